"""From an adapter to files other tools read: a plain LoRA, the merged checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EXPORTED = "export.json"  # in a LoRA folder: rank and error of every weight
MERGED = "merged_from.json"  # in the checkpoint: from what it was made, and by whom it may be overwritten


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint: where it is and how far its logits are from the adapter's on a probe batch."""

    folder: Path
    logit_error: float


def merge(
    adapter: str | Path, out: str | Path, model: str | None = None, dtype: str = "auto", overwrite: bool = False
) -> Merged:
    """Write base + adapter as an ordinary checkpoint that transformers loads without Inlay.

    Each weight is merged in fp32 and rounded once to the base's dtype; a quantised base is dequantised first.

    Args:
        adapter: a run folder or an adapter folder.
        out: the new checkpoint's folder; it appears whole or not at all.
        model: the base, if not the one the adapter names.
        dtype: the checkpoint's: auto (the one the base is stored in), float32, bfloat16 or float16.
        overwrite: replace a checkpoint that is at `out`.

    Raises:
        ValueError: no adapter there, a broken one, a base that does not fit, or `out` exists.
    """
    from inlay.workbench import models
    from inlay.workbench.files import new_folder

    folder = models.adapter_folder(str(adapter))
    name = model or models.base_of(folder)
    base_dtype = models.stored_dtype(name) if dtype == "auto" else models.dtype_for(dtype)
    with new_folder(Path(out), overwrite, marker=MERGED) as part:
        adapted, tokenizer = models.load_adapted(folder, name, base_dtype)
        config: Any = adapted.eval().config
        ids = torch.arange(64, device=adapted.device).remainder(config.get_text_config().vocab_size)[None]
        with torch.no_grad():
            reference = adapted(input_ids=ids).logits.float()
            models.dequantise(adapted)
            merged = adapted.merge_and_unload(safe_merge=True).to(base_dtype)
            error = (merged(input_ids=ids).logits.float() - reference).abs().max().item()
        merged.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        about = {"adapter": str(adapter), "base": name, "largest_logit_difference": error}
        (part / MERGED).write_text(json.dumps(about, indent=2), encoding="utf-8")
    return Merged(Path(out), error)


@dataclass(frozen=True)
class Exported:
    """A LoRA folder, its rank, and each weight's relative error (0: exact)."""

    folder: Path
    rank: int
    errors: dict[str, float]


def export_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    model: str | None = None,
    dtype: str = "float32",
    pad: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write an adapter as an ordinary PEFT LoRA folder, which needs no Inlay to load; vLLM serves it.

    Exact where ΔW is low rank (LoRA, PiSSA, MiLoRA, LaMDA, Bone), at most twice the adapter's rank; else the nearest
    of a rank. The base's weights are read only for methods that read them.

    Args:
        adapter: a run folder or an adapter folder.
        out: appears whole or not at all.
        to: "lora", a PEFT folder, or "gguf", one for llama.cpp and Ollama.
        rank: at most so many ranks per weight.
        energy: as many as keep this share of ‖ΔW‖², in (0, 1].
        model: the base, if not the one the adapter names.
        dtype: of the LoRA's tensors: float32, bfloat16 or float16.
        pad: with zeros to the next rank that vLLM serves.
        overwrite: replace an earlier export at `out`.

    Raises:
        ValueError: the change has full rank and neither `rank` nor `energy` is given, or a path cannot be used.
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
    folder = models.adapter_folder(str(adapter))
    base = model or models.base_of(folder)
    settings = models.load_config(base)
    if to == "gguf":
        llamacpp.check(settings, str(out))
    with new_folder(Path(out), overwrite, marker=EXPORTED) as part:
        blank = lora.load(folder, base)
        made = list(lora.changes(blank, base, rank, energy))
        size = lora.padded(made, pad)
        if to == "gguf":
            llamacpp.write(part / llamacpp.FILE, settings, made, size, models.DTYPES[dtype])
            (part / "Modelfile").write_text(llamacpp.modelfile(base), encoding="utf-8")
        else:
            lora.write(part, folder, blank, made, size, models.DTYPES[dtype])
        rows = [{"module": c.module, "rank": c.rank, "error": c.error} for c in made]
        (part / EXPORTED).write_text(json.dumps({"rank": size, "weights": rows}, indent=1), encoding="utf-8")
    return Exported(Path(out), size, {c.module: c.error for c in made})
