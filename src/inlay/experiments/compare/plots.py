"""Plot a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import matplotlib
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from inlay.evaluation.paired import CONFIDENCE
from inlay.experiments.compare.halving import pareto
from inlay.experiments.compare.outcome import Outcome, Standing, Sweep, mean_of, spread_of
from inlay.host.module_names import layer_index, part_of
from inlay.inspection.change_plots import by_part, panels
from inlay.inspection.changes import PART, Spectrum, WeightChange, median_of
from inlay.inspection.figures import COLOURS, INK, LOOK, finish_plot, new_plot, short_labels, smooth
from inlay.reports.run_plots import MEASURED, memory_bars

MARKERS = "osD^vPX<>"
STYLES = ("-", "--", ":")
FAINT = 1e-4  # of the largest change: smaller ones have the colour of this one
Plot = Callable[[Outcome], Figure]


def comparison_figures(outcome: Outcome) -> Iterator[tuple[str, Figure]]:
    """Yield every plot of a comparison by the name of its file, without those that have nothing to show."""
    drawable = {
        "stack": bool(outcome.kept("memory_planned")),
        "rates": bool(swept(outcome)),
        "forgetting": outcome.forgets,
        "rate_forgetting": outcome.forgets and bool(swept(outcome)),
        "subspaces": bool(outcome.changes),
        "maps": bool(outcome.changes),
        "ranks": bool(allocated(outcome)),
        "spectra": bool(spectra_of(outcome)),
    }
    for name, plot in PLOTS.items():
        if drawable.get(name, True):
            with matplotlib.rc_context(LOOK):
                yield name, plot(outcome)


def look_of(outcome: Outcome, name: str) -> dict[str, Any]:
    """Return a method's colour, marker and line style, the same in every plot."""
    place = [e.name for e in outcome.plan.entries].index(name)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": STYLES[place // len(COLOURS) % len(STYLES)],
    }


def finished(outcome: Outcome) -> list[Standing]:
    """Return the rows of methods with results."""
    return [row for row in outcome.standings() if row.losses]


def curves_plot(outcome: Outcome) -> Figure:
    """Plot the training loss of each method, averaged over seeds, and its final held-out loss."""
    figure, axes = new_plot("Loss", "optimiser step", f"loss ({outcome.unit})")
    for row in finished(outcome):
        runs = [dict(r["curve"]) for r in outcome.finals[row.method] if r and r["after"] is not None]
        steps = [step for step in runs[0] if all(run.get(step) is not None for run in runs)]
        points = smooth([(step, statistics.fmean(run[step] for run in runs)) for step in steps])
        style = look_of(outcome, row.method)
        axes.plot(*zip(*points, strict=True), color=style["color"], linestyle=style["linestyle"], label=row.method)
        axes.plot([steps[-1]], [mean_of(row.losses)], style["marker"], color=style["color"], clip_on=False)
    axes.plot([], [], "o", color=INK, label="held out, after")
    return finish_plot(figure, axes)


def against(outcome: Outcome, title: str, x: str, value: Callable[[Standing], float], log: bool = False) -> Figure:
    """Plot quality against a cost, with a line through the Pareto front."""
    figure, axes = new_plot(title, x, f"held-out loss ({outcome.unit})")
    rows = finished(outcome)
    points = [(value(row), mean_of(row.losses)) for row in rows]
    front = sorted(point for point, best in zip(points, pareto(points), strict=True) if best)
    axes.plot(*zip(*front, strict=True), color=INK, linewidth=1, alpha=0.5, label="Pareto front", zorder=1,
              drawstyle="steps-post")  # fmt: skip
    for row, point in zip(rows, points, strict=True):
        style: dict[str, Any] = {**look_of(outcome, row.method), "linestyle": "none"}
        error = spread_of(row.losses)
        axes.errorbar(*point, yerr=None if math.isnan(error) else error, capsize=3, label=row.method, **style)
        if point in front:
            axes.plot(*point, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, alpha=0.5)
    sizes = [size for size, _ in points]
    axes.set_xscale("log" if log and max(sizes) > 4 * min(sizes) else "linear")
    if log:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    return finish_plot(figure, axes)


