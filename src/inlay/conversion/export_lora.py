"""From an adapter to files other tools read: a plain LoRA, the merged checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPORTED = "export.json"  # in a LoRA folder: rank and error of every weight
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
        revision: of the base on a hub; None: the one the adapter was trained on.
        trust_remote_code: let the base's repository run its own code.

    Raises:
        ValueError: no adapter there, a broken one, a base that does not fit, one that cannot be written as GGUF, or
            `out` exists.
    """
    from inlay.workbench import gguf_model, kinds, lora, merging, models
    from inlay.workbench.files import new_folder
    from inlay.workbench.weights import Weights

    if dtype != "auto" and dtype not in models.DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(models.DTYPES)}")
    if to not in ("safetensors", "gguf"):
        raise ValueError(f"to={to!r} is not one of safetensors, gguf")
    limit = merging.size_of(shard)
    folder = models.adapter_folder(str(adapter))
    name = model or models.base_of(folder)
    revision = revision or (None if model else models.revision_of(folder))
    for used in (folder, Path(models.resolve(name))):
        if used.exists() and used.resolve().is_relative_to(Path(out).resolve()):
            raise ValueError(f"{out} holds {used}, which the merge reads; choose another output")
    with new_folder(Path(out), overwrite, marker=MERGED) as part:
        auto = lora.auto_of(folder, name, revision, trust_remote_code)
        if to == "gguf" and auto is not kinds.find("instruction").auto:
            raise ValueError(f"to={to!r} writes causal language models, which {folder} is not an adapter of")
        blank = lora.load(folder, name, revision, trust_remote_code, auto)
        config: Any = blank.get_base_model().config
        weights = Weights(name, revision, trust_remote_code, auto)
        tensors = merging.merge(blank, folder, weights, width := merging.width(dtype, config))
        if to == "gguf":
            made = gguf_model.write_merged(part, config, merging.tokenizer_of(folder, name), tensors, str(out))
        else:
            made = merging.write(part, tensors, limit)
            merging.describe(part, blank, folder, weights, width)
        error = merging.probe(folder, weights, part) if probe else None
        lost = {new.name.removesuffix(".weight"): new.lost for new in made if new.lost is not None}
        about = {"adapter": str(adapter), "base": name, "largest_logit_difference": error, "lost_in_rounding": lost}
        (part / MERGED).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Merged(Path(out), error, lost)


@dataclass(frozen=True)
class Exported:
    """A LoRA folder, its rank, each weight's relative error (0: exact), and what more its rounding to 16 bits lost."""

    folder: Path
    rank: int
    errors: dict[str, float]
    rounding: dict[str, float]


def export_lora(
    adapter: str | Path | Mapping[str, float],
    out: str | Path,
    *,
    to: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    model: str | None = None,
    dtype: str = "float32",
    pad: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write an adapter as an ordinary PEFT LoRA folder, which needs no Inlay to load; vLLM serves it.

    Exact where ΔW is low rank (LoRA, PiSSA, MiLoRA, LaMDA, Bone), at most twice the adapter's rank; else the nearest
    of a rank. The base's weights are read only for methods that read them.

    Args:
        adapter: a run folder or an adapter folder; or several, of any methods, each with a weight: their weighted sum.
        out: appears whole or not at all.
        to: "lora", a PEFT folder, or "gguf", one for llama.cpp and Ollama.
        rank: at most so many ranks per weight.
        energy: as many as keep this share of ‖ΔW‖², in (0, 1].
        model: the base, if not the one the adapter names.
        dtype: of the LoRA's tensors: float32, bfloat16 or float16.
        pad: with zeros to the next rank that vLLM serves.
        overwrite: replace an earlier export at `out`.
        revision: of the base on a hub; None: the one the (first) adapter was trained on.
        trust_remote_code: let the base's repository run its own code.

    Raises:
        ValueError: the change has full rank and neither `rank` nor `energy` is given, adapters do not fit each other
            or the format, or a path cannot be used.
    """
    from inlay.workbench import llamacpp, lora, models
    from inlay.workbench.files import new_folder

    if to not in ("lora", "gguf"):
        raise ValueError(f"to={to!r} is not one of lora, gguf")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is below 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} is not in (0, 1]")
    if dtype not in models.DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(models.DTYPES)}")
    asked = list(adapter.items()) if isinstance(adapter, Mapping) else [(str(adapter), 1.0)]
    folders: dict[Path, float] = {}
    for path, weight in asked:
        if not math.isfinite(weight):
            raise ValueError(f"the weight {weight} of {path} is not a finite number")
        folder = models.adapter_folder(str(path)).resolve()
        folders[folder] = folders.get(folder, 0.0) + float(weight)
    if not folders:
        raise ValueError("no adapter was named; give at least one, with its weight")
    bases = {} if model else {str(models.resolve(models.base_of(f))): models.base_of(f) for f in folders}
    if len(bases) != 1 and not model:
        raise ValueError(f"the adapters name {len(bases)} bases, {', '.join(bases)}; name the one they share")
    base, first = model or next(iter(bases.values())), next(iter(folders))
    revision = revision or (None if model else models.revision_of(first))
    settings = models.load_config(base, trust_remote_code, revision)
    auto = lora.auto_of(first, base, revision, trust_remote_code)
    if to == "gguf":
        llamacpp.check(settings, str(out))
    for folder in folders if to == "gguf" or list(folders.values()) != [1.0] else ():
        if more := sorted(lora.others(folder)):
            kind = "a GGUF file" if to == "gguf" else "a weighted LoRA"
            raise ValueError(f"{folder} also trained {more[0]} whole, which {kind} has no place for; merge the adapter")
    with new_folder(Path(out), overwrite, marker=EXPORTED) as part:
        loaded = [
            (weight, lora.load(folder, base, revision, trust_remote_code, auto)) for folder, weight in folders.items()
        ]
        made = list(lora.changes(loaded, base, rank, energy, revision, trust_remote_code, auto))
        size = lora.padded(made, pad)
        if to == "gguf":
            llamacpp.write(part / llamacpp.FILE, settings, made, size, models.DTYPES[dtype])
            (part / "Modelfile").write_text(llamacpp.modelfile(base), encoding="utf-8")
        else:
            lora.write(part, first, loaded[0][1], made, size, models.DTYPES[dtype])
        lost = {c.module: 0.0 if dtype == "float32" else c.rounding(models.DTYPES[dtype]) for c in made}
        rows = [{"module": c.module, "rank": c.rank, "error": c.error, "rounding": lost[c.module]} for c in made]
        (part / EXPORTED).write_text(json.dumps({"rank": size, "weights": rows}, indent=1), encoding="utf-8")
    return Exported(Path(out), size, {c.module: c.error for c in made}, lost)
