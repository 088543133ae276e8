"""A run that is stopped, by whatever, goes on to the same end; what cannot be gone on from is refused, and why."""

import contextlib
import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from inlay.cli import main
from inlay.files import atomic
from inlay.files.atomic import locked, new_folder, set_aside, write_text
from inlay.models.base import BaseModel
from inlay.recipe import named_code
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.reports.result import environment
from inlay.training import calibration, checkpoints, mixture
from inlay.training.peft_extras import Allocation
from inlay.training.progress import RunProgress
from inlay.training.train import train, unfinished
from inlay.training.trainers.faults import bad_gradients
from inlay.training.trainers.trainer import Safe

SILENT = Console(quiet=True)
TORTURE = Path(__file__).parents[2] / "checks" / "torture.py"
LAMDA = {"method": "lamda", "args": {"r": 4, "eta": 0.6}, "dropout": 0.1, "weight_decay": 0.1, "accumulation": 2}


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def made(tiny, records, out, **more) -> Recipe:
    values = {"steps": 6, "batch_size": 4, "eval_size": 4, "samples": 0, "dtype": "float32", "save_every": 2, **more}
    return Recipe(model=tiny, data=records, output=str(out), **values)


def outcome(run: Path) -> tuple[list[dict], bytes]:
    """What must not depend on how often a run was stopped: its metrics but for time and memory, its adapter's bits."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]
    trained = run / "adapter" / "adapter_model.safetensors"
    return curve, (trained if trained.exists() else run / "model" / "model.safetensors").read_bytes()


def at_step(monkeypatch, step, what) -> None:
    """Do something once, after a step, in the next one."""

    def once(self, args, state, control, **kwargs):
        if state.global_step == step:
            what()

    monkeypatch.setattr(RunProgress, "on_step_begin", once, raising=False)


def interrupt(number=signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def resume(run: Path, console=SILENT, **changed):
    return train(unfinished(run, changed), console, resume=True)


def stopped(recipe: Recipe, monkeypatch, step=3) -> Path:
    """A run that Ctrl-C ended in the step after this one."""
    with monkeypatch.context() as patch:
        at_step(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, SILENT)
    return Path(str(recipe.output))


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert len(err.strip().splitlines()) == 1
    return err


@pytest.fixture(scope="module")
def whole(tiny, records, tmp_path_factory) -> Path:
    """A LaMDA run that nothing disturbed; 6 steps of 2 × 4 in two and a half epochs of 20."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(made(tiny, records, folder, **LAMDA), SILENT)
    return folder


@pytest.fixture(scope="module")
def interrupted(tiny, records, tmp_path_factory) -> Path:
    """The same, ended by Ctrl-C in its fifth step: with checkpoints of the steps 4 and 5."""
    with pytest.MonkeyPatch.context() as patch:
        return stopped(made(tiny, records, tmp_path_factory.mktemp("cut") / "run", **LAMDA), patch, 4)


