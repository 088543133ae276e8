"""Measure how much of the layers that read one input a shared right factor of rank r carries.

For weights W_1 .. W_L (out_i × in) of one input, the best W_i ≈ B_i C with one C (r × in) for all has the r largest
right singular vectors of the stacked weights as C, and leaves Σ_{i>r} σ_i² of the stack (the joint rank-k approximation
of Peng et al. 2024, arXiv 2402.16319). It is compared with separate factors at the same rank, and with separate factors
that together have as many parameters. A shared factor needs only one product x Cᵀ for all.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from inlay.files.atomic import check_free, new_folder
from inlay.host.config import InlayConfig
from inlay.inspection.singular_values import kept_spectrum, target_weights, weight_spectra
from inlay.messages import first_line
from inlay.models.base import BaseModel
from inlay.numerics.rank_allocation import energy, module_type

JOINT = "joint.json"  # also marks a folder that may be overwritten


@dataclass(frozen=True)
class Readers:
    """Hold modules that read the same input, the singular values of their stacked weights, and those of each."""

    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    stacked: Tensor
    separately: tuple[Tensor, ...]

    @property
    def kinds(self) -> str:
        return ", ".join(module_type(name) for name in self.modules)

    def shared(self, r: int) -> float:
        """Return the share of Σ‖W_i‖² that one right factor of rank r carries."""
        return energy(self.stacked, r)

    def separate(self, r: int) -> float:
        """Return the share of Σ‖W_i‖² that separate factors of rank r carry."""
        total = sum(S.double().square().sum() for S in self.separately)
        kept = sum(S[:r].double().square().sum() for S in self.separately)
        return float(kept / total) if total else 1.0

    def as_many(self, r: int) -> int:
        """Return the rank at which separate factors have at most the parameters of a shared one of rank r."""
        out, inp = sum(shape[0] for shape in self.shapes), self.shapes[0][1]
        return r * (inp + out) // (len(self.shapes) * inp + out)


def inspect_joint(
    model: str = "builtin",
    r: int = 16,
    *,
    target_modules: list[str] | str = "all-linear",
    layers: list[int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[Readers]:
    """Measure what one right factor of rank `r` carries for the modules that read one input; reads the checkpoint only.

    Args:
        model: hub id, local folder, or builtin.
        r: the rank that joint.json gives the shares of; any other can be asked of the result.
        target_modules: which modules, as in `InlayConfig`.
        layers: indices of layers (then `target_modules` must be a list of names).
        output: a folder for joint.json.
        overwrite: replace such a folder.
        revision: of a hub model.
        trust_remote_code: let the model's repository run its own code.

    Raises:
        ValueError: the model, a value or the output folder cannot be used; nothing is then written.
    """
    if output is not None:
        check_free(Path(output), overwrite, JOINT)
    groups = joint_groups(BaseModel(model, revision, trust_remote_code), target_modules, layers)
    if output is not None:
        with new_folder(Path(output), overwrite, JOINT) as part:
            (part / JOINT).write_text(json.dumps(joint_as_data(model, r, groups)) + "\n", encoding="utf-8")
    return groups


def joint_as_data(model: str, r: int, groups: list[Readers]) -> dict[str, Any]:
    """Return all groups for JSON, with the singular values of the stacked weights."""
    return {
        "model": model,
        "r": r,
        "groups": [
            {
                "modules": list(group.modules),
                "shapes": [list(shape) for shape in group.shapes],
                "shared": round(group.shared(r), 6),
                "separate": round(group.separate(r), 6),
                "as_many_r": group.as_many(r),
                "separate_as_many": round(group.separate(group.as_many(r)), 6),
                "singular_values": [float(f"{s:.7g}") for s in group.stacked.tolist()],
            }
            for group in groups
        ],
    }


def joint_groups(
    base: BaseModel, target_modules: list[str] | str = "all-linear", layers: list[int] | None = None
) -> list[Readers]:
    """Return the groups of a model's modules that read one input, with their spectra; only the checkpoint is read.

    Raises:
        ValueError: the model or a value cannot be used, or no two of the modules read the same input.
    """
    config = InlayConfig(target_modules=target_modules, layers_to_transform=layers, task_type="CAUSAL_LM")
    shapes = target_weights(base, config)
    blank = base.meta(torch.float32)
    groups = [names for names in readers(blank, shapes) if len(names) > 1]
    if not groups:
        raise ValueError(f"no two of the modules that target_modules={target_modules!r} names read the same input")
    spectra = weight_spectra(base, {n: shapes[n] for names in groups for n in names})
    weights = base.weights()
    groups_read: list[Readers] = []
    for names in groups:
        stored = [weights.read(f"{n}.weight").float() for n in names]
        transposed = [isinstance(blank.get_submodule(n), Conv1D) for n in names]
        stack = torch.cat([W.T if flip else W for W, flip in zip(stored, transposed, strict=True)])
        sizes = tuple(shapes[n] for n in names)
        groups_read.append(Readers(names, sizes, kept_spectrum(stack), tuple(spectra[n] for n in names)))
    return groups_read


@torch.no_grad()
def readers(blank: PreTrainedModel, names: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Group the named modules of a model on the meta device by the tensor that each reads in a forward pass.

    Raises:
        ValueError: no pass can be made without the model's weights.
    """
    groups: dict[int, tuple[Tensor, list[str]]] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            # The tensor is kept, so that its id is not used again.
            groups.setdefault(id(args[0]), (args[0], []))[1].append(name)

        return hook

    hooks = [blank.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    try:
        ids, mask = (torch.ones(shape, dtype=torch.long, device="meta") for shape in ((1, 4), (1, 1, 4, 4)))
        blank.base_model(input_ids=ids, attention_mask=mask.float(), use_cache=False)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"no pass of this model can be simulated without its weights: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(names) for _, names in groups.values()]


def show_joint(groups: list[Readers], r: int, console: Console) -> None:
    """Print a table with a line per kind of group, medians over the layers."""
    table = Table(
        title=f"one right factor of rank {r} for the modules that read one input",
        caption="shares of Σ‖W‖² in the median over layers; as many: separate factors with no more parameters",
        title_justify="left",
        caption_justify="left",
    )
    columns = ("modules", "in", "shared", f"separate, r = {r}", "as many, r =", "separate, as many")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column == "modules" else "right")
    kinds: dict[tuple[str, tuple], list[Readers]] = {}
    for group in groups:
        kinds.setdefault((group.kinds, group.shapes), []).append(group)
    for (kind, shapes), same_kind in kinds.items():
        few = same_kind[0].as_many(r)
        ranks = (
            [g.shared(r) for g in same_kind],
            [g.separate(r) for g in same_kind],
            [g.separate(few) for g in same_kind],
        )
        shared, separate, as_many = (f"{statistics.median(values):.3f}" for values in ranks)
        table.add_row(f"{kind} ({len(same_kind)})", str(shapes[0][1]), shared, separate, str(few), as_many)
    console.print(table)
