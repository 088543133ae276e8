"""Show before a run what it learns from, its parameters, and the memory it needs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import cast

import torch
from rich.console import Console

from inlay.files.atomic import check_free
from inlay.host.experts import count_of, some_experts
from inlay.host.routing import busiest_experts
from inlay.messages import dtype_name, duration, gib
from inlay.models.base import BaseModel
from inlay.models.folded import fold_at
from inlay.models.loading import dtype_for
from inlay.models.model_classes import PLANNED_TASKS, find_model_class
from inlay.models.sizes import count_parameters, frozen_experts
from inlay.planning.planner import NotPlannedError, PlannedRun
from inlay.recipe.peft_methods import without_start
from inlay.recipe.recipe import Recipe
from inlay.training.allocate_ranks import settle_ranks
from inlay.training.arguments import check_means, optimizer_steps
from inlay.training.base_model import check_fold, model_of
from inlay.training.batch_size import fitting_batch, largest_useful_batch, planned_step
from inlay.training.examples import TOKENS, Examples
from inlay.training.run_folder import MARK
from inlay.training.tasks import TASKS


def dry_run(recipe: Recipe, console: Console, verbose: bool = False) -> None:
    """Show what a run would do: rows, steps, parameters, memory, the first example, the recipe. Load no weights.

    Args:
        recipe: of the run.
        console: where it is shown.
        verbose: show every field of the recipe, and not only those that differ from the defaults.

    Raises:
        ValueError: the recipe or its data cannot be used.
    """
    check_free(recipe.run_folder(), recipe.overwrite, MARK)
    check_means(recipe)
    if adapter := fold_at(recipe.model):
        check_fold(recipe, adapter)
    dtype = dtype_for(recipe.dtype)
    task = TASKS[recipe.task]
    kind = find_model_class(recipe.task)
    tokenizer = task.processor(recipe)
    base = recipe.base_model
    rows = task.examples(recipe, tokenizer, console)
    recipe = settle_ranks(with_first_experts(recipe, base, rows, console), base, rows, console)
    batch = recipe.batch_size
    if batch == "auto":
        batch = fitting_batch(*planned_step(recipe, base, rows, dtype), largest_useful_batch(rows), loaded=False)
    resolved = recipe.resolved(dtype=dtype_name(dtype), eval_size=rows.eval_size, batch_size=batch)
    show_amount(resolved, rows, console)
    if kind.planned:
        show_memory(resolved, rows, *planned_step(resolved, base, rows, dtype), console)
    else:
        trained = count_parameters(base, without_start(recipe.adapter()), **model_of(recipe, rows))
        console.print(
            f"{trained:,} trainable parameters; the memory of a run is predicted for {' and '.join(PLANNED_TASKS)} only"
        )
    console.print("\nfirst example, the learned part in ⟦⟧:" if not kind.causal else TOKENS)
    console.print(task.shown(rows.train[0], tokenizer, resolved), soft_wrap=True, markup=False, highlight=False)
    console.print(
        "\nrecipe:" if verbose else "\nrecipe, where it differs from the defaults (--verbose shows all of it):"
    )
    console.print((resolved.to_yaml() if verbose else recipe.differences()).rstrip(), soft_wrap=True)


def with_first_experts(recipe: Recipe, base: BaseModel, rows: Examples, console: Console) -> Recipe:
    """Return the recipe with the first experts of each layer, where the run itself will look for the busiest."""
    if isinstance(recipe.experts, bool | dict):
        return recipe
    experts = some_experts(base.meta(torch.float32, **model_of(recipe, rows)))
    counts = {name: -torch.arange(count_of(module)) for name, module in experts.items()}
    console.print(
        f"the run trains the busiest {recipe.experts} experts of each layer, which it looks for in the data; here the "
        f"first {recipe.experts} stand for them"
    )
    return replace(recipe, experts=busiest_experts(counts, recipe.experts))


def show_amount(recipe: Recipe, rows: Examples, console: Console) -> None:
    """Print the tokens of an epoch and the optimizer steps of the run; of a stream, those of the first examples."""
    audit = rows.audit
    tokens = f"{audit.mean_tokens * audit.total:,.0f} tokens in {audit.total:,} sequences"
    learned = f", {audit.answer_tokens:,} of them learned" if audit.answer_tokens else ""
    steps = "at most " if recipe.packing and not recipe.steps else ""
    steps += f"{optimizer_steps(recipe, len(rows.train), cast(int, recipe.batch_size)):,} optimizer steps"
    console.print(f"{tokens}{learned}; {steps} of {recipe.batch_size} × {recipe.accumulation} examples")


def show_memory(recipe: Recipe, rows: Examples, run: PlannedRun, length: int, console: Console) -> None:
    """Print the trained parameters, the predicted memory of a step (or why there is none), and the time at least."""
    batch = cast(int, recipe.batch_size)
    try:
        need = run.step(batch, length)
    except NotPlannedError as error:  # of operations that the meta device has not, as of experts
        console.print(f"{run.parameters:,} trainable parameters; memory not planned: {error}", style="yellow")
        return
    finally:
        if line := frozen_experts(run.parts[-1]):
            console.print(line, style="yellow")
    labelled = f", at most {run.labelled:.0%} of them labelled" if run.labelled < 1 else ""
    console.print(f"{need.parameters:,.0f} trainable parameters; batch {batch} × {length} tokens{labelled}")
    training = need.trained + need.gradients + need.optimizer
    console.print(
        f"memory at the peak of a step: {gib(need.peak)}, of which weights {gib(need.frozen)}, adapter with "
        f"gradients and optimiser {gib(training)}, activations {gib(need.activations)}, the rest "
        "temporary; the libraries need more on top"
    )
    if recipe.quantize == "none" and not fold_at(recipe.model):  # products of packed weights are not counted
        steps = optimizer_steps(recipe, len(rows.train), batch) * recipe.accumulation
        tokens = rows.audit.mean_tokens * rows.audit.total
        learned = min(run.labelled, rows.audit.answer_tokens / tokens) if run.labelled < 1 else 1.0
        flops = run.step(batch, length, learned).flops
        products = steps * flops * min(1.0, rows.audit.mean_tokens / length)
        seconds = products / product_rate(run.dtype)
        console.print(f"about {duration(seconds)} (m:ss) of matrix products on this machine; a run takes longer")


def product_rate(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Measure how many operations of matrix products this machine does in a second, in a fraction of one."""
    cuda = torch.cuda.is_available()
    n = 4096 if cuda else 1024
    A = torch.randn(n, n, device="cuda" if cuda else "cpu").to(dtype)
    count = -1  # the first one warms up
    began = spent = 0.0
    while spent < seconds:
        (A @ A)[0, 0].item()  # which waits for a GPU
        count += 1
        began = began if count else time.perf_counter()
        spent = time.perf_counter() - began
    return 2 * n**3 * count / spent
