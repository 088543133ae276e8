"""Before a run: the examples it learns from, the model without memory, and what both will need."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.folding import fold
from inlay.workbench import data, kinds, memory, models, ranks, stream
from inlay.workbench.checkpoints import Checkpoint
from inlay.workbench.files import check_free
from inlay.workbench.peft_methods import FULL, without_start
from inlay.workbench.plan import Run
from inlay.workbench.recipe import Recipe

LOOKED_AT = 1000  # examples of a stream that are audited
TOKENS = "\nfirst example, the tokens that are learned from in ⟦⟧:"
MARK = ".inlay-run"  # what makes a folder a run of ours, which --overwrite may replace


@dataclass
class Examples:
    """Training and held-out examples, and what was found about them. Of a `stream`, `train` is the beginning, and
    `shards` its files with their sizes."""

    train: list[dict]
    heldout: list[dict]
    audit: data.Audit
    labels: list[str] | None = None  # of a classification
    stream: IterableDataset | None = None
    shards: tuple[tuple[str, int], ...] = ()


def examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
    """Read, split and audit a recipe's data; what cannot be learned from is counted and said."""
    source = None
    if recipe.streaming:
        train, held, source = streamed(recipe)
    else:
        train, held = halves(recipe, lambda records: data.examples(records, recipe.columns or None, recipe.system))
    audit = data.audit(train, tokenizer, recipe.max_length)
    count = str(len(train)) if source is None else f"a stream, looked at {len(train)}"
    console.print(f"{count} examples to train on, {len(held)} held out; longest {audit.longest} tokens")
    if audit.cut or audit.masked:
        console.print(
            f"{audit.cut} answers are cut off at max_length={recipe.max_length}, "
            f"{audit.masked} of them wholly (those are left out); raise --max-length to keep them",
            style="yellow",
        )
    if audit.shifted:
        console.print(
            f"in {audit.shifted} examples the prompt's last tokens merge with the answer's first; end prompts "
            "on a word or a line to have the model answer from what it was trained on",
            style="yellow",
        )
    if audit.masked == audit.total:
        raise ValueError(f"no example keeps an answer within max_length={recipe.max_length}; raise it")
    if not any(data.render(row, tokenizer, recipe.max_length).answer_ids for row in held):
        raise ValueError(f"no held-out example keeps an answer within max_length={recipe.max_length}; raise it")
    files = stream.shards(recipe.data) if recipe.streaming else []
    shards = tuple((file.name, file.stat().st_size) for file in files)
    return Examples(train, held, audit, stream=source, shards=shards)


def streamed(recipe: Recipe) -> tuple[list[dict], list[dict], IterableDataset]:
    """The examples of a stream that are looked at, the held-out ones, and the stream to train on."""
    source = stream.examples(recipe.data, recipe.columns or None, recipe.system)
    made = stream.head(source, LOOKED_AT)
    if recipe.eval_data:
        held = data.examples(data.read(recipe.eval_data), recipe.columns or None, recipe.system)
        size = recipe.eval_size or len(held)
        return made, held[: max(1, round(size * len(held)) if size < 1 else int(size))], source
    size = int(recipe.eval_size or 100)
    if not made[size:]:
        raise ValueError(f"eval_size {size} leaves nothing to train on of {len(made)} examples; give eval_data")
    return made[size:], made[:size], source.skip(size)


