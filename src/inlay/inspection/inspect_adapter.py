"""`inlay inspect ADAPTER`: how much an adapter changed of each weight, and in which part of that weight's spectrum."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import Conv1D

from inlay.conversion.import_adapter import import_adapter
from inlay.conversion.lora_factors import adapter_auto_class, load_blank_adapter
from inlay.conversion.merged_weights import read_weight
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
    of_ours,
)
from inlay.models.adapters import (
    adapter_folder,
    base_of,
    label_settings,
    load_adapter,
    read_adapter_config,
    revision_of,
)
from inlay.models.folded import START, fold_at
from inlay.models.loading import load_config, load_model
from inlay.models.model_classes import auto_class
from inlay.models.stored_weights import Weights

OURS = "INLAY"


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
    """What an adapter changed of its base, by module; the base's weights are read one at a time.

    A decomposition per weight: 0.1 s for 576 × 1536 on a core, minutes for 4096 × 11008; `layers` takes a few.

    Args:
        adapter: a run folder or an adapter folder, ours or PEFT's: a LoRA, MiSS or Bone (see `import_adapter`), or
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
    folder = adapter_folder(str(adapter))
    name = model or base_of(folder)
    revision = revision or (None if model else revision_of(folder))
    if read_adapter_config(folder).peft_type == OURS:
        found = changes_of(folder, name, layers, revision, trust_remote_code)
    else:
        with tempfile.TemporaryDirectory() as part:
            try:
                ours = import_adapter(folder, Path(part) / "ours", model=name).folder
            except DamagedFileError:
                raise
            except ValueError as error:
                found = merged_changes(folder, name, layers, revision, trust_remote_code, error)
            else:
                found = changes_of(ours, name, layers, revision, trust_remote_code)
    if output is not None:
        write_changes(found, Path(output), overwrite)
    return found


def is_adapter(name: str) -> bool:
    """Whether a name is the folder of an adapter, or of a run that left one."""
    try:
        return bool(adapter_folder(name))
    except ValueError:
        return False


def changes_of_fold(folder: Path) -> dict[str, WeightChange]:
    """The changes of a fold that was trained; none where what it began with is gone, the subspaces within MOST."""
    with suppress(ValueError):
        return changes_of(folder, base_of(folder), None, None, False, MOST)
    return {}


def changes_of(
    folder: Path,
    base: str,
    layers: list[int] | None,
    revision: str | None,
    trust_remote_code: bool,
    most: float = math.inf,
) -> dict[str, WeightChange]:
    """The changes of one of our adapters; with subspaces if these take at most so many multiplications."""
    auto = adapter_auto_class(folder, base, revision, trust_remote_code)
    light = load_blank_adapter(folder, base, revision, trust_remote_code, auto)
    weights = Weights(base, revision, trust_remote_code, auto)
    every = {layer.cuts["default"].module: layer for layer in adapted(light, "default").values()}
    first: dict[str, InlayLinear] = {}
    if any(layer.cuts["default"].folded for layer in every.values()):
        start = load_blank_adapter(untrained(folder, base), base, revision, trust_remote_code, auto)
        first = {layer.cuts["default"].module: layer for layer in adapted(start, "default").values()}
    names = modules_in_layers(every, layers, folder)
    shapes = [(every[name].out_features, every[name].in_features) for name in names]
    full = sum(math.prod(shape) * min(shape) for shape in shapes) <= most
    shown = chosen_modules(names)
    made: dict[str, WeightChange] = {}
    for name in tqdm(names, desc="Changes", unit="weight", disable=None, delay=1):
        layer = every[name]
        made[name] = measure_change(
            of_ours(layer, base_weight(weights, name, layer), first.get(name)), full, name in shown
        )
    return made


def merged_changes(
    folder: Path, base: str, layers: list[int] | None, revision: str | None, trust_remote_code: bool, why: ValueError
) -> dict[str, WeightChange]:
    """The changes of an adapter of PEFT's that has no equal here, by merging each layer; else `why` it has none."""
    config = load_config(base, trust_remote_code, revision)
    auto = auto_class(config, read_adapter_config(folder).task_type)
    more = {"auto": auto, **label_settings(folder)}
    model = load_model(base, torch.float32, revision, trust_remote_code, **more)
    adapter = load_adapter(model, folder, trainable=True)  # that its numbers are told from the base's
    found = changes(adapter, lambda: Weights(base, revision, trust_remote_code, auto))
    if not found:
        raise why
    return {name: found[name] for name in modules_in_layers(found, layers, folder)}


