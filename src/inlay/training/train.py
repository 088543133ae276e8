"""One fine-tuning run: the trainer of its task between a recipe and a run folder."""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, set_seed
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from inlay.host import processes, starts
from inlay.host.flat import Flat
from inlay.host.groups import raised
from inlay.host.schedule import Schedule
from inlay.workbench import (
    calibration,
    checkpoints,
    kinds,
    memory,
    models,
    optimizers,
    peft_methods,
    ranks,
    report,
    run_plots,
    zero3,
)
from inlay.workbench.changes import CHANGES, Change, as_data, changes
from inlay.workbench.checkpoints import Checkpoint
from inlay.workbench.files import check_free, locked, new_folder, put_back, remove, staged, write_text
from inlay.workbench.inspect_adapter import of_fold
from inlay.workbench.prepare import MARK, Examples, at_most, fitting_batch, load, planned, training_set
from inlay.workbench.recipe import Recipe
from inlay.workbench.recipe import load as load_recipe
from inlay.workbench.result import Result, environment
from inlay.workbench.tasks import TASKS
from inlay.workbench.trainer import Trainer
from inlay.workbench.watch import Watch, duration, peak_memory
from inlay.workbench.weights import Weights

NO_WAY_BACK = "it prunes what a checkpoint would be loaded into, so no run of it can be gone on with"
PAGE = "report.html"  # what a run writes last
INEXACT = ("save_only_model", "ignore_data_skip")  # with these a run would not go on to the same end
BEFORE = ".before.json"  # the answers before training, until the samples are written


def arguments(recipe: Recipe, folder: Path, batch: int, steps: int, dtype: torch.dtype) -> Any:
    """A recipe as the arguments of its task's trainer: trl's SFTConfig, for instructions.

    Raises:
        ValueError: a value, or a key of `trainer`, that trl or transformers refuse.
    """
    task, evaluating = TASKS[recipe.task], recipe.eval_every
    saving = math.ceil(steps / 10) if recipe.save_every is None else recipe.save_every
    if recipe.keep_best or recipe.early_stopping:
        saving = evaluating
    if recipe.method == peft_methods.ADALORA:
        if recipe.save_every or recipe.keep_best or recipe.early_stopping:
            raise ValueError(f"{recipe.method}: {NO_WAY_BACK}; leave out save_every, keep_best and early_stopping")
        saving = 0
    values: dict[str, Any] = {
        "output_dir": str(folder / checkpoints.FOLDER),
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.steps or -1,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "lr_scheduler_type": recipe.scheduler,
        "warmup_steps": recipe.warmup if recipe.warmup >= 1 else min(math.ceil(recipe.warmup * steps), steps - 1),
        "weight_decay": recipe.weight_decay,
        **optimizers.settings(recipe.optim, recipe.optimizer_args, recipe.target_modules),
        "max_grad_norm": recipe.max_grad_norm if recipe.step == "backward" else 0.0,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        # An adapted base is loaded in its compute dtype and θ stays fp32: autocast would only add casts.
        "bf16": recipe.method == peft_methods.FULL and dtype == torch.bfloat16,
        # For its loss scaling.
        "fp16": dtype == torch.float16 and torch.cuda.is_available() and recipe.step == "backward",
        "eval_strategy": "steps" if evaluating else "no",
        "eval_steps": evaluating,
        "save_strategy": "steps" if saving else "no",
        "save_steps": saving or 500,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # early stopping counts on
        "load_best_model_at_end": bool(recipe.keep_best or recipe.early_stopping),
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": 1,
        "report_to": recipe.report_to,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_broadcast_buffers": False,  # θ₀ and frozen factors, equal from the start
        **task.settings(recipe),
    }
    if processes.count() > 1:
        values["accelerator_config"] = {"use_configured_state": True}  # of `processes.joined`
    for key in recipe.trainer:
        check_extra(key, values, task.arguments)
    try:
        return task.arguments(**{**values, **recipe.trainer})
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