def halves(
    recipe: Recipe, convert: Callable[[list[data.Record]], list[dict]], key: Callable[[dict], str] | None = None
) -> tuple[list[dict], list[dict]]:
    """A recipe's training and held-out examples; `key`: see `data.split`."""
    made = convert(data.read(recipe.data, recipe.split))
    if recipe.eval_data:
        held = convert(data.read(recipe.eval_data))
        size = recipe.eval_size or len(held)
        return made, held[: max(1, round(size * len(held)) if size < 1 else int(size))]
    builtin = recipe.data == "builtin"  # its file says which rows are held out: the last 100
    size = recipe.eval_size or (100 if builtin else min(100, max(1, len(made) // 10)))
    return data.split(made, size, None if builtin else recipe.seed, key)


def measured(lengths: list[int], recipe: Recipe) -> data.Audit:
    """An audit of examples that are cut without losing their answer."""
    cut = sum(n > recipe.max_length for n in lengths)
    return data.Audit(len(lengths), cut, 0, 0, max(lengths), sum(lengths) / len(lengths), 0)


def announce(rows: Examples, recipe: Recipe, console: Console) -> None:
    """Say how many examples there are, and how many are cut."""
    console.print(
        f"{len(rows.train)} examples to train on, {len(rows.heldout)} held out; longest {rows.audit.longest} tokens"
        + (f"; labels: {', '.join(rows.labels[:20])}" if rows.labels else "")
    )
    if rows.audit.cut:
        console.print(f"{rows.audit.cut} examples are cut at max_length={recipe.max_length}", style="yellow")


def as_dataset(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Examples as trl takes them: conversations where the tokenizer has a chat template, else plain text."""
    return Dataset.from_list(rows if tokenizer.chat_template else [data.plain(row) for row in rows])


def training_set(rows: Examples, tokenizer: PreTrainedTokenizerBase) -> Dataset | IterableDataset:
    """What a run trains on, as trl takes it."""
    if rows.stream is None:
        return as_dataset(rows.train, tokenizer)
    if tokenizer.chat_template:
        return rows.stream
    return rows.stream.map(data.plain)


def at_most(rows: Examples, processes: int = 1) -> int:
    """The largest batch worth having: a power of two that leaves eight steps an epoch, up to 64."""
    return min(64, 1 << max(0, (len(rows.train) // processes // 8).bit_length() - 1))


def planned(recipe: Recipe, rows: Examples, dtype: torch.dtype) -> tuple[Run, int]:
    """The run as it will train on this machine, for the planner, and its longest sequence."""
    dtype = torch.float32 if recipe.method == FULL else dtype
    run = Run(
        recipe.model, without_start(recipe.adapter()), dtype,
        "nf4" if models.fold_at(recipe.model) else recipe.quantize,
        recipe.gradient_checkpointing, "cuda" if torch.cuda.is_available() else "cpu", recipe.trust_remote_code,
    )  # fmt: skip
    return run, min(recipe.max_length, rows.audit.longest)


def fitting_batch(run: Run, length: int, most: int, loaded: bool) -> int:
    """The largest power of two, at most `most`, whose step fits the free memory (1, if none does); the weights need no
    room of their own once they are `loaded`."""
    room = 0.8 * memory.free() + (run.step(1, length).frozen if loaded else 0.0)
    return min(most, 1 << max(0, run.largest_batch(length, room).bit_length() - 1))


def check_fold(recipe: Recipe, adapter: Path) -> None:
    """Refuse to train a fold as another method than the one it was made with."""
    asked, made = recipe.config().to_dict(), models.read_config(adapter).to_dict()
    names = ["method", "args", "scale", "dropout", "patterns"]
    names += ["bias", "modules_to_save", "exclude_modules", "layers_to_transform"]
    names += ["target_modules"] if recipe.target_modules != "all-linear" else []  # all that were folded
    for name in names:
        if asked[name] != made[name]:
            raise ValueError(
                f"{recipe.model} was folded with {name}={made[name]}, which is fixed; this recipe says {asked[name]}"
            )
    if recipe.quantize != "none":
        raise ValueError(f"{recipe.model} is folded already; leave out quantize: {recipe.quantize}")


def load(
    recipe: Recipe,
    dtype: torch.dtype,
    folder: Path,
    console: Console,
    found: Checkpoint | None = None,
    batches: Iterable[Any] | None = None,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """The model a recipe trains, quantised if it says so; `batches`: for folds that start from data; `settings`: of its
    configuration. After a fold, into
    `folder`/base, it is adapted already, and a run that goes on takes its base from there."""
    from inlay.workbench import packing

    if recipe.quantize == "nf4" and found:
        return models.load_adapted(found.path, str(folder / "base"), dtype, trainable=True)[0]
    if adapter := models.fold_at(recipe.model):
        check_fold(recipe, adapter)
        return models.load_adapted(adapter, dtype=dtype, trainable=True)[0]
    options = (recipe.revision, recipe.trust_remote_code)
    dtype = torch.float32 if recipe.method == FULL else dtype  # its updates are too small for 16 bits
    if recipe.quantize != "nf4":
        quantization = None if recipe.quantize == "none" else packing.settings(recipe.quantize, dtype)
        auto = kinds.find(recipe.task).auto
        return models.load_model(recipe.model, dtype, *options, quantization, auto=auto, **settings)
    made = fold(
        recipe.model, folder / "folded", recipe.config(), rounds=recipe.fold_rounds, batches=batches,
        revision=options[0], trust_remote_code=options[1],
    )  # fmt: skip
    plain, folded = (statistics.mean(getattr(e, kind) for e in made.errors) for kind in ("plain", "folded"))
    console.print(f"folded: the base starts at a relative error of {folded:.4f} per weight (plain NF4: {plain:.4f})")
    if made.unsettled:
        console.print(f"{len(made.unsettled)} layers' starts had not settled; --calibration gives more batches")
    model = models.load_adapted(made.adapter, str(made.base), dtype, trainable=True)[0]
    for path in (made.base, made.folder / "errors.csv"):
        path.rename(folder / path.name)
    made.adapter.rename(folder / models.START)
    shutil.rmtree(made.folder)
    model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    return model


def dry_run(recipe: Recipe, console: Console) -> None:
    """Show what a run would do: recipe, first example with its answer marked, parameters, memory. Loads no weights."""
    from inlay.workbench.tasks import TASKS  # which are made of what is here

    check_free(recipe.run_folder(), recipe.overwrite, MARK)
    if adapter := models.fold_at(recipe.model):
        check_fold(recipe, adapter)
    dtype, task, kind = models.dtype_for(recipe.dtype), TASKS[recipe.task], kinds.find(recipe.task)
    tokenizer = task.processor(recipe)
    rows = task.examples(recipe, tokenizer, console)
    recipe = ranks.settle(recipe, console)
    batch = recipe.batch_size
    if batch == "auto":
        batch = fitting_batch(*planned(recipe, rows, dtype), at_most(rows), loaded=False)
    recipe = recipe.resolved(dtype=str(dtype).removeprefix("torch."), eval_size=len(rows.heldout), batch_size=batch)
    console.print(recipe.to_yaml().rstrip(), soft_wrap=True)
    console.print("\nfirst example, what is learned from in ⟦⟧:" if not kind.causal else TOKENS)
    console.print(task.shown(rows.train[0], tokenizer, recipe), soft_wrap=True)
    if not kind.causal or recipe.task == "preference":
        config = without_start(recipe.adapter())
        trained = memory.count(recipe.model, config, recipe.trust_remote_code, kind.auto, **task.model_settings(rows))
        console.print(f"\n{trained:,} trainable numbers; memory is planned for tasks instruction, language_modelling")
        return
    run, length = planned(recipe, rows, dtype)
    need = run.step(batch, length)
    console.print(f"\n{need.parameters:,.0f} trainable numbers; batch {batch} × {length} tokens")
    training = need.trained + need.gradients + need.optimizer
    console.print(
        f"memory at the peak of a step: {memory.gib(need.peak)}, of it weights {memory.gib(need.frozen)}, adapter with "
        f"gradients and optimiser {memory.gib(training)}, activations kept {memory.gib(need.activations)}, the rest "
        "for a moment; the libraries come on top"
    )
