"""Plot what `inlay inspect` shows: spectra by type of module, and maps, layer × module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from inlay.host.module_names import layer_index
from inlay.inspection.figures import heat_map, plot_text, save_figure
from inlay.inspection.ranks import Inspection, Weight
from inlay.models.builtin import model_name

DEPTH = colormaps["viridis"].resampled(256)


def draw_spectra(spectra: Inspection, folder: Path) -> None:
    """Write spectra, energy, signal and ranks into a folder, each as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(spectra_panels(spectra), folder / "spectra.png")
    maps: tuple[tuple[str, str, str, Callable[[Weight], float]], ...] = (
        ("energy", f"E({spectra.r}): share of Σσ²", ".2f", lambda w: w.energy(spectra.r)),
        ("signal", "singular values above the noise edge", ".4g", lambda w: w.signal),
        ("ranks", f"ranks ({spectra.method}, {spectra.direction}, budget of r = {spectra.r})", ".4g", lambda w: w.rank),
    )
    for name, title, form, value in maps:
        values = {module: value(weight) for module, weight in spectra.weights.items()}
        save_figure(heat_map(values, f"{plot_text(model_name(spectra.model))}\n{title}", form), folder / f"{name}.png")


def spectra_panels(spectra: Inspection) -> Figure:
    """Plot σ_i / σ_1 on a log axis: a panel per type of module, a curve per layer, coloured by depth."""
    kinds = spectra.kinds
    across = min(4, len(kinds))
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(3.1 * across + 1, 2.6 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, sharey="row", squeeze=False)
    deepest = max(1, *(layer_index(name) for name in spectra.weights))
    for axis, (kind, weights) in zip(axes.flat, kinds.items(), strict=False):
        for name, weight in weights.items():
            S = (weight.S / weight.S[0].clamp_min(1e-30)).clamp_min(1e-9)
            shown = S[: max(2, len(S) - len(S) // 50)]  # the last 2 % may fall by decades and flatten all the rest
            axis.semilogy(range(1, len(shown) + 1), shown, color=DEPTH(layer_index(name) / deepest), linewidth=0.8)
        axis.axvline(spectra.r, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_title(kind, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    figure.supxlabel(f"index i (dashed: r = {spectra.r}; the last 2 % are left out)", fontsize=10)
    figure.supylabel("σᵢ / σ₁", fontsize=10)
    figure.suptitle(f"Singular values of {plot_text(model_name(spectra.model))}", fontsize=12)
    if len({layer_index(name) for name in spectra.weights}) > 1:
        figure.colorbar(ScalarMappable(Normalize(0, deepest), DEPTH), ax=axes, label="layer", fraction=0.03, pad=0.01)
    return figure
