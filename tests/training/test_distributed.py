"""Two processes train as one does: DDP and FSDP2 over gloo, on a CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from inlay.cli import main
from inlay.files.atomic import locked
from inlay.host import distributed
from inlay.method import Method
from inlay.methods import METHODS
from inlay.recipe.recipe import Recipe
from inlay.training import checkpoints
from inlay.training.launch import LAUNCHER, end_with_launcher
from inlay.training.train import check_engine, train, unfinished

HERE = Path(__file__).parent.parent
LAMDA = {"method": "lamda", "args": {"r": 4, "eta": 0.6}, "weight_decay": 0.1}
FSDP2 = ["--launch-config", str(HERE.parent / "recipes" / "distributed" / "fsdp2.yaml")]


def made(model, data, out, **more) -> dict:
    values = {"steps": 6, "batch_size": 2, "eval_size": 4, "samples": 1, "dtype": "float32", "save_every": 2, **more}
    return {"model": model, "data": data, "output": str(out), **values}


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def together(folder: Path, runs: list[dict], timeout: int = 600) -> list[list[dict]]:
    """Do runs in two processes, and give back what each process says of each."""
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "together.py"]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), str(folder / "runs.json")],
        capture_output=True, text=True, env=environment(), timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [[json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in (0, 1)] for n in range(len(runs))]


def one(recipe: dict, **changed) -> Path:
    """The same run in one process, with the same effective batch."""
    train(Recipe(**{**recipe, "accumulation": 2, **changed}), Console(quiet=True))
    return Path(changed.get("output", recipe["output"]))


def in_order(adapter: dict) -> dict:
    """With SpIEL's entries sorted by their positions: among equally good ones rounding says which is the first."""
    for name in [name for name in adapter if name.endswith("inlay_eta.weight")]:
        adapter[name], order = adapter[name].sort()
        phi = name.replace("eta", "phi")
        adapter[phi] = adapter[phi][order]
    return adapter


def assert_same(run: Path, other: Path, tolerance: float = 1e-5) -> None:
    rows, others = ([json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, other))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    names = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens", "trained")  # trl's accuracy is a mean
    for row, theirs in zip(rows, others, strict=True):  # over micro-batches, which are others here
        curve, wanted = ({k: v for k, v in r.items() if k in names} for r in (row, theirs))
        assert curve == pytest.approx(wanted, rel=tolerance)
    adapter, theirs = (in_order(load_file(r / "adapter" / "adapter_model.safetensors")) for r in (run, other))
    assert adapter.keys() == theirs.keys()
    for name in adapter:
        torch.testing.assert_close(adapter[name], theirs[name], rtol=1e-4, atol=tolerance)
    seals = [json.loads((r / "adapter" / "adapter_config.json").read_text())["seals"] for r in (run, other)]
    assert {name: seal["base"] for name, seal in seals[0].items()} == {name: s["base"] for name, s in seals[1].items()}
    assert None not in {seal["base"] for seal in seals[0].values()}


@pytest.fixture(scope="module")
def runs(tiny, records, tmp_path_factory):
    """All that two processes do in the quick tests, in one start of them."""
    folder = tmp_path_factory.mktemp("together")
    ddp, cut = (made(tiny, records, folder / name, **LAMDA) for name in ("ddp", "cut"))
    asked = [
        {"engine": "ddp", "recipe": ddp},
        {"engine": "fsdp2", "recipe": cut, "interrupt": 2},
        {"engine": "ddp", "recipe": {**cut, "accumulation": 2}, "resume": True},
        {"engine": "ddp", "recipe": {**ddp, "trainer": {"fsdp": True}}},
    ]
    return folder, together(folder, asked)


@pytest.fixture(scope="module")
def alone(tiny, records, tmp_path_factory):
    return one(made(tiny, records, tmp_path_factory.mktemp("alone") / "run", **LAMDA))


def test_two_processes_learn_what_one_does(runs, alone):
    """DDP: LaMDA's blocks freeze in step, every start is computed once, and the adapter is whole, with its seals."""
    folder, said = runs
    assert [own["said"] for own in said[0]] == ["done", "done"]
    assert [own["starts"] for own in said[0]] == [7, 7]  # of 14 weights
    assert_same(folder / "ddp", alone)
    assert (folder / "ddp" / "report.html").exists()
    assert (folder / "ddp" / "samples.md").read_text() == (alone / "samples.md").read_text()


def test_a_run_goes_on_in_another_number_of_processes(runs, alone):
    """FSDP2: Ctrl-C in one of two ends both, with a checkpoint that one process goes on from, frozen blocks and all."""
    folder, said = runs
    assert [own["said"] for own in said[1]] == ["KeyboardInterrupt: ", "KeyboardInterrupt: "]
    found = checkpoints.newest(folder / "cut" / "checkpoints", Console(quiet=True))
    assert found.step == 3
    assert found.run["identity"]["processes"] == 2
    recipe = unfinished(folder / "cut", {"accumulation": 2})
    train(recipe, Console(quiet=True), resume=True)
    assert_same(folder / "cut", alone)


