"""The state of a search: its trials, its best recipe."""

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
    from optuna.trial import FrozenTrial


ASKED, STUDY, BEST = "tune.yaml", "tune.db", "best.yaml"  # the first also marks a folder as a search's


@dataclass
class TrialResult:
    """What a search found: its study, the runs' results by their labels, and those of the best few again."""

    plan: SearchPlan
    folder: Path
    study: optuna.Study
    results: dict[str, dict[str, Any]]
    again: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def done(self) -> list[FrozenTrial]:
        """The trials that ran to their end and did not diverge, the least loss first; of equal ones, one."""
        best = sorted(completed_trials(self.study), key=lambda trial: trial.values[0])
        return [t for i, t in enumerate(best) if math.isfinite(t.values[0]) and same_trial(best[:i], t) is None]

    def score(self, trial: FrozenTrial) -> float:
        """What a trial is judged by in the end, less being better."""
        result, asked = self.again[trial_label(trial)], self.plan.rescore
        return result["after"] if asked.metric is None else result["metric"] * (-1) ** (asked.direction == "maximize")

    @property
    def best(self) -> FrozenTrial:
        """The trial whose values win."""
        judged = [trial for trial in self.done if trial_label(trial) in self.again]
        return min(judged, key=self.score) if judged else self.done[0]


def best_recipe(found: TrialResult) -> str:
    """The recipe of the trial that won, with what the search did not touch; `inlay train` takes it."""
    made = lay_over(found.plan.recipe, values_of(found.plan, found.best.params))
    head = f"# {trial_label(found.best)} of inlay tune\n"
    return head + yaml.safe_dump(non_defaults(made), sort_keys=False, allow_unicode=True)


def values_of(plan: SearchPlan, params: dict[str, Any]) -> dict[str, Any]:
    """A trial's values as a recipe takes them."""
    return {name: r.labels[params[name]] if r.choices else params[name] for name, r in plan.ranges.items()}


def trial_label(trial: Any) -> str:
    """A trial's folder; one that is tried again after a kill keeps its own."""
    return trial.user_attrs.get("label", f"trial-{trial.number:03d}")


def completed_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ran to their end."""
    return study.get_trials(deepcopy=False, states=(search_state("COMPLETE"),))


def search_state(name: str) -> Any:
    """A state of Optuna's trials."""
    from optuna.trial import TrialState

    return TrialState[name]


def same_trial(trials: list[FrozenTrial], of: Any) -> FrozenTrial | None:
    """The first of some trials with the same values."""
    return next((trial for trial in trials if trial.params == of.params), None)
