"""A base with an adapter merged into it: one weight after another, from the base's files to new ones.

No model is built: what an adapter leaves alone is copied as it is stored, so that memory holds one new file and the
fp32 copies of one weight, and the new checkpoint has the names, the dtypes and the layout of the old one.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Conv1D, GenerationConfig

from inlay.conversion.stored_experts import StoredExperts
from inlay.host import seal
from inlay.host.adapter_state import COPIES, ROOT, wrapped_keys
from inlay.host.layer import PREFIX, adapted
from inlay.host.strength import set_scale
from inlay.models import builtin
from inlay.models.adapters import Adapter
from inlay.models.base import BaseModel
from inlay.models.loading import DTYPES
from inlay.models.model_classes import SEQUENCE
from inlay.models.quantized import dequantized
from inlay.models.stored_weights import MANY, ONE, Weights
from inlay.models.vocabulary import grew, stored_name

TINY = torch.finfo(torch.float32).tiny
TEXT = "The Vaults is a pub near the river. It serves Italian food at £20 to £25, has 3 of 5 stars, and opens at 17:30."
TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class New:
    """Hold a tensor of the merged model.

    Attributes:
        key: its stored name.
        name: the model's name for it.
        value: the tensor.
        lost: the share of an adapter's change that the one rounding lost, ‖rounded − exact‖ / ‖change‖; None where
            there is no change.
    """

    key: str
    name: str
    value: Tensor
    lost: float | None = None


@torch.no_grad()
def merged_tensors(model: PeftModel, adapter: Adapter, weights: Weights, dtype: torch.dtype | None) -> Iterator[New]:
    """Yield every tensor of the merged model, in the order of the stored names; those no longer tied come last.

    Args:
        model: the adapter on a base without memory (see `Adapter.load_blank`).
        adapter: the adapter.
        weights: the stored weights of its base.
        dtype: of all floating tensors; None: each keeps its own.

    Raises:
        ValueError: the base is not the adapter's, is packed in an unknown way, or a merged weight overflows.
    """
    base: Any = model.get_base_model()
    layers = {layer.cuts["default"].module: layer for layer in adapted(model, "default").values()}
    check_mergeable(base.config)
    shifts = {
        f"{module}.bias": shift for module, layer in layers.items() if (shift := layer.shift("default")) is not None
    }
    for name in shifts:
        if weights.key(name) is None:
            raise ValueError(f"{name}, which the adapter shifts, is not stored in the base: it has no merged form")
    whole, rows, resized = trained_beside(model, adapter, weights)
    experts = StoredExperts(weights, layers)
    linear = [module for module in layers if module not in experts.layers]
    waiting = {*whole, *(f"{module}.weight" for module in (*linear, *rows)), *experts.layers}
    tied = dict(base.all_tied_weights_keys)
    resized |= {source: resized[name] for name, source in tied.items() if name in resized and source not in resized}
    names = {key: name for name, key in weights.stored.items()}

    def merged(key: str, name: str, stored: str) -> New:
        module = name.removesuffix(".weight")
        transposed = isinstance(module_below(base, module), Conv1D)
        old, mark = read_weight(weights, stored, transposed)
        if name in resized:  # the base's own, with more tokens
            old = resized[name].to(old.dtype)
            mark = seal.of_base(old)
        if name in whole:
            old = whole[name].T if transposed else whole[name]
        W, change = old, None
        if module in layers and name != module:
            layers[module].check_base("default", mark)
            change = layers[module].change("default", W.float())
            W = W.float() + change
        if name in shifts:
            change = shifts[name]
            W = W.float() + change
        if module in rows:
            W = W.index_copy(0, torch.tensor(rows[module][0]), rows[module][1].to(W.dtype))
        rounded = W.to(dtype or old.dtype) if W.is_floating_point() else W
        if not rounded.isfinite().all() and old.isfinite().all():
            raise ValueError(f"the merged {name} does not fit {rounded.dtype}; choose the dtype bfloat16 or float32")
        lost = None if change is None else ((rounded.float() - W).norm() / change.norm().clamp(min=TINY)).item()
        return New(key, name, (rounded.T if transposed else rounded).contiguous(), lost)

    changed = {*whole, *(f"{module}.weight" for module in linear)}
    for key in weights.names():
        if key in experts.pieces:
            waiting.discard(experts.pieces[key].module)
            yield New(key, key, *experts.merged(key, dtype))
        elif weights.owner(key) is None:
            new = merged(key, names.get(key, key), key)
            waiting.discard(new.name)
            yield new
    for name, tied_to in tied.items():
        if name in changed or tied_to in changed:
            base.config.tie_word_embeddings = False
            if weights.key(name) is None:
                waiting.discard(name)
                yield merged(name, name, tied_to)
    if adapter.config.task_type == SEQUENCE:
        for name in sorted(whole.keys() & waiting):
            if weights.key(name) is None:  # a head, which the base never had
                waiting.discard(name)
                yield New(name, name, whole[name].to(dtype or whole[name].dtype).contiguous())
    if waiting:
        raise ValueError(
            f"the checkpoint of {weights.model!r} does not store {min(waiting)} (nor {len(waiting) - 1} more) "
            "plainly; merge in Python: PeftModel.from_pretrained(...).merge_and_unload()"
        )


def check_mergeable(config: Any) -> None:
    """Raise a ValueError for a base whose stored weights only another library can read."""
    packed = getattr(config, "quantization_config", None) or {}
    kind = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
    kind = getattr(kind, "value", kind)
    if kind not in (None, "bitsandbytes"):
        raise ValueError(
            f"the base is stored in the format of {kind}, which is not merged here; name the model in full precision "
            "as the base, or merge in Python: PeftModel.from_pretrained(...).merge_and_unload()"
        )


def read_weight(weights: Weights, key: str, transposed: bool) -> tuple[Tensor, str | None]:
    """Read a weight of the base, a linear layer's as (out × in), and its mark; a packed one has that shape already."""
    if weights.beside(key):
        return dequantized(weights, key)
    W = weights.read(key).T if transposed else weights.read(key)
    return W, seal.of_base(W) if W.ndim == 2 and W.is_floating_point() else None


