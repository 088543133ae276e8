"""NOMAD's mesh adaptive direct search as the sampler of `inlay tune`, through PyNomadBBO.

Audet and Dennis 2006 (MADS); on instruction tuning: Tribes et al., arXiv:2312.00949. The search is sequential and has
no randomness but its seed's: one that was stopped begins anew, meets the trials it has had, and goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from inlay.experiments.tune.spec import Range, SearchPlan


def import_nomad() -> Any:
    """PyNomad.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import PyNomad
    except ImportError:
        raise ValueError("sampler: nomad needs PyNomadBBO; pip install 'inlay[nomad]', or choose tpe") from None
    return PyNomad


def box(r: Range) -> tuple[float, float, str]:
    """The bounds that NOMAD moves within and the type of the variable: logarithms, or the indices of choices."""
    if r.choices:
        return 0, len(r.choices) - 1, "I"
    if r.log:
        return math.log(r.low), math.log(r.high), "R"
    return r.low, r.high, "I" if r.whole else "R"


def value_at(r: Range, x: float) -> Any:
    """The value of a range at NOMAD's coordinate."""
    if r.choices:
        return list(r.labels)[round(x)]
    value = min(max(math.exp(x) if r.log else x, r.low), r.high)
    return round(value) if r.whole else value


def minimise(loss: Callable[[dict[str, Any]], float], plan: SearchPlan) -> None:
    """Search the space of a plan from its middle, with at most so many values as it has trials.

    Args:
        loss: of values by name; infinite where there is none.
    """
    names, failed = list(plan.ranges), []
    low, high, kinds = zip(*map(box, plan.ranges.values()), strict=True)
    start = [(a + b) // 2 if kind == "I" else (a + b) / 2 for a, b, kind in zip(low, high, kinds, strict=True)]

    def evaluate(point: Any) -> int:
        """NOMAD's callback: 1 where there is a value, which it reads from the point."""
        if failed:  # an exception would not leave NOMAD: it is kept, and what is still asked for is refused
            return 0
        try:
            found = loss({n: value_at(plan.ranges[n], point.get_coord(i)) for i, n in enumerate(names)})
        except BaseException as error:
            failed.append(error)
            return 0
        point.setBBO(f"{found:.17g}".encode())
        return int(math.isfinite(found))

    import_nomad().optimize(evaluate, start, list(low), list(high), [
        "BB_OUTPUT_TYPE OBJ", f"BB_INPUT_TYPE ( {' '.join(kinds)} )", f"MAX_BB_EVAL {plan.ask.trials}",
        f"SEED {plan.recipe.seed}", "DISPLAY_DEGREE 0", "NB_THREADS_PARALLEL_EVAL 1",
    ])  # fmt: skip
    if failed:
        raise failed[0]
