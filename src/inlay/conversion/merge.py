"""Base + adapter as one ordinary checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.conversion.gguf_model import FILE, write_merged
from inlay.conversion.gguf_types import PLAIN, check_gguf_type
from inlay.conversion.merge_weights import (
    merge_dtype,
    merged_tensors,
    parse_size,
    probe_difference,
    write_description,
    write_shards,
)
from inlay.conversion.modelfile import modelfile
from inlay.files.atomic import new_folder
from inlay.host.strength import check_config_scalable, set_scale
from inlay.models.adapters import Adapter
from inlay.models.loading import DTYPES
from inlay.models.model_classes import find_model_class

MERGED = "merged_from.json"  # in the checkpoint: from what it was made, and by whom it may be overwritten


@dataclass(frozen=True)
class Merged:
    """Hold what a merge wrote: the folder of a merged checkpoint and what is known of it.

    Attributes:
        folder: where it is.
        logit_error: the largest difference of its logits from the adapter's in fp32 on a probe batch, if asked for.
        lost: per merged weight, the share of the change that the one rounding lost.
        packed: per weight that was packed for GGUF, ‖W' − W‖ / ‖W‖.
    """

    folder: Path
    logit_error: float | None
    lost: dict[str, float]
    packed: dict[str, float] = field(default_factory=dict)


def merge(
    adapter: str | Path,
    out: str | Path,
    model: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    *,
    to: str = "safetensors",
    gguf_type: str | None = None,
    system: str | None = None,
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
        gguf_type: of the matrices in the GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, or one that
            llama.cpp's llama-quantize makes, as q4_k_m; None: that of the dtype.
        system: the system message in the Modelfile; None: the chat template's own.
        shard: how large a file may be, as 500MB or 4GB.
        probe: compare the new model's logits with the adapter's.
        scale: the strength of the adapter (see `inlay.set_scale`).
        revision: of the base on a hub; None: the one the adapter was trained on.
        trust_remote_code: let the base's repository run its own code.

    Raises:
        ValueError: no adapter there, a broken one, a base that does not fit, one that cannot be written as GGUF, or
            `out` exists.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if to not in ("safetensors", "gguf"):
        raise ValueError(f"to={to!r} is not one of safetensors, gguf")
    if to != "gguf" and (gguf_type is not None or system is not None):
        raise ValueError("gguf_type and system are for to='gguf'; leave them out")
    check_gguf_type(gguf_type, dtype)
    limit = parse_size(shard)
    source = Adapter.open(adapter, model, revision, trust_remote_code)
    source.check_own()
    check_config_scalable(source.config, str(source.folder), scale)
    for used in (source.folder, Path(source.base.resolved)):
        if used.exists() and used.resolve().is_relative_to(Path(out).resolve()):
            raise ValueError(f"{out} holds {used}, which the merge reads; choose another output")
    with new_folder(Path(out), overwrite, marker=MERGED) as part:
        auto = source.auto_class
        if to == "gguf" and auto is not find_model_class("instruction").auto:
            raise ValueError(f"to={to!r} writes causal language models, which {source.folder} is not an adapter of")
        blank = source.load_blank()
        set_scale(blank, scale)
        config: Any = blank.get_base_model().config
        width = merge_dtype(PLAIN.get(gguf_type, "float32") if gguf_type else dtype, config)
        tensors = merged_tensors(blank, source, source.base_weights(), width)
        packed: dict[str, float] = {}
        if to == "gguf":
            tokenizer = source.saved_tokenizer()
            written, packed = write_merged(part, config, tokenizer, tensors, str(out), gguf_type)
            about_it = modelfile(FILE, tokenizer, source.base.generation_config, system)
            (part / "Modelfile").write_text(about_it, encoding="utf-8")
        else:
            written = write_shards(part, tensors, limit)
            write_description(part, blank, source, width)
        error = probe_difference(source, part, scale) if probe else None
        lost = {new.name.removesuffix(".weight"): new.lost for new in written if new.lost is not None}
        about = {
            "adapter": str(adapter),
            "base": source.base.name,
            "scale": scale,
            "largest_logit_difference": error,
            "lost_in_rounding": lost,
        }
        (part / MERGED).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Merged(Path(out), error, lost, packed)