@pytest.fixture
def cut(interrupted, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


# The same end


def test_the_rows_of_steps_are_in_one_file_and_not_in_every_checkpoint(whole):
    """Nor in memory, where they would be all that a long run gathers."""
    states = [json.loads(path.read_text()) for path in whole.rglob("trainer_state.json")]
    assert states
    assert not any("loss" in row for state in states for row in state["log_history"])
    assert sum("loss" in row for row in outcome(whole)[0]) == 6


@pytest.mark.parametrize(
    "of",
    [
        slow({"method": "smt", "args": {"r": 8}, "allocate": "blocks"}),
        slow({"method": "eva", "args": {"r": 4}, "allocate": "variance"}),
        slow({"method": "lora_ga", "args": {"r": 4}, "dropout": 0.1}),
        slow({"method": "lq_lora", "args": {"r": 4}}),
        slow({"method": "spiel", "args": {"r": 4, "rounds": 2}}),
    ],
    ids=lambda of: of["method"],
)
def test_a_run_that_looked_at_data_first_goes_on_without(of, tiny, records, tmp_path, monkeypatch):
    """Its ranks, blocks and start are those of the checkpoint."""
    values = {"steps": 4, "save_every": 1, "calibration": 2, **of}
    train(made(tiny, records, tmp_path / "whole", **values), SILENT)
    cut = stopped(made(tiny, records, tmp_path / "cut", **values), monkeypatch, 2)
    monkeypatch.setattr(calibration, "calibration_batches", lambda *_: [])  # of which nothing could be learned
    resume(cut)
    assert outcome(cut) == outcome(tmp_path / "whole")
    if of["method"] == "smt":
        kept = load_recipe(str(cut / "recipe.yaml"), {})
        assert kept.allocate == "none"
        assert len({args["blocks"] for args in kept.patterns.values()}) > 1
        D = [v for k, v in load_file(cut / "adapter" / "adapter_model.safetensors").items() if "inlay_D" in k]
        one = [round(8 * sum(shape) / 64) for shape in [*2 * [(64, 64)], *2 * [(32, 64)], *3 * [(64, 128)]]]
        assert sum(map(len, D)) == 2 * sum(one)  # in all as many numbers as LoRAs of rank 8


@pytest.mark.parametrize(("model", "kills"), [("tiny", 1), pytest.param("builtin", 25, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_left_alone(model, kills, tmp_path):
    """Frozen blocks, dropout, accumulation, weight decay, more than one epoch."""
    part = "--layers-to-transform 28,29 --target-modules q_proj,down_proj --max-length 48 --batch-size 1"
    small = part if model == "builtin" else ""
    command = [sys.executable, str(TORTURE), str(kills), "--model", model, "--only", "lamda", "--steps", "4"]
    done = subprocess.run([*command, "--more", small], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills in" in done.stdout
    assert "0 ended differently" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, slow(signal.SIGTERM)])
def test_a_signal_ends_a_step_and_leaves_a_checkpoint(number, tiny, records, whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(made(tiny, records, tmp_path / "run", **LAMDA).to_yaml())
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: interrupt(number))
        with pytest.raises(SystemExit) as end:
            main(["train", str(tmp_path / "r.yaml")])
    assert end.value.code == 130
    assert f"inlay train --resume {tmp_path / 'run'}" in " ".join(capsys.readouterr().out.split())
    assert checkpoints.checkpoint_steps(tmp_path / "run" / "checkpoints") == [3, 2]
    main(["train", "--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run") == outcome(whole)
    capsys.readouterr()
    main(["train", "--resume", str(tmp_path / "run")])
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        slow({"packing": True, "max_length": 96, "batch_size": 1, "method": "pissa", "args": {"r": 4}}),
        slow({"trainer": {"logging_steps": 4}, "method": "dota", "args": {"bond": 4, "init": "random"}}),
        slow(
            {"streaming": True, "packing": True, "max_length": 96, "batch_size": 1, "method": "bone", "args": {"r": 4}}
        ),
        {"method": "full", "steps": 7},  # not at the end of an epoch
        slow({"method": "full", "steps": 7, "eval_every": 2, "keep_best": True, "learning_rate": 0.3}),
        {"group_by_length": True, "steps": 9, "dropout": 0.2, "method": "kasa", "args": {"r": 4}, "accumulation": 2},
        {"eval_every": 1, "early_stopping": 3, "learning_rate": 0.5, "dropout": 0.2, "steps": 9},
        {"eval_every": 2, "keep_best": True, "learning_rate": 0.3, "modules_to_save": ["norm"], "samples": 1},
    ],
)
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_a_stopped_run_ends_as_one_left_alone(options, tiny, records, tmp_path, monkeypatch):
    """Also where it is moved in between, and stopped when training is over."""
    train(recipe := made(tiny, records, tmp_path / "run", **options), SILENT)
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    stopped(recipe, monkeypatch, 4).rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr("inlay.training.train.write_trained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resume(tmp_path / "moved")
    resume(tmp_path / "moved")
    curve, adapter = outcome(tmp_path / "moved")
    assert adapter == expected[1]
    if "trainer" in options:  # where it was stopped, a mean over steps is cut in two
        assert [row["step"] for row in curve] == [0, 2, 4, 5, 6, 6]
        curve, expected = (
            [row for row in rows if row["step"] < 5 or "loss" not in row] for rows in (curve, expected[0])
        )
        assert curve == expected
    else:
        assert curve == expected[0]


@pytest.mark.parametrize("packing", [True, slow(False)])
def test_a_stream_over_shards_is_gone_on_with(packing, tiny, tmp_path, monkeypatch):
    """It is stopped in the second of three files, and read more than once in all."""
    rows = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(34)]
    for name, part in (("a", rows[:12]), ("b", rows[12:24]), ("c", rows[24:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    more = {"streaming": True, "packing": packing, "max_length": 96, "batch_size": 1 if packing else 6, "steps": 8}
    recipe = made(tiny, str(tmp_path / "*.parquet"), tmp_path / "run", **more, method="bone", args={"r": 4})
    train(recipe, SILENT)
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    resume(stopped(recipe, monkeypatch))
    assert outcome(tmp_path / "run") == expected
    tokens = [row["tokens"] for row in expected[0] if "tokens" in row]
    assert tokens[-1] > sum(len(f"{row['question']}{row['answer']}".split()) for row in rows)


def test_a_mixture_of_streams_is_resumed(tiny, tmp_path, monkeypatch):
    """A file of lines and a table, one of them with twice the weight, each in its second epoch at the end."""
    rows = [(f"What is {i} plus one?", f"It is {i + 1}.") for i in range(22)]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows[:10]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.csv").write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in rows[10:18]))
    (tmp_path / "held.csv").write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in rows[18:]))
    data = [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, str(tmp_path / "b.csv")]
    more = {"streaming": True, "steps": 8, "eval_data": str(tmp_path / "held.csv"), "eval_size": None}
    recipe = made(tiny, data, tmp_path / "run", **more, method="bone", args={"r": 4})
    train(recipe, SILENT)
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    resume(stopped(recipe, monkeypatch, 5))
    assert outcome(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_fold_is_gone_on_with(tiny, records, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    train(recipe := made(tiny, records, tmp_path / "run", method="pissa", quantize="nf4", samples=1), SILENT)
    expected, text = outcome(tmp_path / "run"), (tmp_path / "run" / "samples.md").read_text()
    shutil.rmtree(tmp_path / "run")
    resume(stopped(recipe, monkeypatch))
    assert outcome(tmp_path / "run") == expected
    assert (tmp_path / "run" / "samples.md").read_text() == text


def test_before_the_first_checkpoint_it_starts_anew(tiny, records, whole, tmp_path, monkeypatch):
    """A process killed while it loads leaves a folder with a recipe."""
    monkeypatch.setattr("inlay.training.train.give_up", lambda *_: False)
    monkeypatch.setattr("inlay.training.settle.load_training_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(made(tiny, records, tmp_path / "run", **LAMDA), SILENT)
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_second_ctrl_c_does_not_wait(tiny, records, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(made(tiny, records, tmp_path / "run"), SILENT)
    assert checkpoints.checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_run_that_replaces_another_is_gone_on_with(tiny, records, tmp_path, monkeypatch):
    """The old one is kept until the new one is done."""
    train(made(tiny, records, tmp_path / "run", steps=1), SILENT)
    stopped(made(tiny, records, tmp_path / "run", overwrite=True), monkeypatch)
    ((old,),) = ([path for path in tmp_path.iterdir() if path.suffix == ".old"],)
    assert (old / "run" / "report.html").exists()
    resume(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ctrl_c_after_the_last_step_is_heard(tiny, records, tmp_path, monkeypatch):
    """When nothing is saved any more."""
    monkeypatch.setattr(RunProgress, "on_train_end", lambda *_, **__: interrupt())
    with pytest.raises(KeyboardInterrupt):
        train(made(tiny, records, tmp_path / "run", steps=1, save_every=0), SILENT)


@pytest.mark.parametrize("key", ["save_only_model", "ignore_data_skip"])
def test_what_would_make_a_resumed_run_end_otherwise_is_refused(key, tiny, records, tmp_path):
    with pytest.raises(ValueError, match=f"'{key}' could not be resumed exactly"):
        train(made(tiny, records, tmp_path / "run", trainer={key: True}), SILENT)


def test_adalora_takes_no_checkpoints_and_says_so(tiny, records, tmp_path, monkeypatch):
    """It prunes, and PEFT cannot load what is left into what is whole."""
    recipe = made(tiny, records, tmp_path / "run", method="peft:adalora", steps=3)
    with pytest.raises(ValueError, match="so its runs cannot be resumed; leave out save_every"):
        train(recipe, SILENT)
    run = stopped(replace(recipe, save_every=None), monkeypatch, 1)
    assert checkpoints.checkpoint_steps(run / "checkpoints") == [2]  # of Ctrl-C
    with pytest.raises(ValueError, match="start again"):
        resume(run)


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_and_said(name, damage, cut, capsys):
    damage(cut / "checkpoints" / "checkpoint-5" / name)
    found = checkpoints.newest(cut / "checkpoints", Console(width=400))
    assert found.step == 4
    said = capsys.readouterr().out
    assert "checkpoint-5 is not whole" in said
    assert name in said


def test_what_does_not_belong_to_a_checkpoint_is_seen(cut):
    (cut / "checkpoints" / "checkpoint-5" / "pytorch_model.bin").write_bytes(b"")
    assert checkpoints.newest(cut / "checkpoints", SILENT).step == 4


def test_a_run_goes_on_from_the_older_checkpoint(cut, whole, monkeypatch):
    """Also by the name of "."; what is damaged is none of the two that are kept."""
    truncate(cut / "checkpoints" / "checkpoint-5" / "optimizer.pt")
    monkeypatch.chdir(cut)
    resume(Path())
    assert outcome(cut) == outcome(whole)
    assert checkpoints.checkpoint_steps(cut / "checkpoints") == [6, 4]  # both whole
    assert checkpoints.read_checkpoint(cut / "checkpoints" / "checkpoint-6").over


def test_two_checkpoints_stay_where_a_process_was_killed_before_it_removed_the_third(cut, whole):
    """Also where the last one ended the training, after which none is written."""
    for run, steps in ((cut, [6, 5]), (Path(shutil.copytree(whole, cut.parent / "over")), [6, 4])):
        last = run / "checkpoints" / f"checkpoint-{checkpoints.checkpoint_steps(run / 'checkpoints')[1]}"
        for step in (1, 2):
            shutil.copytree(last, run / "checkpoints" / f"checkpoint-{step}")  # of which the first is half removed
        (run / "checkpoints" / "checkpoint-1" / "optimizer.pt").unlink()
        (run / "report.html").unlink(missing_ok=True)
        resume(run)
        assert checkpoints.checkpoint_steps(run / "checkpoints") == steps
        assert outcome(run) == outcome(whole)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(cut, monkeypatch):
    def failing(folder):
        if folder.name == "checkpoint-5":
            raise OSError(5, "Input/output error")
        return digests(folder)

    digests = checkpoints.digests
    monkeypatch.setattr(checkpoints, "digests", failing)
    assert checkpoints.newest(cut / "checkpoints", SILENT).step == 4


def test_a_run_that_was_killed_when_all_was_written_is_completed(whole, tmp_path, monkeypatch, capsys):
    uploaded = []
    monkeypatch.setattr("inlay.training.train.upload_run", lambda folder, name: uploaded.append((folder.name, name)))
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (tmp_path / ".run.abcdefgh.old").mkdir()
    (run / ".before.json").write_text("[]")
    for _ in range(2):
        main(["train", "--resume", str(run), "--push-to-hub", "me/it"])
        assert "is finished" in capsys.readouterr().out
    assert uploaded == [("adapter", "me/it")]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (run / ".before.json").exists()


def reseal(folder, **changed):
    """Make a checkpoint's manifest right again, as somebody else could."""
    about = json.loads((folder / "manifest.json").read_text()) | {"files": checkpoints.digests(folder)} | changed
    about.pop("seal")
    (folder / "manifest.json").write_text(json.dumps({**about, "seal": checkpoints.seal.of_values(about)}))


@pytest.mark.parametrize("changed", [
    {"files": [1]}, {"run": {}}, {"run": 5}, {"step": "5"}, {"step": 4},
    {"run": {"recipe": 1, "identity": 2, "versions": 3}},
])  # fmt: skip
def test_a_sealed_manifest_that_is_none_is_passed_over(changed, cut):
    reseal(cut / "checkpoints" / "checkpoint-5", **changed)
    assert checkpoints.newest(cut / "checkpoints", SILENT).step == 4


@pytest.mark.parametrize(("name", "content"), [
    ("metrics.jsonl", ""), ("metrics.jsonl", "5"), ("metrics.jsonl", '{"eval_loss": "x"}'),
    ("trainer_state.json", '{"x": 1}'), ("trainer_state.json", "[" * 100_000),
    ("trainer_state.json", '{"global_step": 5, "best_metric": "x"}'),
    ("optimizer.pt", ""), ("rng_state.pth", "x"), ("scheduler.pt", ""),
])  # fmt: skip
def test_sealed_files_that_are_none_are_said(name, content, cut, capsys):
    folder = cut / "checkpoints" / "checkpoint-5"
    (folder / name).write_text(content)
    reseal(folder)
    assert "checkpoint-5" in (said := fails(capsys, "train", "--resume", str(cut)))
    assert "cannot be loaded" in said


def test_a_name_without_end_is_cut_short(cut, capsys):
    """Or what colours the message would look through all of it, again and again."""
    folder = cut / "checkpoints" / "checkpoint-5"
    reseal(folder, files={**checkpoints.digests(folder), "[red]\x1b" + "x" * 1_000_000: "0"})
    assert checkpoints.newest(cut / "checkpoints", Console(width=1000)).step == 4
    said = capsys.readouterr().out
    assert "'[red]\\x1bxxx" in said
    assert len(said) < 1000


def test_a_checkpoints_manifest_may_be_no_file(cut):
    manifest = cut / "checkpoints" / "checkpoint-5" / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    assert checkpoints.newest(cut / "checkpoints", SILENT).step == 4


def test_a_pickle_in_a_checkpoint_does_not_run(cut, capsys):
    class Payload:
        def __reduce__(self):
            return Path.touch, (cut / "ran",)

    folder = cut / "checkpoints" / "checkpoint-5"
    torch.save({"state": Payload()}, folder / "optimizer.pt")
    reseal(folder)
    assert "cannot be loaded" in fails(capsys, "train", "--resume", str(cut))
    assert not (cut / "ran").exists()
    torch.load(folder / "optimizer.pt", weights_only=False)  # it is one that would
    assert (cut / "ran").exists()


def test_checkpoints_hold_no_pickle_that_is_not_read(cut):
    files = {path.name for path in (cut / "checkpoints" / "checkpoint-5").iterdir()}
    pickles = {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


# Another run


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--learning-rate", "1e-3"], "learning_rate was 0.0005 and is 0.001"),
        (["--method", "bone", "--args", "{r: 4}"], "method was 'lamda' and is 'bone'"),
        (["--batch-size", "2"], "batch_size was 4 and is 2"),
        (["--accumulation", "1"], "accumulation was 2 and is 1"),
        (["--model", "builtin"], "and is 'builtin'"),
        (["--data", "builtin"], "and is 'builtin'"),
        (["--dropout", "0"], "dropout was 0.1 and is 0.0"),
    ],
)
def test_another_run_is_refused_with_the_difference(flags, says, cut, capsys):
    assert says in fails(capsys, "train", "--resume", str(cut), *flags)


def test_other_data_under_the_same_name_is_refused(cut, records, tmp_path, capsys):
    text = Path(records).read_text()
    try:
        Path(records).write_text(text.replace("It is 7.", "It is 8."))
        assert "data was" in fails(capsys, "train", "--resume", str(cut))
    finally:
        Path(records).write_text(text)


def test_a_chat_template_that_changed_is_refused(cut, tiny, capsys):
    """By its text, as the first example need not show it."""
    file = Path(tiny) / "chat_template.jinja"
    text = file.read_text()
    try:
        file.write_text(text + "{# for others #}")
        assert "another run: the chat template was" in fails(capsys, "train", "--resume", str(cut))
    finally:
        file.write_text(text)


def identity(tokenizer, recipe: Recipe, train: list, heldout: list) -> dict:
    arguments = SimpleNamespace(train_batch_size=1, gradient_accumulation_steps=1, world_size=1)
    trainer = SimpleNamespace(train_dataset=[{"input_ids": [1]}], model=nn.Identity(), args=arguments, base="")
    rows = SimpleNamespace(train=train, heldout=heldout, shards=())
    return checkpoints.run_identity(trainer, rows, recipe, tokenizer)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("row", "data was"), ("order", "data was"), ("grown", "the number of examples was 2 and is 3"),
        ("shorter", "the number of examples was 2 and is 1"), ("held-out row", "the held-out data was"),
        ("held-out grown", "the number of held-out examples was 1 and is 2"), ("template", "the chat template was"),
        ("word", "the vocabulary was"), ("code", "method own was"), ("code", "reward own.py:short was"),
    ],
)  # fmt: skip
def test_whatever_a_run_reads_is_compared_when_it_is_resumed(what, says, small_tokenizer, tmp_path, monkeypatch):
    tokenizer, train, heldout = copy.deepcopy(small_tokenizer), [{"a": 1}, {"a": 2}], [{"a": 3}]
    (tmp_path / "own.py").write_text("")
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(__file__=str(tmp_path / "own.py")))
    monkeypatch.setattr(named_code, "find", lambda _: SimpleNamespace(__module__="own"))
    monkeypatch.setattr(named_code, "find_function", lambda *_: SimpleNamespace(__module__="own"))
    recipe = SimpleNamespace(method="own", reward=["exact_match", "own.py:short"])
    before = identity(tokenizer, recipe, train, heldout)
    checkpoint = SimpleNamespace(path=tmp_path, run={"identity": before})
    checkpoints.check_same(checkpoint, "identity", identity(tokenizer, recipe, train, heldout))
    if what in ("row", "order", "grown", "shorter"):
        train = {"row": [{"a": 1}, {"a": 9}], "order": train[::-1], "grown": [*train, {}], "shorter": train[:1]}[what]
    elif what in ("held-out row", "held-out grown"):
        heldout = {"held-out row": [{"a": 9}], "held-out grown": [*heldout, {}]}[what]
    elif what == "template":
        tokenizer.chat_template += "{# for others #}"
    elif what == "word":
        tokenizer.add_tokens(["anotherword"])
    else:
        (tmp_path / "own.py").write_text("# changed")
    with pytest.raises(ValueError, match=re.escape(says)):
        checkpoints.check_same(checkpoint, "identity", identity(tokenizer, recipe, train, heldout))


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_another_base_under_the_same_name_is_refused(tensor, cut, tiny, capsys):
    file = Path(tiny) / "model.safetensors"
    data = file.read_bytes()
    try:
        tensors = load_file(file)
        tensors[tensor][0] += 1
        save_file(tensors, file, {"format": "pt"})
        assert "base was" in fails(capsys, "train", "--resume", str(cut))
    finally:
        file.write_bytes(data)
    assert checkpoints.checkpoint_steps(cut / "checkpoints") == [5, 4]


def test_another_configuration_of_the_base_is_refused(cut, tiny, capsys):
    """By what changed; a checkpoint of before that was looked at, or of another release, is still gone on with."""
    file = Path(tiny) / "config.json"
    text = file.read_text()
    about = json.loads(text)
    changed = {"rms_norm_eps": 1e-5, "rope_parameters": {**about["rope_parameters"], "rope_theta": 5.0}, "new": 1}
    try:
        file.write_text(json.dumps({**about, **changed}))
        said = fails(capsys, "train", "--resume", str(cut))
    finally:
        file.write_text(text)
    assert "checkpoint-5 is of another run: the base's rms_norm_eps was 1e-06 and is 1e-05; " in said
    assert (
        "the base's rope_parameters was {'rope_theta': 10000.0, 'rope_type': 'default'} and is {'rope_theta': 5.0"
        in said
    )
    now = checkpoints.configuration(BaseModel(tiny))
    checkpoint = checkpoints.newest(cut / "checkpoints", SILENT)
    assert checkpoint.run["configuration"] == now
    del checkpoint.run["configuration"]["the base's hidden_act"]
    checkpoints.check_same(checkpoint, "configuration", {**now, "the base's newer field": 1})
    del checkpoint.run["configuration"]
    checkpoints.check_same(checkpoint, "configuration", now)


@pytest.mark.parametrize("row", [3, 25, 33])  # learned already, looked at or not; and not yet
def test_another_row_of_a_stream_is_refused(row, tiny, tmp_path, monkeypatch):
    """Any of them, however far behind those that are looked at before training."""
    monkeypatch.setattr(mixture, "LOOKED_AT", 10)
    rows = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(34)]
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    recipe = made(tiny, str(tmp_path / "*.jsonl"), tmp_path / "run", streaming=True, batch_size=8, steps=6)
    run = stopped(recipe, monkeypatch)
    file = tmp_path / ("a.jsonl" if row < 20 else "b.jsonl")
    text = file.read_text()
    file.write_text(text.replace(f"It is {row + 1}.", f"It is {row + 2}."))
    with pytest.raises(ValueError, match="data was"):
        resume(run)
    file.write_text(text)
    assert resume(run).history[-1]["step"] == 6


@pytest.mark.parametrize("method", ["peft:lora", "full"])
def test_another_base_of_what_is_not_ours_is_refused(method, tiny, records, tmp_path, monkeypatch):
    """A checkpoint of before that was looked at is still gone on with."""
    model = shutil.copytree(tiny, tmp_path / "model")
    values = {"method": method, "steps": 3, "save_every": 1}
    run = stopped(made(str(model), records, tmp_path / "run", **values), monkeypatch, 1)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="whole base was"):
        resume(run)
    found = checkpoints.newest(run / "checkpoints", SILENT)
    del found.run["identity"]["whole base"]
    monkeypatch.setattr(checkpoints, "newest", lambda *_: found)
    assert resume(run).history[-1]["step"] == 3


def test_what_is_no_run_cannot_be_gone_on_with(tmp_path, capsys):
    assert "holds no run" in fails(capsys, "train", "--resume", str(tmp_path))
    assert "leave out RECIPE" in fails(capsys, "train", "r.yaml", "--resume", str(tmp_path))


def test_other_versions_are_said(cut, monkeypatch):
    monkeypatch.setattr(checkpoints, "environment", lambda: {**environment(), "torch": "1.0"})
    found = checkpoints.newest(cut / "checkpoints", SILENT)
    assert checkpoints.versions_changed(found) == [f"torch {torch.__version__.split('+')[0]} (now 1.0)"] or (
        checkpoints.versions_changed(found)[0].startswith("torch ")
    )


# Disks


def test_a_full_disk_is_said_and_nothing_lost(tiny, records, whole, tmp_path, monkeypatch):
    """A limit on the size of files is the disk that is full when the second checkpoint is written."""
    rotate, (soft, hard) = checkpoints.rotate, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments):
        rotate(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    monkeypatch.setattr(checkpoints, "rotate", full)
    try:
        with pytest.raises(ValueError, match=r"checkpoint-4 cannot be written, with .* free on its disk"):
            train(made(tiny, records, tmp_path / "run", **LAMDA), SILENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_folder_that_cannot_be_written_is_said(tiny, records, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(13, "Permission denied")

    if os.geteuid():
        tmp_path.chmod(0o500)
    else:  # whom no rights stop
        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="run cannot be written: Permission denied"):
        train(made(tiny, records, tmp_path / "runs" / "run"), SILENT)
    tmp_path.chmod(0o700)


# NaN


def poison(model, name: str, times: int = 10**6) -> None:
    """NaN in the gradient of one parameter, so many times."""
    left = [times]

    def hook(grad):
        left[0] -= 1
        return grad * float("nan") if left[0] >= 0 else grad

    next(p for n, p in model.named_parameters() if name in n).register_hook(hook)


def with_model(monkeypatch, step, what) -> None:
    """Do something to the model after a step."""

    def once(self, args, state, control, model=None, **kwargs):
        if state.global_step == step:
            what(model)

    monkeypatch.setattr(RunProgress, "on_step_begin", once, raising=False)


def test_a_loss_that_is_nan_ends_the_run_and_names_the_layer(tiny, records, tmp_path, monkeypatch):
    def spoil(model):
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.base_layer")
        layer.weight.data[3, 5] = float("inf")

    with_model(monkeypatch, 4, spoil)
    with pytest.raises(ValueError, match=r"step 5: the loss is nan, first in .*layers\.1\.mlp\.down_proj"):
        train(made(tiny, records, tmp_path / "run"), SILENT)
    assert checkpoints.newest(tmp_path / "run" / "checkpoints", SILENT).step == 4


def test_a_gradient_that_is_nan_ends_the_run_and_names_the_layer(tiny, records, tmp_path, monkeypatch):
    with_model(monkeypatch, 2, lambda model: poison(model, "layers.0.self_attn.v_proj.inlay_D"))
    with pytest.raises(ValueError, match=r"step 3: the gradient of .*layers\.0\.self_attn\.v_proj\.inlay_D"):
        train(made(tiny, records, tmp_path / "run", accumulation=2), SILENT)
    assert checkpoints.newest(tmp_path / "run" / "checkpoints", SILENT).step == 2


def test_a_step_with_nan_is_passed_over_as_often_as_allowed(tiny, records, tmp_path, monkeypatch):
    seen = {}

    def look(self, args, state, control, model=None, **kwargs):
        seen[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        if state.global_step == 2:
            poison(model, "layers.0.self_attn.v_proj.inlay_D", times=1)

    monkeypatch.setattr(RunProgress, "on_step_end", look, raising=False)
    recipe = made(tiny, records, tmp_path / "run", skip_nan=1, accumulation=2, weight_decay=0.1)
    result = train(recipe, SILENT)
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert not any(torch.equal(seen[3][name], seen[4][name]) for name in seen[2])
    assert [row["step"] for row in result.history if "loss" in row] == [1, 2, 4, 5, 6]
    (row,) = [row for row in result.history if "passed_over" in row]
    assert row["step"] == 3
    assert "v_proj" in row["passed_over"]


def test_a_step_that_is_passed_over_in_fp16_moves_nothing():
    """Its loss scaling fails where no gradient is left."""
    model, scaler = nn.Linear(3, 2), torch.amp.GradScaler("cpu")
    optimizer, before = torch.optim.AdamW(model.parameters(), weight_decay=0.1), copy.deepcopy(model.state_dict())
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0), passed={}, skips=1, fault="the loss is nan",
        accelerator=SimpleNamespace(scaler=scaler),
    )  # fmt: skip
    Safe._pass_over(cast(Safe, trainer), model)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.passed == {1: "the loss is nan"}


@pytest.mark.parametrize("grad", [None, torch.full((2, 3), torch.nan)], ids=["none", "nan"])
def test_adalora_does_nothing_in_a_step_that_is_passed_over(grad):
    """PEFT multiplies parameters by their gradients, which are not there, or stay NaN in its means."""
    asked, model = [], nn.Module()
    model.lora_A, model.base_model = nn.Parameter(torch.ones(2, 3)), nn.Module()
    model.base_model.update_and_allocate = asked.append
    model.peft_config = {"default": SimpleNamespace(orth_reg_weight=0.5)}
    for value, steps in ((grad, []), (torch.ones(2, 3), [8])):
        model.lora_A.grad = None if value is None else value.clone()
        callback, state = Allocation(), SimpleNamespace(global_step=7)
        callback.on_pre_optimizer_step(None, state, None, model=model)
        callback.on_optimizer_step(None, state, None, model=model)
        assert asked == steps
        assert (model.lora_A.grad is None) == (value is None)


def test_a_run_that_goes_on_passes_over_no_more_steps(tiny, records, tmp_path, monkeypatch):
    fault = Safe._find_fault

    def faulty(self, model, inputs, loss, last):
        return "made up" if self.state.global_step + 1 in (2, 4) else fault(self, model, inputs, loss, last)

    monkeypatch.setattr(Safe, "_find_fault", faulty)
    run = stopped(made(tiny, records, tmp_path / "run", skip_nan=1), monkeypatch, 2)
    with pytest.raises(ValueError, match="step 4: made up"):
        resume(run)


@pytest.mark.parametrize("every", [0, 1])
def test_what_holds_inf_after_the_last_step_is_not_kept(every, tiny, records, tmp_path, monkeypatch):
    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(p for n, p in model.named_parameters() if p.requires_grad).data[0] = torch.inf

    monkeypatch.setattr(RunProgress, "on_step_end", spoil, raising=False)
    last = "the checkpoint of step 1 is untouched" if every else "there is no checkpoint"
    with pytest.raises(ValueError, match=rf"step 2: .*layers\.0.* holds NaN or Inf; {last}"):
        train(made(tiny, records, tmp_path / "run", steps=2, save_every=every), SILENT)
    assert not (tmp_path / "run" / "adapter").exists()


# One process at a time


def test_a_run_folder_has_one_process(tiny, records, cut, tmp_path, capsys):
    with locked(cut):
        assert "in use by another process" in fails(capsys, "train", "--resume", str(cut))
        flags = ["--model", tiny, "--data", records, "--output", str(cut), "--overwrite"]
        assert "in use by another process" in fails(capsys, "train", *flags)
    assert not (tmp_path / ".run.lock").exists()


def test_a_killed_process_holds_nothing(tmp_path):
    hold = "import sys, time; from pathlib import Path; from inlay.files.atomic import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use"), locked(tmp_path / "run"):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    assert (tmp_path / ".run.lock").exists()
    with locked(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_holds_nothing_by_the_workers_that_outlive_it(tmp_path):
    """The workers of a data loader are forked, and notice after seconds that nobody asks them any more."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(tmp_path / "run"):
            if (worker := os.fork()) == 0:
                time.sleep(600)
            os.write(write, str(worker).encode())
            time.sleep(600)
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(ValueError, match="in use"), locked(tmp_path / "run"):
            pass
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.kill(worker, 0)  # it lives
        with locked(tmp_path / "run"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_a_worker_that_ends_leaves_the_lock_to_its_parent(tmp_path):
    with locked(tmp_path / "run"):
        if (worker := os.fork()) == 0:
            with contextlib.suppress(ValueError), locked(tmp_path / "run"):
                os._exit(1)
            os._exit(0)
        assert os.waitpid(worker, 0)[1] == 0
        with pytest.raises(ValueError, match="in use"), locked(tmp_path / "run"):
            pass


def test_a_folder_that_is_written_whole_has_one_process_and_keeps_nothing_of_a_killed_one(tmp_path):
    out = tmp_path / "merged [1]"
    for left in (".part", ".old"):
        (tmp_path / f".{out.name}.abcdefgh{left}").mkdir()
    (tmp_path / f".{out.name}s.abcdefgh.part").mkdir()  # another folder's
    with new_folder(out) as part:
        (part / "mark").touch()
        with pytest.raises(ValueError, match="in use by another process"), new_folder(out):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".{out.name}s.abcdefgh.part", out.name]
    with new_folder(out, overwrite=True, marker="mark") as part:
        (part / "second").touch()
    assert [p.name for p in out.iterdir()] == ["second"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_has_one_lock_by_whatever_name(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    with locked(tmp_path / "run"):
        for name in (tmp_path / "link", Path()):
            with pytest.raises(ValueError, match="in use by another process"), locked(name):
                pass


@pytest.mark.parametrize("killed", [False, True])
def test_what_is_replaced_is_lost_only_when_something_is_in_its_place(killed, tmp_path, monkeypatch):
    """Where the second rename fails, and where a process dies before it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mark").write_text("old")
    if killed:
        set_aside(out)
    else:

        def fail(*_):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, "replace", fail)
            with pytest.raises(OSError, match="Input/output"), new_folder(out, overwrite=True, marker="mark"):
                pass
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="out exists"), new_folder(out):
        pass
    assert (out / "mark").read_text() == "old"
    with new_folder(out, overwrite=True, marker="mark"):
        pass
    assert [*tmp_path.iterdir()] == [out]


