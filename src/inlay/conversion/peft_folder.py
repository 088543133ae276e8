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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inlay.files.untrusted import DamagedFileError, from_json
from inlay.messages import first_line
from inlay.models.meta import meta_model
from inlay.models.stored_weights import Weights

ROOT = "base_model.model."
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
    """A PEFT adapter as it lies in its folder."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        return str(self.config.get("peft_type"))


def read_peft_folder(folder: Path) -> PeftFolder:
    """An adapter's config and tensors.

    Raises:
        ValueError: its type is not one we know, or a file is missing or broken.
    """
    try:
        config = from_json((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{folder}/adapter_config.json is not an adapter's configuration: {error!r}") from None
    if kind == "INLAY":
        raise ValueError(f"{folder} is an Inlay adapter already; use it as it is")
    if kind not in KINDS:
        raise ValueError(f"{folder}: peft_type={kind!r} is not one of {', '.join(KINDS)}")
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder}/adapter_model.bin is a pickle, which can run any code when it is read; where you trust it, load "
            "the adapter with PEFT, save it with safe_serialization=True, and import that"
        )
    try:
        return PeftFolder(folder, config, load_file(path))
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(f"{path} cannot be read: {first_line(error)}") from None


def check_config(source: PeftFolder) -> None:
    """Raise a ValueError for a setting that changes the outputs in a way Inlay does not know."""
    for key, value in source.config.items():
        if value and key not in KEPT[source.kind] and key not in SILENT:
            raise ValueError(f"{key}={value!r} has no equal in Inlay{f': {WHY[key]}' if key in WHY else ''}")
    if (task := source.config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type={task!r} is not CAUSAL_LM, and only causal language models are loaded here")


def build_peft_adapter(source: PeftFolder, base: str, kind: type, changed: dict[str, Any]) -> PeftModel:
    """The adapter on its base as PEFT builds it, without memory.

    Raises:
        ValueError: PEFT cannot build it.
    """
    blank = meta_model(base, torch.float32)
    kept = {k: v for k, v in source.config.items() if k in KEPT[source.kind]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that do nothing here, as Conv1D's fan_in_fan_out
            return get_peft_model(blank, kind(**(kept | changed)), low_cpu_mem_usage=True)
    except Exception as error:  # PEFT raises many kinds
        raise ValueError(f"PEFT cannot build this adapter on {base}: {first_line(error)}") from None


def without_base_copies(judge: PeftModel, source: PeftFolder, base: str, residual: Collection[str] = ()) -> PeftFolder:
    """The adapter without copies of the base's weights, which PEFT stores with one on the embeddings or the head.

    `residual`: the modules whose copies are W − s B₀ A₀, which is known without them.

    Raises:
        ValueError: the file does not hold what its config asks for, or weights that are not those of the base.
    """
    asked = get_peft_model_state_dict(judge, save_embedding_layers=False)
    own = dict(judge.get_base_model().named_parameters(remove_duplicate=False))
    copies = {k for k in source.tensors.keys() - asked.keys() if k.removeprefix(ROOT) in own}
    weights = Weights(base, source.config.get("revision")) if copies else None
    for key in sorted(copies):
        assert weights is not None
        names = [n.replace(".base_layer", "") for n, p in own.items() if p is own[key.removeprefix(ROOT)]]  # tied ones
        value, W = source.tensors[key], weights.read(next((n for n in names if weights.key(n)), names[0]))
        other = names[0].removesuffix(".weight") not in residual and not torch.equal(value, W.to(value.dtype))
        if value.shape != W.shape or other:
            raise ValueError(
                f"{source.folder} holds a {names[0]} that is not the base's (a resized vocabulary?); save the base "
                "with it, and name that"
            )
    source = replace(source, tensors={k: v for k, v in source.tensors.items() if k not in copies})
    check_tensors(asked, source)
    return source


def check_tensors(asked: dict[str, Tensor], source: PeftFolder) -> None:
    """Raise a ValueError unless the file holds the tensors that the config asks for, and no others."""
    faults = [f"{key} is missing" for key in sorted(asked.keys() - source.tensors.keys())]
    faults += [f"{key} belongs to no module it targets" for key in sorted(source.tensors.keys() - asked.keys())]
    for key in sorted(asked.keys() & source.tensors.keys()):
        if (found := tuple(source.tensors[key].shape)) != (shape := tuple(asked[key].shape)):
            faults.append(f"{key} has shape {found}, not {shape}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError(
            f"{source.folder} does not hold the adapter its config describes: {'; '.join(faults[:3])}{more}"
        )


def peft_layers(judge: PeftModel, kind: type) -> dict[str, Any]:
    """PEFT's adapted layers by the name of the module.

    Raises:
        ValueError: one of them is not linear.
    """
    found = {n.removeprefix(ROOT): m for n, m in judge.named_modules() if isinstance(m, kind)}
    for name, layer in found.items():
        if isinstance(layer, LoraLayer) and type(layer) is not LoraLinear:
            what = type(layer.get_base_layer()).__name__
            raise ValueError(f"{name} is a {what}, and Inlay adapts linear layers only; import has nothing for it")
    return found
