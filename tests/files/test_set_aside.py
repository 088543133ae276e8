"""What `--overwrite` sets aside: it is there until something is in its place, and every command finds it again."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import fails
from rich.console import Console
from safetensors.torch import save_file

from inlay.cli import main
from inlay.experiments import runner
from inlay.experiments.runner import ORIGIN, experiment_folder
from inlay.experiments.trial import TRIAL, end_with_parent
from inlay.files import atomic
from inlay.files.atomic import find_again, locked, new_folder, set_aside
from inlay.recipe.recipe import Recipe
from inlay.training import live_page
from inlay.training.train import train

SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tiny, records, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    short = {"steps": 2, "save_every": 1, "eval_size": 4, "samples": 0, "method": "lora"}
    train(Recipe(model=tiny, data=records, output=str(folder), **short), SILENT)
    return folder


@pytest.fixture
def aside(run, tmp_path) -> Path:
    """A copy of a run that is set aside by a process that was killed before it put another in its place."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    set_aside(folder)
    assert not folder.exists()
    return folder


@pytest.mark.parametrize("words", [
    ["train", "--resume", "RUN"], ["generate", "RUN", "--prompt", "a", "--tokens", "1"],
    ["generate", "RUN/adapter", "--prompt", "a", "--tokens", "1"], ["export", "RUN", "OUT"],
    ["merge", "RUN", "OUT", "--no-probe"], ["inspect", "RUN"],
    ["eval", "RUN", "--task", "exact", "--data", "RECORDS", "--limit", "1", "--tokens", "1"],
    ["train", "RUN/recipe.yaml", "--dry-run", "--output", "OUT"],
], ids=lambda words: " ".join(words[:2]))  # fmt: skip
def test_a_run_that_was_set_aside_is_found_by_every_command(words, aside, records, tmp_path, capsys):
    names = {"RUN": str(aside), "OUT": str(tmp_path / "out"), "RECORDS": records}
    main([word.replace("RUN", names["RUN"]) if word.startswith("RUN") else names.get(word, word) for word in words])
    assert (aside / "report.html").exists()
    assert not list(tmp_path.glob(".*"))


def test_import_finds_it_too(aside, tmp_path, capsys):
    assert "adapter is an Inlay adapter already" in fails(capsys, "import", str(aside), str(tmp_path / "out"))
    assert aside.exists()


def test_a_run_that_has_begun_to_replace_another_says_where_that_is(aside, tmp_path, capsys):
    """A process was killed after it had put the new run in its place, before it was trained."""
    aside.mkdir()
    (old,) = tmp_path.glob(".run.????????.old")
    says = f"run/adapter/ is there; what it is to replace is in {old} until it is finished"
    assert says in fails(capsys, "export", str(aside), str(tmp_path / "out"))


