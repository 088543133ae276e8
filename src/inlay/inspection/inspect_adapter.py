"""Inspect an adapter: how much it changed of each weight, and in which part of that weight's spectrum."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import Conv1D

from inlay.conversion.import_adapter import import_opened
from inlay.conversion.merge_weights import read_weight
from inlay.conversion.peft_folder import read_peft_folder
from inlay.conversion.stored_experts import StoredExperts
from inlay.files.atomic import check_free, new_folder, write_text
from inlay.files.untrusted import DamagedFileError
from inlay.host.layer import InlayLinear, adapted
from inlay.host.module_names import layer_index
from inlay.inspection.changes import (
    CHANGES,
    FIELDS,
    MOST,
    PART,
    WeightChange,
    by_type,
    changes,
    changes_as_data,
    chosen_modules,
    measure_change,
    median_of,
    of_inlay,
)
from inlay.models.adapters import Adapter, adapter_folder
from inlay.models.folded import START, fold_at
from inlay.models.stored_weights import Weights


def inspect_adapter(
    adapter: str | Path,
    *,
    model: str | None = None,
    layers: list[int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, WeightChange]:
    """Return what an adapter changed of its base, by module; the base's weights are read one at a time.

    A decomposition per weight takes 0.1 s for 576 × 1536 on a core, minutes for 4096 × 11008; `layers` selects a few.

    Args:
        adapter: a run folder or an adapter folder, Inlay's or PEFT's: a LoRA, MiSS or Bone (see `import_adapter`), or
            another that can be merged, for which the base is loaded.
        model: the base, if not the one the adapter names.
        layers: indices of layers; None: all.
        output: a folder for changes.json and plots/.
        overwrite: replace such a folder.
        revision: of the base on a hub; None: the one the adapter was trained on.
        trust_remote_code: let the base's repository run its own code.

    Raises:
        ValueError: no adapter there, a broken one, a base that is not its own, or an output that cannot be used;
            nothing is then written.
    """
    if output is not None:
        check_free(Path(output), overwrite, CHANGES)
    source = Adapter.open(adapter, model, revision, trust_remote_code)
    if source.is_inlay:
        changed = changes_of(source, layers)
    else:
        with tempfile.TemporaryDirectory() as part:
            out = Path(part) / "imported"
            try:
                import_opened(read_peft_folder(source), out, None, False, str(source.folder))
            except DamagedFileError:
                raise
            except ValueError as error:
                changed = merged_changes(source, layers, error)
            else:
                changed = changes_of(Adapter.open(out, source.base), layers)
    if output is not None:
        write_changes(changed, Path(output), overwrite)
    return changed


def is_adapter(name: str) -> bool:
    """Return whether `name` is the folder of an adapter, or of a run that left one."""
    try:
        return bool(adapter_folder(name))
    except DamagedFileError:
        raise
    except ValueError:
        return False


def changes_of_fold(folder: Path) -> dict[str, WeightChange]:
    """Return the changes of a trained fold; none where the adapter it began with is gone."""
    with suppress(ValueError):
        return changes_of(Adapter.open(folder), None, MOST)
    return {}


def changes_of(adapter: Adapter, layers: list[int] | None, most: float = math.inf) -> dict[str, WeightChange]:
    """Return the changes of one of Inlay's adapters, with subspaces if these cost at most `most` multiplications."""
    light = adapter.load_blank()
    weights = adapter.base_weights()
    adapters = {layer.cuts["default"].module: layer for layer in adapted(light, "default").values()}
    first: dict[str, InlayLinear] = {}
    if any(layer.cuts["default"].folded for layer in adapters.values()):
        start = Adapter.open(untrained(adapter), adapter.base).load_blank()
        first = {layer.cuts["default"].module: layer for layer in adapted(start, "default").values()}
    names = modules_in_layers(adapters, layers, adapter.folder)
    shapes = [(adapters[name].out_features, adapters[name].in_features) for name in names]
    full = sum(math.prod(shape) * min(shape) for shape in shapes) <= most
    shown = chosen_modules(names)
    changed: dict[str, WeightChange] = {}
    stored = StoredExperts(weights, adapters)
    for name in tqdm(names, desc="Changes", unit="weight", disable=None, delay=1):
        layer = adapters[name]
        W = stored.whole(name) if name in stored.layers else base_weight(weights, name, layer)
        for part, trained in of_inlay(name, layer, W, first.get(name)).items():
            changed[part] = measure_change(trained, full, name in shown)
    return changed


