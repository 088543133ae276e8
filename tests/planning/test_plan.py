"""The planner: what it says of a step against real steps, closed formulas and real files; what fits, fits."""

import csv
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli import main
from inlay.data.audit import audit_examples
from inlay.data.render import render
from inlay.methods import HiRA
from inlay.models.base import BaseModel
from inlay.models.sizes import count_parameters, count_trainable, layers_of, repeated_depths
from inlay.planning.planner import FrozenLimit, PlannedRun
from inlay.planning.table import candidates
from inlay.recipe.recipe import Recipe
from inlay.training.batch_size import labelled_share, planned_step
from inlay.training.examples import Examples

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def config(method, **args):
    return inlay.InlayConfig(method=method, args=args, **ALL)


def shapes(folder, **more):
    """A folder with a configuration and no weights."""
    values = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 7, "num_attention_heads": 4}
    LlamaConfig(**{**values, "num_key_value_heads": 2, "vocab_size": 256, **more}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("plan") / "small")


@pytest.fixture(scope="session")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_plan", BENCHMARK)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their names
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def trainable_model(tmp_path_factory):
    """Random, with a vocabulary so small that the logits do not drown everything else."""
    folder = tmp_path_factory.mktemp("plan") / "wide"
    torch.manual_seed(0)
    settings = LlamaConfig(
        hidden_size=384, intermediate_size=1152, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=512, pad_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("bone", {}),
        pytest.param("PEFT LoRA", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("dota", {"checkpointing": True}, marks=pytest.mark.slow),
        ("full", {}),
        pytest.param("pissa", {"quantize": "nf4"}, marks=pytest.mark.slow),
        ("bone", {"labelled": 0.25}),
    ],
)
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_the_peak_is_that_of_a_real_step(benchmark, trainable_model, method, more):
    case = benchmark.Case("wide", method, batch=4, length=192, **more)
    measured, planned = benchmark.measure(case, trainable_model)["peak"], benchmark.predicted(case, trainable_model)
    assert abs(planned - measured) <= 0.15 * measured


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "bat"])
def test_the_peak_of_a_step_on_experts(benchmark, tmp_path, method):
    torch.manual_seed(0)
    settings = transformers.MixtralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, num_local_experts=8, pad_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(settings).save_pretrained(tmp_path)
    case = benchmark.Case("wide", method, batch=4, length=192, experts=True)
    measured, planned = benchmark.measure(case, str(tmp_path))["peak"], benchmark.predicted(case, str(tmp_path))
    assert abs(planned - measured) <= 0.15 * measured


@pytest.mark.parametrize("method", ["lora", "dota", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_layers_say_what_all_of_them_do(small, method, checkpointing):
    run = PlannedRun(BaseModel(small), None if method == "full" else config(method), checkpointing=checkpointing)
    assert [len(layers_of(part)) for part in run.parts] == [2, 3]
    whole = run.follow(run.build(None), 2, 64, 1.0)
    assert asdict(run.step(2, 64)) == pytest.approx(asdict(whole))


@pytest.mark.parametrize("method", ["lora", "dota", "full"])
def test_runs_with_models_in_common_are_planned_as_each_alone(small, method):
    asked = None if method == "full" else config(method)
    alone = [PlannedRun(BaseModel(small), asked, checkpointing=saving).step(2, 64) for saving in (False, True)]
    plain = PlannedRun(BaseModel(small), asked)
    saving = replace(plain, checkpointing=True, like=plain)
    assert saving.parts is plain.parts
    assert [saving.step(2, 64), plain.step(2, 64)] == alone[::-1]


def test_layers_of_two_kinds_are_counted_in_pairs(tmp_path):
    model = BaseModel(shapes(tmp_path / "m", num_hidden_layers=9)).meta(torch.float32)
    model.config.layer_types = ["sliding_attention", "full_attention"] * 4 + ["sliding_attention"]
    assert repeated_depths(model) == (3, 5)
    layers_of(model)[4].mlp = torch.nn.Identity()
    assert repeated_depths(model) is None


def test_layers_that_differ_are_followed_one_by_one(small):
    uneven = inlay.InlayConfig(method="lora", args={"r": 4}, patterns={r"layers\.3\..*": {"r": 8}}, **ALL)
    run = PlannedRun(BaseModel(small), uneven)
    assert len(run.parts) == 1
    assert run.parameters == count_parameters(BaseModel(small), uneven)


@pytest.mark.parametrize("peft", [False, True])
def test_numbers_and_file_are_those_of_the_real_adapter(small, tmp_path, peft):
    asked = LoraConfig(r=4, **ALL) if peft else config("pissa", r=4)
    step = PlannedRun(BaseModel(small), asked).step(1, 8)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(small)), asked)
    assert step.parameters == count_trainable(model)
    model.save_pretrained(tmp_path)
    header = 40_000
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert step.file < size < step.file + header


