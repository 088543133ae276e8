"""Scores with their confidence intervals, and the files they are written to."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.evaluation.eval_tasks import EVAL_TASKS, Question
from inlay.evaluation.paired import Difference, paired
from inlay.evaluation.text_overlap import installed_measures
from inlay.files.atomic import write_text
from inlay.files.untrusted import from_json, read_regular

Scores = list[float]


@dataclass(frozen=True)
class Score:
    """Hold a score, its 95 % interval and the number of examples (both None for a user's own metric)."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    draws: tuple[float, ...] = field(default=(), repr=False)  # its bootstrap: the same examples for every model

    def __str__(self) -> str:
        interval = "" if self.low is None else f"95 % {self.low:.3f} to {self.high:.3f}"
        details = ", ".join(part for part in (interval, f"{self.count} examples" if self.count else "") if part)
        return f"{self.name}: {self.value:.3f}" + (f" ({details})" if details else "")


def share_score(name: str, right: list[bool]) -> Score:
    """Return a share with Wilson's interval."""
    n, z = len(right), 1.96
    p = sum(right) / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Score(name, p, (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n), n)


def resampled_score(name: str, count: int, value: Callable[[list[int]], float], draws: int = 200) -> Score:
    """Return a value of a whole corpus, with the interval of its bootstrap."""
    draw = random.Random(0)
    again = tuple(value([draw.randrange(count) for _ in range(count)]) for _ in range(draws))
    return Score(name, value(list(range(count))), *bootstrap_interval(again), count, again)


def bootstrap_interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the interval that holds 95 % of the values of a bootstrap."""
    order = sorted(values)
    return order[int(0.025 * len(order))], order[int(0.975 * len(order)) - 1]


def overlap_scores(answers: list[str], questions: list[Question]) -> list[Score]:
    """Score answers by their overlap with the references, by every measure that is installed."""
    wanted = [question.wanted for question in questions]
    return [
        resampled_score(name, len(answers), measure(answers, wanted)) for name, measure in installed_measures().items()
    ]


def score_difference(was: Score, now: Score, its: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Return in words how the second of two models differs on the same examples, with the 95 % interval.

    The interval of a mean over examples is Student's; that of a value of the whole corpus comes from its bootstrap,
    with the same draws in both models. The text is empty where neither can be computed.
    """
    first, second = ([row[now.name] for row in own if now.name in row] for own in (its, rows))
    if first and isinstance(first[0], bool | int | float):
        gap = paired(list(map(float, second)), list(map(float, first)))
    elif was.draws and len(was.draws) == len(now.draws) and was.count == now.count:
        gaps = [b - a for a, b in zip(was.draws, now.draws, strict=True)]
        alike = math.isclose(min(gaps), max(gaps)) and any(gaps)
        gap = Difference(now.value - was.value, *((math.nan, math.nan) if alike else bootstrap_interval(gaps)))
    else:
        return ""
    if math.isnan(gap.low):
        return f"{gap.mean:+.3f}, noise is not known: one example, or all differ by the same"
    up, down = (
        ("worse", "better") if any(task.less and now.name in task.whole for task in EVAL_TASKS) else ("better", "worse")
    )
    verdict = "no difference beyond noise" if gap.low <= 0 <= gap.high else up if gap.low > 0 else down
    return f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}), {verdict}"


def score_as_data(score: Score) -> dict[str, Any]:
    """Return a score for JSON."""
    return {key: value for key, value in vars(score).items() if key != "draws"}


def unused_name(folder: Path, name: str, written: dict[str, dict[str, Any]]) -> str:
    """Return `name`, or with the first number after it under which no scores of other settings would be replaced.

    `written` holds the settings of each file that is to be written, by the end of its name.
    """
    for one in itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2))):
        if not any(has_others(folder / f"{one}{end}.json", about) for end, about in written.items()):
            return one
    raise AssertionError("numbers do not end")


def has_others(path: Path, about: dict[str, Any]) -> bool:
    """Return whether a file is there that does not hold scores of the settings `about`."""
    if not path.exists():
        return False
    try:
        found = from_json(read_regular(path))
    except (OSError, ValueError):
        return True
    return not isinstance(found, dict) or {key: found[key] for key in found if key != "figures"} != about


def write_scores(
    folder: Path, name: str, figures: list[Score], rows: list[dict[str, Any]], about: dict[str, Any]
) -> Path:
    """Write NAME.json with the scores, and NAME.jsonl with a line for each example; return the first."""
    folder.mkdir(parents=True, exist_ok=True)
    values = list(map(score_as_data, figures))
    write_text(
        folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    )
    write_text(folder / f"{name}.json", json.dumps({**about, "figures": values}, indent=1))
    return folder / f"{name}.json"