def modules_in_layers(names: Collection[str], layers: list[int] | None, folder: Path) -> list[str]:
    """The modules that are in some layers.

    Raises:
        ValueError: there are none.
    """
    asked = [name for name in names if layers is None or layer_index(name) in layers]
    if not asked:
        known = ", ".join(str(i) for i in sorted(set(map(layer_index, names))) if i >= 0)
        raise ValueError(f"layers={layers}: {folder} adapts none of these; it adapts {known or 'no layers'}")
    return asked


def untrained(folder: Path, base: str) -> Path:
    """The adapter that a fold began with, which lies beside its base: a run's that folded, or what inlay fold made.

    Raises:
        ValueError: it is not there, or nothing was trained.
    """
    kept = Path(base).parent / START
    start = kept if kept.is_dir() else fold_at(str(kept.parent))
    if start is None:
        raise ValueError(
            f"{folder} is folded, and the adapter it began with is not beside {base}: what training changed cannot be "
            "told from what was cut out of the base (train on what inlay fold makes, which keeps it)"
        )
    if start.resolve() == folder.resolve():
        raise ValueError(f"{folder} is a fold that nothing was trained of yet, so that no weight is changed")
    return start


def base_weight(weights: Weights, module: str, layer: InlayLinear) -> torch.Tensor:
    """The base's weight (out × in) under a layer, fp32; a packed one is unpacked.

    Raises:
        ValueError: the checkpoint does not store it, or it is not the one the adapter was cut from.
    """
    key = weights.key(f"{module}.weight")
    if key is None:
        weights.read(f"{module}.weight")  # says what is wrong
    W, mark = read_weight(weights, str(key), isinstance(layer.base_layer, Conv1D))
    layer.check_base("default", mark)
    return W.float()


def write_changes(found: Mapping[str, WeightChange], folder: Path, overwrite: bool = False) -> None:
    """changes.json and the plots, all or nothing.

    Raises:
        ValueError: the folder exists or cannot be written.
    """
    from inlay.inspection.change_plots import change_figures, draw_change_plots  # matplotlib takes a second

    with new_folder(folder, overwrite, CHANGES) as part:
        (part / "plots").mkdir()
        draw_change_plots(change_figures(found), part / "plots")
        write_text(part / CHANGES, json.dumps(changes_as_data(found), indent=1))


def show_changes(found: Mapping[str, WeightChange], adapter: str, console: Console) -> None:
    """A table with a line per type of module, and a sentence."""
    made = Table(
        title=f"{adapter}: {len(found)} weights",
        caption="medians over layers; principal, minor: the share of ‖ΔW‖² in the first and the last eighth of W's "
        f"singular vectors (random: {1 / PART:.3f})",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("module", *(head for _, head, _ in FIELDS), "trained"):
        made.add_column(column, no_wrap=True, justify="left" if column == "module" else "right")
    for kind, count, values, trained in by_type(found):
        cells = ["" if v is None else f"{v:{form}}" for v, (_, _, form) in zip(values, FIELDS, strict=True)]
        made.add_row(f"{kind} ({count})", *cells, f"{trained:,}")
    console.print(made)
    console.print(changes_summary(found))


def changes_summary(found: Mapping[str, WeightChange]) -> str:
    """Where the change lies, in one sentence."""
    size, principal, minor = (median_of(found.values(), field) for field in ("size", "principal", "minor"))
    if not size or principal is None or minor is None:
        return "in the median no weight is changed"
    side, share = max(("principal", principal), ("minor", minor), key=lambda pair: pair[1])
    times = f"{share * PART:.1f} times a random one's in the {side} part"
    return (
        f"in the median ΔW has {size:.2%} of W's norm; {principal:.1%} of its energy lies in the principal eighth of "
        f"W's spectrum and {minor:.1%} in the minor one (random: {1 / PART:.1%}): "
        + (f"mostly in the {side} part" if share > 0.5 else times)
    )
