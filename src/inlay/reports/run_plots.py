"""Plot a run: its loss, where the weights changed, spectra before and after, the ranks, and the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inlay.inspection.change_plots import PHONE, Plot, change_figures
from inlay.inspection.changes import WeightChange
from inlay.inspection.figures import COLOURS, smooth
from inlay.models.model_classes import find_model_class
from inlay.reports.result import Result

MEASURED = "process or GPU, libraries included"


def run_figures(result: Result, changed: Mapping[str, WeightChange], title: str) -> Iterator[Plot]:
    """Yield all plots of a run."""
    yield "loss", loss_plot(result, title)
    yield from change_figures(changed)
    if result.memory_planned:
        yield "memory", planned_memory_stack(result.memory_planned, result.memory)


def loss_plot(result: Result, title: str) -> Figure:
    """Plot the training loss per step with the held-out loss over it."""
    figure = Figure(figsize=(PHONE, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [(row["step"], row["loss"]) for row in result.history if "loss" in row]
    held = [(row["step"], row["eval_loss"]) for row in result.history if "eval_loss" in row]
    axes.plot(*zip(*steps, strict=True), color=COLOURS[5], linewidth=1, alpha=0.6, label="training batch")
    axes.plot(*zip(*smooth(steps), strict=True), color=COLOURS[0], label="training, smoothed")
    mark = "o--" if len(held) > 2 else "o"  # a line through two points would suggest a course
    axes.plot(*zip(*held, strict=True), mark, color=COLOURS[3], linewidth=1, label="held-out examples")
    about: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 8), "color": COLOURS[3], "ha": "center"}
    for step, value in (held[0], held[-1]):
        axes.annotate(f"{value:.2f}", (step, value), **about)
    axes.set(xlabel="optimiser step", ylabel=find_model_class(result.recipe.task).loss)
    axes.set_title(title, fontsize=10)
    axes.margins(0.05, 0.12)
    axes.legend()
    return figure


def planned_memory_stack(planned: Mapping[str, float], measured: float) -> Figure:
    """Plot the predicted memory in its parts, and the measured peak beside it, in GiB."""
    figure = Figure(figsize=(PHONE, 2.6), layout="constrained")
    axes = figure.subplots()
    memory_bars(axes, "predicted", planned)
    axes.barh("measured", measured / 2**30, color=COLOURS[7], label=MEASURED)
    axes.set(xlabel="GiB", title="Memory at the peak of a step")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def memory_bars(axes: Axes, at: str | float, planned: Mapping[str, float], height: float = 0.8) -> None:
    """Draw the parts of a predicted peak as one stacked bar at the position `at`."""
    left = 0.0
    for place, (name, size) in enumerate(planned.items()):
        axes.barh(at, size / 2**30, height, left=left / 2**30, color=COLOURS[place], label=name)
        left += size
