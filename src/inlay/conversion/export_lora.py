"""From an adapter to files other tools read: a plain LoRA, the merged checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inlay.conversion.gguf_lora import FILE, check_lora_architecture, modelfile, write_lora_gguf
from inlay.conversion.lora_factors import lora_deltas, padded_to_one_rank, saved_beside, write_lora
from inlay.files.atomic import new_folder
from inlay.models.adapters import Adapter, adapter_folder
from inlay.models.loading import DTYPES
from inlay.models.vocabulary import grew

FORMS = ("lora", "vllm", "gguf")
EXPORTED = "export.json"  # in a LoRA folder: rank and error of every weight


@dataclass(frozen=True)
class Exported:
    """Hold a LoRA folder, its rank, each weight's relative error (0: exact), and what rounding to 16 bits lost."""

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
        to: "lora", a PEFT folder, "vllm", the same with the experts of a mixture of experts one by one, as vLLM reads
            them, or "gguf", one for llama.cpp and Ollama.
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
    if to not in FORMS:
        raise ValueError(f"to={to!r} is not one of {', '.join(FORMS)}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is below 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} is not in (0, 1]")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    weights = adapter if isinstance(adapter, Mapping) else {str(adapter): 1.0}
    adapters = on_one_base(weights, model, revision, trust_remote_code)
    first, base = adapters[0][1], adapters[0][1].base
    total = sum(weight for weight, _ in adapters)
    if abs(total - 1) > 1e-6 and any(one.folded for _, one in adapters):
        raise ValueError(
            f"{first.folder} was cut out of its base by a fold, which is not whole without all of it: weights must add "
            f"up to 1, not {total:g}"
        )
    config = base.config(**first.settings)
    if to == "gguf":
        check_lora_architecture(config, str(out))
    if to == "gguf" or [weight for weight, _ in adapters] != [1.0]:
        for _, one in adapters:
            if beside := sorted(saved_beside(one)):
                kind = "a GGUF file" if to == "gguf" else "a weighted LoRA"
                raise ValueError(
                    f"{one.folder} also trained {beside[0]} whole, which {kind} has no place for; merge the adapter"
                )
    with new_folder(Path(out), overwrite, marker=EXPORTED) as part:
        blanks = [(weight, one.load_blank()) for weight, one in adapters]
        grown = any(grew(blank, config) for _, blank in blanks)
        if grown and (to == "gguf" or [weight for weight, _ in adapters] != [1.0]):
            raise ValueError(
                f"{first.folder} was trained on a grown vocabulary, which only one LoRA folder takes along; merge it"
            )
        deltas = list(lora_deltas(blanks, first.base_weights, rank, energy))
        size = padded_to_one_rank(deltas, pad)
        if to == "gguf":
            write_lora_gguf(part / FILE, config, deltas, size, DTYPES[dtype])
            (part / "Modelfile").write_text(modelfile(base.name), encoding="utf-8")
        else:
            write_lora(part, first, blanks[0][1], deltas, size, DTYPES[dtype], grown, each=to == "vllm")
        lost = {d.module: 0.0 if dtype == "float32" else d.rounding(DTYPES[dtype]) for d in deltas}
        rows = [{"module": d.module, "rank": d.rank, "error": d.error, "rounding": lost[d.module]} for d in deltas]
        (part / EXPORTED).write_text(json.dumps({"rank": size, "weights": rows}, indent=1), encoding="utf-8")
    return Exported(Path(out), size, {d.module: d.error for d in deltas}, lost)


def on_one_base(
    weights: Mapping[str, float], model: str | None, revision: str | None, trust_remote_code: bool
) -> list[tuple[float, Adapter]]:
    """Open adapters with their weights, all on one base; a folder that is named twice has the sum of its weights.

    Raises:
        ValueError: none is named, a weight is not finite, or they name several bases and `model` is not given.
    """
    adapters: dict[Path, Adapter] = {}
    factors: dict[Path, float] = {}
    for path, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight {weight} of {path} is not a finite number")
        opened = Adapter.open(adapter_folder(path).resolve(), model, revision, trust_remote_code)
        opened.check_own()
        adapters.setdefault(opened.folder, opened)
        factors[opened.folder] = factors.get(opened.folder, 0.0) + float(weight)
    if not adapters:
        raise ValueError("no adapter was named; give at least one, with its weight")
    bases = {one.base.resolved: one.base for one in adapters.values()}
    if len(bases) != 1:
        raise ValueError(f"the adapters name {len(bases)} bases, {', '.join(bases)}; name the one they share")
    base = next(iter(adapters.values())).base
    return [(factors[folder], replace(one, base=base)) for folder, one in adapters.items()]
