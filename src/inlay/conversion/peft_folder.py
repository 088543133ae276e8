"""A PEFT adapter as it lies in its folder, and as PEFT builds it on a base without memory.

PEFT says which modules an adapter targets, and what rank and factor each one has; its rules for names and patterns are
not repeated here. What the file holds must be exactly what PEFT would look for in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor

from inlay.files.untrusted import DamagedFileError
from inlay.host.adapter_state import ROOT
from inlay.messages import first_line
from inlay.models.adapters import CONFIG, INLAY, WEIGHTS, Adapter
from inlay.models.base import BaseModel

KINDS = ("LORA", "MISS", "BONE")
WHERE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"}
KEPT = {
    "LORA": WHERE | {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora"}
    | {"trainable_token_indices"},
    "MISS": WHERE | {"r", "miss_dropout", "mini_r", "init_weights"},
    "BONE": WHERE | {"r", "init_weights"},
}  # fmt: skip
SILENT = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
init_lora_weights loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size""".split()
WHY = {
    "use_dora": "DoRA rescales the rows of the merged weight",
    "lora_bias": "lora_bias adds a bias to the change",
    "target_parameters": "it adapts fused expert weights, not linear layers",
    "alora_invocation_tokens": "an aLoRA is active on a part of the text only",
    "arrow_config": "Arrow routes between adapters",
    "layer_replication": "it adapts a model whose layers were copied",
    "ensure_weight_tying": "it ties adapters on tied weights",
}


@dataclass(frozen=True)
class PeftFolder:
    """Hold a PEFT adapter as it lies in its folder, and the base that it is read against."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base: BaseModel

    @property
    def kind(self) -> str:
        """Return PEFT's type of the adapter."""
        return str(self.config.get("peft_type"))


def read_peft_folder(adapter: Adapter) -> PeftFolder:
    """Read the configuration and the tensors of an adapter of PEFT's.

    Raises:
        ValueError: its type is not one that can be imported, or a file is missing or damaged.
    """
    folder, kind = adapter.folder, adapter.raw.get("peft_type")
    if "peft_type" not in adapter.raw:
        raise DamagedFileError(f"{folder}/{CONFIG} is not an adapter's configuration: {KeyError('peft_type')!r}")
    if kind == INLAY:
        raise ValueError(f"{folder} is an Inlay adapter already; use it as it is")
    if kind not in KINDS:
        raise ValueError(f"{folder}: peft_type={kind!r} is not one of {', '.join(KINDS)}")
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder}/adapter_model.bin is a pickle, which can run any code when it is read; where you trust it, load "
            "the adapter with PEFT, save it with safe_serialization=True, and import that"
        )
    return PeftFolder(folder, adapter.raw, adapter.tensors, adapter.base)


def check_config(source: PeftFolder) -> None:
    """Raise a ValueError for a setting that changes the outputs in a way Inlay does not know."""
    for key, value in source.config.items():
        if value and key not in KEPT[source.kind] and key not in SILENT:
            raise ValueError(f"{key}={value!r} has no equal in Inlay{f': {WHY[key]}' if key in WHY else ''}")
    if (task := source.config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type={task!r} is not CAUSAL_LM, and only causal language models are loaded here")


def build_peft_adapter(source: PeftFolder, kind: type, changed: dict[str, Any]) -> PeftModel:
    """Build the adapter on its base without memory, as PEFT does.

    Raises:
        ValueError: PEFT cannot build it.
    """
    blank = source.base.meta(torch.float32)
    kept = {k: v for k, v in source.config.items() if k in KEPT[source.kind]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that do nothing here, as Conv1D's fan_in_fan_out
            return get_peft_model(blank, kind(**(kept | changed)), low_cpu_mem_usage=True)
    except Exception as error:  # PEFT raises many kinds
        raise ValueError(f"PEFT cannot build this adapter on {source.base.resolved}: {first_line(error)}") from None


def without_base_copies(built: PeftModel, source: PeftFolder, residual: Collection[str] = ()) -> PeftFolder:
    """Return the adapter without the copies of base weights that PEFT stores with one on the embeddings or the head.

    Args:
        built: the adapter as PEFT builds it.
        source: the adapter as it is stored.
        residual: the modules whose copies are W − s B₀ A₀, which is known without them.

    Raises:
        ValueError: the file does not hold what its config asks for, or weights that are not those of the base.
    """
    expected = get_peft_model_state_dict(built, save_embedding_layers=False)
    parameters = dict(built.get_base_model().named_parameters(remove_duplicate=False))
    copies = {k for k in source.tensors.keys() - expected.keys() if k.removeprefix(ROOT) in parameters}
    weights = source.base.weights() if copies else None
    for key in sorted(copies):
        assert weights is not None
        parameter = parameters[key.removeprefix(ROOT)]
        names = [n.replace(".base_layer", "") for n, p in parameters.items() if p is parameter]  # tied ones
        value, W = source.tensors[key], weights.read(next((n for n in names if weights.key(n)), names[0]))
        other = names[0].removesuffix(".weight") not in residual and not torch.equal(value, W.to(value.dtype))
        if value.shape != W.shape or other:
            raise ValueError(
                f"{source.folder} holds a {names[0]} that is not the base's (a resized vocabulary?); save the base "
                "with it, and name that"
            )
    source = replace(source, tensors={k: v for k, v in source.tensors.items() if k not in copies})
    check_tensors(expected, source)
    return source


def check_tensors(expected: dict[str, Tensor], source: PeftFolder) -> None:
    """Raise a ValueError unless the file holds the tensors that the config asks for, and no others."""
    faults = [f"{key} is missing" for key in sorted(expected.keys() - source.tensors.keys())]
    faults += [f"{key} belongs to no module it targets" for key in sorted(source.tensors.keys() - expected.keys())]
    for key in sorted(expected.keys() & source.tensors.keys()):
        if (stored := tuple(source.tensors[key].shape)) != (shape := tuple(expected[key].shape)):
            faults.append(f"{key} has shape {stored}, not {shape}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError(
            f"{source.folder} does not hold the adapter its config describes: {'; '.join(faults[:3])}{more}"
        )


def peft_layers(built: PeftModel, kind: type) -> dict[str, Any]:
    """Return PEFT's adapted layers by the name of the module.

    Raises:
        ValueError: one of them is not linear.
    """
    layers = {n.removeprefix(ROOT): m for n, m in built.named_modules() if isinstance(m, kind)}
    for name, layer in layers.items():
        if isinstance(layer, LoraLayer) and type(layer) is not LoraLinear:
            what = type(layer.get_base_layer()).__name__
            raise ValueError(f"{name} is a {what}, and Inlay adapts linear layers only; import has nothing for it")
    return layers