def memory_plot(outcome: Outcome) -> Figure:
    """Plot quality against the process's peak memory."""
    return against(outcome, "Quality against memory", "peak memory (GiB)", lambda row: row.memory / 2**30)


def seconds_plot(outcome: Outcome) -> Figure:
    """Plot quality against training time."""
    return against(outcome, "Quality against time", "training time (s)", lambda row: row.seconds)


def parameters_plot(outcome: Outcome) -> Figure:
    """Plot quality against trained parameters."""
    return against(outcome, "Quality against parameters", "trained parameters", lambda row: row.parameters, log=True)


def forgetting_plot(outcome: Outcome) -> Figure:
    """Plot the loss gained on unrelated text against the loss won on the task."""
    learned = f"fall of the held-out loss ({outcome.unit})"
    forgotten = "rise of the loss on unrelated text\n(nats per token)"
    figure, axes = new_plot("Forgetting against learning", learned, forgotten)
    for row in finished(outcome):
        style: dict[str, Any] = {**look_of(outcome, row.method), "linestyle": "none"}
        bars: dict[str, Any] = {
            axis: s for axis, v in (("xerr", row.losses), ("yerr", row.forgetting)) if not math.isnan(s := spread_of(v))
        }
        axes.errorbar(
            outcome.before - mean_of(row.losses), mean_of(row.forgetting), capsize=3, label=row.method, **bars, **style
        )
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.margins(0.12)
    return finish_plot(figure, axes)


def swept(outcome: Outcome) -> dict[str, Sweep]:
    """Return the sweeps in which at least one rate did not diverge."""
    return {
        name: s for name, s in outcome.sweeps.items() if s.rungs and any(map(math.isfinite, s.rungs[0][1].values()))
    }


def rates_plot(outcome: Outcome) -> Figure:
    """Plot the first rung of every method's sweep, with its chosen rate ringed."""
    sweeps = swept(outcome)
    shares = sorted({f"{s.rungs[0][0]} of {outcome.steps[name]}" for name, s in sweeps.items()})
    loss_label = f"loss on the selection examples\nafter {', '.join(shares)} steps"
    figure, axes = new_plot("Learning rates", "learning rate", loss_label)
    for name, s in sweeps.items():
        points = sorted((rate, loss) for rate, loss in s.rungs[0][1].items() if math.isfinite(loss))
        axes.plot(*zip(*points, strict=True), **look_of(outcome, name), markersize=5, label=name)
        for rate, loss in points:
            if s.rates and rate == s.rates[0]:
                axes.plot(rate, loss, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK)
    axes.plot([], [], "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, label="chosen")
    lowest = min(loss for s in sweeps.values() for loss in s.rungs[0][1].values())
    if axes.get_ylim()[1] > 2 * outcome.before:
        axes.set_ylim(0.95 * lowest, 2 * outcome.before)  # a rate that diverges would flatten all others
    axes.set_xscale("log")
    return finish_plot(figure, axes)


def rate_forgetting_plot(outcome: Outcome) -> Figure:
    """Plot the loss gained on unrelated text against the task's loss along the rates of every method's first rung."""
    task = f"loss on the selection examples\n({outcome.unit}; left is better)"
    forgotten = "rise of the loss on unrelated text\n(nats per token)"
    figure, axes = new_plot("Forgetting along each method's rates", task, forgotten)
    points = {
        name: [(loss, s.forgotten[r]) for r, loss in sorted(s.rungs[0][1].items()) if math.isfinite(loss)]
        for name, s in swept(outcome).items()
        if any(map(math.isfinite, s.forgotten.values()))
    }
    for name, line in points.items():
        axes.plot(*zip(*line, strict=True), **look_of(outcome, name), markersize=5, label=name)
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    learned = [
        point for line in points.values() for point in line if point[0] < outcome.before and math.isfinite(point[1])
    ]
    if learned:  # rates that ruin the task say nothing of equal learning, and would flatten all others
        for limits, values in ((axes.set_xlim, [x for x, _ in learned]), (axes.set_ylim, [y for _, y in learned])):
            room = 0.08 * (max(values) - min(values)) or 0.1
            limits(min(values) - room, max(values) + room)
    return finish_plot(figure, axes)


def differences_plot(outcome: Outcome) -> Figure:
    """Plot each method's difference to the reference with its confidence interval."""
    reference = outcome.plan.reference
    left = f"held-out loss − that of {reference}\n({outcome.unit}; left is better)"
    figure, axes = new_plot(f"Difference to {reference}", left, "")
    rows = [row for row in reversed(finished(outcome)) if not math.isnan(row.difference.mean)]
    for place, row in enumerate(rows):
        d = row.difference
        style: dict[str, Any] = {**look_of(outcome, row.method), "linestyle": "none"}
        bars: dict[str, Any] = {} if math.isnan(d.low) else {"xerr": [[d.mean - d.low], [d.high - d.mean]]}
        axes.errorbar(d.mean, place, capsize=4, **bars, **style)
    axes.errorbar([], [], xerr=[], color=INK, marker="o", capsize=4, linestyle="none",
                  label=f"mean, joint {CONFIDENCE:.0%} interval, {len(outcome.plan.spec.seeds)} seeds")  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1, alpha=0.6, label=reference)
    axes.set_yticks(range(len(rows)), labels=[row.method for row in rows])
    axes.set_ylim(-0.6, max(0, len(rows) - 1) + 0.6)
    return finish_plot(figure, axes, len(rows))


