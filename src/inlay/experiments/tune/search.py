"""Search over fields of a recipe (`inlay tune`), each trial in a process of its own.

Optuna chooses the trials (or NOMAD, see nomad.py) and keeps them in a SQLite file in the folder; it minimises the loss
on examples used neither in training nor in the final evaluation, and ends a trial early that falls behind. A lower loss
is not always a better model, and the lowest of many is partly luck: the best few are trained again with another seed
and evaluated on the held-out examples, or by the user's own metric.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from inlay.evaluation.metric import load_metric
from inlay.experiments import ray_cluster
from inlay.experiments.ray_cluster import Cluster
from inlay.experiments.runner import Runner, Workers, experiment_folder, origin, steps_of
from inlay.experiments.trial import Trial
from inlay.experiments.tune.nomad import import_nomad, minimise
from inlay.experiments.tune.spec import Range, SearchPlan, lay_over, load_search, same_values
from inlay.experiments.tune.study import (
    BEST,
    PLAN,
    STUDY,
    SearchOutcome,
    best_recipe,
    completed_trials,
    same_trial,
    search_state,
    trial_label,
    values_of,
)
from inlay.files.atomic import locked, write_text
from inlay.files.untrusted import user_path
from inlay.messages import Terminal, check_installed
from inlay.training.arguments import check_means
from inlay.training.tasks import TASKS

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def tune(
    path: str,
    jobs: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    cluster: Cluster | None = None,
    given: dict[str, object] | None = None,
) -> Path:
    """Run or resume a search, and return its folder with the best recipe, a table and plots.

    Args:
        path: a recipe with a `tune` block.
        jobs: trials at a time; None: one locally, on a cluster as many as it has room for.
        output: the folder; None: the recipe's, or runs/ and the recipe's name.
        overwrite: replace the folder of another search.
        console: for messages.
        cluster: the Ray cluster that runs the trials; None: this machine.
        given: fields that override the recipe's.

    Raises:
        ValueError: the recipe or the data cannot be used, the folder holds something else, Optuna, NOMAD or Ray is not
            installed, or every trial failed.
    """
    console = console or Terminal()
    plan = load_search(path, output, overwrite, given)
    check_trial(plan, jobs)
    check_means(plan.recipe)
    folder = user_path(plan.recipe.output or Path("runs") / Path(path).stem)
    recipe = plan.recipe
    task = TASKS[recipe.task]
    rows = task.examples(recipe, task.processor(recipe), console)
    if plan.spec.selection >= len(rows.train):
        raise ValueError(f"selection: {plan.spec.selection} of {len(rows.train)} examples leave none to train on")
    with ray_cluster.workers(jobs, cluster, console) as workers, locked(folder):
        opened = (folder, folder / PLAN, plan.to_yaml(), origin(recipe, rows), overwrite, "search", same_values)
        with experiment_folder(*opened):
            with SearchRun(plan, folder, len(rows.train) - plan.spec.selection, workers, console) as search:
                search.run()
                outcome = search.rescore()
            from inlay.experiments.tune.report import write_search  # matplotlib takes a second

            write_text(folder / BEST, best_recipe(outcome))
            write_search(outcome, console)
    return folder


def check_trial(plan: SearchPlan, jobs: int | None) -> None:
    """Refuse what would fail only after the trials.

    Raises:
        ValueError: something is not installed, the metric cannot be imported, or NOMAD is combined with several jobs.
    """
    check_installed("inlay tune", "optuna")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if plan.spec.sampler == "nomad":
        import_nomad()
        if jobs is not None and jobs > 1:
            raise ValueError(f"sampler: nomad chooses each trial after the one before; leave out --jobs {jobs}")
    if plan.rescore.metric:
        load_metric(plan.rescore.metric)


class SearchRun:
    """Choose the trials of a search, run them, and report them to Optuna's study."""

    def __init__(self, plan: SearchPlan, folder: Path, examples: int, workers: Workers, console: Console) -> None:
        import optuna

        self.plan = plan
        self.folder = folder
        self.examples = examples
        self.console = console
        self.runner = Runner(folder, workers, console, self.hopeless)
        self.storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}")
        evaluations = plan.spec.evaluations
        pruner = {
            "median": optuna.pruners.MedianPruner,
            "hyperband": lambda: optuna.pruners.HyperbandPruner(max_resource=evaluations),
            "none": optuna.pruners.NopPruner,
        }[plan.spec.pruner]()
        self.study = optuna.create_study(storage=self.storage, pruner=pruner, study_name="inlay", load_if_exists=True)
        self.outcome = SearchOutcome(plan, folder, self.study, {})
        self.running: dict[Path, tuple[optuna.Trial, int]] = {}
        self.reported: Counter[Path] = Counter()
        self.lock = threading.Lock()  # one trial is chosen at a time

    def __enter__(self) -> SearchRun:
        self.runner.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.runner.__exit__(*raised)
        self.storage.remove_session()
        self.storage.engine.dispose()

    def run(self) -> None:
        """Run trials until the plan's number of them has finished, including earlier ones.

        A trial that a kill or a failure ended is tried again first, in its own folder.
        """
        finished = self.study.get_trials(states=(search_state("COMPLETE"), search_state("PRUNED")))
        for trial in self.study.get_trials(states=(search_state("RUNNING"),)):
            self.study.tell(trial.number, state=search_state("FAIL"))
        kept = {trial_label(t) for t in (*finished, *self.study.get_trials(states=(search_state("WAITING"),)))}
        for trial in self.study.get_trials(states=(search_state("FAIL"),)):
            if trial_label(trial) not in kept and len(trial.params) == len(self.plan.ranges):
                self.study.enqueue_trial(trial.params, user_attrs={"label": trial_label(trial)})
                kept.add(trial_label(trial))
        for trial in finished:
            self.keep(trial)
        left = self.plan.spec.trials - len(finished)
        if finished:
            self.console.print(f"{len(finished)} trials are finished already, {max(0, left)} remain")
        if self.plan.spec.sampler == "tpe":
            self.runner.map(lambda _: self.attempt(), range(left))
        elif left > 0:
            self.runner.map(self.mesh, [left])

    def mesh(self, left: int) -> None:
        """Run the trials that NOMAD chooses, one after the other."""
        self.runner.bars.update(self.runner.all, total=left)
        minimise(self.at, self.plan)

    def keep(self, trial: FrozenTrial) -> None:
        """Load the result of a trial that was run before."""
        run = self.trial_of(trial)
        if result := run.result(self.folder / "runs" / run.name):
            self.outcome.results[trial_label(trial)] = result

    def at(self, params: dict[str, Any]) -> float:
        """Return the loss at the values `params`, for a sampler that chooses them itself."""
        finished = self.study.get_trials(deepcopy=False, states=(search_state("COMPLETE"), search_state("PRUNED")))
        trial = next((t for t in finished if t.params == params), None)
        if trial is None:
            self.study.enqueue_trial(params, skip_if_exists=True)
            trial = self.attempt()
        return trial.values[0] if trial.state == search_state("COMPLETE") else math.inf

    def attempt(self) -> FrozenTrial:
        """Run one trial with values from the study, and report its loss to the study."""
        with self.lock:
            trial = self.ask()
            finished = self.study.get_trials(deepcopy=False, states=(search_state("COMPLETE"), search_state("PRUNED")))
        name = trial_label(trial)
        if earlier := same_trial(finished, trial):
            self.console.print(f"{name}: the values of {trial_label(earlier)}")
            values = earlier.values if earlier.state == search_state("COMPLETE") else None
            return self.study.tell(trial, values, earlier.state)
        texts = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        self.console.print(f"{name}: {', '.join(texts)}")
        run = self.trial_of(trial)
        folder = self.folder / "runs" / run.name
        self.running[folder] = (trial, run.stop)
        result = self.runner.one(run)
        if result is None:
            return self.study.tell(trial, state=search_state("PRUNED" if folder in self.runner.pruned else "FAIL"))
        self.outcome.results[name] = result
        finished_trial = self.study.tell(trial, math.inf if result["after"] is None else result["after"])
        best = min(t.values[0] for t in completed_trials(self.study))
        self.runner.bars.update(self.runner.all, now=f"best {best:.3f}")
        return finished_trial

    def ask(self) -> optuna.Trial:
        """Return a trial with values from the study.

        What the n-th draws depends on the seed, n and the losses so far, not on how often the search was killed.
        """
        import optuna

        drawn = {
            trial_label(t) for t in self.study.get_trials(deepcopy=False) if len(t.params) == len(self.plan.ranges)
        }
        self.study.sampler = optuna.samplers.TPESampler(seed=(self.plan.recipe.seed * 1_000_003 + len(drawn)) % 2**32)
        trial = self.study.ask()
        if "label" not in trial.user_attrs:  # an older version may have left numbers out
            free = (f"trial-{n:03d}" for n in itertools.count(len(drawn)))
            trial.set_user_attr("label", next(label for label in free if label not in drawn))
        for name, r in self.plan.ranges.items():
            suggest(trial, name, r)
        return trial

    def trial_of(self, trial: optuna.Trial | FrozenTrial, again: bool = False) -> Trial:
        """Return the run of a trial's values; with `again`, the run with another seed and the final evaluation."""
        plan, name = self.plan, trial_label(trial)
        recipe = lay_over(plan.recipe, values_of(plan, trial.params))
        steps = steps_of(recipe, self.examples)
        recipe = replace(
            recipe, steps=steps, output=None, overwrite=False, seed=recipe.seed + again,
            eval_every=None if again else math.ceil(steps / plan.spec.evaluations),
        )  # fmt: skip
        where = f"again/{name}" if again else name
        metric = plan.rescore.metric if again else None
        return Trial(recipe.method, recipe, steps, again, plan.spec.selection, plan.recipe.seed, None, where, metric)

    def hopeless(self, folder: Path, rows: list[dict[str, Any]]) -> bool:
        """Report a trial's new losses to the pruner, and return whether it ends the trial."""
        if folder not in self.running:  # one of the best few, trained again
            return False
        trial, stop = self.running[folder]
        held = [row["eval_loss"] for row in rows if "eval_loss" in row and 0 < row["step"] < stop]
        new = held[self.reported[folder] :]
        for loss in new:
            self.reported[folder] += 1
            trial.report(loss, self.reported[folder])
        return bool(new) and trial.should_prune()

    def rescore(self) -> SearchOutcome:
        """Train the best few trials again, and add the results to the outcome.

        Raises:
            ValueError: no trial ran to its end.
        """
        if not self.outcome.done:
            raise ValueError(f"no trial ran to its end; see the log.txt files under {self.folder / 'runs'}")
        top = self.outcome.done[: self.plan.rescore.top]
        results = self.runner.run([self.trial_of(trial, again=True) for trial in top])
        self.outcome.again = {
            trial_label(t): r for t, r in zip(top, results, strict=True) if r is not None and r["after"] is not None
        }
        return self.outcome


def suggest(trial: optuna.Trial, name: str, r: Range) -> None:
    """Let the study choose a value of a range."""
    if r.choices:
        trial.suggest_categorical(name, list(r.labels))
    elif r.whole:
        trial.suggest_int(name, int(r.low), int(r.high), log=r.log)
    else:
        trial.suggest_float(name, r.low, r.high, log=r.log)
