"""The tokenizer of a run: what it lacks, and what the model has no room for, is said before anything is loaded."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from inlay.recipe.recipe import Recipe
from inlay.training.examples import load_examples
from inlay.training.run_tokenizer import answer_ends, learned_positions, run_tokenizer
from inlay.training.tasks import TASKS

SILENT = Console(quiet=True)


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model's folder, with values of its tokenizer's configuration changed."""

    def model(name="model", **changes):
        folder = shutil.copytree(tiny, tmp_path / name)
        file = folder / "tokenizer_config.json"
        about = json.loads(file.read_text())
        file.write_text(json.dumps({**about, **changes}))
        return str(folder)

    return model


@pytest.fixture
def rows(tmp_path):
    def rows(*records, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
        return str(tmp_path / name)

    return rows


def fault(function, *arguments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the message
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(recipe):
    return TASKS[recipe.task].examples(recipe, run_tokenizer(recipe), SILENT)


def test_a_tokenizer_without_an_end_is_refused(model, records):
    folder = model(eos_token=None)
    assert "has no end token, so no answer could be learned to end" in fault(
        run_tokenizer, Recipe(model=folder, data=records)
    )
    assert run_tokenizer(Recipe(model=folder, task="language_modelling", data="x.txt")).pad_token
    given = Recipe(model=folder, data=records, trainer={"eos_token": "<|im_end|>"})
    assert run_tokenizer(given).eos_token == "<|im_end|>"
    given.trainer["eos_token"] = "<|no|>"
    assert "eos_token '<|no|>' is not a token" in fault(run_tokenizer, given)


def test_a_tokenizer_longer_than_the_embedding(tiny, tmp_path, rows):
    """Is refused where the data, or the padding, has a token of those that are too many."""
    folder = shutil.copytree(tiny, tmp_path / "longer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<color>"])
    tokenizer.save_pretrained(folder)
    plain = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(10)]
    load(Recipe(model=str(folder), data=rows(*plain)))
    colored = rows(*plain, {"prompt": "which <color>?", "completion": "red"}, name="colored.jsonl")
    message = fault(load, Recipe(model=str(folder), data=colored))
    assert f"has {size + 1:,} tokens, its embedding {size:,} rows and none for '<color>'; resize it" in message
    pairs = rows(*({**row, "chosen": "<color>", "rejected": "x"} for row in plain), name="pairs.jsonl")
    assert "none for '<color>'" in fault(load, Recipe(model=str(folder), data=pairs, task="preference"))
    labels = rows(*({"text": f"<color> {i}", "label": i % 2} for i in range(10)), name="labels.jsonl")
    assert "none for '<color>'" in fault(load, Recipe(model=str(folder), data=labels, task="classification"))
    tokenizer.pad_token = "<color>"
    tokenizer.save_pretrained(folder)
    assert "none for '<color>'" in fault(load, Recipe(model=str(folder), data=rows(*plain)))


