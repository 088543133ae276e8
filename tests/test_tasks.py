"""Tasks beyond instruction tuning: every method in all of them, on tiny models; and one for real."""

import importlib.util
import itertools
import json
import math
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from rich.console import Console
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import inlay
from inlay.cli import main
from inlay.methods import METHODS
from inlay.workbench import builtin, kinds, prepare, recipe, train
from inlay.workbench.recipe import Recipe
from inlay.workbench.result import Result
from inlay.workbench.tasks import TASKS
from inlay.workbench.tasks import classification as cls

SILENT = Console(quiet=True)
METHOD_NAMES = [method.name for method in METHODS]
WIDTH = {"max_length": 48, "eval_size": 4, "batch_size": 4, "dtype": "float32", "samples": 1, "learning_rate": 1e-3}
PREFERENCES = [
    {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No, I will not say {i}."} for i in range(20)
]
DATA = {
    "classification": [{"sentence": f"{w} number {i}", "label": int(w == "good")}
                       for i in range(12) for w in ("good", "bad")],
    "seq2seq": [{"document": f"The number of the day is {i}, they say.", "summary": f"Number {i}."} for i in range(24)],
    "language_modelling": [{"text": f"Line {i} of a text about nothing at all, or about {i}."} for i in range(120)],
    "preference": PREFERENCES,
}  # fmt: skip


@pytest.fixture(scope="module")
def models_of(tmp_path_factory, tiny) -> dict[str, str]:
    """A tiny model for each task: a BERT without a head, as encoders are published, a T5, and the shared Llama."""
    tokenizer, folder = builtin.load_tokenizer(), tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    for name, model in (("bert", BertModel(bert)), ("t5", T5ForConditionalGeneration(t5))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    causal = dict.fromkeys(("language_modelling", "preference"), tiny)
    return {"classification": str(folder / "bert"), "seq2seq": str(folder / "t5"), **causal}


@pytest.fixture(scope="module")
def data_of(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("task-data")
    for task, rows in DATA.items():
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {task: str(folder / f"{task}.jsonl") for task in DATA}


def values(task: str, models_of, data_of, **more) -> dict:
    return {"task": task, "model": models_of[task], "data": data_of[task], **WIDTH, **more}


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these tiny models' weights it is large
@pytest.mark.parametrize("task", DATA)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_takes_steps_in_every_task(task, method, models_of, data_of, tmp_path):
    """Two steps change what is trained, and nothing else; the start is the base's."""
    size = {"bond": 4} if method == "dota" else {"r": 4}
    asked = Recipe(
        **values(task, models_of, data_of, method=method, args=size, steps=2, save_every=0, output=str(tmp_path))
    )
    of, (tokenizer, rows) = TASKS[task], examples(asked)
    base = prepare.load(asked, torch.float32, tmp_path, SILENT, **of.model_settings(rows))
    before = {name: p.clone() for name, p in base.named_parameters()}
    trainer = train.build(asked, base, tokenizer, rows, tmp_path)
    start = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], p) for name, p in start.items())
    kept = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in after.items()}
    same = [name for name, p in before.items() if name in kept and torch.equal(kept[name], p)]
    assert len(same) >= len(before) - 2  # the head, which is trained whole, stands elsewhere


def examples(asked: Recipe):
    tokenizer = TASKS[asked.task].processor(asked)
    return tokenizer, TASKS[asked.task].examples(asked, tokenizer, SILENT)
