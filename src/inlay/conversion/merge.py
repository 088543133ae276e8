"""Base + adapter as one ordinary checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MERGED = "merged_from.json"  # in the checkpoint: from what it was made, and by whom it may be overwritten


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint.

    Attributes:
        folder: where it is.
        logit_error: the largest difference of its logits from the adapter's in fp32 on a probe batch, if asked for.
        lost: per merged weight, the share of the change that the one rounding lost.
    """

    folder: Path
    logit_error: float | None
    lost: dict[str, float]


def merge(
    adapter: str | Path,
    out: str | Path,
    model: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    *,
    to: str = "safetensors",
    shard: str = "4GB",
    probe: bool = True,
    scale: float = 1.0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write base + adapter as an ordinary checkpoint that transformers loads without Inlay, or as GGUF for llama.cpp.

    Each weight is merged in fp32 and rounded once. Weights pass from the base's files to the new ones one at a time, so
    that memory holds one new file and a few fp32 copies of the largest weight. The probe afterwards needs the whole
    model in fp32; leave it out where that does not fit. A 4-bit or 8-bit base becomes 16 bits wide.

    Args:
        adapter: a run folder or an adapter folder.
        out: the new checkpoint's folder; it appears whole or not at all.
        model: the base, if not the one the adapter names.
        dtype: the checkpoint's: auto (each tensor keeps its own), float32, bfloat16 or float16.
        overwrite: replace a checkpoint that is at `out`.
        to: "safetensors", or "gguf": one file with the tokenizer in it, and an Ollama Modelfile.
        shard: how large a file may be, as 500MB or 4GB.
        probe: compare the new model's logits with the adapter's.
        scale: the strength of the adapter (see `inlay.set_scale`).
        revision: of the base on a hub; None: the one the adapter was trained on.
        trust_remote_code: let the base's repository run its own code.

    Raises:
        ValueError: no adapter there, a broken one, a base that does not fit, one that cannot be written as GGUF, or
            `out` exists.
    """
    from inlay.conversion.gguf_model import write_merged
    from inlay.conversion.lora_factors import adapter_auto_class, load_blank_adapter
    from inlay.conversion.merged_weights import (
        merge_dtype,
        merged_tensors,
        parse_size,
        probe_difference,
        tokenizer_of,
        write_description,
        write_shards,
    )
    from inlay.files.atomic import new_folder
    from inlay.host.strength import set_scale
    from inlay.models.adapters import adapter_folder, base_of, revision_of
    from inlay.models.loading import DTYPES, resolve
    from inlay.models.model_classes import find_model_class
    from inlay.models.stored_weights import Weights

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if to not in ("safetensors", "gguf"):
        raise ValueError(f"to={to!r} is not one of safetensors, gguf")
    limit = parse_size(shard)
    folder = adapter_folder(str(adapter))
    name = model or base_of(folder)
    revision = revision or (None if model else revision_of(folder))
    for used in (folder, Path(resolve(name))):
        if used.exists() and used.resolve().is_relative_to(Path(out).resolve()):
            raise ValueError(f"{out} holds {used}, which the merge reads; choose another output")
    with new_folder(Path(out), overwrite, marker=MERGED) as part:
        auto = adapter_auto_class(folder, name, revision, trust_remote_code)
        if to == "gguf" and auto is not find_model_class("instruction").auto:
            raise ValueError(f"to={to!r} writes causal language models, which {folder} is not an adapter of")
        blank = load_blank_adapter(folder, name, revision, trust_remote_code, auto)
        set_scale(blank, scale)
        config: Any = blank.get_base_model().config
        weights = Weights(name, revision, trust_remote_code, auto)
        tensors = merged_tensors(blank, folder, weights, width := merge_dtype(dtype, config))
        if to == "gguf":
            made = write_merged(part, config, tokenizer_of(folder, name), tensors, str(out))
        else:
            made = write_shards(part, tensors, limit)
            write_description(part, blank, folder, weights, width)
        error = probe_difference(folder, weights, part, scale) if probe else None
        lost = {new.name.removesuffix(".weight"): new.lost for new in made if new.lost is not None}
        about = {
            "adapter": str(adapter),
            "base": name,
            "scale": scale,
            "largest_logit_difference": error,
            "lost_in_rounding": lost,
        }
        (part / MERGED).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Merged(Path(out), error, lost)