def test_another_effective_batch_is_refused(runs):
    _, said = runs
    assert "accumulation was 1 and is 2" in said[2][0]["said"]
    assert said[2][1]["said"].startswith("Elsewhere")  # it is said once


def test_what_the_launcher_configures_is_refused_in_a_recipe(runs):
    _, said = runs
    assert "trainer: fsdp is configured through accelerate" in said[3][0]["said"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (LAMDA, "method: lamda changes which parameters are trained"),
        ({"method": "lorta"}, "method: lorta shares tensors between layers"),
        ({"method": "kasa"}, "method: kasa has a penalty on what is trained"),
        ({"dtype": "bfloat16"}, "dtype: DeepSpeed would round trained parameters"),
        ({"lr_ratio": 16.0}, "lr_ratio: not with DeepSpeed; use recipes/distributed/fsdp2.yaml"),
        ({"optimizer": "adafactor"}, "optimizer: not with DeepSpeed"),
        ({"quantize": "int8"}, "a sharded model takes no method: full, quantize"),
    ],
)
def test_what_zero3_cannot_follow_is_refused(more, says, tiny, records, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=re.escape(says)):
        check_engine(Recipe(**{**made(tiny, records, tmp_path / "run", method="bone"), **more}))


def zero3(folder: Path) -> Path:
    """Its configuration for tests.together: even the smallest tensors are cut in two."""
    own = {"stage": 3, "stage3_param_persistence_threshold": 0}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    text = {"zero_optimization": own, "zero_allow_untested_optimizer": True, **dict.fromkeys(sizes, "auto")}
    (folder / "zero3").write_text(json.dumps(text))
    return folder