def test_the_frozen_limit_is_two_products_a_weight(small):
    """And three without checkpointing's second forward pass for what trains whole."""
    batch, length = 2, 32
    tokens, layer = batch * length, 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192
    attention = 2 * 2 * batch * length * length * 64  # two products of all scores
    head = 64 * 256 * batch * (length - 1)
    forward = 7 * (2 * tokens * layer + attention) + 2 * head
    # No gradient is wanted of the first layer's input, which three of its weights read.
    inputs = 7 * 2 * tokens * layer - 2 * tokens * 64 * (64 + 32 + 32) + 7 * 2.5 * attention
    # The head's tile is computed twice.
    backward = inputs + 2 * 2 * head
    asked = inlay.InlayConfig(method=FrozenLimit(), **ALL)
    assert PlannedRun(BaseModel(small), asked).step(batch, length).flops == pytest.approx(forward + backward)
    full = PlannedRun(BaseModel(small), None).step(batch, length).flops
    weights = 7 * 2 * tokens * layer + 2 * head
    assert full == pytest.approx(forward + backward + weights + 2 * tokens * 64 * (64 + 32 + 32))


def test_the_head_is_planned_at_labelled_positions_alone(small):
    run = PlannedRun(BaseModel(small), config("lora"), torch.float32, device="cpu", labelled=0.25)
    some, every = run.step(4, 32), run.step(4, 32, 1.0)
    assert some == run.step(4, 32, 0.25)
    left = 4 * 31 - 4 * 32 / 4  # positions
    assert every.flops - some.flops == 3 * 2 * 64 * 256 * left  # two products and the backward pass's own
    assert every.peak > some.peak
    assert run.largest_batch(32, run.step(70, 32).peak + 1) == 70


def test_the_share_of_labels_that_a_run_is_planned_with(small, small_tokenizer):
    rows = [{"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": "d e f g"}]
    audit = audit_examples(rows, small_tokenizer, 64)
    examples = Examples(audit.sequences, [], audit)
    shown = [render(row, small_tokenizer, 64) for row in rows]
    most, length = max(len(one.answer_ids) for one in shown), max(len(one.ids) for one in shown)
    recipe = Recipe(model=small)
    run, tokens = planned_step(recipe, recipe.base_model, examples, torch.float32)
    assert (run.labelled, tokens) == (most / length, length)
    assert labelled_share(replace(recipe, packing=True), examples, length) == 1
    assert labelled_share(replace(recipe, trainer={"label_smoothing_factor": 0.1}), examples, length) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["bone", "lamda"])
def test_a_frozen_side_keeps_no_input(small, method, dtype):
    """Neither among the saved tensors nor by a closure, which hooks on saved tensors do not see."""
    r, tokens = 4, 64
    floor = PlannedRun(BaseModel(small), inlay.InlayConfig(method=FrozenLimit(), **ALL), dtype).step(1, tokens)
    own = PlannedRun(BaseModel(small), config(method, r=r), dtype).step(1, tokens)
    assert own.activations - floor.activations <= 7 * 7 * r * tokens * dtype.itemsize * 1.1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_largest_batch_fits_and_the_next_does_not(small, device):
    run = PlannedRun(BaseModel(small), config("bone"), device=device)
    for wanted in (1, 5, 70):  # before and after tiles of the logits stop growing, at 4,096 tokens
        batch = run.largest_batch(128, run.step(wanted, 128).peak + 1)
        assert batch == wanted
    assert run.largest_batch(128, run.step(1, 128).peak / 2) == 0