def test_folders_have_the_rights_that_the_user_gives(tmp_path):
    for umask in (0o077, 0o022):
        before = os.umask(umask)
        try:
            with new_folder(tmp_path / str(umask)):
                pass
        finally:
            os.umask(before)
        assert (tmp_path / str(umask)).stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_folder_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(atomic, "sync", lambda path: seen.append(path.relative_to(tmp_path).parts[1:]))
    with new_folder(tmp_path / "out") as part:
        (part / "a").mkdir()
        (part / "a" / "b").touch()
    assert seen == [("a",), ("a", "b"), (), ()]


def test_nothing_is_written_through_a_link(cut, tmp_path, capsys):
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / ".text.part").symlink_to("precious")
    write_text(tmp_path / "text", "new")
    assert not (tmp_path / "text").is_symlink()
    (cut / "plots").symlink_to(tmp_path)
    assert "plots is a link" in fails(capsys, "train", "--resume", str(cut))
    assert (tmp_path / "precious").read_text() == "as it was"


def test_gradients_that_are_not_finite_are_named():
    """Also beside a parameter of which a process holds no part, and where there is no gradient at all."""
    net = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(3)), "none": torch.nn.Parameter(torch.ones(0))})
    assert bad_gradients(net) == []
    net["a"].grad, net["none"].grad = torch.ones(3), torch.ones(0)
    assert bad_gradients(net) == []
    net["a"].grad[1] = torch.inf
    assert bad_gradients(net) == ["a"]