@pytest.mark.slow
def test_zero3_does_what_one_process_does(tiny, records, tmp_path):
    """Also stopped and gone on with, by itself and by DDP; NaN ends it before the step."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    values = {"method": "pissa", "args": {"r": 3}, "weight_decay": 0.1, "max_grad_norm": 0.3}
    cut, moved, bad = (made(tiny, records, tmp_path / name, **values) for name in ("cut", "moved", "bad"))
    asked = [
        {"engine": "zero3", "recipe": cut, "interrupt": 2},
        {"engine": "zero3", "recipe": cut, "resume": True},
        {"engine": "zero3", "recipe": moved, "interrupt": 2},
        {"engine": "ddp", "recipe": moved, "resume": True},
        {"engine": "zero3", "recipe": bad, "spoil": 2},
    ]
    said = [[own["said"] for own in both] for both in together(zero3(tmp_path), asked)]
    assert [both[0].partition(":")[0] for both in said] == ["KeyboardInterrupt", "done"] * 2 + ["ValueError"]
    assert all(re.match(r"ValueError: step 3: the gradient of .*layers\.1\.mlp\.down_proj", own) for own in said[4])
    for recipe in (cut, moved):
        assert_same(Path(recipe["output"]), one(recipe, output=str(tmp_path / f"{recipe['output']}-alone")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_every_method_that_zero3_takes_learns_in_it(tiny, records, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    asked = [
        made(tiny, records, tmp_path / m.name, method=m.name, steps=3, save_every=0, samples=0)
        for m in METHODS
        if not m.needs and not m.shared and m.penalty is Method.penalty
        if m.schedule is Method.schedule and m.restart is Method.restart
    ]
    said = together(zero3(tmp_path), [{"engine": "zero3", "recipe": recipe} for recipe in asked], 900)
    for recipe, (first, second) in zip(asked, said, strict=True):
        assert (first["said"], second["said"]) == ("done", "done"), recipe["method"]
        assert_same(Path(recipe["output"]), one(recipe, output=f"{recipe['output']}-alone"), 1e-4)


@pytest.mark.slow
def test_nan_in_one_process_ends_all(tiny, records, tmp_path):
    runs = {engine: made(tiny, records, tmp_path / engine, method="bone", args={"r": 4}) for engine in ("ddp", "fsdp2")}
    asked = [{"engine": engine, "recipe": recipe, "spoil": 2} for engine, recipe in runs.items()]
    for engine, said in zip(runs, together(tmp_path, asked), strict=True):
        for own in said:
            assert re.match(r"ValueError: step 3: the gradient of .*layers\.1\.mlp\.down_proj", own["said"]), own
        assert checkpoints.newest(tmp_path / engine / "checkpoints", Console(quiet=True)).step == 2


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "inlay", "train", *map(str, arguments), "--num-processes", "2"]


def flags(recipe: dict) -> list[str]:
    return [part for key, value in recipe.items() for part in (f"--{key.replace('_', '-')}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], FSDP2], ids=["ddp", "fsdp2"])
def test_a_killed_process_ends_the_run_and_it_goes_on(more, tiny, records, alone, tmp_path):
    recipe = made(tiny, records, tmp_path / "run", **LAMDA)
    begun = subprocess.Popen(
        command(*flags(recipe), *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wanted = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "manifest.json"
    while not wanted.exists() and begun.poll() is None:
        time.sleep(0.02)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(begun.pid).children(recursive=True)}
    ranks["1"].send_signal(signal.SIGKILL)
    _, error = begun.communicate(timeout=120)
    assert begun.returncode == 1, error
    assert error.count("inlay: process 1 was ended by SIGKILL") == 1
    assert "Traceback" not in error
    done = subprocess.run(
        [*command("--resume", tmp_path / "run"), *more], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_every_method_learns_in_two_processes(engine, tiny, records, tmp_path):
    asked = [
        made(tiny, records, tmp_path / m.name, method=m.name, steps=3, save_every=0, samples=0)
        for m in METHODS
        if not m.needs
    ]
    said = together(tmp_path, [{"engine": engine, "recipe": recipe} for recipe in asked], 900)
    for recipe, (first, second) in zip(asked, said, strict=True):
        assert (first["said"], second["said"]) == ("done", "done"), recipe["method"]
        assert_same(Path(recipe["output"]), one(recipe, output=f"{recipe['output']}-alone"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], FSDP2], ids=["ddp", "fsdp2"])
def test_the_real_model(more, tmp_path):
    recipe = made("builtin", "builtin", tmp_path / "run", max_length=128, steps=3, save_every=0, samples=0)
    recipe |= {"method": "lamda", "eta": 0.6, "r": 8}
    done = subprocess.run([*command(*flags(recipe)), *more], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    args = {"r": recipe.pop("r"), "eta": recipe.pop("eta")}
    assert_same(tmp_path / "run", one(recipe, args=args, output=str(tmp_path / "alone")))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--num-processes", "2", "--launch-config", "nowhere.yaml"], "launch_config nowhere.yaml does not exist"),
        (["--num-processes", "0"], "no whole number from 1 up"),
        (FSDP2, "give --num-processes too"),
    ],
)
def test_what_cannot_be_started_is_refused(more, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *more])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_experts_in_two_processes(tmp_path, small_tokenizer, records):
    """DDP, FSDP2 and one process train the same adapter of a mixture of experts, with checkpointed activations too."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    settings = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, vocab_size=len(small_tokenizer), bos_token_id=small_tokenizer.bos_token_id,
        eos_token_id=small_tokenizer.eos_token_id, pad_token_id=small_tokenizer.pad_token_id,
    )  # fmt: skip
    MixtralForCausalLM(settings).save_pretrained(base)
    small_tokenizer.save_pretrained(base)
    recipe = made(str(base), records, tmp_path / "ddp", method="pissa", args={"r": 2}, experts=True, steps=3)
    other = {**recipe, "output": str(tmp_path / "fsdp2"), "gradient_checkpointing": True}
    said = together(tmp_path, [{"engine": "ddp", "recipe": recipe}, {"engine": "fsdp2", "recipe": other}])
    assert {own["said"] for both in said for own in both} == {"done"}
    alone = one(recipe, output=str(tmp_path / "one"))
    for run in ("ddp", "fsdp2"):
        assert_same(tmp_path / run, alone)
    names = load_file(alone / "adapter" / "adapter_model.safetensors")
    assert any(".experts.down_proj.inlay_A" in name for name in names)


def test_processes_wait_for_as_long_as_the_first_one_works(monkeypatch):
    """It alone computes spectra, reads data first, draws plots and uploads, which may take hours."""
    given = {}

    class MadeError(Exception):
        pass

    class State:
        _shared_state: dict = {}

        def __init__(self, **kwargs):
            given.update(kwargs)
            raise MadeError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "PartialState", State)
    with pytest.raises(MadeError), distributed.joined_processes():
        pass
    assert given["timeout"] >= timedelta(hours=12)


def test_a_process_ends_with_its_launcher(tmp_path, monkeypatch):
    """The launcher is killed before it can end its processes: none of them holds the run's lock."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher = os.fork()
    if launcher == 0:
        os.environ[LAUNCHER] = str(os.getpid())
        if os.fork() == 0:
            with locked(tmp_path / "run"):
                end_with_launcher()
                time.sleep(60)
        time.sleep(60)
        os._exit(1)
    while not (tmp_path / ".run.lock").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    with pytest.raises(ValueError, match="in use by another process"), locked(tmp_path / "run"):
        pass
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    deadline = time.monotonic() + 20
    while True:
        try:
            with locked(tmp_path / "run"):
                break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
