"""Use NOMAD's mesh adaptive direct search as the sampler of `inlay tune`, through PyNomadBBO.

Audet and Dennis 2006 (MADS); on instruction tuning: Tribes et al., arXiv:2312.00949. The search is sequential and
random only by its seed: one that was stopped starts again, meets the trials it already has, and resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from inlay.experiments.tune.spec import Range, SearchPlan
from inlay.messages import check_installed


def import_nomad() -> Any:
    """Import PyNomad.

    Raises:
        ValueError: it is not installed.
    """
    check_installed("sampler: nomad", "PyNomad")
    import PyNomad

    return PyNomad


def box(r: Range) -> tuple[float, float, str]:
    """Return NOMAD's lower bound, upper bound and type of a range: logarithms, or indices of choices."""
    if r.choices:
        return 0, len(r.choices) - 1, "I"
    if r.log:
        return math.log(r.low), math.log(r.high), "R"
    return r.low, r.high, "I" if r.whole else "R"


def value_at(r: Range, x: float) -> Any:
    """Return the value of a range at NOMAD's coordinate `x`."""
    if r.choices:
        return list(r.labels)[round(x)]
    value = min(max(math.exp(x) if r.log else x, r.low), r.high)
    return round(value) if r.whole else value


def minimise(loss: Callable[[dict[str, Any]], float], plan: SearchPlan) -> None:
    """Search the space of a plan from its middle, evaluating at most as many points as the plan has trials.

    Args:
        loss: returns the loss at values by name; infinite where there is none.
        plan: the search.
    """
    names = list(plan.ranges)
    failed: list[BaseException] = []
    low, high, kinds = zip(*map(box, plan.ranges.values()), strict=True)
    start = [(a + b) // 2 if kind == "I" else (a + b) / 2 for a, b, kind in zip(low, high, kinds, strict=True)]

    def evaluate(point: Any) -> int:
        """Evaluate a point for NOMAD; return 1 if it has a value, which NOMAD reads from the point."""
        if failed:  # an exception would not pass through NOMAD: it is kept, and all later points are refused
            return 0
        try:
            value = loss({n: value_at(plan.ranges[n], point.get_coord(i)) for i, n in enumerate(names)})
        except BaseException as error:
            failed.append(error)
            return 0
        point.setBBO(f"{value:.17g}".encode())
        return int(math.isfinite(value))

    import_nomad().optimize(evaluate, start, list(low), list(high), [
        "BB_OUTPUT_TYPE OBJ", f"BB_INPUT_TYPE ( {' '.join(kinds)} )", f"MAX_BB_EVAL {plan.spec.trials}",
        f"SEED {plan.recipe.seed}", "DISPLAY_DEGREE 0", "NB_THREADS_PARALLEL_EVAL 1",
    ])  # fmt: skip
    if failed:
        raise failed[0]
