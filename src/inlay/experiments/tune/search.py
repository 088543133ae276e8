"""`inlay tune`: a search over fields of a recipe, each trial in a process of its own.

Optuna chooses the trials (or NOMAD, see nomad.py) and keeps them in a SQLite file in the folder; what it minimises is
the loss on examples that neither train nor count in the end, and a trial that falls behind is ended early. A lower loss
is not always a better model, and the least of many is partly luck: the best few are trained again with another seed and
judged by the held-out examples, or by the user's own metric.
"""

from __future__ import annotations

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
from inlay.experiments.runner import Runner, Workers, open_folder, origin, steps_of
from inlay.experiments.trial import Trial
from inlay.experiments.tune.nomad import import_nomad, minimise
from inlay.experiments.tune.spec import Range, SearchPlan, lay_over, load_search, same_values
from inlay.experiments.tune.study import (
    ASKED,
    BEST,
    STUDY,
    TrialResult,
    best_recipe,
    completed_trials,
    same_trial,
    search_state,
    trial_label,
    values_of,
)
from inlay.files.atomic import locked, write_text
from inlay.training.examples import load_examples
from inlay.training.run_tokenizer import run_tokenizer

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
) -> Path:
    """Run a search, or go on with it, and leave its best recipe, its table and its plots in its folder, which is
    returned.

    Raises:
        ValueError: the recipe or the data cannot be used, the folder holds something else, Optuna, NOMAD or Ray is
            not there, or every trial failed.
    """
    console = console or Console()
    plan = load_search(path, output, overwrite)
    check_trial(plan, jobs)
    folder = Path(plan.recipe.output or Path("runs") / Path(path).stem).expanduser()
    recipe = plan.recipe
    rows = load_examples(recipe, run_tokenizer(recipe), console)
    if plan.ask.selection >= len(rows.train):
        raise ValueError(f"selection: {plan.ask.selection} of {len(rows.train)} examples leave none to train on")
    with ray_cluster.workers(jobs, cluster, console) as workers, locked(folder):
        open_folder(folder, folder / ASKED, plan.to_yaml(), origin(recipe, rows), overwrite, "search", same_values)
        with SearchRun(plan, folder, len(rows.train) - plan.ask.selection, workers, console) as search:
            search.run()
            found = search.judge()
        from inlay.experiments.tune.report import write_search  # matplotlib takes a second

        write_text(folder / BEST, best_recipe(found))
        write_search(found, console)
    return folder


