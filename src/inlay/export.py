"""From an adapter to files other tools read: the merged checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
