"""Once it is in place, a trained adapter stays, whatever fails afterwards."""

from pathlib import Path

import pytest
from helpers import fails
from rich.console import Console
from safetensors.torch import load_file

from inlay.cli import main
from inlay.recipe.recipe import Recipe
from inlay.training import run_files
from inlay.training.tasks import TASKS
from inlay.training.train import train
from inlay.training.trainers.trainer import Trainer

SILENT = Console(quiet=True)


@pytest.fixture
def words(tiny, records, tmp_path) -> list[str]:
    """A run of one step without checkpoints, as a command."""
    flags = ["--steps", "1", "--eval-size", "4", "--samples", "1", "--save-every", "0", "--dtype", "float32"]
    return ["train", "--model", tiny, "--data", records, "--output", str(tmp_path / "run"), *flags]


FULL = OSError(28, "No space left on device")
STEPS = {  # what follows the training, where it is done, at which time after it, and how it fails
    "evaluate": ("evaluate", Trainer, 2, RuntimeError("no memory")),
    "answers": ("answers", type(TASKS["instruction"]), 2, RuntimeError("no memory")),
    "card": ("model_card", run_files, 1, KeyError("no name")),
    "samples": ("samples_text", run_files, 1, FULL),
    "plots": ("draw_change_plots", run_files, 1, RuntimeError("no font")),
    "report": ("run_page", run_files, 1, FULL),
}


def saved(run: Path) -> bool:
    return bool(load_file(run / "adapter" / "adapter_model.safetensors"))


def fail_in(monkeypatch, step: str, other: BaseException | None = None) -> BaseException:
    """Let one of `STEPS` fail, with its error or another one."""
    name, owner, which, error = STEPS[step]
    error = other or error
    real, count = getattr(owner, name), [0]

    def failing(*arguments, **options):
        count[0] += 1
        if count[0] == which:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    return error


@pytest.mark.parametrize("step", STEPS)
def test_what_fails_after_the_training_leaves_the_adapter(step, words, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        error = fail_in(patch, step)
        with pytest.raises(SystemExit) as end:
            main(words)
    said = capsys.readouterr().err
    assert end.value.code == 3
    assert (
        f"{tmp_path}/run/adapter is trained and saved; its samples, its plots or its report could not be made" in said
    )
    assert str(error) in said
    assert len(said.strip().splitlines()) == 1
    assert saved(tmp_path / "run")
    assert "no checkpoint to go on from; use it as it is" in fails(capsys, "train", "--resume", str(tmp_path / "run"))
    assert saved(tmp_path / "run")


@pytest.mark.parametrize("step", ["answers", "samples"])
def test_with_checkpoints_the_rest_is_made_by_resuming(step, words, tmp_path, monkeypatch, capsys):
    words[words.index("--save-every") + 1] = "1"
    with monkeypatch.context() as patch:
        fail_in(patch, step)
        with pytest.raises(SystemExit) as end:
            main(words)
    assert end.value.code == 3
    assert saved(tmp_path / "run")
    capsys.readouterr()
    main(["train", "--resume", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.html").exists()
    assert "**after**" in (tmp_path / "run" / "samples.md").read_text()


@pytest.mark.parametrize("every", ["0", "1"])
def test_an_upload_that_fails_is_made_again_by_resuming(every, words, tmp_path, monkeypatch, capsys):
    uploads = []

    class Hub:
        def create_repo(self, *_, **__): ...

        def upload_folder(self, repo_id, folder_path):
            uploads.append(folder_path)
            if len(uploads) == 1:
                raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("inlay.training.hub.offline", lambda: False)
    words[words.index("--save-every") + 1] = every
    with pytest.raises(SystemExit) as end:
        main([*words, "--push-to-hub", "me/it"])
    assert end.value.code == 3
    folder = str(tmp_path / "run" / "adapter")
    assert f"upload to me/it failed (the run is in {folder}): no route to the hub" in capsys.readouterr().err
    assert saved(tmp_path / "run")
    main(["train", "--resume", str(tmp_path / "run")])
    assert uploads == [folder, folder]
    assert saved(tmp_path / "run")


def test_ctrl_c_after_the_training_leaves_the_adapter(words, tmp_path, monkeypatch, capsys):
    fail_in(monkeypatch, "answers", KeyboardInterrupt())
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 130
    assert saved(tmp_path / "run")


def test_a_dollar_in_the_name_of_a_model_is_a_dollar_in_its_plots(tiny, records, tmp_path, painted):
    (tmp_path / "a$b_{$").symlink_to(tiny, target_is_directory=True)
    recipe = Recipe(
        model=str(tmp_path / "a$b_{$"), data=records, output=str(tmp_path / "run"), steps=1, eval_size=4, samples=0
    )
    with painted():
        train(recipe, SILENT)
    assert (tmp_path / "run" / "report.html").exists()
