"""From an adapter to files other tools read: a plain LoRA, the merged checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

EXPORTED = "export.json"  # in a LoRA folder: rank and error of every weight


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
    from inlay.conversion.gguf_lora import FILE, check_lora_architecture, modelfile, write_lora_gguf
    from inlay.conversion.lora_factors import (
        adapter_auto_class,
        load_blank_adapter,
        lora_deltas,
        padded_to_one_rank,
        saved_beside,
        write_lora,
    )
    from inlay.files.atomic import new_folder
    from inlay.models.adapters import adapter_folder, base_of, revision_of
    from inlay.models.loading import DTYPES, load_config, resolve
    from inlay.models.vocabulary import grew

    if to not in ("lora", "gguf"):
        raise ValueError(f"to={to!r} is not one of lora, gguf")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is below 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} is not in (0, 1]")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    asked = list(adapter.items()) if isinstance(adapter, Mapping) else [(str(adapter), 1.0)]
    folders: dict[Path, float] = {}
    for path, weight in asked:
        if not math.isfinite(weight):
            raise ValueError(f"the weight {weight} of {path} is not a finite number")
        folder = adapter_folder(str(path)).resolve()
        folders[folder] = folders.get(folder, 0.0) + float(weight)
    if not folders:
        raise ValueError("no adapter was named; give at least one, with its weight")
    bases = {} if model else {str(resolve(base_of(f))): base_of(f) for f in folders}
    if len(bases) != 1 and not model:
        raise ValueError(f"the adapters name {len(bases)} bases, {', '.join(bases)}; name the one they share")
    base, first = model or next(iter(bases.values())), next(iter(folders))
    revision = revision or (None if model else revision_of(first))
    settings = load_config(base, trust_remote_code, revision)
    auto = adapter_auto_class(first, base, revision, trust_remote_code)
    if to == "gguf":
        check_lora_architecture(settings, str(out))
    for folder in folders if to == "gguf" or list(folders.values()) != [1.0] else ():
        if more := sorted(saved_beside(folder)):
            kind = "a GGUF file" if to == "gguf" else "a weighted LoRA"
            raise ValueError(f"{folder} also trained {more[0]} whole, which {kind} has no place for; merge the adapter")
    with new_folder(Path(out), overwrite, marker=EXPORTED) as part:
        loaded = [
            (weight, load_blank_adapter(folder, base, revision, trust_remote_code, auto))
            for folder, weight in folders.items()
        ]
        grown = any(grew(blank, settings) for _, blank in loaded)
        if grown and (to == "gguf" or list(folders.values()) != [1.0]):
            raise ValueError(
                f"{first} was trained on a grown vocabulary, which only one LoRA folder takes along; merge it"
            )
        made = list(lora_deltas(loaded, base, rank, energy, revision, trust_remote_code, auto))
        size = padded_to_one_rank(made, pad)
        if to == "gguf":
            write_lora_gguf(part / FILE, settings, made, size, DTYPES[dtype])
            (part / "Modelfile").write_text(modelfile(base), encoding="utf-8")
        else:
            write_lora(part, first, loaded[0][1], made, size, DTYPES[dtype], grown)
        lost = {c.module: 0.0 if dtype == "float32" else c.rounding(DTYPES[dtype]) for c in made}
        rows = [{"module": c.module, "rank": c.rank, "error": c.error, "rounding": lost[c.module]} for c in made]
        (part / EXPORTED).write_text(json.dumps({"rank": size, "weights": rows}, indent=1), encoding="utf-8")
    return Exported(Path(out), size, {c.module: c.error for c in made}, lost)