def check_trial(plan: SearchPlan, jobs: int | None) -> None:
    """Refuse what would fail only after the trials.

    Raises:
        ValueError: something is not installed, the metric cannot be imported, or NOMAD is asked for several jobs.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("inlay tune needs Optuna; pip install 'inlay[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if plan.ask.sampler == "nomad":
        import_nomad()
        if jobs is not None and jobs > 1:
            raise ValueError(f"sampler: nomad chooses each trial by the one before; leave out --jobs {jobs}")
    if plan.rescore.metric:
        load_metric(plan.rescore.metric)


class SearchRun:
    """The trials of a search: chosen, run, told to the study."""

    def __init__(self, plan: SearchPlan, folder: Path, rows: int, workers: Workers, console: Console) -> None:
        import optuna

        self.plan, self.folder, self.rows, self.console = plan, folder, rows, console
        self.runner = Runner(folder, workers, console, self.hopeless)
        self.storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY}")
        known = [s.study_name for s in self.storage.get_all_studies()]
        seen = len(self.storage.get_all_trials(self.storage.get_study_id_from_name("inlay"))) if known else 0
        evaluations = plan.ask.evaluations
        pruner: Any = {
            "median": optuna.pruners.MedianPruner,
            "hyperband": lambda: optuna.pruners.HyperbandPruner(max_resource=evaluations),
            "none": optuna.pruners.NopPruner,
        }[plan.ask.pruner]()
        # A search that goes on must not draw again what it drew at its start.
        sampler = optuna.samplers.TPESampler(seed=plan.recipe.seed + seen)
        self.study = optuna.create_study(
            storage=self.storage, sampler=sampler, pruner=pruner, study_name="inlay", load_if_exists=True
        )
        self.found = TrialResult(plan, folder, self.study, {})
        self.going: dict[Path, tuple[optuna.Trial, int]] = {}
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
        """As many trials as are asked for, those that finished before included; what a kill or a failure ended is
        tried again first, in its own folder."""
        finished = self.study.get_trials(states=(search_state("COMPLETE"), search_state("PRUNED")))
        for trial in self.study.get_trials(states=(search_state("RUNNING"),)):
            self.study.tell(trial.number, state=search_state("FAIL"))
        going = {trial_label(t) for t in (*finished, *self.study.get_trials(states=(search_state("WAITING"),)))}
        for trial in self.study.get_trials(states=(search_state("FAIL"),)):
            if trial_label(trial) not in going and len(trial.params) == len(self.plan.ranges):
                self.study.enqueue_trial(trial.params, user_attrs={"label": trial_label(trial)})
                going.add(trial_label(trial))
        for trial in finished:
            self.keep(trial)
        left = self.plan.ask.trials - len(finished)
        if finished:
            self.console.print(f"{len(finished)} trials are finished already, {max(0, left)} are left")
        if self.plan.ask.sampler == "tpe":
            self.runner.map(lambda _: self.attempt(), range(left))
        elif left > 0:
            self.runner.map(self.mesh, [left])

    def mesh(self, left: int) -> None:
        """The trials that NOMAD chooses, one after the other."""
        self.runner.bars.update(self.runner.all, total=left)
        minimise(self.at, self.plan)

    def keep(self, trial: FrozenTrial) -> None:
        """Read the result of a trial that was run before."""
        asked = self.trial_of(trial)
        if result := asked.result(self.folder / "runs" / asked.name):
            self.found.results[trial_label(trial)] = result

    def at(self, params: dict[str, Any]) -> float:
        """The loss at some values, for a method that chooses them itself."""
        finished = self.study.get_trials(deepcopy=False, states=(search_state("COMPLETE"), search_state("PRUNED")))
        known = next((t for t in finished if t.params == params), None)
        if known is None:
            self.study.enqueue_trial(params, skip_if_exists=True)
            known = self.attempt()
        return known.values[0] if known.state == search_state("COMPLETE") else math.inf

    def attempt(self) -> FrozenTrial:
        """One trial: its values from the study, its run, its loss to the study."""
        with self.lock:
            trial = self.study.ask()
            for name, r in self.plan.ranges.items():
                suggest(trial, name, r)
            finished = self.study.get_trials(deepcopy=False, states=(search_state("COMPLETE"), search_state("PRUNED")))
        name = trial_label(trial)
        if known := same_trial(finished, trial):
            self.console.print(f"{name}: the values of {trial_label(known)}")
            return self.study.tell(
                trial, known.values if known.state == search_state("COMPLETE") else None, known.state
            )
        values = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        self.console.print(f"{name}: {', '.join(values)}")
        asked = self.trial_of(trial)
        folder = self.folder / "runs" / asked.name
        self.going[folder] = (trial, asked.stop)
        result = self.runner.one(asked)
        if result is None:
            return self.study.tell(trial, state=search_state("PRUNED" if folder in self.runner.pruned else "FAIL"))
        self.found.results[name] = result
        told = self.study.tell(trial, math.inf if result["after"] is None else result["after"])
        best = min(t.values[0] for t in completed_trials(self.study))
        self.runner.bars.update(self.runner.all, now=f"best {best:.3f}")
        return told

    def trial_of(self, trial: Any, again: bool = False) -> Trial:
        """The run of a trial's values; `again`: with another seed, judged by what is held out or by the metric."""
        plan, name = self.plan, trial_label(trial)
        recipe = lay_over(plan.recipe, values_of(plan, trial.params))
        steps = steps_of(recipe, self.rows)
        made = replace(
            recipe, steps=steps, output=None, overwrite=False, seed=recipe.seed + again,
            eval_every=None if again else math.ceil(steps / plan.ask.evaluations),
        )  # fmt: skip
        where = f"again/{name}" if again else name
        metric = plan.rescore.metric if again else None
        return Trial(recipe.method, made, steps, again, plan.ask.selection, plan.recipe.seed, None, where, metric)

    def hopeless(self, folder: Path, rows: list[dict[str, Any]]) -> bool:
        """Tell the pruner what a trial has reached; whether it gives the trial up."""
        if folder not in self.going:  # one of the best few, again
            return False
        trial, stop = self.going[folder]
        held = [row["eval_loss"] for row in rows if "eval_loss" in row and 0 < row["step"] < stop]
        new = held[self.reported[folder] :]
        for loss in new:
            self.reported[folder] += 1
            trial.report(loss, self.reported[folder])
        return bool(new) and trial.should_prune()

    def judge(self) -> TrialResult:
        """Train the best few again, and judge them.

        Raises:
            ValueError: no trial ran to its end.
        """
        if not self.found.done:
            raise ValueError(f"no trial ran to its end; see the log.txt files under {self.folder / 'runs'}")
        top = self.found.done[: self.plan.rescore.top]
        results = self.runner.run([self.trial_of(trial, again=True) for trial in top])
        self.found.again = {
            trial_label(t): r for t, r in zip(top, results, strict=True) if r is not None and r["after"] is not None
        }
        return self.found


def suggest(trial: optuna.Trial, name: str, r: Range) -> None:
    """Have the study choose a value of a range."""
    if r.choices:
        trial.suggest_categorical(name, list(r.labels))
    elif r.whole:
        trial.suggest_int(name, int(r.low), int(r.high), log=r.log)
    else:
        trial.suggest_float(name, r.low, r.high, log=r.log)
