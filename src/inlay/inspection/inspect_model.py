"""Inspect a model: the spectra of its weights, the share of them that r triplets cover, and the ranks that follow."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from inlay.files.atomic import check_free, new_folder
from inlay.host.config import InlayConfig
from inlay.host.module_names import layer_index
from inlay.inspection.noise_edge import edge, effective_rank, stable_rank
from inlay.inspection.ranks import Inspection, Weight, inspection, patterns
from inlay.models.base import BaseModel
from inlay.numerics.rank_allocation import DIRECTIONS, Direction, rank_set

SPECTRA = "spectra.json"  # also marks a folder that may be overwritten


def inspect(
    model: str = "builtin",
    method: str = "lamda",
    r: int = 16,
    direction: Direction = "flat",
    *,
    target_modules: list[str] | str = "all-linear",
    layers: list[int] | None = None,
    experts: bool | dict[str, list[int]] = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Return the singular values of a model's weights, and the ranks that LaMDA++ gives them.

    Only the checkpoint is read.

    Args:
        model: hub id, local folder, or builtin.
        method: whose parameters the budget counts; any with an r.
        r: the rank whose parameters, at the same rank everywhere, are the budget of each type of module.
        direction: "flat" gives more to flat spectra, "peaked" to peaked ones.
        target_modules: which modules, as in `InlayConfig`.
        layers: indices of layers (then `target_modules` must be a list of names).
        experts: of a mixture-of-experts model, as in `InlayConfig`; each expert has a spectrum and a rank of its own.
        output: a folder for spectra.json, ranks.yaml (a recipe's `patterns`) and plots/.
        overwrite: replace such a folder.
        revision: of a hub model.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        ValueError: the model, a value or the output folder cannot be used; nothing is then written.
    """
    if direction not in DIRECTIONS:  # before minutes are spent
        raise ValueError(f"direction={direction!r} is not one of {', '.join(DIRECTIONS)}")
    if output is not None:
        check_free(Path(output), overwrite, SPECTRA)
    config = InlayConfig(
        method=method,
        args={"r": r},
        target_modules=target_modules,
        layers_to_transform=layers,
        experts=experts,
        task_type="CAUSAL_LM",
    )
    spectra = inspection(BaseModel(model, revision, trust_remote_code), config, direction)
    if output is not None:
        write_inspection(spectra, Path(output), overwrite)
    return spectra


