"""`inlay inspect`: the spectra of a model's weights, what share of them r triplets cover, and the ranks that follow."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from inlay.allocate import DIRECTIONS, Direction, rank_set
from inlay.host.config import InlayConfig
from inlay.workbench.files import check_free, new_folder
from inlay.workbench.ranks import Inspection, Weight, inspection, patterns

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
    found = inspection(model, config, direction, revision, trust_remote_code)
    if output is not None:
        write(found, Path(output), overwrite)
    return found


def write(found: Inspection, folder: Path, overwrite: bool = False) -> None:
    """spectra.json, ranks.yaml and the plots, all or nothing.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    from inlay.workbench import plots  # matplotlib takes a second

    with new_folder(folder, overwrite, SPECTRA) as part:
        (part / SPECTRA).write_text(json.dumps(as_data(found)) + "\n", encoding="utf-8")
        text = yaml.safe_dump({"patterns": patterns(found.ranks)}, sort_keys=False, width=1000)
        (part / "ranks.yaml").write_text(f"# {found.summary()}\n{text}", encoding="utf-8")
        plots.draw(found, part / "plots")


def as_data(found: Inspection) -> dict[str, Any]:
    """Everything that was found, as JSON holds it; singular values with 7 digits, which is all that fp32 has."""
    about = {"model": found.model, "method": found.method, "r": found.r, "direction": found.direction}
    return {
        **about,
        "modules": {
            name: {
                "shape": list(w.shape),
                "rank": w.rank,
                "numbers": w.numbers,
                "energies": {str(r): round(w.energy(r), 6) for r in rank_set(found.r) if r <= len(w.S)},
                "singular_values": [float(f"{s:.7g}") for s in w.S.tolist()],
            }
            for name, w in found.weights.items()
        },
    }


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of σ / Σσ (Roy and Vetterli 2007): how many equal singular values would be as spread out."""
    p = S.double() / S.double().sum().clamp_min(1e-300)
    return torch.special.entr(p).sum().exp().item()


def condition(S: Tensor) -> float:
    """σ_max / σ_min, infinite where σ_min is 0."""
    return (S[0].double() / S[-1].double()).item() if S[-1] > 0 else float("inf")


def show(found: Inspection, console: Console) -> None:
    """A table with a line per type of module, the rank of every layer, and the total."""
    console.print(table(found))
    console.print("ranks by layer:")
    for kind, weights in found.kinds.items():
        console.print(f"  {kind:<12}{' '.join(f'{w.rank:>3}' for w in weights.values())}", soft_wrap=True)
    console.print(found.summary())


def table(found: Inspection) -> Table:
    """A line per type of module."""
    made = Table(
        title=f"{found.model}: {len(found.weights)} weights",
        caption="medians over layers; E, the share of Σσ² in the first r triplets: least, median, largest",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("module", "out × in", "σ max", "condition", "eff. rank", f"E({found.r})", "ranks"):
        made.add_column(column, no_wrap=True, justify="left" if column == "module" else "right")
    made.add_column(f"numbers / r = {found.r}", justify="right")
    for kind, weights in found.kinds.items():
        made.add_row(f"{kind} ({len(weights)})", *cells(list(weights.values()), found.r))
    return made


def cells(weights: list[Weight], r: int) -> Iterator[str]:
    """What the table says of one type."""
    shapes, ranks = sorted({w.shape for w in weights}), sorted({w.rank for w in weights})
    energies = [w.energy(r) for w in weights]
    yield "{} × {}".format(*shapes[0]) if len(shapes) == 1 else f"{len(shapes)} shapes"
    yield f"{statistics.median(w.S[0].item() for w in weights):.3g}"
    yield f"{statistics.median(condition(w.S) for w in weights):.2g}"
    yield f"{statistics.median(effective_rank(w.S) for w in weights):.0f}"
    yield f"{min(energies):.2f} {statistics.median(energies):.2f} {max(energies):.2f}"
    yield f"{ranks[0]}..{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    yield f"{sum(w.numbers for w in weights):,} / {sum(w.uniform for w in weights):,}"