def check_extra(key: str, values: dict[str, Any], arguments: Any) -> None:
    """Refuse a key of `trainer` that the trainer's arguments do not have, or that the recipe sets itself."""
    known = [f.name for f in fields(arguments)]
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        raise ValueError(
            f"trainer: {arguments.__name__} has no {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    if key in INEXACT:
        raise ValueError(f"trainer: a run with {key!r} could not be gone on with exactly; leave it out")
    if key in values and key not in ("logging_steps", "save_total_limit", "per_device_eval_batch_size", "eval_packing"):
        raise ValueError(f"trainer: {key!r} is set by the recipe itself; use its own field")


def train(recipe: Recipe, console: Console | None = None, resume: bool = False) -> Result:
    """Run a recipe and leave its run folder, or go on with the run that is at its `output` (see `unfinished`).

    Raises:
        ValueError: the recipe, the data or the output folder cannot be used, and nothing is then written; the run was
            made with something else; or it met NaN, Inf or a full disk, and can go on from its last checkpoint.
    """
    console = console or Console()
    console = console if processes.first() else Console(quiet=True)
    folder = processes.same(recipe.run_folder)
    with locked(folder) if processes.first() else nullcontext():
        found = processes.same(lambda: begin(recipe, folder, console, resume))
        dtype = models.dtype_for(recipe.dtype)
        task = TASKS[recipe.task]
        tokenizer = task.processor(recipe)
        rows = processes.in_turn(lambda: task.examples(recipe, tokenizer, console))
        processes.same(lambda: None if found else start_folder(folder, recipe))
        try:
            recipe = processes.same(lambda recipe=recipe: ranks.settle(recipe, console))
            recipe = processes.same(
                lambda recipe=recipe: calibration.settle(recipe, dtype, folder, tokenizer, rows, console)
            )
            set_seed(recipe.seed)
            seen = calibration.batches(recipe, tokenizer, rows)
            base = load(recipe, dtype, folder, console, found, seen, **task.model_settings(rows))
            whole = checkpoints.mark(base)  # some of PEFT's starts change the base itself
            trainer = build(recipe, base, tokenizer, rows, folder)
            trainer.base = whole
            if found is None:
                calibration.start(recipe, trainer.model, tokenizer, rows, console)
            recipe = recipe.resolved(
                dtype=str(dtype).removeprefix("torch."),
                eval_size=len(rows.heldout),
                batch_size=trainer.args.per_device_train_batch_size,
                output=str(folder),
            )
            write_text(folder / "recipe.yaml", recipe.to_yaml()) if processes.first() else None
            result = run(recipe, trainer, tokenizer, rows, console, found)
        except BaseException:
            if processes.first() and give_up(folder):
                way = "" if recipe.method == peft_methods.ADALORA else f"; to go on: inlay train --resume {folder}"
                console.print(f"what it learned so far is kept{way}")
            raise
        console.print(f"run folder: {folder}")
        finish(recipe, folder, console) if processes.first() else None
    return result


def begin(recipe: Recipe, folder: Path, console: Console, resume: bool) -> Checkpoint | None:
    """See that a run can begin, and find the checkpoint that it goes on from, if it does."""
    check_engine(recipe)
    put_back(folder)
    check_free(folder, recipe.overwrite or resume, MARK)
    if resume and recipe.method == peft_methods.ADALORA:
        raise ValueError(f"{recipe.method}: {NO_WAY_BACK}; start it anew with --overwrite")
    found = checkpoints.newest(folder / checkpoints.FOLDER, console) if resume else None
    if found:
        checkpoints.check_same(found, "recipe", checkpoints.settings(recipe))
        console.print(f"going on from {found.path}")
    check_tracker(recipe.report_to)
    if recipe.push_to_hub:
        claim(recipe.push_to_hub)
    return found


def check_engine(recipe: Recipe) -> None:
    """Refuse what does not go together with several processes, or with a model that is sharded among them."""
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if key in recipe.trainer:
            raise ValueError(
                f"trainer: {key} is accelerate's to configure: --launch-config recipes/distributed/fsdp2.yaml"
            )
    if processes.launched() and recipe.quantize == "nf4":
        raise ValueError(
            "quantize: nf4 folds in one process; run inlay fold first, then train with its folder as model"
        )
    if not processes.sharded():
        return
    if processes.deepspeed():
        zero3.check(recipe)
    if recipe.optim == "subspace_descent":
        raise ValueError("optimizer: subspace_descent projects whole matrices, which a sharded model has not; use DDP")
    if processes.fsdp() and os.environ.get("FSDP_VERSION", "2") != "2":
        raise ValueError("fsdp_version: 1 is not supported; set it to 2, as recipes/distributed/fsdp2.yaml does")
    if processes.fsdp() and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ValueError("fsdp_cpu_ram_efficient_loading leaves most processes without weights to cut; set it to false")
    if recipe.method == peft_methods.FULL or recipe.quantize != "none" or recipe.keep_best or recipe.early_stopping:
        raise ValueError(
            "a sharded model takes no method: full, quantize, keep_best or early_stopping; use DDP for these"
        )


def unfinished(folder: Path, changed: dict[str, Any]) -> Recipe | None:
    """The recipe of the run in a folder, with what a user says of it; None if nothing is left to do.

    Raises:
        ValueError: there is no run, it is of another method (whose hyperparameters have other names), or it holds a
            link, through which it would write elsewhere.
    """
    folder = folder.resolve()
    if not (folder / MARK).exists() or not (folder / "recipe.yaml").exists():
        raise ValueError(f"{folder} holds no run to go on with: it has no recipe.yaml of one")
    begun = load_recipe(str(folder / "recipe.yaml"), {}).method
    if (asked := changed.get("method", begun)) != begun:
        raise ValueError(f"{folder} is of another run: method was {begun!r} and is {asked!r}; start a new run for that")
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise ValueError(f"{link} is a link, through which a run would write elsewhere; put there what it points to")
    recipe = load_recipe(str(folder / "recipe.yaml"), {**changed, "output": str(folder)})
    if not (folder / PAGE).exists():
        return recipe
    if (folder / BEFORE).exists() and not int(os.environ.get("RANK", 0)):
        with locked(folder):
            finish(recipe, folder, Console())
    return None


def run(
    recipe: Recipe, trainer: Trainer, tokenizer: Any, rows: Examples, console: Console, found: Checkpoint | None = None
) -> Result:
    """Fit, and write everything into the run folder."""
    result = fit(recipe, trainer, tokenizer, rows, console, found)
    result.memory_planned = foreseen(recipe, rows, trainer)
    model = cast(Any, trainer.model)
    state = processes.whole_state(model) if trainer.sharded else None
    write(result, model, state) if processes.first() else None
    return result


def fit(
    recipe: Recipe, trainer: Trainer, tokenizer: Any, rows: Examples, console: Console, found: Checkpoint | None = None
) -> Result:
    """Evaluate, train, evaluate; the metrics go into the run folder as they come."""
    folder, model = Path(str(recipe.output)), cast(Any, trainer.model)
    trainer.run = {
        "recipe": checkpoints.settings(recipe),
        "identity": checkpoints.identity(trainer, rows),
        "versions": environment(),
    }
    task = TASKS[recipe.task]
    watch = Watch(folder, console, task.metrics)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    parameters, base = memory.numbers(model)
    console.print(
        f"{recipe.method} on {report.model_name(recipe.model)} in {recipe.dtype}: {parameters:,} of "
        f"{base:,} numbers are trained ({parameters / base:.2%})"
    )
    if found:
        checkpoints.check_same(found, "identity", trainer.run["identity"])
        for change in checkpoints.versions_changed(found):
            told = f"note: the checkpoint was made with {change[:400]}; bits may differ"
            console.print(told, style="yellow", markup=False, highlight=False)
        watch.restore(found.path)
        trainer.passed = watch.passed
        console.print(f"held-out loss before: {watch.evaluated[0]['eval_loss']:.3f}")
    elif processes.count() > 1:  # a model evaluated before it is trained would not be wrapped any more, without a word
        trainer.args.eval_on_start = True
    else:
        trainer.evaluate()
    questions = task.questions(rows.heldout, recipe.samples)
    asked = [row["input"] for row in questions]
    if not processes.same((folder / BEFORE).exists):
        said = task.answers(model, tokenizer, asked) if asked else []
        write_text(folder / BEFORE, json.dumps(said)) if processes.first() else None
    try:
        trainer.go_on(found)
    except KeyboardInterrupt:
        console.print(f"stopped at step {trainer.state.global_step}")
        raise
    finally:
        watch.bar.stop()
    trainer.check_finite()
    seconds = watch.seconds
    first, last = watch.evaluated[0], trainer.evaluate()
    before, after = first["eval_loss"], last["eval_loss"]
    console.print(f"held-out loss after:  {after:.3f}  ({duration(seconds)}, {memory.gib(peak_memory())} peak)")
    then, now = task.scores(first), task.scores(last)
    for name, score in now.items():
        console.print(f"{name}: {then[name]:.3f} before, {score:.3f} after")
    answers = [processes.same(lambda: json.loads((folder / BEFORE).read_text(encoding="utf-8")))]
    answers += [task.answers(model, tokenizer, asked)] if asked else []
    return Result(
        recipe, folder, parameters, base, before, after, seconds, watch.tokens, peak_memory(), watch.history,
        samples(questions, answers), {name: (then[name], score) for name, score in now.items()},
        len(rows.labels or ()) or None,
    )  # fmt: skip


def foreseen(recipe: Recipe, rows: Examples, trainer: Any) -> dict[str, float]:
    """What the planner says of the peak of a step, by part, in bytes; nothing where it cannot follow the model."""
    if recipe.task not in ("instruction", "language_modelling"):
        return {}
    try:
        run, length = planned(recipe, rows, models.dtype_for(recipe.dtype))
        need = run.step(trainer.args.per_device_train_batch_size, length)
    except ValueError:
        return {}
    parts = {
        "weights": need.frozen,
        "adapter, gradients, optimiser": need.trained + need.gradients + need.optimizer,
        "activations": need.activations,
    }
    return {**parts, "for a moment": max(0.0, need.peak - sum(parts.values()))}


def build(recipe: Recipe, base: Any, tokenizer, rows: Examples, folder: Path) -> Trainer:
    """The trainer for a recipe and its base, which is adapted here unless it is so already; settles `batch_size`."""
    batch = recipe.batch_size
    if batch == "auto":
        most = at_most(rows, processes.count())
        batch = min(processes.gather(fitting_batch(*planned(recipe, rows, base.dtype), most, loaded=True)))
    of_step = batch * recipe.accumulation * processes.count()
    steps = recipe.steps or math.ceil(recipe.epochs * len(rows.train) / of_step)
    stop: list[TrainerCallback] = [EarlyStoppingCallback(recipe.early_stopping)] if recipe.early_stopping else []
    adapter = None if isinstance(base, PeftModel) else recipe.adapter(steps)
    if adapter is not None:
        adapter.revision = recipe.revision  # of the base, for who loads or merges it
    task = TASKS[recipe.task]
    own = optimizers.own(recipe.optim, recipe.learning_rate, recipe.optimizer_args)
    if own is not None and recipe.task == "preference":
        raise ValueError(f"optimizer: trl's DPO trainer takes transformers' optimisers alone, not {recipe.optim}")
    with starts.shared():
        trainer = task.trainer(
            base,
            args=arguments(recipe, folder, batch, steps, models.dtype_for(recipe.dtype)),
            train_dataset=training_set(rows, tokenizer) if rows.stream else task.dataset(rows.train, tokenizer, recipe),
            eval_dataset=task.dataset(rows.heldout, tokenizer, recipe),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Schedule(), *([Flat(recipe.flat_noise, recipe.seed)] if recipe.flat_noise else []), *stop],
            skips=recipe.skip_nan,
            lr_ratio=recipe.lr_ratio,
            zeroth=recipe.zeroth(),
            **({} if own is None else {"optimizer_cls_and_kwargs": own}),
            **task.parts(tokenizer, rows),
        )
    if adapter is not None and not peft_methods.is_ours(recipe.method):
        peft_methods.complete(trainer)
    optimizers.check_shapes(recipe.optim, cast(Any, trainer.model))
    if recipe.lr_ratio is not None:
        raised([], cast(Any, trainer.model), recipe.lr_ratio)  # refuses a model without pairs of factors
    return trainer