def test_a_folder_of_full_fine_tuning_is_found_as_a_model(run, tiny, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copytree(tiny, folder / "model")
    set_aside(folder)
    main(["generate", "--model", str(folder), "--prompt", "a", "--tokens", "1"])
    assert folder.exists()


def test_runs_that_were_set_aside_are_on_the_page(aside, monkeypatch):
    class Program:
        TensorBoardServerException = OSError

        def TensorBoard(self, **_):
            raise KeyboardInterrupt

    seen = []
    look = live_page.Follower.look
    monkeypatch.setattr(live_page, "board", lambda: Program())
    monkeypatch.setattr(live_page.Follower, "look", lambda self: (look(self), seen.extend(self.known)))
    with pytest.raises(KeyboardInterrupt):
        live_page.serve(str(aside.parent), console=SILENT)
    assert [path.relative_to(aside.parent).as_posix() for path in seen] == ["run/metrics.jsonl"]


def test_what_a_living_process_set_aside_is_left_to_it(aside):
    with locked(aside):
        assert find_again(aside) == aside
        assert not aside.exists()
    find_again(aside / "adapter")
    assert aside.exists()
    for path in (Path("no such/folder"), Path("/no such"), Path("a" * 500), Path("\0")):
        assert find_again(path) == path


# -- compare and tune -------------------------------------------------------------------------------------------------


def opened(folder: Path, text: str = "new", overwrite: bool = False):
    return experiment_folder(folder, folder / "compare.yaml", text, {"data": "d"}, overwrite, "comparison")


@pytest.fixture
def old(tmp_path) -> Path:
    with opened(tmp_path / "c", "old"):
        (tmp_path / "c" / "results.csv").touch()
    return tmp_path / "c"


def left(folder: Path) -> dict[str, str]:
    """What a folder holds, and its hidden neighbours by their ends."""
    found = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    return found | {path.suffix: "" for path in folder.parent.iterdir() if path.name.startswith(".")}


OLD = {"compare.yaml": "old", ORIGIN: '{"data": "d"}', "results.csv": ""}


@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_comparison_killed_while_it_begins_leaves_the_old_or_a_whole_new_one(write, old, monkeypatch):
    """It dies before the first file, between the two, and before they are moved to their place."""
    pid = os.fork()
    if pid == 0:
        count = [0]

        def die(*_):
            count[0] += 1
            if count[0] == write:
                os.kill(os.getpid(), signal.SIGKILL)

        for module, name in ((runner, "write_text"), (atomic, "set_aside")):
            real = getattr(module, name)
            setattr(module, name, lambda *args, real=real: (die(), real(*args)))
        with locked(old), opened(old, overwrite=True):
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert left(old) == {**OLD, ".part": "", ".lock": ""}
    with locked(old), opened(old, overwrite=True):
        assert left(old) == {"compare.yaml": "new", ORIGIN: '{"data": "d"}', ".old": "", ".lock": ""}
    assert left(old) == {"compare.yaml": "new", ORIGIN: '{"data": "d"}'}


def test_a_comparison_killed_before_it_is_in_its_place_is_found_again(old):
    set_aside(old)
    with pytest.raises(ValueError, match="holds another comparison"), opened(old):
        pass
    assert left(old) == OLD
    set_aside(old)
    with opened(old, "old"):  # the same command as before
        assert left(old) == OLD


def begin_a_run(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / TRIAL).touch()
    raise KeyboardInterrupt


def test_old_results_are_there_until_new_ones_are(old):
    """They come back where nothing was run; once a run has begun, both are kept until the new ones are whole."""
    with pytest.raises(KeyboardInterrupt), opened(old, overwrite=True):
        raise KeyboardInterrupt
    assert left(old) == OLD
    with pytest.raises(KeyboardInterrupt), opened(old, overwrite=True):
        begin_a_run(old)
    assert left(old) == {"compare.yaml": "new", ORIGIN: '{"data": "d"}', ".old": ""}
    assert list(old.parent.glob(".c.????????.old/c/results.csv"))
    with opened(old):
        assert (old / "runs" / TRIAL).exists()
    assert left(old) == {"compare.yaml": "new", ORIGIN: '{"data": "d"}'}


@pytest.mark.parametrize("verb", ["compare", "tune"])
def test_compare_and_tune_begin_in_such_a_folder(verb, tiny, records, tmp_path, monkeypatch, capsys):
    if verb == "tune":
        pytest.importorskip("optuna", reason="Optuna is not installed")
    blocks = {
        "compare": {"methods": ["lora"], "learning_rates": [1e-3], "seeds": [0], "selection": 4},
        "tune": {"space": {"dropout": {"choices": [0.0, 0.1]}}, "trials": 1, "selection": 4},
    }
    short = {"model": tiny, "data": records, "steps": 2, "batch_size": 4, "eval_size": 4, "dtype": "float32"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**short, "method": "lora", verb: blocks[verb]}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{verb}.yaml").write_text("another")
    (tmp_path / "out" / "results.csv").write_text("precious")
    begun = []

    def wait(self, folder, bar):
        begun.append(list(tmp_path.glob(".out.????????.old/out/results.csv")))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Runner, "wait", wait)
    with pytest.raises(SystemExit) as end:
        main([verb, str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out"), "--overwrite"])
    assert end.value.code == 130
    ((precious,),) = begun
    assert precious.read_text() == "precious"
    assert "dropout" in (tmp_path / "out" / f"{verb}.yaml").read_text() or verb == "compare"
    set_aside(tmp_path / "out")  # and the next start finds the unfinished one
    with pytest.raises(SystemExit) as end:
        main([verb, str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out")])
    assert end.value.code == 130
    assert len(begun) == 2


def test_a_trial_ends_with_the_process_that_began_it(tmp_path):
    """At once, and not after its next step: another start would run it in the same folder."""
    context = multiprocessing.get_context("fork")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        trial = context.Process(target=end_with_parent)
        trial.start()
        os.write(write, str(trial.pid).encode())
        time.sleep(600)
    trial = int(os.read(read, 20))
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    end = time.monotonic() + 60
    while Path(f"/proc/{trial}").exists() and "Z" not in Path(f"/proc/{trial}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.1)
    os.close(read)
    os.close(write)


def rust_error():
    """What safetensors says of a disk that is full; a limit on the size of files is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        save_file({"a": torch.zeros(9_000)}, "large.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded"), rust_error,
    Exception("No space left on device (os error 28)"),
], ids=lambda error: getattr(error, "__name__", repr(error)))  # fmt: skip
def test_a_disk_that_is_full_is_one_line_wherever_a_folder_is_written(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mark").touch()
    full = pytest.raises(ValueError, match=r"out cannot be written, with .* MiB free on its disk")
    with full, new_folder(tmp_path / "out", True, "mark") as part:
        (part / "half").touch()
        error() if callable(error) else (_ for _ in ()).throw(error)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mark"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_disk_that_is_full_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(OSError, match=r"large\.json"):
            atomic.write_text(tmp_path / "large.json", "a" * 9_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
