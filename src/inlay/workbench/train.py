"""One fine-tuning run: trl's SFTTrainer between a recipe and a run folder."""

from __future__ import annotations

import difflib
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, set_seed
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from inlay.host.schedule import Schedule
from inlay.workbench import memory, models, peft_methods, ranks, report
from inlay.workbench.files import check_free, new_folder, set_aside, write_text
from inlay.workbench.generate import answer
from inlay.workbench.prepare import MARK, Examples, as_dataset, at_most, examples, fitting_batch, load, planned
from inlay.workbench.recipe import Recipe
from inlay.workbench.result import Result
from inlay.workbench.watch import Watch, duration, peak_memory

INTERRUPTED = "interrupted"  # the adapter of a run that Ctrl-C ended


def arguments(recipe: Recipe, folder: Path, batch: int, steps: int, dtype: torch.dtype) -> SFTConfig:
    """A recipe as trl's SFTConfig.

    Raises:
        ValueError: a value, or a key of `trainer`, that trl or transformers refuse.
    """
    evaluating, saving = recipe.eval_every, recipe.save_every
    if recipe.keep_best or recipe.early_stopping:
        saving = evaluating
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.steps or -1,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "lr_scheduler_type": recipe.scheduler,
        "warmup_steps": recipe.warmup if recipe.warmup >= 1 else min(math.ceil(recipe.warmup * steps), steps - 1),
        "weight_decay": recipe.weight_decay,
        "optim": recipe.optimizer,
        "max_grad_norm": recipe.max_grad_norm,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "eval_packing": False,
        # An adapted base is loaded in its compute dtype and θ stays fp32: autocast would only add casts.
        "bf16": recipe.method == peft_methods.FULL and dtype == torch.bfloat16,
        "fp16": dtype == torch.float16 and torch.cuda.is_available(),  # for its loss scaling
        "eval_strategy": "steps" if evaluating else "no",
        "eval_steps": evaluating,
        "save_strategy": "steps" if saving else "no",
        "save_steps": saving or 500,
        "save_total_limit": 2,
        "load_best_model_at_end": bool(recipe.keep_best or recipe.early_stopping),
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": 1,
        "report_to": recipe.report_to,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    for key in recipe.trainer:
        check_extra(key, values)
    try:
        return SFTConfig(**{**values, **recipe.trainer})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the trainer refuses this recipe: {models.first_line(error)}") from None


