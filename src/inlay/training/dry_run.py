"""Show before a run what it learns from, its parameters, and the memory it needs."""

from __future__ import annotations

from rich.console import Console

from inlay.files.atomic import check_free
from inlay.messages import dtype_name, gib
from inlay.models.folded import fold_at
from inlay.models.loading import dtype_for
from inlay.models.model_classes import find_model_class
from inlay.models.sizes import count_parameters
from inlay.recipe.peft_methods import without_start
from inlay.recipe.recipe import Recipe
from inlay.training.allocate_ranks import settle_ranks
from inlay.training.base_model import check_fold
from inlay.training.batch_size import fitting_batch, largest_useful_batch, planned_step
from inlay.training.examples import TOKENS
from inlay.training.run_folder import MARK
from inlay.training.tasks import TASKS


def dry_run(recipe: Recipe, console: Console) -> None:
    """Show what a run would do: recipe, first example with its answer marked, parameters, memory. Load no weights."""
    check_free(recipe.run_folder(), recipe.overwrite, MARK)
    if adapter := fold_at(recipe.model):
        check_fold(recipe, adapter)
    dtype = dtype_for(recipe.dtype)
    task = TASKS[recipe.task]
    kind = find_model_class(recipe.task)
    tokenizer = task.processor(recipe)
    base = recipe.base_model()
    rows = task.examples(recipe, tokenizer, console)
    recipe = settle_ranks(recipe, base, console)
    batch = recipe.batch_size
    if batch == "auto":
        batch = fitting_batch(*planned_step(recipe, base, rows, dtype), largest_useful_batch(rows), loaded=False)
    recipe = recipe.resolved(dtype=dtype_name(dtype), eval_size=rows.eval_size, batch_size=batch)
    console.print(recipe.to_yaml().rstrip(), soft_wrap=True)
    console.print("\nfirst example, the learned part in ⟦⟧:" if not kind.causal else TOKENS)
    console.print(task.shown(rows.train[0], tokenizer, recipe), soft_wrap=True)
    if not kind.causal or recipe.task == "preference":
        config = without_start(recipe.adapter())
        trained = count_parameters(base, config, kind.auto, **task.model_settings(rows))
        console.print(
            f"\n{trained:,} trainable parameters; memory is predicted for tasks instruction, language_modelling"
        )
        return
    run, length = planned_step(recipe, base, rows, dtype)
    need = run.step(batch, length)
    console.print(f"\n{need.parameters:,.0f} trainable parameters; batch {batch} × {length} tokens")
    training = need.trained + need.gradients + need.optimizer
    console.print(
        f"memory at the peak of a step: {gib(need.peak)}, of which weights {gib(need.frozen)}, adapter with "
        f"gradients and optimiser {gib(training)}, activations {gib(need.activations)}, the rest "
        "temporary; the libraries need more on top"
    )