def start_folder(folder: Path, recipe: Recipe) -> None:
    """Create the run folder with its recipe, in place of what is set aside."""
    try:
        with staged(folder) as part:
            (part / MARK).touch()
            write_text(part / "recipe.yaml", recipe.to_yaml())
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None


def give_up(folder: Path) -> bool:
    """After a failure: whether the folder is kept, for its checkpoints; else things are as they were before the run."""
    if checkpoints.steps(folder / checkpoints.FOLDER):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    put_back(folder)
    return False


def finish(recipe: Recipe, folder: Path, console: Console) -> None:
    """What is left to do of a run that is written."""
    tidy(folder)
    if recipe.push_to_hub:
        upload(folder / recipe.kept, recipe.push_to_hub)
        console.print(f"uploaded to {recipe.push_to_hub}")
    (folder / BEFORE).unlink(missing_ok=True)  # last: where it is found with a report, this is done again


def tidy(folder: Path) -> None:
    """Remove the run that this one replaces, and what processes of this one left half-written when they were killed."""
    remove(folder, "old")
    remove(folder, "part")
    for path in folder.rglob(".*part"):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def samples(questions: list[dict], answers: list[list[str]]) -> list[dict[str, str]]:
    """Prompt, reference, and the answers before and after."""
    if len(answers) < 2:
        return []
    return [
        {"prompt": row["prompt"], "reference": row["reference"], "before": b, "after": a}
        for row, b, a in zip(questions, answers[0], answers[1], strict=False)
    ]