def write_inspection(spectra: Inspection, folder: Path, overwrite: bool = False) -> None:
    """Write spectra.json, ranks.yaml and the plots, all or nothing.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    from inlay.inspection.spectra_plots import draw_spectra  # matplotlib takes a second

    with new_folder(folder, overwrite, SPECTRA) as part:
        (part / SPECTRA).write_text(json.dumps(inspection_as_data(spectra)) + "\n", encoding="utf-8")
        text = yaml.safe_dump({"patterns": patterns(spectra.ranks)}, sort_keys=False, width=1000)
        (part / "ranks.yaml").write_text(f"# {spectra.summary()}\n{text}", encoding="utf-8")
        draw_spectra(spectra, part / "plots")


def inspection_as_data(spectra: Inspection) -> dict[str, Any]:
    """Return an inspection as JSON data; singular values have 7 digits, the precision of fp32."""
    about = {"model": spectra.model, "method": spectra.method, "r": spectra.r, "direction": spectra.direction}
    return {
        **about,
        "suggestion": asdict(suggestion(spectra)),
        "modules": {
            name: {
                "shape": list(w.shape),
                "rank": w.rank,
                "numbers": w.numbers,
                "signal": w.signal,
                "noise_edge": float(f"{edge(w.S, w.shape):.7g}"),
                "stable_rank": round(stable_rank(w.S), 4),
                "effective_rank": round(effective_rank(w.S), 4),
                "energies": {str(r): round(w.energy(r), 6) for r in rank_set(spectra.r) if r <= len(w.S)},
                "minor_energies": {str(r): float(f"{w.minor(r):.6g}") for r in rank_set(spectra.r) if r <= len(w.S)},
                "singular_values": [float(f"{s:.7g}") for s in w.S.tolist()],
            }
            for name, w in spectra.weights.items()
        },
    }


@dataclass(frozen=True)
class Suggestion:
    """Hold a suggested method, its rank, the side of the spectrum that it trains (or "none"), and the reason."""

    method: str
    r: int
    side: str
    reason: str

    def __str__(self) -> str:
        return f"suggested: {self.method} with r = {self.r}: {self.reason}"


def suggestion(spectra: Inspection) -> Suggestion:
    """Suggest where in the spectrum adapters of the requested rank belong [ours].

    PiSSA trains the principal triplets because they hold what a weight is about, MiLoRA the minor ones because they
    hold noise, and training there leaves the learned part alone. Either presumes something that can be counted: that r
    triplets hold the signal, or that the last r lie below the noise edge. Medians over the weights are compared. This
    is no evidence of better training: `inlay compare` gives that.
    """
    r, weights = spectra.r, list(spectra.weights.values())
    count = statistics.median_low(w.signal for w in weights)
    if count == 0:
        reason = (
            "no singular value stands out of noise, so neither end of the spectrum is better than a random subspace"
        )
        return Suggestion("lora", r, "none", reason)
    if count <= r:
        held = statistics.median(w.energy(count) for w in weights)
        reason = (
            f"half of the weights have at most {count} singular values above the noise edge, so that the first {count} "
            f"triplets hold the signal ({held:.1%} of the energy), and a larger rank would train noise"
        )
        return Suggestion("pissa", count, "principal", reason)
    room = max(1, min(r, *(len(w.S) - w.signal for w in weights)))
    held, minor = statistics.median(w.energy(r) for w in weights), statistics.median(w.minor(room) for w in weights)
    reason = (
        f"{count} singular values stand above the noise edge, of which r = {r} principal triplets would train a part "
        f"({held:.1%} of the energy), while the last {room} ({minor:.2%}) lie below it and leave the signal alone"
    )
    return Suggestion("milora", room, "minor", reason)


def show_inspection(spectra: Inspection, console: Console) -> None:
    """Print a table with a line per type of module, the ranks of every layer, and the total; of experts, ranges."""
    console.print(inspection_table(spectra))
    console.print("ranks by layer:")
    width = max(12, *(len(kind) + 1 for kind in spectra.kinds))
    for kind, weights in spectra.kinds.items():
        of_layer: dict[int, list[int]] = {}
        for name, weight in weights.items():
            of_layer.setdefault(layer_index(name), []).append(weight.rank)
        told = " ".join(f"{ranks_told(ranks):>3}" for ranks in of_layer.values())
        console.print(f"  {kind:<{width}}{told}", soft_wrap=True)
    console.print(spectra.summary())
    console.print(f"{suggestion(spectra)} (from spectra alone; inlay compare shows which trains better)")


def inspection_table(spectra: Inspection) -> Table:
    """Build the table with a line per type of module."""
    r = spectra.r
    table = Table(
        title=f"{spectra.model}: {len(spectra.weights)} weights",
        caption="medians over layers; signal: singular values above the noise edge (Marchenko-Pastur), least, median, "
        f"most; E({r}), last {r}: shares of Σσ² in the first and the last triplets",
        title_justify="left",
        caption_justify="left",
    )
    heads = ("module", "out × in", "σ max", "stable rank", "eff. rank", "signal")
    for column in (*heads, f"E({r})", f"last {r}", "ranks"):
        table.add_column(column, no_wrap=True, justify="left" if column == "module" else "right")
    for kind, weights in spectra.kinds.items():
        table.add_row(f"{kind} ({len(weights)})", *inspection_cells(list(weights.values()), r))
    return table


def inspection_cells(weights: list[Weight], r: int) -> Iterator[str]:
    """Yield the cells of one type of module."""
    shapes, ranks = sorted({w.shape for w in weights}), [w.rank for w in weights]
    signals = sorted(w.signal for w in weights)
    yield "{} × {}".format(*shapes[0]) if len(shapes) == 1 else f"{len(shapes)} shapes"
    yield f"{statistics.median(w.S[0].item() for w in weights):.3g}"
    yield f"{statistics.median(stable_rank(w.S) for w in weights):.0f}"
    yield f"{statistics.median(effective_rank(w.S) for w in weights):.0f}"
    yield f"{signals[0]}..{statistics.median_low(signals)}..{signals[-1]}"
    yield f"{statistics.median(w.energy(r) for w in weights):.2f}"
    yield f"{statistics.median(w.minor(r) for w in weights):.1g}"
    yield ranks_told(ranks)


def ranks_told(ranks: list[int]) -> str:
    """Return the smallest and the largest of some ranks as text, or the one that all are."""
    low, high = min(ranks), max(ranks)
    return f"{low}..{high}" if low < high else str(low)
