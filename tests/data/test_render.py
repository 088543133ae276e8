"""Rendering: conversations whole or turn by turn, token by token as each answer would be alone."""

import copy
import re
from importlib.resources import files

import pytest
from datasets import Dataset

from inlay.data.chat_templates import mentions, templated, training_template
from inlay.data.chats import chat_cell, conversation, turn_by_turn
from inlay.data.render import IGNORED, as_plain_text, decoded, encode_example, render, sequences
from inlay.training.examples import token_dataset

SPECIAL = r"<\|[^|'\"{}\s]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>"
MARKED = (  # it puts a hint before the last user's message, so that no prefix is stable
    "{% for message in messages %}"
    "{% if message.role == 'user' and loop.revindex == (1 if add_generation_prompt else 2) %}{{ 'hint\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_MARKS = re.sub(r"{%-? (end)?generation %}", "", MARKED)


@pytest.fixture(scope="module")
def of_family(real_tokenizer):
    """The built-in tokenizer with the chat template of a family of models, whose marks are tokens of it."""

    def of_family(name):
        tokenizer = copy.deepcopy(real_tokenizer)
        template = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
        if marks := sorted(set(re.findall(SPECIAL, template))):
            tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.chat_template = template
        return tokenizer

    return of_family


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def chat(turns, **answer):
    made = []
    for i in range(turns):
        made += [
            {"role": "user", "content": f"question {i}?"},
            {"role": "assistant", "content": f"It is {i}.", **answer},
        ]
    return made


def learned(example, tokenizer):
    """The texts of the spans that are learned."""
    one = encode_example(example, tokenizer)
    return [decoded(one.ids[start:stop], tokenizer) for start, stop in one.spans]


def alone(example, tokenizer):
    """The texts that are learned turn by turn."""
    return [text for part in turn_by_turn(example) for text in learned(part, tokenizer)]


STABLE = ["smollm", "qwen2_5", "llama3", "gemma", "deepseekv3", "cohere"]


@pytest.mark.parametrize("family", [*STABLE, "qwen3", "phi3", "glm4moe"])
def test_a_chat_of_twenty_turns_is_one_sequence(family, of_family, real_tokenizer):
    """Of at most 1.05 times the tokens of one pass, with all answers in it, each as it is alone."""
    tokenizer = real_tokenizer if family == "smollm" else of_family(family)
    example = conversation(chat(20))
    (part,) = sequences(example, tokenizer)
    one = render(part, tokenizer, None)
    # Qwen 3's own template has the empty thought before the last answer only, which it would then learn once.
    template = training_template(tokenizer) if family == "qwen3" else None
    once = templated(tokenizer, example["prompt"] + example["completion"], chat_template=template, return_dict=True)
    assert one.length <= 1.05 * len(once["input_ids"])
    assert part == example
    ends = [re.sub(r"(<\|endoftext\|>|<\|im_end\|>|\s)+$", "", text) for text in learned(part, tokenizer)]
    assert ends == [re.sub(r"(<\|endoftext\|>|<\|im_end\|>|\s)+$", "", text) for text in alone(example, tokenizer)]
    assert all(f"It is {i}." in text for i, text in enumerate(learned(part, tokenizer)))


@pytest.mark.parametrize("family", STABLE)
def test_a_whole_chat_is_learned_token_by_token_as_turn_by_turn(family, of_family, real_tokenizer):
    tokenizer = real_tokenizer if family == "smollm" else of_family(family)
    example = conversation([{"role": "user", "content": "hi"}, *chat(3)[1:]])
    whole = encode_example(example, tokenizer)
    for part, (start, stop) in zip(turn_by_turn(example), whole.spans, strict=True):
        one = encode_example(part, tokenizer)
        assert (one.ids, one.spans) == (whole.ids[:stop], [(start, stop)])


def test_only_answers_that_are_to_be_learned_have_labels(real_tokenizer):
    turns = chat(3)
    turns[1]["weight"] = 0
    example = conversation([*turns, {"role": "user", "content": "and then?"}])
    one = render(example, real_tokenizer, None)
    assert re.findall("⟦(.*?)⟧", one.marked(real_tokenizer)) == ["It is 1.<|im_end|>", "It is 2.<|im_end|>"]
    assert "It is 0." in one.marked(real_tokenizer)
    assert "and then?" not in one.marked(real_tokenizer)
    assert [a for a, b in zip(one.ids, one.labels, strict=True) if b != IGNORED] == one.answer_ids
    last = render(conversation(turns, last=True), real_tokenizer, None)
    assert re.findall("⟦(.*?)⟧", last.marked(real_tokenizer)) == ["It is 2.<|im_end|>"]


def test_what_the_template_rewrites_is_learned_turn_by_turn(real_tokenizer):
    tokenizer = with_template(real_tokenizer, NO_MARKS)
    example = conversation(chat(3))
    assert sequences(example, tokenizer) == turn_by_turn(example)
    with pytest.raises(ValueError, match="learned turn by turn"):
        render(example, tokenizer, None)
    tokenizer.chat_template = None
    assert sequences(example, tokenizer) == turn_by_turn(example)


def test_a_template_that_marks_its_answers_takes_them_in_one_sequence(real_tokenizer):
    tokenizer = with_template(real_tokenizer, MARKED)
    example = conversation(chat(3))
    assert sequences(example, tokenizer) == [example]
    assert learned(example, tokenizer) == [f"It is {i}.<|im_end|>\n" for i in range(3)] == alone(example, tokenizer)
    loses = with_template(real_tokenizer, MARKED.replace("{{ message.content + '<|im_end|>\n' }}{% endg",
                          "{{ (message.content if loop.last else '') + '<|im_end|>\n' }}{% endg"))  # fmt: skip
    assert loses.chat_template != MARKED
    assert sequences(example, loses) == turn_by_turn(example)


def test_reasoning_is_learned_in_each_turn_of_one_sequence(of_family):
    """In the template that trl has for training Qwen 3, whose own drops it from earlier turns."""
    tokenizer = of_family("qwen3")
    example = conversation(chat(3, reasoning_content="let me see"))
    (part,) = sequences(example, tokenizer)
    assert encode_example(part, tokenizer).trained
    wanted = [f"<think>\nlet me see\n</think>\n\nIt is {i}.<|im_end|>\n" for i in range(3)]
    assert learned(part, tokenizer) == wanted == alone(example, tokenizer)
    assert training_template(tokenizer) != tokenizer.chat_template


def test_reasoning_goes_by_the_name_that_the_template_knows(of_family):
    tokenizer = of_family("qwen3")
    texts = [learned(conversation(chat(1, **{key: "let me see"})), tokenizer) for key in ("thinking", "reasoning")]
    assert texts == [learned(conversation(chat(1, reasoning_content="let me see")), tokenizer)] * 2
    assert "let me see" in texts[0][0]


def test_tools_calls_and_their_answers_are_rendered(of_family):
    tokenizer = of_family("qwen2_5")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "content": "It is 4."},
    ]
    one = render(conversation(turns, tools=tools), tokenizer, None)
    before, called, answered, said, _ = re.split("[⟦⟧]", one.marked(tokenizer))
    assert '"name": "add", "parameters"' in before
    assert called == '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    assert "four" in answered
    assert said == "It is 4.<|im_end|>"
    texts = with_template(tokenizer, "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
                          "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}")  # fmt: skip
    assert 'add{"a": 2}' in templated(texts, turns, tokenize=False)


