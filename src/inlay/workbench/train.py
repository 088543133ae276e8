"""One fine-tuning run: trl's SFTTrainer between a recipe and a run folder."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from inlay.workbench import data, memory, models, report
from inlay.workbench.files import check_free, new_folder, write_text
from inlay.workbench.generate import answer
from inlay.workbench.recipe import Recipe
from inlay.workbench.result import Result
from inlay.workbench.watch import Watch, duration, peak_memory

RUN_FILE = "recipe.yaml"  # what makes a folder a run of ours


@dataclass
class Examples:
    """Training and held-out examples, and what was found about them."""

    train: list[dict]
    heldout: list[dict]
    audit: data.Audit


def examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
    """Read, split and audit a recipe's data; what cannot be learned from is counted and said."""
    made = data.examples(data.read(recipe.data, recipe.split), recipe.columns or None, recipe.system)
    if recipe.eval_data:
        held = data.examples(data.read(recipe.eval_data), recipe.columns or None, recipe.system)
        train, held = made, held[: int(recipe.eval_size or len(held))]
    else:
        builtin = recipe.data == "builtin"  # its file says which rows are held out: the last 100
        size = recipe.eval_size or (100 if builtin else min(100, max(1, len(made) // 10)))
        train, held = data.split(made, size, None if builtin else recipe.seed)
    audit = data.audit(train, tokenizer, recipe.max_length)
    console.print(f"{len(train)} examples to train on, {len(held)} held out; longest {audit.longest} tokens")
    if audit.cut or audit.masked:
        console.print(
            f"[yellow]{audit.cut} answers are cut off at max_length={recipe.max_length}, "
            f"{audit.masked} of them wholly (those are left out); raise --max-length to keep them[/yellow]"
        )
    if audit.shifted:
        console.print(
            f"[yellow]in {audit.shifted} examples the prompt's last tokens merge with the answer's first; end prompts "
            "on a word or a line to have the model answer from what it was trained on[/yellow]"
        )
    if audit.masked == audit.total:
        raise ValueError(f"no example keeps an answer within max_length={recipe.max_length}; raise it")
    return Examples(train, held, audit)


def as_dataset(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Examples as trl takes them: conversations where the tokenizer has a chat template, else plain text."""
    return Dataset.from_list(rows if tokenizer.chat_template else [data.plain(row) for row in rows])


def arguments(recipe: Recipe, folder: Path, batch: int, steps: int) -> SFTConfig:
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
        "warmup_steps": recipe.warmup if recipe.warmup >= 1 else math.ceil(recipe.warmup * steps),
        "weight_decay": recipe.weight_decay,
        "optim": recipe.optimizer,
        "max_grad_norm": recipe.max_grad_norm,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "eval_packing": False,
        "bf16": False,  # the base is loaded in its compute dtype and θ stays fp32: autocast would only add casts
        "fp16": False,
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
    try:
        return SFTConfig(**{**values, **recipe.trainer})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the trainer refuses this recipe: {models.first_line(error)}") from None


def train(recipe: Recipe, console: Console | None = None) -> Result:
    """Run a recipe and leave its run folder.

    Raises:
        ValueError: the recipe, the data or the output folder cannot be used; nothing is then written.
    """
    console = console or Console()
    set_seed(recipe.seed)
    folder = recipe.run_folder()
    check_free(folder, recipe.overwrite, RUN_FILE)
    dtype = models.dtype_for(recipe.dtype)
    base, tokenizer = models.load_base(recipe.model, dtype, recipe.revision, recipe.trust_remote_code)
    rows = examples(recipe, tokenizer, console)
    with tempfile.TemporaryDirectory() as somewhere:  # a trainer creates its folder; ours waits until all is valid
        trainer = build(recipe, base, tokenizer, rows, Path(somewhere))
    model = cast(PeftModel, trainer.model)
    recipe = recipe.resolved(
        dtype=str(dtype).removeprefix("torch."),
        eval_size=len(rows.heldout),
        batch_size=trainer.args.per_device_train_batch_size,
        output=str(folder),
    )
    start_folder(folder, recipe)
    trainer.args.output_dir = str(folder / "checkpoints")
    watch = Watch(folder, console)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)

    parameters, everything = model.get_nb_trainable_parameters()
    console.print(
        f"{recipe.method} on {report.model_name(recipe.model)} in {recipe.dtype}: {parameters:,} of "
        f"{everything - parameters:,} numbers are trained ({parameters / (everything - parameters):.2%})"
    )
    before = trainer.evaluate()["eval_loss"]
    console.print(f"held-out loss before: {before:.3f}")
    prompts = [row["prompt"] for row in rows.heldout if "prompt" in row][: recipe.samples]
    answers = [answer(model, tokenizer, prompts)] if prompts else []

    began = time.perf_counter()
    try:
        trainer.train()
    finally:
        watch.bar.stop()
    seconds = time.perf_counter() - began

    after = trainer.evaluate()["eval_loss"]
    console.print(f"held-out loss after:  {after:.3f}  ({duration(seconds)}, {memory.gib(peak_memory())} peak)")
    answers += [answer(model, tokenizer, prompts)] if prompts else []
    result = Result(
        recipe, folder, parameters, everything - parameters, before, after, seconds, watch.tokens, peak_memory(),
        watch.history, samples(rows.heldout, answers),
    )  # fmt: skip
    finish(result, model, console)
    return result


def build(recipe: Recipe, base, tokenizer, rows: Examples, folder: Path) -> SFTTrainer:
    """The trainer for a recipe; `batch_size: auto` is settled here."""
    batch = recipe.batch_size
    if batch == "auto":
        probe = (
            base
            if base.device.type != "cpu"
            else get_peft_model(memory.meta_model(recipe.model, base.dtype), recipe.config())
        )
        batch = memory.largest_batch(probe, min(recipe.max_length, rows.audit.longest))
    steps = recipe.steps or math.ceil(recipe.epochs * len(rows.train) / (batch * recipe.accumulation))
    stop: list[TrainerCallback] = [EarlyStoppingCallback(recipe.early_stopping)] if recipe.early_stopping else []
    return SFTTrainer(
        base,
        args=arguments(recipe, folder, batch, steps),
        train_dataset=as_dataset(rows.train, tokenizer),
        eval_dataset=as_dataset(rows.heldout, tokenizer),
        processing_class=tokenizer,
        peft_config=recipe.config(),
        callbacks=stop,
    )


def start_folder(folder: Path, recipe: Recipe) -> None:
    """Create the run folder with its resolved recipe."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_text(folder / RUN_FILE, recipe.to_yaml())
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None


def samples(heldout: list[dict], answers: list[list[str]]) -> list[dict[str, str]]:
    """Prompt, reference, and the answers before and after."""
    if len(answers) < 2:
        return []
    rows = [row for row in heldout if "prompt" in row]
    return [
        {"prompt": row["prompt"][-1]["content"], "reference": row["completion"][-1]["content"], "before": b, "after": a}
        for row, b, a in zip(rows, answers[0], answers[1], strict=False)
    ]


def finish(result: Result, model: PeftModel, console: Console) -> None:
    """Write the adapter with its card, the samples, the plots and the report; upload when asked."""
    with new_folder(result.folder / "adapter") as part:
        model.save_pretrained(str(part))
        (part / "README.md").write_text(report.card(result), encoding="utf-8")
    (result.folder / "plots").mkdir(exist_ok=True)
    report.plot_loss(result, result.folder / "plots" / "loss.png")
    write_text(result.folder / "samples.md", report.samples_text(result))
    write_text(result.folder / "report.html", report.page(result))
    console.print(f"run folder: {result.folder}")
    if result.recipe.push_to_hub:
        upload(result.folder / "adapter", result.recipe.push_to_hub)
        console.print(f"uploaded to {result.recipe.push_to_hub}")


def upload(folder: Path, repository: str) -> None:
    """Put a folder on the hub."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # network, rights and names fail in many ways, none of them worth losing the run for
        raise ValueError(
            f"upload to {repository} failed (the run is in {folder}): {models.first_line(error)}"
        ) from None


def dry_run(recipe: Recipe, console: Console) -> None:
    """Show what a run would do: recipe, first example with its answer marked, parameters, memory. Loads no weights."""
    check_free(recipe.run_folder(), recipe.overwrite, RUN_FILE)
    dtype = models.dtype_for(recipe.dtype)
    tokenizer = models.load_tokenizer(recipe.model, recipe.revision, recipe.trust_remote_code)
    rows = examples(recipe, tokenizer, console)
    model = get_peft_model(memory.meta_model(recipe.model, dtype, recipe.trust_remote_code), recipe.config())
    length = min(recipe.max_length, rows.audit.longest)
    batch = memory.largest_batch(model, length) if recipe.batch_size == "auto" else recipe.batch_size
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    recipe = recipe.resolved(dtype=str(dtype).removeprefix("torch."), eval_size=len(rows.heldout), batch_size=batch)
    need = memory.estimate(model, batch, length)
    shown = data.render(rows.train[0], tokenizer, recipe.max_length)
    console.print(recipe.to_yaml().rstrip(), markup=False, highlight=False)
    console.print("\nfirst example, [reverse]answer tokens marked[/reverse]:")
    console.print(shown.prompt, end="", markup=False, highlight=False)
    console.print(shown.answer, style="reverse", markup=False, highlight=False)
    console.print(f"\n{memory.trainable(model):,} trainable numbers; batch {batch} × {length} tokens")
    console.print(
        f"memory, counted: {memory.gib(need.total)} = weights {memory.gib(need.weights)}, adapter with gradients and "
        f"optimiser {memory.gib(need.training)}, activations {memory.gib(need.activations)}"
    )
