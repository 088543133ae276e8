"""Manage the folder of a run: its start, what is kept after a failure, what is removed at the end."""

from __future__ import annotations

import shutil
from pathlib import Path

from inlay.files.atomic import put_back, remove_siblings, staged, write_text
from inlay.recipe.recipe import Recipe
from inlay.training import checkpoints

KEPT = ("adapter", "model")  # where a run leaves what it trained, see `Recipe.kept`
MARK = ".inlay-run"  # marks a folder as a run of Inlay's, which --overwrite may replace


def start_folder(folder: Path, recipe: Recipe) -> None:
    """Create the run folder with its recipe, in place of one that is set aside."""
    try:
        with staged(folder) as part:
            (part / MARK).touch()
            write_text(part / "recipe.yaml", recipe.to_yaml())
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None


def give_up(folder: Path) -> bool:
    """Return, after a failure, whether the folder is kept for its checkpoints; else restore what was there before.

    A folder that holds a trained adapter or model is never removed.
    """
    if checkpoints.checkpoint_steps(folder / checkpoints.FOLDER):
        return True
    if any((folder / kept).is_dir() for kept in KEPT):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    put_back(folder)
    return False


def tidy(folder: Path) -> None:
    """Remove the run that this one replaces, and half-written files of processes that were killed."""
    remove_siblings(folder, "old")
    remove_siblings(folder, "part")
    for path in folder.rglob(".*part"):
        if path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