def test_the_largest_rank_for_a_budget(small):
    lora = PlannedRun(BaseModel(small), config("lora"))
    each = lora.sized(1).parameters
    assert lora.largest_size(lambda run: run.parameters, 5.5 * each) == 5
    peft = PlannedRun(BaseModel(small), LoraConfig(**ALL))
    assert peft.largest_size(lambda run: run.parameters, 5.5 * each) == 5
    assert lora.largest_size(lambda run: run.parameters, 0.5 * each) is None
    bat = PlannedRun(BaseModel(small), config("bat"))
    assert bat.sizes() == [1, 2, 4, 8, 16, 32]
    assert bat.largest_size(lambda run: run.parameters, bat.sized(8).parameters + 1) == 8
    assert lora.largest_size(lambda run: run.step(2, 64).peak, lora.sized(9).step(2, 64).peak) == 9


def test_a_model_of_70_billion_numbers(tmp_path):
    folder = shapes(
        tmp_path / "large", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    step = PlannedRun(BaseModel(folder), config("lora", r=16)).step(1, 2048)
    widths = {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 3}
    assert step.parameters == 80 * 16 * sum(n * (a + b) for (a, b), n in widths.items())
    numbers = 2 * 128256 * 8192 + 8192 + 80 * (2 * 8192 + sum(n * a * b for (a, b), n in widths.items()))
    assert step.frozen == pytest.approx(2 * numbers, rel=1e-5)  # rotary frequencies are there too


def test_without_a_rank_each_method_has_its_own():
    planned = {name: cfg for method in ("hira", "bone") for name, cfg in candidates({"method": method}, [None])}
    assert planned["hira"].build().r == HiRA().r != planned["bone"].build().r  # type: ignore[union-attr]
    assert planned["PEFT LoRA"].r == LoraConfig().r  # type: ignore[union-attr]


def test_the_command_says_and_writes(small, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("rows.json", "rows.csv")]
    main(["plan", small, "--method", "bone", "--r", "4,8", "--length", "64", "--json", files[0], "--csv", files[1]])
    said = capsys.readouterr().out
    assert "base in bfloat16" in said
    assert "base in nf4" in said
    rows = json.loads(Path(files[0]).read_text())
    assert {(row["method"], row["size"]) for row in rows} == {
        ("bone", 4), ("bone", 8), ("PEFT LoRA", 4), ("PEFT LoRA", 8), ("full", None),
    }  # fmt: skip
    bone, again = (row for row in rows if row["method"] == "bone" and row["size"] == 8 and row["base"] == "bfloat16")
    assert bone["parameters"] == PlannedRun(BaseModel(small), config("bone", r=8)).parameters
    assert again["checkpointing"]
    assert again["activations"] < bone["activations"]
    assert again["time"] > bone["time"] > 1
    table = csv.DictReader(Path(files[1]).read_text().splitlines())
    assert [row["peak"] for row in table] == [str(row["peak"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bone", None])
def test_what_fits_is_said_most_useful_first(small, method, tmp_path, capsys):
    names = [m.name for m in inlay.methods.METHODS] if method is None else [method]
    file = tmp_path / "fits.json"
    main(
        [
            "plan",
            small,
            *([] if method is None else ["--method", method]),
            "--r",
            "8",
            "--length",
            "256",
            "--fits",
            "0.1",
            "--json",
            str(file),
        ]
    )
    said, rows = capsys.readouterr().out, json.loads(file.read_text())
    assert {row["method"] for row in rows} == {*names, "PEFT LoRA", "full"}
    assert rows[0]["base"] == "bfloat16"
    assert not rows[0]["checkpointing"]
    alike = [row for row in rows if row["base"] == "bfloat16" and not row["checkpointing"] and row["peak"]]
    assert rows[0]["batch_size"] == max(row["batch_size"] for row in alike if row["length"] == 256)
    assert said.startswith(f"in 0.1 GB: {rows[0]['method']}")
    assert f"batch {rows[0]['batch_size']} × 256" in said
    assert all(row["peak"] <= 0.9 * 0.1 * 2**30 for row in rows if row["peak"])
    main(
        ["plan", small, "--method", "lora", "--length", "64", "--batch-size", "2", "--fits", "0.1", "--json", str(file)]
    )
    rows = json.loads(file.read_text())
    assert {row["size"] for row in rows if row["method"] == "lora"} <= {1, 2, 4, 8, 16, 32, 64}
    assert "largest rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "loar"], "unknown method 'loar'"),
        (["--method", "bat", "--r", "7"], "does not divide both sides"),
        (["--r", "0"], "--r"),
        (["--batch-size", "0"], "no whole number"),
        (["--method", "lora", "--bond", "3"], "no hyperparameter 'bond'"),
        (["--method", "lora", "--target-modules", "q_prj"], "q_prj"),
    ],
)
def test_mistakes_are_one_line(small, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", small, *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(said.splitlines()) == 1
    assert words in said


def test_planning_leaves_bitsandbytes_as_it_was(small):
    """It keeps a table where it first needed one; on meta that would be none for whoever quantises next."""
    from bitsandbytes.functional import name2qmap, quantize_blockwise

    name2qmap.pop("dynamic", None)
    PlannedRun(BaseModel(small), config("bone"), quantize="nf4").step(1, 8)
    quantize_blockwise(torch.randn(256))


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    for module in ("planner", "table"):
        monkeypatch.setattr(f"inlay.planning.{module}.installed", lambda name: name != "bitsandbytes")


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("method", ["lora", "bone", "dota"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_bits_by_size_are_near_those_followed(trainable_model, method, checkpointing):
    plain = PlannedRun(BaseModel(trainable_model), config(method), checkpointing=checkpointing)
    run = replace(plain, quantize="nf4")
    followed, step = run.step(4, 192), replace(run, like=plain).step(4, 192)
    assert (step.parameters, step.file, step.gradients) == (followed.parameters, followed.file, followed.gradients)
    assert step.frozen == pytest.approx(followed.frozen, rel=0.02)
    assert step.peak == pytest.approx(followed.peak, rel=0.08)


@pytest.mark.slow
def test_without_bitsandbytes_there_is_a_column_of_four_bits(small, no_bitsandbytes, capsys):
    main(["plan", small, "--method", "bone", "--r", "8", "--length", "64", "--fits", "0.1"])
    said = capsys.readouterr().out
    assert "nf4" in said
    assert "int8" not in said
    assert "note: 8 bits are not planned without bitsandbytes: pip install" in said
    main(["plan", small, "--method", "bone", "--length", "64", "--batch-size", "2", "--fits", "0.1"])
    assert "largest rank" in capsys.readouterr().out


@pytest.mark.slow
def test_what_fits_the_length_comes_before_what_shortens_it(small, tmp_path):
    """In less than the weights take in 16 bits with the asked length, something still fits it."""
    lengths = {}
    for gigabytes in ("0.05", "0.1"):
        file = tmp_path / f"{gigabytes}.json"
        flags = ["--method", "bone", "--r", "8", "--length", "4096", "--fits", gigabytes]
        main(["plan", small, *flags, "--json", str(file)])
        lengths[gigabytes] = [row["length"] for row in json.loads(file.read_text()) if row["peak"]]
    for found in lengths.values():
        assert found == sorted(found, key=lambda length: length < 4096)
    assert any(length < 4096 for found in lengths.values() for length in found)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_a_model_of_experts_is_planned(kind, tmp_path, capsys):
    made = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, head_dim=16, **({"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4}),
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    for more in ([], ["--fits", "1"]):
        main(["plan", str(tmp_path), "--method", "lora", "--r", "4", "--length", "64", *more])
        said = capsys.readouterr().out
        assert "the experts of this model stay frozen" in said
        assert "PEFT LoRA" in said
    main(["plan", str(tmp_path), "--method", "lora", "--r", "4", "--length", "64", "--experts", "true"])
    assert "stay frozen" not in capsys.readouterr().out
