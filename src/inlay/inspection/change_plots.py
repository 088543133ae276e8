"""Plot what training changed in each weight."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from inlay.host.module_names import layer_index, part_of
from inlay.inspection.changes import Spectrum, WeightChange
from inlay.inspection.figures import COLOURS, INK, LOOK, heat_map, inline_svg, plot_name, save_figure, short_labels

Value = Callable[[WeightChange], float | None]
Plot = tuple[str, Figure]
MAPS: tuple[tuple[str, str, str, Value], ...] = (
    ("changes", "‖ΔW‖ / ‖W‖", ".3f", lambda c: c.size),
    ("principal", "share of ‖ΔW‖² in W's principal eighth (random: 0.125)", ".2f", lambda c: c.principal),
    ("minor", "share of ‖ΔW‖² in W's minor eighth (random: 0.125)", ".2f", lambda c: c.minor),
    ("ranks", "rank", ".4g", lambda c: c.rank),
)

PHONE = 5  # inches of a plot that is legible, whole, on the screen of a phone; wider ones scroll there
BANDS = 64  # colours behind a spectrum
POINTS = 160  # points of its curves
TRAINED = LinearSegmentedColormap.from_list("trained", [(*to_rgb(COLOURS[1]), alpha) for alpha in (0.0, 1.0)])


def draw_change_plots(plots: Iterator[Plot], folder: Path) -> dict[str, str]:
    """Write `plots` into `folder` as PNG and SVG, and return each as an SVG element for a page."""
    elements: dict[str, str] = {}
    with matplotlib.rc_context(LOOK):
        for name, figure in plots:
            svg = save_figure(figure, folder / f"{name}.png")
            label, inches = html.escape(plot_name(figure)), figure.get_figwidth()
            wide = f' style="--inches: {inches:g}; --least: {68 * inches if inches > PHONE else 0:g}px"'
            elements[name] = f"<figure{wide}>{inline_svg(name, svg, label)}</figure>"
    return elements


def change_figures(changed: Mapping[str, WeightChange]) -> Iterator[Plot]:
    """Yield the plots of what an adapter changed: maps by layer and module, and spectra."""
    for name, title, form, value in MAPS:
        values = {module: v for module, c in changed.items() if (v := value(c)) is not None}
        if values and (name != "ranks" or len(set(values.values())) > 1):
            yield name, heat_map(values, title, form)
    if spectra := {module: c.spectrum for module, c in changed.items() if c.spectrum is not None}:
        yield "spectra", changed_spectra(spectra)


def changed_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
    """Plot σ before and after training, with a row per type of module and a column per layer."""
    rows = {part: f"σ of {end}" for part, end in by_part(spectra).items()}
    columns = {i: f"layer {i}" if i >= 0 else "no layer" for i in sorted(set(map(layer_index, spectra)))}
    cells = {(rows[part_of(name)], columns[layer_index(name)]): spectrum for name, spectrum in spectra.items()}
    return panels(cells, list(rows.values()), list(columns.values()))


def by_part(modules: Iterable[str]) -> dict[str, str]:
    """Return the types of some `modules`, each with its short label."""
    parts = list(dict.fromkeys(map(part_of, modules)))
    return dict(zip(parts, short_labels(parts), strict=True))


def panels(cells: Mapping[tuple[str, str], Spectrum], rows: list[str], columns: list[str]) -> Figure:
    """Plot σ before and after training by row and column; the background is coloured where ΔW lies."""
    wide, high = 1.2 + 2.3 * len(columns), 2.2 + 1.3 * len(rows)
    figure = Figure(figsize=(wide, high))  # laid out in inches: matplotlib's own layout takes seconds
    around = {"left": 1 / wide, "right": 1 - 0.2 / wide, "bottom": 1.5 / high, "top": 1 - 0.7 / high}
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharey="row", gridspec_kw={**around, "hspace": 0.35})
    figure.suptitle("Singular values before and after, and where the change lies", fontsize=11, y=1 - 0.2 / high)
    for axis in grid.flat:
        axis.set_visible(False)  # a layer may lack a type
    for (row, column), spectrum in cells.items():
        i, j = rows.index(row), columns.index(column)
        panel(grid[i][j], spectrum)
        if j == 0:
            grid[i][j].set_ylabel(row, fontsize=9)
    for axis, column in zip(grid[0], columns, strict=True):
        axis.set_title(column, fontsize=9)
    inch = 1 / high
    figure.text(0.5, 1.02 * inch, "index of the singular value, largest first", fontsize=9, ha="center")
    bar = figure.colorbar(
        ScalarMappable(Normalize(-1, 1), TRAINED), cax=figure.add_axes((0.5, 0.62 * inch, 0.45, 0.12 * inch)),
        orientation="horizontal", ticks=[-1, 0, 1],
    )  # fmt: skip
    bar.set_label("‖ΔW‖² in a direction, over a random change's", fontsize=9)
    bar.ax.set_xticklabels(["≤ 0.1", "1", "≥ 10"], fontsize=8.5)
    bar.ax.grid(visible=False)
    lines = next(axis for axis in grid.flat if axis.get_visible()).get_lines()
    figure.legend(lines, ["before", "after"], loc="lower left", bbox_to_anchor=(0.5 / wide, 0.25 * inch), ncols=2)
    return figure


def panel(axis: Axes, spectrum: Spectrum) -> None:
    """Draw the spectrum of one weight into `axis`."""
    S = spectrum.before
    k = len(S)
    edges = torch.linspace(0, k, min(BANDS, k) + 1).round().long().tolist()
    dense = torch.stack([spectrum.shares[a:b].mean() * k for a, b in pairwise(edges)]).clamp(0.1, 10).log10()
    ground = AxesImage(axis, cmap=TRAINED, norm=Normalize(-1, 1), interpolation="none", extent=(0.5, k + 0.5, 0, 1))
    ground.set_data(dense[None].numpy())
    ground.set_transform(axis.get_xaxis_transform())
    at = torch.linspace(0, k - 1, min(POINTS, k)).round().long()
    floor = S[0].item() * 1e-6  # on a log axis zeros would reach down without end
    for values, ink, width in ((S, INK, 2.2), (spectrum.after, COLOURS[0], 1.0)):
        axis.semilogy(at + 1, values[at].clamp_min(floor), color=ink, linewidth=width)
    axis.add_image(ground)
    axis.set(visible=True, xlim=(0.5, k + 0.5))
    axis.minorticks_off()
    axis.tick_params(labelsize=8.5)
