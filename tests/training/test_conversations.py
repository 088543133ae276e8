"""What is learned is what the record says: decoded from the trainer's own batches, for conversations in all forms."""

import copy
import json
from collections import Counter
from importlib.resources import files

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from inlay.data.audit import audit_examples
from inlay.data.formats import convert_records
from inlay.data.render import IGNORED
from inlay.models.adapters import Adapter
from inlay.recipe.recipe import Recipe
from inlay.training.examples import load_examples, token_dataset, training_set
from inlay.training.train import train
from inlay.training.trainer import Trainer

SILENT = Console(quiet=True)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(real_tokenizer):
    """The built-in tokenizer with a chat template that shows tools and their calls."""
    tokenizer = copy.deepcopy(real_tokenizer)
    tokenizer.chat_template = files("trl").joinpath("chat_templates", "qwen2_5.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="module")
def batches(tokenizer, tmp_path_factory):
    """The batches that a trainer makes of examples: pairs of token ids and labels, and how many tokens they are."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    arguments = {"output_dir": str(tmp_path_factory.mktemp("run")), "report_to": "none", "use_cpu": True, "bf16": False}

    def batches(rows: Dataset):
        config = SFTConfig(**arguments, max_length=4096, per_device_train_batch_size=3)
        trainer = Trainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
        made = list(trainer.get_train_dataloader())
        pairs = [pair for batch in made for pair in zip(batch["input_ids"], batch["labels"], strict=True)]
        return pairs, sum(int(batch["attention_mask"].sum()) for batch in made)

    return batches


def learned(pairs, tokenizer) -> Counter:
    """The texts that have labels, without whitespace, each as often as it has."""
    found: Counter = Counter()
    for ids, labels in pairs:
        span: list[int] = []
        for token, label in zip([*ids.tolist(), 0], [*labels.tolist(), IGNORED], strict=True):
            if label != IGNORED:
                span.append(token)
            elif span:
                found[squeezed(tokenizer.decode(span, clean_up_tokenization_spaces=False))] += 1
                span = []
    return found


def squeezed(text: str) -> str:
    return "".join(text.split())


def said_texts():
    """Texts with something to see in them, and no tokens of the chat template."""
    characters = st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn"])
    return (
        st.text(characters, min_size=1, max_size=12).map(lambda text: f"{text}.").filter(lambda text: "<" not in text)
    )


turns = st.fixed_dictionaries(
    {"ask": said_texts(), "say": said_texts(), "learned": st.booleans(), "call": st.booleans(), "result": said_texts()}
)
conversations = st.lists(turns, min_size=1, max_size=3).filter(lambda made: any(turn["learned"] for turn in made))


def openai(made, parts=False, text=False):
    """A conversation as OpenAI has it; contents in parts, or all of it as JSON, if so asked."""
    chat = []
    for turn in made:
        switch = {} if turn["learned"] else {"weight": 0}
        chat.append({"role": "user", "content": turn["ask"]})
        if turn["call"]:
            function = {"name": "add", "arguments": json.dumps({"x": turn["ask"]})}
            call = {"id": "c1", "type": "function", "function": function}
            chat.append({"role": "assistant", "content": None, "tool_calls": [call], **switch})
            chat.append({"role": "tool", "content": turn["result"]})
        chat.append({"role": "assistant", "content": turn["say"], **switch})
    if parts:
        chat = [m | {"content": [{"type": "text", "text": m["content"]}]} if m["content"] else m for m in chat]
    return {"messages": json.dumps(chat) if text else chat, "tools": [TOOL]}


def sharegpt(made):
    """A conversation as ShareGPT has it."""
    chat = []
    for turn in made:
        switch = {} if turn["learned"] else {"train": False}
        chat.append({"from": "human", "value": turn["ask"]})
        if turn["call"]:
            value = json.dumps({"name": "add", "arguments": {"x": turn["ask"]}})
            chat.append({"from": "function_call", "value": value, **switch})
            chat.append({"from": "observation", "value": turn["result"]})
        chat.append({"from": "gpt", "value": turn["say"], **switch})
    return {"conversations": chat, "system": "Be brief.", "tools": json.dumps([TOOL["function"]])}


FORMS = {
    "OpenAI": openai,
    "OpenAI, in parts": lambda made: openai(made, parts=True),
    "OpenAI, as JSON": lambda made: openai(made, text=True),
    "ShareGPT": sharegpt,
}


def wanted(made) -> Counter:
    """What a record says is to be learned."""
    found: Counter = Counter()
    for turn in made:
        if turn["learned"]:
            found[squeezed(f"{turn['say']}<|im_end|>")] += 1
        if turn["learned"] and turn["call"]:
            call = json.dumps({"name": "add", "arguments": {"x": turn["ask"]}}, ensure_ascii=False)
            found[squeezed(f"<tool_call>{call}</tool_call><|im_end|>")] += 1
    return found


@pytest.mark.parametrize("form", FORMS)
@given(made=st.lists(conversations, min_size=1, max_size=4))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_learned_of_a_chat_is_what_the_record_says(form, made, batches, tokenizer):
    records = [FORMS[form](one) for one in made]
    audit = audit_examples(convert_records(records), tokenizer, None)
    pairs, _ = batches(token_dataset(audit.sequences, tokenizer))
    assert learned(pairs, tokenizer) == sum(map(wanted, made), Counter())
    assert len(pairs) == len(made)  # one sequence each


PAIRS = {
    "prompt-completion": lambda ask, say: {"prompt": ask, "completion": say},
    "prompt-completion, of messages": lambda ask, say: {
        "prompt": [{"role": "user", "content": ask}],
        "completion": [{"role": "assistant", "content": say}],
    },
    "question-answer": lambda ask, say: {"question": ask, "answer": say},
    "instruction": lambda ask, say: {"instruction": ask, "input": "", "output": say},
    "E2E": lambda ask, say: {"mr": ask, "ref": say},
}


@given(
    form=st.sampled_from(sorted(PAIRS)), made=st.lists(st.tuples(said_texts(), said_texts()), min_size=1, max_size=4)
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_learned_of_a_pair_is_its_answer(form, made, batches, tokenizer):
    rows = convert_records([PAIRS[form](ask, say) for ask, say in made])
    pairs, _ = batches(token_dataset(rows, tokenizer))
    assert learned(pairs, tokenizer) == Counter(squeezed(f"{say}<|im_end|>") for _, say in made)


def test_twenty_turns_cost_one_pass(batches, tokenizer):
    turn = [
        {"role": "user", "content": "And what is next, then?"},
        {"role": "assistant", "content": "The one after it."},
    ]
    rows = convert_records([{"messages": turn * 20}] * 3)
    pairs, count = batches(token_dataset(audit_examples(rows, tokenizer, None).sequences, tokenizer))
    once = tokenizer.apply_chat_template(turn * 20, return_dict=True)["input_ids"]
    assert count <= 1.05 * 3 * len(once)
    assert sum(learned(pairs, tokenizer).values()) == 60


def test_a_stream_of_chats_is_learned_as_the_file_is(tokenizer, tmp_path):
    """Some of which have tools, and calls with other arguments."""
    made = [
        [{"ask": f"{i}?", "say": f"{i}!", "learned": True, "call": i % 3 == 0, "result": "x"}] * (1 + i % 3)
        for i in range(30)
    ]
    rows = [openai(one) | ({} if i % 3 == 0 else {"tools": None}) for i, one in enumerate(made)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(data=str(tmp_path / "chats.jsonl"), streaming=True, steps=1, eval_size=4)
    streamed = load_examples(recipe, tokenizer, SILENT)
    whole = audit_examples(convert_records(rows), tokenizer, None).sequences
    assert (streamed.heldout, streamed.train) == (whole[:4], whole[4:])
    assert list(training_set(streamed, tokenizer)) == list(token_dataset(whole[4:], tokenizer))


def test_a_chat_template_of_ones_own_stays_with_the_adapter(tiny, records, tmp_path):
    """So that what is generated begins as what was learned; and the tokenizer is there for other programs."""
    own = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    (tmp_path / "own.jinja").write_text(own)
    recipe = Recipe(model=tiny, data=records, chat_template=str(tmp_path / "own.jinja"), output=str(tmp_path / "run"),
                    dtype="float32", steps=1, samples=0, save_every=0)  # fmt: skip
    train(recipe, SILENT)
    (tmp_path / "own.jinja").unlink()
    _, tokenizer = Adapter.open(tmp_path / "run" / "adapter").load()
    assert tokenizer.chat_template == own
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == own