def test_a_developer_is_the_system_where_the_template_knows_no_other(real_tokenizer, of_family):
    turns = [{"role": "developer", "content": "Be brief."}, *chat(1)]
    assert templated(real_tokenizer, turns, tokenize=False).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    both = [{"role": "system", "content": "Be good."}, *turns]
    assert templated(real_tokenizer, both, tokenize=False).startswith("<|im_start|>system\nBe good.\n\nBe brief.<|im_")
    knows = of_family("gptoss")
    assert mentions(knows.chat_template, "developer")
    assert "Be brief." in templated(knows, turns, tokenize=False)


ASK, SAY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
RULE = {"role": "system", "content": "Be brief."}
SEVERAL = [
    [ASK, SAY, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "It is so."}],
    [RULE, ASK, {"role": "assistant", "content": "  four, i.e. 2 + 2 = 4 " * 4}],
    [{"role": "user", "content": "long " * 40}, SAY],
]


@pytest.fixture(scope="module")
def prepared(real_tokenizer, tmp_path_factory):
    """What SFTTrainer makes of a data set with a tokenizer: a list of (input_ids, labels)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(real_tokenizer), **sizes))
    folder = str(tmp_path_factory.mktemp("trainer"))

    def prepared(rows, tokenizer, max_length):
        arguments = SFTConfig(output_dir=folder, max_length=max_length, report_to="none", use_cpu=True, bf16=False)
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

    return prepared


@pytest.mark.parametrize("max_length", [None, 48])
@pytest.mark.parametrize("kind", ["template", "plain", "text"])
def test_a_turn_has_the_tokens_that_trl_makes_of_it(kind, max_length, real_tokenizer, prepared):
    """And trl leaves the tokens that it is given as they are."""
    tokenizer = real_tokenizer if kind == "template" else with_template(real_tokenizer, None)
    rows = [part for one in SEVERAL for part in turn_by_turn(conversation(one))]
    rows = rows if kind != "text" else [{"text": "Once upon a time. " * n} for n in (1, 20)]
    given = rows if kind == "template" else [as_plain_text(row) for row in rows]
    shown = [render(row, tokenizer, max_length) for row in rows]
    expected = [(one.ids, one.labels) for one in shown if one.answer_ids]
    assert prepared(Dataset.from_list(given), tokenizer, max_length) == expected
    assert prepared(token_dataset(rows, tokenizer), tokenizer, max_length) == expected
    assert shown == [render(row, tokenizer, max_length) for row in given]


def test_render_marks_the_answer(real_tokenizer):
    row = conversation([RULE, ASK, SAY])
    one = render(row, real_tokenizer, None)
    assert one.marked(real_tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        "⟦4<|im_end|>⟧"
    )
    assert decoded(one.answer_ids, real_tokenizer) == "4<|im_end|>\n"
    assert (one.length, one.cut, one.shifted) == (len(one.prompt_ids) + len(one.answer_ids), 0, False)
    short = render(row, real_tokenizer, one.length - 2)
    assert (decoded(short.answer_ids, real_tokenizer), short.cut, short.length) == ("4", 2, one.length)
    nothing = render(row, real_tokenizer, 5)
    assert (nothing.answer_ids, nothing.cut, len(nothing.prompt_ids)) == ([], 3, 5)
    plain = render(row, with_template(real_tokenizer, None), None)
    assert plain.marked(real_tokenizer) == "Be brief.\n\n### Instruction:\n2 + 2?\n\n### Response:\n⟦4<|im_end|>⟧"


def test_render_says_when_the_answer_shifts_the_prompt(real_tokenizer):
    row = {"prompt": [ASK], "completion": [{"role": "assistant", "content": "\n\n4"}]}
    assert render(row, real_tokenizer, None).shifted
    assert not render(conversation(chat_cell([ASK, row["completion"][0]], "x")), real_tokenizer, None).shifted


def test_render_passes_on_what_a_template_refuses(real_tokenizer):
    strict = with_template(real_tokenizer, "{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="does not take this example: no system role"):
        render(conversation([ASK, SAY]), strict, None)


def test_text_begins_and_ends_once(real_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(real_tokenizer)
    first, end = tokenizer.bos_token, tokenizer.eos_token
    special = [(first, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first} $A {end}",
                                                                    special_tokens=special)  # fmt: skip
    for text in ("once", f"{first}once", f"once{end}", f"{first}once{end}\n"):
        ids = render({"text": text}, tokenizer, None).ids
        assert ids[0] == tokenizer.bos_token_id != ids[1]
        assert ids.count(tokenizer.eos_token_id) == 1