def check_tracker(names: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed."""
    known = sorted({*INTEGRATION_TO_CALLBACK, "all", "none"})
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"report_to: {name!r} is not one of {', '.join(known)}")
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: {name} is not installed; pip install {name}")


def check_extra(key: str, values: dict[str, Any]) -> None:
    """Refuse a key of `trainer` that trl does not have, or that the recipe sets itself."""
    known = [f.name for f in fields(SFTConfig)]
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        raise ValueError(f"trainer: SFTConfig has no {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if key in values and key not in ("logging_steps", "save_total_limit", "per_device_eval_batch_size", "eval_packing"):
        raise ValueError(f"trainer: {key!r} is set by the recipe itself; use its own field")


def train(recipe: Recipe, console: Console | None = None) -> Result:
    """Run a recipe and leave its run folder.

    Raises:
        ValueError: the recipe, the data or the output folder cannot be used; nothing is then written.
    """
    console = console or Console()
    set_seed(recipe.seed)
    folder = recipe.run_folder()
    check_free(folder, recipe.overwrite, MARK)
    check_tracker(recipe.report_to)
    if recipe.push_to_hub:
        claim(recipe.push_to_hub)
    dtype = models.dtype_for(recipe.dtype)
    tokenizer = models.load_tokenizer(recipe.model, recipe.revision, recipe.trust_remote_code)
    rows = examples(recipe, tokenizer, console)
    recipe = ranks.settle(recipe, console)
    with room_beside(folder) as part:  # the run's folder waits until all is valid
        model = load(recipe, dtype, part / "folded", console)
        trainer = build(recipe, model, tokenizer, rows, part)
        recipe = recipe.resolved(
            dtype=str(dtype).removeprefix("torch."),
            eval_size=len(rows.heldout),
            batch_size=trainer.args.per_device_train_batch_size,
            output=str(folder),
        )
        old = start_folder(folder, recipe)
        if (part / "folded").exists():
            for name in ("base", "errors.csv"):
                (part / "folded" / name).rename(folder / name)
            cast(Any, trainer.model).peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    try:
        result = run(recipe, trainer, tokenizer, rows, console)
    except BaseException:
        give_up(folder, old)
        raise
    if old:
        shutil.rmtree(old)
    console.print(f"run folder: {folder}")
    if recipe.push_to_hub:
        upload(folder / recipe.kept, recipe.push_to_hub)
        console.print(f"uploaded to {recipe.push_to_hub}")
    return result


def run(recipe: Recipe, trainer: SFTTrainer, tokenizer: Any, rows: Examples, console: Console) -> Result:
    """Fit, and write everything into the run folder."""
    result = fit(recipe, trainer, tokenizer, rows, console)
    write(result, cast(Any, trainer.model))
    return result


def fit(recipe: Recipe, trainer: SFTTrainer, tokenizer: Any, rows: Examples, console: Console) -> Result:
    """Evaluate, train, evaluate; the metrics go into the run folder as they come."""
    folder, model = Path(str(recipe.output)), cast(Any, trainer.model)
    trainer.args.output_dir = str(folder / "checkpoints")
    watch = Watch(folder, console)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    parameters, base = memory.numbers(model)
    console.print(
        f"{recipe.method} on {report.model_name(recipe.model)} in {recipe.dtype}: {parameters:,} of "
        f"{base:,} numbers are trained ({parameters / base:.2%})"
    )
    before = trainer.evaluate()["eval_loss"]
    console.print(f"held-out loss before: {before:.3f}")
    prompts = [row["prompt"] for row in rows.heldout if "prompt" in row][: recipe.samples]
    answers = [answer(model, tokenizer, prompts)] if prompts else []
    began = time.perf_counter()
    try:
        trainer.train()
    except KeyboardInterrupt:
        with new_folder(folder / INTERRUPTED) as part:
            model.save_pretrained(str(part))
        console.print(f"stopped at step {trainer.state.global_step}; the adapter so far is in {folder / INTERRUPTED}")
        raise
    finally:
        watch.bar.stop()
    seconds = time.perf_counter() - began
    after = trainer.evaluate()["eval_loss"]
    console.print(f"held-out loss after:  {after:.3f}  ({duration(seconds)}, {memory.gib(peak_memory())} peak)")
    answers += [answer(model, tokenizer, prompts)] if prompts else []
    return Result(
        recipe, folder, parameters, base, before, after, seconds, watch.tokens, peak_memory(), watch.history,
        samples(rows.heldout, answers),
    )  # fmt: skip


def build(recipe: Recipe, base: Any, tokenizer, rows: Examples, folder: Path) -> SFTTrainer:
    """The trainer for a recipe and its base, which is adapted here unless it is so already; settles `batch_size`."""
    batch = recipe.batch_size
    if batch == "auto":
        batch = fitting_batch(*planned(recipe, rows, base.dtype), at_most(rows), loaded=True)
    steps = recipe.steps or math.ceil(recipe.epochs * len(rows.train) / (batch * recipe.accumulation))
    stop: list[TrainerCallback] = [EarlyStoppingCallback(recipe.early_stopping)] if recipe.early_stopping else []
    adapter = None if isinstance(base, PeftModel) else recipe.adapter(steps)
    trainer = SFTTrainer(
        base,
        args=arguments(recipe, folder, batch, steps, models.dtype_for(recipe.dtype)),
        train_dataset=as_dataset(rows.train, tokenizer),
        eval_dataset=as_dataset(rows.heldout, tokenizer),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[Schedule(), *stop],
    )
    if adapter is not None and not peft_methods.is_ours(recipe.method):
        peft_methods.complete(trainer)
    return trainer


@contextmanager
def room_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `folder`; of the parents made for it, none stays empty."""
    missing = [p for p in folder.parents if not p.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
            yield Path(part)
    except PermissionError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def start_folder(folder: Path, recipe: Recipe) -> Path | None:
    """Create the run folder with its resolved recipe; give back where the one it replaces was put."""
    try:
        old = set_aside(folder)
        folder.mkdir(parents=True)
        (folder / MARK).touch()
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        return old
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None


def give_up(folder: Path, old: Path | None) -> None:
    """After a failure: keep a folder that holds something trained, else leave things as they were before the run."""
    if (folder / INTERRUPTED).exists() or any((folder / "checkpoints").glob("checkpoint-*")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    if old:
        (old / folder.name).rename(folder)
        old.rmdir()


def samples(heldout: list[dict], answers: list[list[str]]) -> list[dict[str, str]]:
    """Prompt, reference, and the answers before and after."""
    if len(answers) < 2:
        return []
    rows = [row for row in heldout if "prompt" in row]
    return [
        {"prompt": row["prompt"][-1]["content"], "reference": row["completion"][-1]["content"], "before": b, "after": a}
        for row, b, a in zip(rows, answers[0], answers[1], strict=False)
    ]


def write(result: Result, model: PeftModel | PreTrainedModel) -> None:
    """The adapter (or the whole model) with its card, the samples, the plots and the report."""
    with new_folder(result.folder / result.recipe.kept) as part:
        model.save_pretrained(str(part))
        (part / "README.md").write_text(report.card(result), encoding="utf-8")
    (result.folder / "plots").mkdir(exist_ok=True)
    report.plot_loss(result, result.folder / "plots" / "loss.png")
    write_text(result.folder / "samples.md", report.samples_text(result))
    write_text(result.folder / "report.html", report.page(result))


def claim(repository: str) -> None:
    """Create the hub repository, or see that it may be written, before hours are spent."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
    except Exception as error:  # network, rights and names fail in many ways
        raise ValueError(f"push_to_hub: {repository} cannot be written: {models.first_line(error)}") from None


def upload(folder: Path, repository: str) -> None:
    """Put a folder on the hub."""
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # network, rights and names fail in many ways, none of them worth losing the run for
        raise ValueError(
            f"upload to {repository} failed (the run is in {folder}): {models.first_line(error)}"
        ) from None
