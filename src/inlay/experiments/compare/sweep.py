"""Choose a method's learning rate: successive halving that extends its grid and drops nothing within the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.experiments.compare.halving import row_noise, survivors

TrialResult = dict[str, Any]  # of a trial
Rung = tuple[int, dict[float, float]]  # the steps, and the losses by rate


@dataclass
class Sweep:
    """Hold the halving of one method: what has run, and which runs are due.

    Every rung runs the first steps of the whole training with the rates that are left. Where the lowest loss is at an
    end of all rates tried, the next rate beyond it runs too, until the lowest is inside. A rate is dropped only where
    its loss is above the best one's by more than the noise; where several are left in the end, they run all steps.

    Attributes:
        rates: still in the sweep, the best first.
        ladder: how many rates each rung is meant to have, and its steps.
        extend: how many further rates may still be tried beyond the ends.
        noise: taken for the noise of a difference where the rows of the two runs are not known.
        rungs: the steps and the losses by rate.
        failed: rates of runs that failed, which tells nothing of the rate.
        rows: of the present rung, by rate, the token count and the summed loss of each example.
        forgotten: of the first rung, by rate, the rise of the loss on unrelated text.
    """

    rates: list[float]
    ladder: Sequence[tuple[int, int]] = ()
    extend: int = 0
    noise: float = 0.0
    rungs: list[Rung] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)
    rows: dict[float, list[list[float]]] = field(default_factory=dict)
    forgotten: dict[float, float] = field(default_factory=dict)
    place: int = 0  # in the ladder

    def due(self) -> list[tuple[int, float]]:
        """Return the runs that are next, each as its steps and its rate; none once the rate is chosen."""
        if len(self.ladder) < 2 or self.place >= len(self.ladder) or not self.rates:
            return []
        steps = self.ladder[self.place][1]
        done = self.rungs[self.place][1] if self.place < len(self.rungs) else {}
        return [(steps, rate) for rate in self.rates if rate not in done]

    def take(self, results: Mapping[float, TrialResult | None]) -> None:
        """Take the results of the runs that were due, by rate; None for one that failed."""
        if self.place == len(self.rungs):
            self.rungs.append((self.ladder[self.place][1], {}))
        losses = self.rungs[self.place][1]
        losses |= {rate: loss_of(result) for rate, result in results.items()}
        self.failed += [rate for rate, result in results.items() if result is None]
        self.rows |= {rate: r["rows"] for rate, r in results.items() if r is not None and r.get("rows")}
        if self.place == 0:
            rises = {rate: (result or {}).get("forgetting") for rate, result in results.items()}
            self.forgotten |= {rate: math.nan if rise is None else rise for rate, rise in rises.items()}
        best = survivors(losses, 1)
        end = best[0] if best else self.tried[0]  # lower rates may not diverge
        if self.extend and losses.keys() - self.failed and (beyond := self.beyond(end)) is not None:
            self.extend -= 1
            self.rates = [*self.rates, beyond]
            return
        last = self.place == len(self.ladder) - 1
        noise = {rate: self.between(rate, best[0]) for rate in losses if best and not last}
        self.rates = survivors(losses, 1 if last else self.ladder[self.place + 1][0], noise)
        self.place, self.rows = self.place + 1, {}
        if len(self.rates) == 1 and self.place == len(self.ladder) - 1:
            self.place += 1  # nothing is left to choose

    def between(self, rate: float, best: float) -> float:
        """Return the noise of the difference between two rates: twice its standard error over the same examples."""
        if rate in self.rows and best in self.rows:
            return 2 * row_noise(self.rows[rate], self.rows[best])
        return self.noise

    def beyond(self, rate: float) -> float | None:
        """Return the next rate of the grid beyond one that is at an end of all that were tried; None for any other."""
        tried = self.tried
        if len(tried) < 2 or rate not in (tried[0], tried[-1]):
            return None
        near = tried[1] if rate == tried[0] else tried[-2]
        return float(f"{rate * rate / near:.3g}")

    @property
    def tried(self) -> list[float]:
        """Return all rates that were tried."""
        return sorted({rate for _, losses in self.rungs for rate in losses})

    @property
    def edge(self) -> str:
        """Return which end of the swept range the chosen rate is, "lowest" or "highest", or an empty text."""
        if not self.rates or self.beyond(self.rates[0]) is None:
            return ""
        return "lowest" if self.rates[0] == self.tried[0] else "highest"

    @property
    def untuned(self) -> str:
        """Return why the method is not ranked: its best rate was not looked for, or may lie beyond those tried."""
        if len(self.tried) < 2:
            return "one rate was tried"
        return f"its rate is the {self.edge} tried" if self.edge else ""


def loss_of(result: TrialResult | None) -> float:
    """Return a run's loss; infinite where it failed or diverged."""
    return math.inf if result is None or result["after"] is None else result["after"]
