"""The pictures of a run beside its loss: where the weights changed, the ranks, and the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from inlay.workbench import plots
from inlay.workbench.changes import Change
from inlay.workbench.ranks import split

Value = Callable[[Change], float | None]
MAPS: tuple[tuple[str, str, str, Value], ...] = (
    ("changes", "‖ΔW‖ / ‖W‖", ".3f", lambda c: c.size),
    ("principal", "share of ‖ΔW‖² in W's principal eighth (random: 0.125)", ".2f", lambda c: c.principal),
    ("minor", "share of ‖ΔW‖² in W's minor eighth (random: 0.125)", ".2f", lambda c: c.minor),
    ("ranks", "rank", ".4g", lambda c: c.rank),
)


def draw(found: dict[str, Change], memory: dict[str, float], folder: Path) -> list[str]:
    """Write what there is to see into a folder, as PNG and SVG; gives back the names."""
    made: list[str] = []
    for name, title, form, value in MAPS if found else ():
        values = {module: v for module, c in found.items() if (v := value(c)) is not None}
        if values and (name != "ranks" or len(set(values.values())) > 1):
            plots.save(heat_map(values, title, form), folder / f"{name}.png")
            made.append(name)
    if memory:
        plots.save(stack(memory), folder / "memory.png")
        made.append("memory")
    return made


def heat_map(values: dict[str, float], title: str, form: str) -> Figure:
    """Layers down, types of module across; where a layer has several of a type, their mean."""
    parts = {module: split(module) for module in values}
    kinds = list(dict.fromkeys(tail.strip(".") or head.strip(".") for head, _, tail in parts.values()))
    layers = sorted({int(index or -1) for _, index, _ in parts.values()})
    cells: dict[tuple[int, str], list[float]] = {}
    for module, (head, index, tail) in parts.items():
        cells.setdefault((int(index or -1), tail.strip(".") or head.strip(".")), []).append(values[module])
    rows = [[plots.mean(cells.get((layer, kind), [])) for kind in kinds] for layer in layers]
    figure = Figure(figsize=(1.6 + 0.85 * len(kinds) + 0.9, 1.8 + 0.26 * len(layers)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(rows, aspect="auto", cmap="viridis")
    low, high = picture.get_clim()
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            if number == number:  # a layer may lack a type
                ink = "k" if number > low + 0.6 * (high - low) else "w"
                axes.text(j, i, f"{number:{form}}", ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_xticks(
        range(len(kinds)), labels=[k.rpartition(".")[2] for k in kinds], rotation=30, ha="right", fontsize=9
    )
    axes.set_yticks(range(len(layers)), labels=[str(i) if i >= 0 else "–" for i in layers], fontsize=8)
    axes.set(xlabel="module", ylabel="layer")
    axes.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axes, fraction=0.06)
    return figure


def stack(memory: dict[str, float]) -> Figure:
    """Predicted memory in its parts, and the measured peak beside it, in GiB."""
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes, left = figure.subplots(), 0.0
    for name, size in memory.items():
        if name != "measured":
            axes.barh("predicted", size / 2**30, left=left / 2**30, label=name)
            left += size
    axes.barh("measured", memory["measured"] / 2**30, color="0.5", label="process or GPU, libraries included")
    axes.set(xlabel="GiB", title="Memory at the peak of a step")
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
