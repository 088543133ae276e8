"""Checkpoints that are whole or not there, and what a run may go on from.

transformers writes a checkpoint file by file. Here it does so in a staging folder; then comes a manifest with the
SHA-256 of every file, all of it is flushed to the disk, and one rename puts it in its place. The optimiser, scheduler
and RNG files are transformers' own: pickles, which it reads with `weights_only`, so that none can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

from inlay.files.atomic import sync, sync_all
from inlay.files.untrusted import DamagedFileError
from inlay.host import distributed, seal
from inlay.host.layer import PREFIX, InlayLinear
from inlay.messages import first_line, gib, short
from inlay.recipe.recipe import Recipe
from inlay.reports.result import environment

FOLDER, MANIFEST, METRICS, FORMAT = "checkpoints", "manifest.json", "metrics.jsonl", 1
FREE = {"output", "overwrite", "save_every", "report_to", "push_to_hub"}  # fields that do not change what is learned


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole: its step, whether the training was over with it, and of what run it is."""

    path: Path
    step: int
    over: bool
    run: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return folder / f"checkpoint-{step}"


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints, whole or not, the newest first."""
    numbers = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)


@contextmanager
def staged_checkpoint(folder: Path, step: int, over: bool, run: dict[str, Any]) -> Iterator[Path]:
    """A staging folder, in which the block leaves a checkpoint; it and the run's metrics are then sealed and moved, by
    the first process, when what the others write there is whole.

    Raises:
        ValueError: it could not be written; the checkpoints before it are untouched.
    """
    part, final = folder / ".part", path_of(folder, step)
    made = part / final.name
    if not distributed.is_first():
        distributed.wait_for_all()
        yield part
        distributed.wait_for_all()
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        distributed.wait_for_all()
        yield part
        distributed.wait_for_all()
        (made / "training_args.bin").unlink(missing_ok=True)  # a pickle that only code could read
        shutil.copyfile(folder.parent / METRICS, made / METRICS)
        about = {"format": FORMAT, "step": step, "over": over, "run": run, "files": digests(made)}
        (made / MANIFEST).write_text(json.dumps({**about, "seal": seal.of_values(about)}, indent=1), encoding="utf-8")
        sync_all(made)
        shutil.rmtree(final, ignore_errors=True)  # not whole, or the run would not have come to its step again
        os.replace(made, final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if distributed.lost(error):
            raise
        free = gib(shutil.disk_usage(folder.parent).free)
        raise ValueError(
            f"{final} cannot be written, with {free} free on its disk ({first_line(error)}); those before it are whole"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def rotate(folder: Path, step: int, limit: int | None, best: int | None) -> None:
    """Remove all but the newest `limit` checkpoints up to a step, and the best."""
    mine = [number for number in checkpoint_steps(folder) if number <= step]
    for number in mine[limit or len(mine) :]:
        if number != best:
            shutil.rmtree(path_of(folder, number), ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    made = {}
    for path in files:
        with path.open("rb") as file:
            made[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return made


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, every byte of it checked.

    Raises:
        ValueError: it is not whole.
    """
    try:
        if not (path / MANIFEST).is_file():  # it may be what has no end
            raise ValueError
        about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        mark = about.pop("seal")
        if mark != seal.of_values(about) or about["format"] != FORMAT:
            raise ValueError
        files, found = about["files"], Checkpoint(path, about["step"], about["over"], about["run"])
        parts = [files, *(found.run[part] for part in ("recipe", "identity", "versions"))]
        if path.name != f"checkpoint-{found.step!r}" or not all(isinstance(part, dict) for part in parts):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError(f"{path} is not whole: its {MANIFEST} is missing or damaged") from None
    there = digests(path)
    if changed := sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name)):
        names = [name if name.isprintable() and len(name) < 60 else short(name) for name in changed[:5]]
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise DamagedFileError(f"{path} is not whole: {', '.join(names)}{more} is not what was written")
    return found


def newest(folder: Path, console: Console) -> Checkpoint | None:
    """The newest checkpoint that is whole; of each one passed over it is said why."""
    for step in checkpoint_steps(folder):
        try:
            return read_checkpoint(path_of(folder, step))
        except (OSError, ValueError) as error:  # a file of it that cannot be read, too
            console.print(f"{error}; it is passed over", style="yellow", markup=False, highlight=False)
    return None


def learning_settings(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe changes what is learned, as JSON gives it back."""
    return json.loads(json.dumps({k: v for k, v in asdict(recipe).items() if k not in FREE}))


def base_mark(base: nn.Module) -> str:
    """A digest of every weight of a model as it was loaded, but for those of an adapter that a fold has put there."""
    own = isinstance(base, PeftModel)
    kept = {n: p.data for n, p in base.named_parameters() if not (own and (p.requires_grad or PREFIX in n))}
    byte = torch.uint8
    sums = {n: seal.sums(t.flatten().view(byte), byte) for n, t in kept.items() if not t.is_meta}
    return seal.of_values({n: [*kept[n].shape, digest] for n, digest in sums.items()})


def run_identity(trainer: Any, rows: Any) -> dict[str, Any]:
    """What a recipe names but does not hold: the data, the base's weights, the batch over all devices."""
    digest = hashlib.sha256()
    first = next(iter(trainer.train_dataset))  # as tokenised, with the template
    for row in (*rows.train, *rows.heldout, first, *rows.shards):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    layers = {n: m for n, m in trainer.model.named_modules() if isinstance(m, InlayLinear)}
    args = trainer.args
    return {
        "data": digest.hexdigest()[:16],
        "base": seal.of_values({n: m.base_mark(m.cuts["default"].folded) for n, m in layers.items()}),
        "whole base": trainer.base,
        "effective batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
    }


def check_same(found: Checkpoint, part: str, now: dict[str, Any]) -> None:
    """Raise a ValueError that names the differences between what a checkpoint was made with and what there is now."""
    then = {key: value for key, value in found.run[part].items() if key not in divided_batch(found)}
    changed = [f"{key} was {then[key]!r} and is {now.get(key)!r}" for key in then if then[key] != now.get(key)]
    if changed:
        way = "start a new run for that"
        if changed[0].startswith("effective batch"):
            count = distributed.process_count()
            way = f"choose --batch-size and --accumulation so that, times {count} processes, they give it"
        raise ValueError(f"{found.path} is of another run: {'; '.join(changed)}; {way}")


def divided_batch(found: Checkpoint) -> set[str]:
    """What may differ where other than so many processes go on: how they divide the effective batch among them."""
    same = found.run["identity"].get("processes", 1) == distributed.process_count()
    return set() if same else {"batch_size", "accumulation", "processes"}


def versions_changed(found: Checkpoint) -> list[str]:
    """The libraries that are not those a checkpoint was made with: with others, bits may differ."""
    now = environment()
    return [f"{name} {old} (now {now.get(name)})" for name, old in found.run["versions"].items()
            if now.get(name) != old]  # fmt: skip
