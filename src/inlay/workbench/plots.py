"""The pictures of `inlay inspect`: spectra by type of module, and maps of energies and ranks, layer × module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from inlay.workbench.ranks import Inspection, Weight, split
from inlay.workbench.report import model_name

DEPTH = colormaps["viridis"].resampled(256)


def draw(found: Inspection, folder: Path) -> None:
    """Write spectra, energy and ranks into a folder, each as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    save(spectra(found), folder / "spectra.png")
    ranks = f"ranks ({found.method}, {found.direction}, budget of r = {found.r})"
    save(heat_map(found, f"E({found.r}): share of Σσ²", lambda w: w.energy(found.r), ".2f"), folder / "energy.png")
    save(heat_map(found, ranks, lambda w: w.rank, ".4g"), folder / "ranks.png")


def save(figure: Figure, path: Path) -> None:
    """As PNG and SVG; the same figure gives the same files."""
    matplotlib.rcParams["svg.hashsalt"] = "inlay"
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def depth(name: str) -> int:
    """The index of a module's layer; -1 outside of the layers (a head)."""
    return int(split(name)[1] or -1)


def spectra(found: Inspection) -> Figure:
    """σ_i / σ_1 on a log axis: a panel per type of module, a curve per layer, coloured by depth."""
    kinds = found.kinds
    across = min(4, len(kinds))
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(3.1 * across + 1, 2.6 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, sharey="row", squeeze=False)
    deepest = max(1, *(depth(name) for name in found.weights))
    for axis, (kind, weights) in zip(axes.flat, kinds.items(), strict=False):
        for name, weight in weights.items():
            S = (weight.S / weight.S[0].clamp_min(1e-30)).clamp_min(1e-9)
            shown = S[: max(2, len(S) - len(S) // 50)]  # the last 2 % may fall by decades and flatten all the rest
            axis.semilogy(range(1, len(shown) + 1), shown, color=DEPTH(depth(name) / deepest), linewidth=0.8)
        axis.axvline(found.r, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_title(kind, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    figure.supxlabel(f"index i (dashed: r = {found.r}; the last 2 % are left out)", fontsize=10)
    figure.supylabel("σᵢ / σ₁", fontsize=10)
    figure.suptitle(f"Singular values of {model_name(found.model)}", fontsize=12)
    if len({depth(name) for name in found.weights}) > 1:
        figure.colorbar(ScalarMappable(Normalize(0, deepest), DEPTH), ax=axes, label="layer", fraction=0.03, pad=0.01)
    return figure


def heat_map(found: Inspection, title: str, value: Callable[[Weight], float], form: str) -> Figure:
    """Layers down, types of module across; where a layer has several of a type (experts), their mean."""
    kinds = found.kinds
    layers = sorted({depth(name) for name in found.weights})
    rows = [[mean([value(w) for n, w in of.items() if depth(n) == layer]) for of in kinds.values()] for layer in layers]
    figure = Figure(figsize=(1.6 + 0.85 * len(kinds) + 0.9, 1.6 + 0.26 * len(layers)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(rows, aspect="auto", cmap="viridis")
    low, high = picture.get_clim()
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            if number == number:  # a layer may lack a type
                light = number > low + 0.6 * (high - low)
                axes.text(j, i, f"{number:{form}}", ha="center", va="center", fontsize=7.5, color="k" if light else "w")
    axes.set_xticks(range(len(kinds)), labels=list(kinds), rotation=30, ha="right", fontsize=9)
    axes.set_yticks(range(len(layers)), labels=[str(i) if i >= 0 else "–" for i in layers], fontsize=8)
    axes.set(xlabel="module", ylabel="layer")
    axes.set_title(f"{model_name(found.model)}\n{title}", fontsize=10)
    figure.colorbar(picture, ax=axes, fraction=0.06)
    return figure


def mean(values: list[Any]) -> float:
    """The mean; NaN of none."""
    return sum(values) / len(values) if values else float("nan")
