"""Comparisons of all tasks: the figure of the task itself beside the loss, and no forgetting without plain text."""

import csv
import json
import statistics

import pytest
import torch
import yaml
from rich.console import Console
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from inlay.experiments import trial
from inlay.experiments.compare.compare import compare
from inlay.experiments.compare.spec import load_comparison
from inlay.experiments.runner import Runner

DATA = {
    "classification": [{"sentence": f"{w} number {i}", "label": w} for i in range(12) for w in ("good", "bad")],
    "language_modelling": [{"text": f"Line {i} of a text about nothing at all, or about {i}."} for i in range(120)],
    "preference": [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No, not {i}."} for i in range(24)],
    "kto": [{"prompt": f"Say {i}.", "completion": f"It is {i}.", "label": bool(i % 2)} for i in range(24)],
    "reward": [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No, not {i}."} for i in range(24)],
    "grpo": [{"prompt": f"Say {i}."} for i in range(24)],
    "seq2seq": [{"document": f"The number of the day is {i}, they say.", "summary": f"No {i}."} for i in range(24)],
}
FIGURES = {"classification": "accuracy", "language_modelling": "perplexity", "preference": "rewards/accuracies",
           "kto": "rewards/margins", "reward": "accuracy", "grpo": "reward"}  # fmt: skip
MORE = {"grpo": {"reward": [{"format": "e"}], "num_generations": 2, "max_new_tokens": 4}}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny, small_tokenizer) -> dict[str, str]:
    folder, size, pad = tmp_path_factory.mktemp("models"), len(small_tokenizer), small_tokenizer.pad_token_id
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                      num_attention_heads=2, max_position_embeddings=64, pad_token_id=pad)  # fmt: skip
    t5 = T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=pad,
                  eos_token_id=small_tokenizer.eos_token_id, decoder_start_token_id=pad)  # fmt: skip
    made = {"classification": BertModel(bert), "seq2seq": T5ForConditionalGeneration(t5)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        small_tokenizer.save_pretrained(folder / name)
    return {task: str(folder / task) if task in made else tiny for task in DATA}


@pytest.mark.parametrize(
    "task", ["classification", *(pytest.param(t, marks=pytest.mark.slow) for t in DATA if t != "classification")]
)
def test_methods_are_compared_by_the_tasks_own_figure(task, models, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "wait", lambda self, folder, bar: trial.run_trial(folder))
    data, path = tmp_path / "data.jsonl", tmp_path / "c.yaml"
    data.write_text("\n".join(map(json.dumps, DATA[task])))
    methods = [{"method": "bone", "args": {"r": 4}}, {"method": "lora", "args": {"r": 2}}]
    block = {"methods": methods, "learning_rates": [1e-2], "seeds": [0, 1], "selection": 4}
    ask = {"task": task, "model": models[task], "data": str(data), "steps": 2, "batch_size": 4, "eval_size": 8,
           "max_length": 80, "dtype": "float32", "compare": block, **MORE.get(task, {})}  # fmt: skip
    path.write_text(yaml.safe_dump(ask))
    folder = compare(str(path), output=str(tmp_path / "out"), console=Console(quiet=True))
    rows = {row["method"]: row for row in csv.DictReader((folder / "results.csv").read_text().splitlines())}
    runs = [json.loads(p.read_text()) for p in sorted(folder.rglob("bone/*-final/result.json"))]
    assert float(rows["bone"]["loss"]) == pytest.approx(statistics.fmean(r["after"] for r in runs))
    assert [r.get("metric_name") for r in runs] == [FIGURES.get(task)] * 2
    page = (folder / "report.html").read_text()
    if task in FIGURES:
        assert float(rows["bone"]["metric"]) == pytest.approx(statistics.fmean(r["metric"] for r in runs))
        assert f"<button>{FIGURES[task]}</button>" in page
    else:
        assert "metric" not in rows["bone"]
    causal = task in ("language_modelling", "preference", "kto", "grpo")  # only these have a loss over plain text
    assert all((r["forgetting"] is not None) is causal for r in runs)
    assert ("<button>forgetting</button>" in page) is causal
    assert (folder / "plots" / "forgetting.png").exists() is causal


def test_a_budget_counts_the_head_of_a_classifier(models, tmp_path, monkeypatch):
    """Bert's six weights of one layer and its pooler at r, and the head, which is trained whole."""
    monkeypatch.setattr(Runner, "wait", lambda self, folder, bar: trial.run_trial(folder))
    data, path = tmp_path / "data.jsonl", tmp_path / "c.yaml"
    data.write_text("\n".join(map(json.dumps, DATA["classification"])))
    block = {
        "methods": ["lora"],
        "learning_rates": [1e-2],
        "seeds": [0],
        "selection": 4,
        "budget": {"parameters": 2000},
    }
    ask = {"task": "classification", "model": models["classification"], "data": str(data), "steps": 1, "batch_size": 4,
           "eval_size": 4, "max_length": 48, "dtype": "float32", "compare": block}  # fmt: skip
    path.write_text(yaml.safe_dump(ask))
    folder = compare(str(path), output=str(tmp_path / "out"), console=Console(quiet=True))
    (row,) = csv.DictReader((folder / "results.csv").read_text().splitlines())
    of_rank = 5 * (32 + 32) + 2 * (32 + 64)
    head = 2 * 32 + 2
    assert row["size"] == f"r={(2000 - head) // of_rank}"
    assert float(row["parameters"]) == (2000 - head) // of_rank * of_rank + head


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"task": "vision", "data": "a.jsonl"}, "task: vision is for single runs"),
        (
            {"task": "classification", "data": "a.jsonl", "compare": {"budget": {"memory": 3}}},
            "budget: memory is not predicted for task classification",
        ),
    ],
)
def test_what_a_task_cannot_is_refused(values, says, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=says):
        load_comparison(str(tmp_path / "c.yaml"))