def module_below(base: Any, module: str) -> Any:
    """Return the module of a name, without an adapter's layer around it; None where there is no such module."""
    try:
        layer = base.get_submodule(module)
    except AttributeError:
        return None
    return getattr(layer, "base_layer", layer)


def trained_beside(
    model: PeftModel, source: Adapter, weights: Weights
) -> tuple[dict[str, Tensor], dict[str, tuple[list[int], Tensor]], dict[str, Tensor]]:
    """Return what `source` holds beside θ: tensors trained whole, rows of embeddings, and embeddings that grew.

    Rows are (indices, values). The embeddings are the base's own, with the tokens that it had before the training.
    """
    config: Any = model.peft_config["default"]
    trained = wrapped_keys(model, "default")
    whole = {}
    rows = {}
    resized = {}
    for key, value in source.tensors.items():
        name = key.removeprefix(ROOT).replace(".base_layer.bias", ".bias")
        if name.endswith(TOKENS) and key in trained:
            module, tokens = name.removesuffix(TOKENS), config.trainable_token_indices
            indices = tokens if isinstance(tokens, list) else next(v for k, v in tokens.items() if module.endswith(k))
            rows[module] = indices, value
        elif name.endswith(".base_layer.weight"):
            stored, wrapper = stored_name(key), key.removesuffix(".base_layer.weight")
            tied = wrapper.endswith(".token_adapter") and f"{wrapper}.trainable_tokens_delta" not in trained
            if not tied and not equals_base(weights, stored, value):
                resized[stored] = value
        elif f".{PREFIX}" not in key and not re.search(COPIES, name) and not equals_base(weights, name, value):
            whole[name] = value
    return whole, rows, resized


def equals_base(weights: Weights, name: str, value: Tensor) -> bool:
    """Return whether the base has this very tensor: PEFT saves embeddings, trained or not, where a head is adapted."""
    return weights.key(name) is not None and torch.equal(weights.read(name).to(value.dtype), value)