def write(result: Result, model: PeftModel | PreTrainedModel, state: dict[str, Tensor] | None = None) -> None:
    """The adapter (or the whole model) with its card, the samples, the plots and the report; `state`: what to save of a
    model that is sharded."""
    kept = result.folder / result.recipe.kept
    marker = "adapter_config.json" if isinstance(model, PeftModel) else "config.json"
    with new_folder(kept, overwrite=True, marker=marker) as part:
        if isinstance(model, PeftModel):  # DPO may keep another adapter as the reference
            model.save_pretrained(str(part), state_dict=state, selected_adapters=["default"])
        else:
            model.save_pretrained(str(part), state_dict=state)
            TASKS[result.recipe.task].processor(result.recipe).save_pretrained(str(part))
        if kinds.find(result.recipe.task).peft == kinds.SEQUENCE:
            model.config.save_pretrained(str(part))  # the labels
        (part / "README.md").write_text(report.card(result), encoding="utf-8")
    (result.folder / "plots").mkdir(exist_ok=True)
    found: dict[str, Change] = {}
    if isinstance(model, PeftModel) and getattr(model.peft_config["default"], "folded", False):
        found = of_fold(kept)
    elif state is None:  # a sharded model has no weights here to compare
        found = changes(model, lambda: weights_of(result.recipe))
    drawn = run_plots.draw(run_plots.of_run(result, found, report.title(result)), result.folder / "plots")
    if found:
        write_text(result.folder / CHANGES, json.dumps(as_data(found), indent=1))
    write_text(result.folder / "samples.md", report.samples_text(result))
    write_text(result.folder / PAGE, report.page(result, drawn, found))


def weights_of(recipe: Recipe) -> Weights:
    """What the checkpoint of a recipe's model stores."""
    return Weights(recipe.model, recipe.revision, recipe.trust_remote_code, kinds.find(recipe.task).auto)


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
