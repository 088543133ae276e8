"""Write checkpoints that are whole or absent, and find the one that a run resumes from.

transformers writes a checkpoint file by file. Here it does so in a staging folder; then comes a manifest with the
SHA-256 of every file, everything is flushed to the disk, and one rename puts it in its place. The optimiser, scheduler
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
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from inlay.data.chat_templates import template_text
from inlay.files.atomic import sync, sync_all
from inlay.files.untrusted import DamagedFileError, read_regular, regular_file
from inlay.host import distributed, seal
from inlay.host.layer import PREFIX, InlayLinear
from inlay.messages import first_line, gib, short
from inlay.models.base import BaseModel
from inlay.recipe.named_code import code_digests
from inlay.recipe.recipe import Recipe
from inlay.reports.result import environment

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
FORMAT = 1
# Fields that do not affect training.
FREE = {"imports", "output", "overwrite", "save_every", "report_to", "push_to_hub"}


@dataclass(frozen=True)
class Checkpoint:
    """Describe a whole checkpoint: its step, whether it ended the training, and the run it belongs to."""

    path: Path
    step: int
    over: bool
    run: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps that have checkpoints, whole or not, the newest first."""
    numbers = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)


@contextmanager
def staged_checkpoint(folder: Path, step: int, over: bool, run: dict[str, Any]) -> Iterator[Path]:
    """Yield a staging folder in which the block leaves a checkpoint.

    When all processes have written their parts, the first one adds the run's metrics, seals the checkpoint and moves
    it.

    Args:
        folder: of the checkpoints.
        step: of the checkpoint.
        over: whether it ends the training.
        run: identifies the run.

    Raises:
        ValueError: it could not be written; earlier checkpoints are untouched.
    """
    part = folder / ".part"
    final = path_of(folder, step)
    staged = part / final.name
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
        (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle that could run code when read
        shutil.copyfile(folder.parent / METRICS, staged / METRICS)
        about = {"format": FORMAT, "step": step, "over": over, "run": run, "files": digests(staged)}
        (staged / MANIFEST).write_text(json.dumps({**about, "seal": seal.of_values(about)}, indent=1), encoding="utf-8")
        sync_all(staged)
        shutil.rmtree(final, ignore_errors=True)  # damaged, else the run would not have reached this step again
        os.replace(staged, final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if distributed.lost(error):
            raise
        free = gib(shutil.disk_usage(folder.parent).free)
        raise ValueError(
            f"{final} cannot be written, with {free} free on its disk ({first_line(error)}); earlier ones are intact"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def rotate(folder: Path, step: int, limit: int | None, best: int | None) -> None:
    """Remove all checkpoints up to `step` but the newest `limit` and the best."""
    earlier = [number for number in checkpoint_steps(folder) if number <= step]
    for number in earlier[limit or len(earlier) :]:
        if number != best:
            shutil.rmtree(path_of(folder, number), ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder` but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    sums: dict[str, str] = {}
    for path in files:
        with regular_file(path).open("rb") as file:
            sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, checking every byte of it.

    Raises:
        ValueError: it is not whole.
    """
    try:
        if not (path / MANIFEST).is_file():  # a device would never end
            raise ValueError
        about = json.loads(read_regular(path / MANIFEST))
        written_seal = about.pop("seal")
        if written_seal != seal.of_values(about) or about["format"] != FORMAT:
            raise ValueError
        files = about["files"]
        checkpoint = Checkpoint(path, about["step"], about["over"], about["run"])
        parts = [files, *(checkpoint.run[part] for part in ("recipe", "identity", "versions"))]
        parts.append(checkpoint.run.get("configuration", {}))  # which older checkpoints do not have
        if path.name != f"checkpoint-{checkpoint.step!r}" or not all(isinstance(part, dict) for part in parts):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError(f"{path} is not whole: its {MANIFEST} is missing or damaged") from None
    now = digests(path)
    if changed := sorted(name for name in files.keys() | now.keys() if files.get(name) != now.get(name)):
        names = [name if name.isprintable() and len(name) < 60 else short(name) for name in changed[:5]]
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise DamagedFileError(f"{path} is not whole: {', '.join(names)}{more} is not what was written")
    return checkpoint


def newest(folder: Path, console: Console) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, and print why each newer one was skipped."""
    for step in checkpoint_steps(folder):
        try:
            return read_checkpoint(path_of(folder, step))
        except (OSError, ValueError) as error:  # or a file of it that cannot be read
            console.print(f"{error}; it is skipped", style="yellow", markup=False, highlight=False)
    return None


def learning_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe that affect training, as JSON gives them back."""
    return json.loads(json.dumps({k: v for k, v in asdict(recipe).items() if k not in FREE}))


def base_mark(base: nn.Module) -> str:
    """Return a digest of every weight of a model as it was loaded, without the adapter that a fold has put there."""
    adapted = isinstance(base, PeftModel)
    kept = {n: p.data for n, p in base.named_parameters() if not (adapted and (p.requires_grad or PREFIX in n))}
    byte = torch.uint8
    sums = {n: seal.sums(t.flatten().view(byte), byte) for n, t in kept.items() if not t.is_meta}
    return seal.of_values({n: [*kept[n].shape, digest] for n, digest in sums.items()})


def configuration(base: BaseModel) -> dict[str, Any]:
    """Return the configuration of a base as JSON gives it back, by names that say that it is the base's.

    It is without what every release of transformers writes anew.
    """
    values = json.loads(base.config().to_json_string(use_diff=False))
    return {f"the base's {k}": v for k, v in values.items() if k not in ("transformers_version", "_name_or_path")}


def run_identity(
    trainer: Any, rows: Any, recipe: Recipe, processor: PreTrainedTokenizerBase | ProcessorMixin
) -> dict[str, Any]:
    """Return what a recipe names but does not hold: data, tokenizer, code, the base's weights, the batch in all.

    Args:
        trainer: of the run.
        rows: its examples.
        recipe: what is trained and how.
        processor: the tokenizer; where the model sees images, what holds it.
    """
    digest, held = hashlib.sha256(), hashlib.sha256()
    for row in rows.heldout:
        held.update(json.dumps(row, sort_keys=True, default=str).encode())
    first = next(iter(trainer.train_dataset))  # tokenised, with the chat template
    for row in (*rows.train, *rows.heldout, first, *rows.shards):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    layers = {n: m for n, m in trainer.model.named_modules() if isinstance(m, InlayLinear)}
    args = trainer.args
    template = template_text(cast(Any, processor).chat_template or "")
    tokenizer = cast(Any, processor).tokenizer if isinstance(processor, ProcessorMixin) else processor
    words = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return {
        "the number of examples": len(rows.train),
        "the number of held-out examples": len(rows.heldout),
        "the held-out data": held.hexdigest()[:16],
        "data": digest.hexdigest()[:16],
        "the chat template": hashlib.sha256(template.encode()).hexdigest()[:16],
        "the vocabulary": words.hexdigest()[:16],
        **code_digests(recipe),
        "base": seal.of_values({n: m.base_mark(m.cuts["default"].folded) for n, m in layers.items()}),
        "whole base": trainer.base,
        "effective batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
    }


def check_same(checkpoint: Checkpoint, part: str, now: dict[str, Any]) -> None:
    """Raise a ValueError that names the differences between a checkpoint's run and the current one.

    A configuration is compared by what both releases of transformers know of it, if these differ.
    """
    then = {key: value for key, value in checkpoint.run.get(part, {}).items() if key not in divided_batch(checkpoint)}
    if part == "configuration":
        then = {key: then[key] for key in sorted(then.keys() & now.keys())}
    changed = [f"{key} was {then[key]!r} and is {now.get(key)!r}" for key in then if then[key] != now.get(key)]
    if changed:
        fix = "start a new run for that"
        if changed[0].startswith("effective batch"):
            count = distributed.process_count()
            fix = f"choose --batch-size and --accumulation so that, times {count} processes, they give the same"
        raise ValueError(f"{checkpoint.path} is of another run: {'; '.join(changed)}; {fix}")


def divided_batch(checkpoint: Checkpoint) -> set[str]:
    """Return the fields that may differ when another number of processes resumes, dividing the effective batch anew."""
    same = checkpoint.run["identity"].get("processes", 1) == distributed.process_count()
    return set() if same else {"batch_size", "accumulation", "processes"}


def versions_changed(checkpoint: Checkpoint) -> list[str]:
    """Return the libraries whose versions differ from the checkpoint's, with which bits may differ."""
    now = environment()
    return [f"{name} {old} (now {now.get(name)})" for name, old in checkpoint.run["versions"].items()
            if now.get(name) != old]  # fmt: skip