def write_shards(folder: Path, tensors: Iterator[New], limit: int) -> list[New]:
    """Write the tensors as safetensors files of at most `limit` bytes (or one tensor), and their index.

    Returns:
        The tensors without their values.
    """
    written: list[New] = []
    files: list[list[str]] = []
    part: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(part, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(part))
        part.clear()

    for new in tensors:
        size = new.value.nbytes
        if part and size + sum(t.nbytes for t in part.values()) > limit:
            flush()
        part[new.key], total = new.value, total + size
        written.append(New(new.key, new.name, new.value.new_empty(0), new.lost))
    flush()
    where = {}
    for i, keys in enumerate(files):
        name = ONE if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"part-{i}").rename(folder / name)
        where |= dict.fromkeys(keys, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / MANY).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return written


def merge_dtype(dtype: str, config: Any) -> torch.dtype | None:
    """Return the dtype to merge in. "auto" is 16 bits for a quantised base, else None: each tensor's own dtype."""
    if dtype != "auto":
        return DTYPES[dtype]
    stored = config.get_text_config().dtype if getattr(config, "quantization_config", None) else None
    return stored if stored in (None, torch.float16) else torch.bfloat16


def write_description(folder: Path, model: PeftModel, source: Adapter, dtype: torch.dtype | None) -> None:
    """Write the merged model's configuration and its tokenizer, the adapter's or else the base's, beside its weights.

    Args:
        folder: of the merged model.
        model: the adapter on a base without memory.
        source: the adapter.
        dtype: of the merged weights; None: each has kept its own.
    """
    base = source.base
    config = base.config(**source.settings)
    if source.settings:
        config.architectures = [type(model.get_base_model()).__name__]
    config.__dict__.pop("quantization_config", None)
    if grew(model, config):
        config.get_text_config().vocab_size = cast(Any, model.get_base_model()).config.get_text_config().vocab_size
    config.tie_word_embeddings = cast(Any, model.get_base_model()).config.tie_word_embeddings
    for part in (config, config.get_text_config()):
        part.dtype = dtype or part.dtype
    config.save_pretrained(folder)
    with contextlib.suppress(OSError):
        GenerationConfig.from_pretrained(base.resolved, revision=base.revision or "main").save_pretrained(folder)
    with contextlib.suppress(ValueError):  # a base without a tokenizer gives a model without one
        source.saved_tokenizer().save_pretrained(folder)


def probe_difference(source: Adapter, merged: Path, scale: float = 1.0) -> float:
    """Return the largest difference of logits between the adapter on its base and the merged model, both in fp32.

    `scale` is the strength at which the adapter was merged.
    """
    base, auto = source.base, source.auto_class
    model: Any = base.load(torch.float32, folded=True, auto=auto, **source.settings)
    config = copy.deepcopy(model.config)
    try:
        ids = torch.tensor([base.tokenizer().encode(TEXT)])
    except ValueError:  # it has none
        ids = torch.arange(32)[None] * 101
    ids %= config.get_text_config().vocab_size
    adapted = source.attach(model)
    set_scale(adapted, scale)
    before = logits_of(adapted, ids)
    del model, adapted
    after = load_merged(merged, config, auto, base.trust_remote_code)
    return (logits_of(after, ids) - before).abs().max().item()


def load_merged(merged: Path, config: Any, auto: Any = AutoModelForCausalLM, trust_remote_code: bool = False) -> Any:
    """Load a merged model in fp32; one in a GGUF file with the configuration of the base, which says more."""
    for file in merged.glob("*.gguf"):
        config.__dict__.pop("quantization_config", None)
        return builtin.load_gguf(file, None if config.model_type == "mistral" else config)  # in GGUF that is a llama
    return BaseModel(str(merged), trust_remote_code=trust_remote_code).load(torch.float32, auto=auto)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Return the logits, (1, tokens, vocabulary) or (1, labels), on the CPU; encoder and decoder read the same."""
    ids = ids.to(model.device)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **more).logits.float().cpu()


def parse_size(text: str) -> int:
    """Return the bytes of a size as 500MB, 4GB or a number.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|k|m|g|t)i?b?", str(text).strip().lower())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no size; write it as 500MB or 4GB")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))
