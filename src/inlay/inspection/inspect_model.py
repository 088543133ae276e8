"""`inlay inspect`: the spectra of a model's weights, what share of them r triplets cover, and the ranks that follow."""

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
from inlay.inspection.noise_edge import edge, effective_rank, stable_rank
from inlay.inspection.ranks import Inspection, Weight, inspection, patterns
from inlay.models.base import BaseModel
from inlay.numerics.rank_allocation import DIRECTIONS, Direction, rank_set

SPECTRA = "spectra.json"  # also what marks a folder as one that may be overwritten


def inspect(
    model: str = "builtin",
    method: str = "lamda",
    r: int = 16,
    direction: Direction = "flat",
    *,
    target_modules: list[str] | str = "all-linear",
    layers: list[int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """The singular values of a model's weights, and the ranks that LaMDA++ gives them; reads the checkpoint only.

    Args:
        model: hub id, local folder, or builtin.
        method: whose numbers the budget counts; any with an r.
        r: the rank whose numbers, the same everywhere, are the budget of each type of module.
        direction: "flat" gives more to flat spectra, "peaked" to peaked ones.
        target_modules: which modules, as in `InlayConfig`.
        layers: indices of layers (then `target_modules` must be a list of names).
        output: a folder for spectra.json, ranks.yaml (a recipe's `patterns`) and plots/.
        overwrite: replace such a folder.
        revision: of a hub model.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        ValueError: the model, a value or the output folder cannot be used; nothing is then written.
    """
    if direction not in DIRECTIONS:  # said before minutes are spent
        raise ValueError(f"direction={direction!r} is not one of {', '.join(DIRECTIONS)}")
    if output is not None:
        check_free(Path(output), overwrite, SPECTRA)
    config = InlayConfig(
        method=method,
        args={"r": r},
        target_modules=target_modules,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    found = inspection(BaseModel(model, revision, trust_remote_code), config, direction)
    if output is not None:
        write_inspection(found, Path(output), overwrite)
    return found


def write_inspection(found: Inspection, folder: Path, overwrite: bool = False) -> None:
    """spectra.json, ranks.yaml and the plots, all or nothing.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    from inlay.inspection.spectra_plots import draw_spectra  # matplotlib takes a second

    with new_folder(folder, overwrite, SPECTRA) as part:
        (part / SPECTRA).write_text(json.dumps(inspection_as_data(found)) + "\n", encoding="utf-8")
        text = yaml.safe_dump({"patterns": patterns(found.ranks)}, sort_keys=False, width=1000)
        (part / "ranks.yaml").write_text(f"# {found.summary()}\n{text}", encoding="utf-8")
        draw_spectra(found, part / "plots")


def inspection_as_data(found: Inspection) -> dict[str, Any]:
    """Everything that was found, as JSON holds it; singular values with 7 digits, which is all that fp32 has."""
    about = {"model": found.model, "method": found.method, "r": found.r, "direction": found.direction}
    return {
        **about,
        "suggestion": asdict(suggestion(found)),
        "modules": {
            name: {
                "shape": list(w.shape),
                "rank": w.rank,
                "numbers": w.numbers,
                "signal": w.signal,
                "noise_edge": float(f"{edge(w.S, w.shape):.7g}"),
                "stable_rank": round(stable_rank(w.S), 4),
                "effective_rank": round(effective_rank(w.S), 4),
                "energies": {str(r): round(w.energy(r), 6) for r in rank_set(found.r) if r <= len(w.S)},
                "minor_energies": {str(r): float(f"{w.minor(r):.6g}") for r in rank_set(found.r) if r <= len(w.S)},
                "singular_values": [float(f"{s:.7g}") for s in w.S.tolist()],
            }
            for name, w in found.weights.items()
        },
    }


@dataclass(frozen=True)
class Suggestion:
    """A method, its rank, the side of the spectrum that it trains (none: either), and why."""

    method: str
    r: int
    side: str
    reason: str

    def __str__(self) -> str:
        return f"suggested: {self.method} with r = {self.r}: {self.reason}"


def suggestion(found: Inspection) -> Suggestion:
    """Where spectra say that adapters of the rank asked for belong [ours].

    PiSSA trains the principal triplets because they hold what a weight is about, MiLoRA the minor ones because they
    hold noise, and training there leaves what was learned alone. Either presumes something that can be counted: that r
    triplets hold the signal, or that the last r lie below the noise edge. Medians over the weights; no evidence that it
    trains better: `inlay compare` gives that.
    """
    r, weights = found.r, list(found.weights.values())
    count = statistics.median_low(w.signal for w in weights)
    if count == 0:
        reason = (
            "no singular value stands out of noise, so that neither end of the spectrum is more than a random place"
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


def show_inspection(found: Inspection, console: Console) -> None:
    """A table with a line per type of module, the rank of every layer, and the total."""
    console.print(inspection_table(found))
    console.print("ranks by layer:")
    for kind, weights in found.kinds.items():
        console.print(f"  {kind:<12}{' '.join(f'{w.rank:>3}' for w in weights.values())}", soft_wrap=True)
    console.print(found.summary())
    console.print(f"{suggestion(found)} (spectra alone; inlay compare tells which trains better)")


def inspection_table(found: Inspection) -> Table:
    """A line per type of module."""
    r = found.r
    made = Table(
        title=f"{found.model}: {len(found.weights)} weights",
        caption="medians over layers; signal: singular values above the noise edge (Marchenko-Pastur), least, median, "
        f"most; E({r}), last {r}: shares of Σσ² in the first and the last triplets",
        title_justify="left",
        caption_justify="left",
    )
    heads = ("module", "out × in", "σ max", "stable rank", "eff. rank", "signal")
    for column in (*heads, f"E({r})", f"last {r}", "ranks"):
        made.add_column(column, no_wrap=True, justify="left" if column == "module" else "right")
    for kind, weights in found.kinds.items():
        made.add_row(f"{kind} ({len(weights)})", *inspection_cells(list(weights.values()), r))
    return made


def inspection_cells(weights: list[Weight], r: int) -> Iterator[str]:
    """What the table says of one type."""
    shapes, ranks = sorted({w.shape for w in weights}), sorted({w.rank for w in weights})
    signals = sorted(w.signal for w in weights)
    yield "{} × {}".format(*shapes[0]) if len(shapes) == 1 else f"{len(shapes)} shapes"
    yield f"{statistics.median(w.S[0].item() for w in weights):.3g}"
    yield f"{statistics.median(stable_rank(w.S) for w in weights):.0f}"
    yield f"{statistics.median(effective_rank(w.S) for w in weights):.0f}"
    yield f"{signals[0]}..{statistics.median_low(signals)}..{signals[-1]}"
    yield f"{statistics.median(w.energy(r) for w in weights):.2f}"
    yield f"{statistics.median(w.minor(r) for w in weights):.1g}"
    yield f"{ranks[0]}..{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
