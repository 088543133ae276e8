"""Hold the state of a search: its trials and its best recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from inlay.experiments.tune.spec import SearchPlan, lay_over
from inlay.recipe.reading import non_defaults

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, TrialState

PLAN = "tune.yaml"  # also marks a folder as a search's
STUDY = "tune.db"
BEST = "best.yaml"


@dataclass
class SearchOutcome:
    """Hold the outcome of a search.

    Attributes:
        plan, folder, study: of the search.
        results: of the runs, by label.
        again: of the best few, trained again, by label.
    """

    plan: SearchPlan
    folder: Path
    study: optuna.Study
    results: dict[str, dict[str, Any]]
    again: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def done(self) -> list[FrozenTrial]:
        """Return the completed trials that did not diverge, the lowest loss first, without duplicates."""
        best = sorted(completed_trials(self.study), key=lambda trial: trial.values[0])
        return [t for i, t in enumerate(best) if math.isfinite(t.values[0]) and same_trial(best[:i], t) is None]

    def score(self, trial: FrozenTrial) -> float:
        """Return what a trial is compared by in the end; lower is better."""
        result = self.again[trial_label(trial)]
        rescore = self.plan.rescore
        if rescore.metric is None:
            return result["after"]
        return -result["metric"] if rescore.direction == "maximize" else result["metric"]

    @property
    def best(self) -> FrozenTrial:
        """Return the trial whose values win."""
        rescored = [trial for trial in self.done if trial_label(trial) in self.again]
        return min(rescored, key=self.score) if rescored else self.done[0]


def best_recipe(outcome: SearchOutcome) -> str:
    """Return the recipe of the best trial as YAML, with the fields that the search did not touch."""
    recipe = lay_over(outcome.plan.recipe, values_of(outcome.plan, outcome.best.params))
    head = f"# {trial_label(outcome.best)} of inlay tune\n"
    return head + yaml.safe_dump(non_defaults(recipe), sort_keys=False, allow_unicode=True)


def values_of(plan: SearchPlan, params: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's values as a recipe takes them."""
    return {name: r.labels[params[name]] if r.choices else params[name] for name, r in plan.ranges.items()}


def trial_label(trial: optuna.Trial | FrozenTrial) -> str:
    """Return the name of a trial's folder; one that is tried again after a kill keeps its own."""
    return trial.user_attrs.get("label", f"trial-{trial.number:03d}")


def completed_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ran to their end."""
    return study.get_trials(deepcopy=False, states=(search_state("COMPLETE"),))


def search_state(name: str) -> TrialState:
    """Return a state of Optuna's trials by name."""
    from optuna.trial import TrialState

    return TrialState[name]


def same_trial(trials: list[FrozenTrial], other: optuna.Trial | FrozenTrial) -> FrozenTrial | None:
    """Return the first of some trials with the values of another one."""
    return next((trial for trial in trials if trial.params == other.params), None)