def test_learned_positions_bound_the_length(small_tokenizer, tmp_path, rows, tiny):
    sizes = {"vocab_size": len(small_tokenizer)}
    opt = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64, **sizes)),
        "opt": OPTForCausalLM(OPTConfig(max_position_embeddings=64, **opt, **sizes)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        small_tokenizer.save_pretrained(tmp_path / name)
        long = rows(*({"prompt": f"question {i}", "completion": "yes " * 200} for i in range(10)))
        message = fault(load, Recipe(model=str(tmp_path / name), data=long, max_length=128))
        assert "has 64 learned positions, and a row may have 128 tokens; --max-length 64 cuts" in message
        short = rows(*({"prompt": f"question {i}", "completion": "yes"} for i in range(10)))
        load(Recipe(model=str(tmp_path / name), data=short, max_length=128))
    text = rows(*({"text": f"line {i} of a text that goes on"} for i in range(200)), name="text.jsonl")
    blocks = Recipe(model=str(tmp_path / "gpt2"), data=text, task="language_modelling", max_length=128)
    assert "has 64 learned positions, and a row may have 128 tokens" in fault(load, blocks)
    bert = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    RobertaModel(RobertaConfig(max_position_embeddings=66, **bert, **sizes)).save_pretrained(tmp_path / "roberta")
    asked = Recipe(model=str(tmp_path / "roberta"), data="x.csv", task="classification")
    assert learned_positions(asked) == 64  # two are before the first
    assert learned_positions(Recipe(model=tiny)) is None


def test_a_chat_template_of_ones_own(model, rows, tmp_path):
    folder = model()
    (Path(folder) / "chat_template.jinja").unlink()
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}" \
          "<assistant>{% endif %}{{ '!' if loud }}"  # fmt: skip
    (tmp_path / "own.jinja").write_text(own)
    data = rows(*({"prompt": f"question {i}", "completion": "yes"} for i in range(10)))
    recipe = Recipe(model=folder, data=data, chat_template=str(tmp_path / "own.jinja"))
    tokenizer = run_tokenizer(recipe)
    made = load(recipe)
    assert "<assistant>⟦yes<|im_end|>⟧" in TASKS["instruction"].shown(made.train[0], tokenizer, recipe)
    recipe.chat_template_kwargs = {"loud": True}
    assert "yes<|im_end|>!" in TASKS["instruction"].shown(load(recipe).train[0], run_tokenizer(recipe), recipe)
    recipe.chat_template_kwargs = {"lout": True}
    assert "the chat template reads no 'lout'" in fault(run_tokenizer, recipe)
    recipe.chat_template_kwargs = {"tokenize": True}
    assert "tokenize is not the chat template's to know" in fault(run_tokenizer, recipe)
    for name, why in (("none.jinja", "is no file"), ("training", "trl has none"), (str(tmp_path), "is no file")):
        assert why in fault(run_tokenizer, Recipe(model=folder, data=data, chat_template=name))
    (tmp_path / "empty.jinja").write_text(" ")
    assert "accepted: 1 to" in fault(run_tokenizer, Recipe(model=folder, chat_template=str(tmp_path / "empty.jinja")))


@pytest.mark.parametrize(
    "key", ["completion_only_loss", "assistant_only_loss", "chat_template_path", "truncation_mode"]
)
def test_what_trl_would_do_to_text_has_no_effect_on_tokens_and_is_refused(key):
    assert f"trainer: {key} has no effect" in fault(lambda: Recipe(trainer={key: False}))
    assert f"trainer: {key}" in fault(lambda: Recipe(trainer={key: False}, task="preference", data="x.jsonl"))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"answers": "last", "task": "preference"}, "answers is for task instruction, not preference"),
        ({"chat_template": "x.jinja", "task": "seq2seq"}, "chat_template is for task instruction or preference"),
        ({"chat_template_kwargs": {"x": 1}, "task": "vision"}, "chat_template_kwargs is for task instruction or"),
    ],
)
def test_what_is_said_of_conversations_where_there_are_none(values, why):
    assert why in fault(lambda: Recipe(data="x.jsonl", **values))


def test_answers_end_where_the_model_stops(tiny):
    assert answer_ends(Recipe(model=tiny)) == {AutoTokenizer.from_pretrained(tiny).eos_token_id}


def test_pairs_without_room_for_an_answer_are_counted(tiny, rows):
    long = [{"prompt": "word " * (60 if i % 2 else 2) + str(i), "chosen": "yes", "rejected": "no"} for i in range(20)]
    recipe = Recipe(model=tiny, data=rows(*long), task="preference", max_length=64, eval_size=6)
    console = Console(record=True, width=200, file=io.StringIO())
    made = TASKS["preference"].examples(recipe, run_tokenizer(recipe), console)
    said = console.export_text()
    assert f"{14 - len(made.train)} of 14 examples are left out: their prompt alone fills max_length=64" in said
    assert (made.eval_size, len(made.train) + len(made.heldout)) == (6, 10)
    recipe = Recipe(model=tiny, data=rows(*long[1::2]), task="preference", max_length=64)
    assert "no example fits: their prompt alone fills max_length=64; raise it" in fault(load, recipe)


def test_held_out_chats_are_counted_as_conversations(tiny, rows):
    """So that a run that goes on holds out the same, though they are learned turn by turn."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, turns[1], *turns]} for i in range(10)]
    recipe = Recipe(model=tiny, data=rows(*chats), eval_size=3)
    tokenizer = run_tokenizer(recipe)
    tokenizer.chat_template = None
    made = load_examples(recipe, tokenizer, SILENT)
    assert (len(made.train), len(made.heldout), made.eval_size) == (14, 6, 3)
