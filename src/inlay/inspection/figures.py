"""Share the style and the helpers of all plots.

Ink and background are left to the page, so that a plot suits light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inlay.host.module_names import last_part, layer_index, part_of
from inlay.messages import one_line


def plot_text(text: str) -> str:
    """Return a name from outside as text of a plot: on one line, and $ as it is, not as the start of a formula."""
    return one_line(text).replace("$", r"\$")


def plot_name(figure: Figure) -> str:
    """Return a plot's title as a page says it."""
    return (figure.get_suptitle() or figure.axes[0].get_title()).replace(r"\$", "$")


def new_plot(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Return an empty plot with its axes labelled."""
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finish_plot(figure: Figure, axes: Axes, rows: int = 0) -> Figure:
    """Add the legend below the plot, where it covers nothing, with room for it and for `rows` beside the axis."""
    handles, labels = axes.get_legend_handles_labels()
    figure.set_figheight(max(3.8, 1.4 + 0.24 * rows) + 0.2 * math.ceil(len(labels) / 3))
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


INK = "#262626"
LIGHT_INK = "#d8d8d8"  # of a plot that a dark page shows

# Okabe and Ito's colours, which colour-blind readers can tell apart, without black; markers tell the second round.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#7F7F7F")
LOOK: Any = {  # matplotlib types its keys as literals
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "inlay",  # the same figure gives the same file
}


def save_figure(figure: Figure, path: Path) -> str:
    """Save a figure as PNG, on white, and as SVG, in the ink of a light or a dark page; both repeat byte for byte.

    Returns:
        The SVG, whose ink is the text colour of what it lies on.
    """
    with matplotlib.rc_context({**LOOK, "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150)
        figure.set_layout_engine("none")  # the SVG would find the layout again, a third of its time
        file = io.StringIO()
        about = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=about)
    svg = file.getvalue().replace(INK, "currentColor")
    ink = (
        f"<style>svg {{ color: {INK} }} @media (prefers-color-scheme: dark) {{ svg {{ color: {LIGHT_INK} }} }}</style>"
    )
    path.with_suffix(".svg").write_text(svg.replace("<defs>", ink + "<defs>", 1), encoding="utf-8")
    return svg


def inline_svg(name: str, svg: str, label: str) -> str:
    """Return an SVG as an element of a page, with ids prefixed by `name`."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def short_labels(parts: list[str]) -> list[str]:
    """Return the last components of names, or the whole name where that is ambiguous."""
    ends = list(map(last_part, parts))
    return [plot_text(end if ends.count(end) == 1 else part) for part, end in zip(parts, ends, strict=True)]


def heat_map(values: Mapping[str, float], title: str, form: str) -> Figure:
    """Plot values with layers down and types of module across; equal types in a layer (experts) are averaged."""
    parts = list(dict.fromkeys(map(part_of, values)))
    layers = sorted(set(map(layer_index, values)))
    cells: dict[tuple[int, str], list[float]] = {}
    for module, value in values.items():
        cells.setdefault((layer_index(module), part_of(module)), []).append(value)
    rows = [[mean_or_nan(cells.get((layer, part), [])) for part in parts] for layer in layers]
    figure = Figure(figsize=(2.5 + 0.85 * len(parts), 1.8 + 0.26 * len(layers)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="none")
    low, high = picture.get_clim()
    form = form_for(form, high - low)
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            if number == number:  # a layer may lack a type
                ink = "k" if number > low + 0.6 * (high - low) else "w"
                axes.text(j, i, f"{number:{form}}", ha="center", va="center", fontsize=8.5, color=ink)
    axes.set_xticks(range(len(parts)), labels=short_labels(parts), rotation=30, ha="right", fontsize=9)
    axes.set_yticks(range(len(layers)), labels=[str(i) if i >= 0 else "–" for i in layers], fontsize=8.5)
    axes.set(xlabel="module", ylabel="layer")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=False)
    figure.colorbar(picture, ax=axes, fraction=0.06)
    return figure


def form_for(form: str, spread: float) -> str:
    """Return a fixed-point `form` with as many decimals as show a twentieth of `spread`."""
    if not form.endswith("f") or not 0 < spread < math.inf:
        return form
    return f".{min(8, max(int(form[1:-1]), math.ceil(-math.log10(spread / 20))))}f"


def mean_or_nan(values: list[float]) -> float:
    """Return the mean of `values`; NaN of none."""
    return sum(values) / len(values) if values else float("nan")


def smooth(points: list[tuple[int, float]], weight: float = 0.85) -> list[tuple[int, float]]:
    """Return the exponential moving average of `points`, corrected for its start."""
    smoothed = []
    mean = 0.0
    mass = 0.0
    for step, loss in points:
        mean = weight * mean + (1 - weight) * loss
        mass = weight * mass + 1 - weight
        smoothed.append((step, mean / mass))
    return smoothed