def merged_changes(adapter: Adapter, layers: list[int] | None, why: ValueError) -> dict[str, WeightChange]:
    """Return the changes of a PEFT adapter that cannot be imported, by merging its layers; else raise `why`."""
    auto = adapter.auto_class
    base = adapter.base.load(torch.float32, auto=auto, **adapter.settings)
    model = adapter.attach(base, trainable=True)  # so that its parameters are told from the base's
    changed = changes(model, adapter.base_weights)
    if not changed:
        raise why
    return {name: changed[name] for name in modules_in_layers(changed, layers, adapter.folder)}


def modules_in_layers(names: Collection[str], layers: list[int] | None, folder: Path) -> list[str]:
    """Return those of the modules `names` that are in `layers`.

    Raises:
        ValueError: there are none.
    """
    selected = [name for name in names if layers is None or layer_index(name) in layers]
    if not selected:
        adapted_layers = ", ".join(str(i) for i in sorted(set(map(layer_index, names))) if i >= 0)
        raise ValueError(f"layers={layers}: {folder} adapts none of these; it adapts {adapted_layers or 'no layers'}")
    return selected


def untrained(adapter: Adapter) -> Path:
    """Return the folder of the adapter that a fold began with: beside its base, from a run or from inlay fold.

    Raises:
        ValueError: it is not there, or nothing was trained.
    """
    folder, base = adapter.folder, adapter.base.name
    kept = Path(base).parent / START
    start = kept if kept.is_dir() else fold_at(str(kept.parent))
    if start is None:
        raise ValueError(
            f"{folder} is folded, and the adapter it began with is not beside {base}: what training changed cannot be "
            "told from what the fold took out of the base (train on the output of inlay fold, which keeps it)"
        )
    if start.resolve() == folder.resolve():
        raise ValueError(f"{folder} is a fold that was not trained yet, so no weight is changed")
    return start


def base_weight(weights: Weights, module: str, layer: InlayLinear) -> torch.Tensor:
    """Read the base weight (out × in) under a layer as fp32, unpacked if it is quantised.

    Raises:
        ValueError: the checkpoint does not store it, or it is not the one the adapter was cut from.
    """
    key = weights.key(f"{module}.weight")
    if key is None:
        weights.read(f"{module}.weight")  # raises, saying what is wrong
    W, checksum = read_weight(weights, str(key), isinstance(layer.base_layer, Conv1D))
    layer.check_base("default", checksum)
    return W.float()


def write_changes(changed: Mapping[str, WeightChange], folder: Path, overwrite: bool = False) -> None:
    """Write changes.json and the plots, all or nothing.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    from inlay.inspection.change_plots import change_figures, draw_change_plots  # matplotlib takes a second

    with new_folder(folder, overwrite, CHANGES) as part:
        (part / "plots").mkdir()
        draw_change_plots(change_figures(changed), part / "plots")
        write_text(part / CHANGES, json.dumps(changes_as_data(changed), indent=1))


def show_changes(changed: Mapping[str, WeightChange], adapter: str, console: Console) -> None:
    """Print a table with a line per type of module, and a sentence."""
    table = Table(
        title=f"{adapter}: {len(changed)} weights",
        caption="medians over layers; principal, minor: the share of ‖ΔW‖² in the first and the last eighth of W's "
        f"singular vectors (random: {1 / PART:.3f})",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("module", *(head for _, head, _ in FIELDS), "trained"):
        table.add_column(column.replace(" ", "\n"), no_wrap=True, justify="left" if column == "module" else "right")
    for kind, count, values, trained in by_type(changed):
        cells = ["" if v is None else f"{v:{form}}" for v, (_, _, form) in zip(values, FIELDS, strict=True)]
        table.add_row(f"{kind} ({count})", *cells, f"{trained:,}")
    console.print(table)
    console.print(changes_summary(changed))


def changes_summary(changed: Mapping[str, WeightChange]) -> str:
    """Summarise in one sentence where the change lies."""
    size, principal, minor = (median_of(changed.values(), field) for field in ("size", "principal", "minor"))
    if not size or principal is None or minor is None:
        return "the median weight is not changed"
    side, share = max(("principal", principal), ("minor", minor), key=lambda pair: pair[1])
    times = f"{share * PART:.1f} times a random one's in the {side} part"
    return (
        f"in the median ΔW has {size:.2%} of W's norm; {principal:.1%} of its energy lies in the principal eighth of "
        f"W's spectrum and {minor:.1%} in the minor one (random: {1 / PART:.1%}): "
        + (f"mostly in the {side} part" if share > 0.5 else times)
    )
