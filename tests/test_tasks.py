"""Tasks beyond instruction tuning: every method in all of them, on tiny models; and one for real."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, get_peft_model
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

from inlay.cli import main
from inlay.host.layer import InlayLinear
from inlay.methods import METHODS
from inlay.workbench import builtin, checkpoints, prepare, train
from inlay.workbench.recipe import Recipe
from inlay.workbench.tasks import TASKS

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
def test_every_method_learns_in_every_task(task, models_of, data_of, tmp_path):
    """By the task's own loss on one batch: the adapter starts where the base is, two steps lower it, W stays."""
    asked = [made(m, values(task, models_of, data_of, steps=2, save_every=0)) for m in METHOD_NAMES]
    tokenizer, rows = examples(asked[0])
    base = prepare.load(asked[0], torch.float32, tmp_path, SILENT, **TASKS[task].model_settings(rows))
    before, losses = copy.deepcopy(base.state_dict()), []
    trainer = train.build(asked[0], base, tokenizer, rows, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for one in asked:
        base = trainer.model.unload()  # with what trl changed of it
        base.load_state_dict(before)  # the head is trained whole
        trainer.model = model = get_peft_model(base, one.adapter())
        model.eval()  # without dropout
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        steps = []
        for _ in range(3):
            loss = trainer.compute_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        assert steps[-1] < steps[0], one.method
        losses.append(steps[0])
        layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, InlayLinear)}
        assert layers
        assert all(torch.equal(m.base_layer.weight, before[f"{n}.weight"]) for n, m in layers.items()), one.method
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-5)


def made(method: str, of: dict) -> Recipe:
    return Recipe(**of, method=method, args={"bond": 4} if method == "dota" else {"r": 4})


def examples(asked: Recipe):
    tokenizer = TASKS[asked.task].processor(asked)
    return tokenizer, TASKS[asked.task].examples(asked, tokenizer, SILENT)


# -- runs -------------------------------------------------------------------------------------------------------------


def command(task: str, models_of, data_of, output: Path, *more: str) -> list[str]:
    flags = {"task": task, "model": models_of[task], "data": data_of[task], "output": str(output), **WIDTH}
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in flags.items()]
    return ["train", *itertools.chain(*pairs), "--method", "pissa", "--r", "4", *more]


AUTOS = {"classification": AutoModelForSequenceClassification, "seq2seq": AutoModelForSeq2SeqLM}


@pytest.mark.parametrize("task", AUTOS)
def test_a_run_is_saved_merged_and_read_without_inlay(task, models_of, data_of, tmp_path, capsys):
    main(command(task, models_of, data_of, tmp_path / "run", "--steps", "3"))
    said = capsys.readouterr().out
    assert task != "classification" or "accuracy:" in said
    main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")])
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4  # the largest difference of logits
    model = AUTOS[task].from_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    if task == "classification":
        assert model.config.id2label == {0: "0", 1: "1"}
        again = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "run" / "adapter"), num_labels=2)
        ids = torch.arange(10)[None]
        assert torch.allclose(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("task", DATA)
def test_a_stopped_run_goes_on_to_the_same_end(task, models_of, data_of, tmp_path, monkeypatch):
    """As one that was left alone: after the second of four steps its process dies."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--steps", "4", "--save-every", "2")
    main(command(task, models_of, data_of, whole, *flags))

    def die(*_):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "rotate", die)
        with pytest.raises(SystemExit):
            main(command(task, models_of, data_of, broken, *flags))
    main(["train", "--resume", str(broken)])
    ends = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, broken)]
    assert ends[0] == ends[1]
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, broken)]
    keep = ("step", "loss", "eval_loss", "tokens", "eval_accuracy")
    assert [{k: r.get(k) for k in keep} for r in rows[0]] == [{k: r.get(k) for k in keep} for r in rows[1]]