def maps_plot(outcome: Outcome) -> Figure:
    """Plot ‖ΔW‖ / ‖W‖ of every weight."""
    changes = {row.method: of for row in finished(outcome) if (of := outcome.changes.get(row.method))}
    sizes = [change.size for weights in changes.values() for change in weights.values() if change.size > 0]
    most = max(sizes, default=1)
    colours = LogNorm(max(min(sizes, default=0.5), most * FAINT), most)
    return mapped(changes, "size", colours, "Where the weights changed", "‖ΔW‖ / ‖W‖")


def ranks_plot(outcome: Outcome) -> Figure:
    """Plot the ranks of methods whose ranks differ between weights."""
    changes = allocated(outcome)
    values = [change.rank or 0 for weights in changes.values() for change in weights.values()]
    return mapped(changes, "rank", Normalize(min(values), max(values)), "Ranks, where they were allocated", "rank")


def allocated(outcome: Outcome) -> dict[str, dict[str, WeightChange]]:
    """Return the changes by method, for methods whose ranks differ between weights."""
    changes = {row.method: outcome.changes.get(row.method, {}) for row in finished(outcome)}
    return {name: weights for name, weights in changes.items() if len({change.rank for change in weights.values()}) > 1}


def mapped(
    changes: Mapping[str, Mapping[str, WeightChange]], field: str, colours: Normalize, title: str, unit: str
) -> Figure:
    """Plot a map of layers and modules for each method, all on one colour scale."""
    modules = list(dict.fromkeys(module for weights in changes.values() for module in weights))
    parts = list(dict.fromkeys(map(part_of, modules)))
    layers = sorted(set(map(layer_index, modules)))
    wide, deep = min(4, len(changes)), math.ceil(len(changes) / 4)
    figure = Figure(figsize=(1.4 + 2.3 * wide, 0.9 + deep * (1.1 + 0.06 * len(layers))), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(deep, wide, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        axes.set_visible(place < len(changes))
        axes.grid(visible=False)
    for axes, (name, weights) in zip(grid.flat, changes.items(), strict=False):
        cells = [[typical(weights, layer, part, field) for part in parts] for layer in layers]
        picture = axes.imshow(cells, norm=colours, aspect="auto", cmap="viridis", interpolation="none")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(parts)), labels=short_labels(parts), rotation=60, ha="right", fontsize=8)
    shown = range(0, len(layers), max(1, len(layers) // 6))
    grid[0][0].set_yticks(shown, labels=[str(layers[i]) if layers[i] >= 0 else "–" for i in shown], fontsize=8)
    figure.supylabel("layer", fontsize=10)
    figure.supxlabel("module", fontsize=10)
    figure.colorbar(picture, ax=grid, fraction=0.03, label=unit)
    return figure


def typical(weights: Mapping[str, WeightChange], layer: int, part: str, field: str) -> float:
    """Return the median of a layer's changes of one type of module; NaN, which is not drawn, where nothing changed."""
    cell = [c for name, c in weights.items() if (layer_index(name), part_of(name)) == (layer, part)]
    return median_of(cell, field) or math.nan


def spectra_plot(outcome: Outcome) -> Figure:
    """Plot singular values before and after training in the middle layer."""
    spectra = spectra_of(outcome)
    columns = by_part(module for weights in spectra.values() for module in weights)
    cells = {
        (name, columns[part_of(module)]): spectrum
        for name, weights in spectra.items()
        for module, spectrum in weights.items()
    }
    return panels(cells, list(spectra), list(columns.values()))


def spectra_of(outcome: Outcome) -> dict[str, dict[str, Spectrum]]:
    """Return the spectra of the middle layer among those that were kept, by method and module."""
    spectra: dict[str, dict[str, Spectrum]] = {}
    for row in finished(outcome):
        kept = {m: c.spectrum for m, c in outcome.changes.get(row.method, {}).items() if c.spectrum is not None}
        layers = sorted(set(map(layer_index, kept)))
        if layers:
            middle = layers[len(layers) // 2]
            spectra[row.method] = {m: spectrum for m, spectrum in kept.items() if layer_index(m) == middle}
    return spectra


def memory_stack(outcome: Outcome) -> Figure:
    """Plot the predicted memory of each method in its parts, and the measured memory below it."""
    planned = outcome.kept("memory_planned")
    rows = [row for row in finished(outcome) if row.method in planned]
    figure, axes = new_plot("Memory at the peak of a step, predicted and measured", "GiB", "")
    figure.set_size_inches(8, 1.9 + 0.42 * len(rows))
    for place, row in enumerate(rows):
        memory_bars(axes, place - 0.2, planned[row.method], 0.36)
        axes.barh(place + 0.2, row.memory / 2**30, 0.36, color=COLOURS[7], label=MEASURED)
    axes.set_yticks(range(len(rows)), labels=[row.method for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=3)
    return figure


def subspaces_plot(outcome: Outcome) -> Figure:
    """Plot in which part of each weight's own spectrum a method changed it: medians and quartiles over its weights."""
    figure, axes = new_plot("In which part of the spectrum", "share of ‖ΔW‖² (a random change: 1/8)", "")
    rows = [row.method for row in reversed(finished(outcome)) if row.method in outcome.changes]
    for place, name in enumerate(rows):
        for up, field, filled in ((0.14, "principal", True), (-0.14, "minor", False)):
            shares = [v for c in outcome.changes[name].values() if (v := vars(c)[field]) is not None]
            if len(shares) > 1:
                low, middle, high = statistics.quantiles(shares, n=4)
                style: dict[str, Any] = {**look_of(outcome, name), "linestyle": "none"}
                if not filled:
                    style["markerfacecolor"] = "none"
                axes.errorbar(middle, place + up, xerr=[[middle - low], [high - middle]], capsize=3, **style)
    for label, fill in (("principal eighth", INK), ("minor eighth", "none")):
        axes.plot([], [], "o", color=INK, markerfacecolor=fill, label=label)
    axes.axvline(1 / PART, color=INK, linewidth=1, alpha=0.6, label="random")
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, max(0, len(rows) - 1) + 0.6))
    return finish_plot(figure, axes, len(rows))


PLOTS: dict[str, Plot] = {
    "differences": differences_plot,
    "curves": curves_plot,
    "parameters": parameters_plot,
    "memory": memory_plot,
    "seconds": seconds_plot,
    "stack": memory_stack,
    "forgetting": forgetting_plot,
    "rates": rates_plot,
    "rate_forgetting": rate_forgetting_plot,
    "subspaces": subspaces_plot,
    "maps": maps_plot,
    "ranks": ranks_plot,
    "spectra": spectra_plot,
}
