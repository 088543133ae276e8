"""Folding: the base becomes Q(W − s ΔW(θ₀)) in 4 bits, and the adapter s ΔW(θ) is what makes it whole again.

QDoTA and QPiSSA are this. The offset form on a plain 4-bit base starts at Q(W); the folded one at Q(W − s ΔW(θ₀)) +
s ΔW(θ₀), which is nearer to W where ΔW(θ₀) carries energy, as the principal components do and the minor ones do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.base import get_keys_to_not_convert

from inlay.conversion.fold_quantizer import (
    FoldError,
    FoldPlan,
    finish_fold,
    folding_config,
    methods_of,
    save_adapter,
)
from inlay.files.atomic import new_folder, write_text
from inlay.host.calibrate import gather_statistics
from inlay.host.config import InlayConfig
from inlay.messages import check_installed
from inlay.models.base import BaseModel
from inlay.models.folded import FOLDED


@dataclass(frozen=True)
class Folded:
    """Hold what a fold made: a 4-bit base and its adapter, and the error of each weight against plain NF4."""

    folder: Path
    errors: list[FoldError]
    unsettled: list[str]  # the modules whose start had not seen enough data

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def fold(
    model: str,
    out: str | Path,
    config: InlayConfig,
    *,
    quantization: str = "nf4",
    rounds: int = 1,
    batches: Iterable[Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    done: Callable[[str], object] = lambda module: None,
) -> Folded:
    """Write `out`/base, an ordinary 4-bit checkpoint of W − s ΔW(θ₀), and `out`/adapter, which fits no other base.

    Each weight is decomposed in fp32 and quantised (NF4 in blocks of 64, double quantisation, products in bf16) while
    the model loads, so that memory holds the 4-bit model and one weight. Linear layers the config does not target are
    quantised as they are.

    Args:
        model: hub id, folder or builtin; not quantised.
        out: appears whole or not at all.
        config: the method and its target modules.
        quantization: "nf4", the only one.
        rounds: quantise, decompose again what that lost, and so on; each weight keeps its best round, as the method
            weighs errors (LQ-LoRA: by sensitivity).
        batches: for methods that start from data, as in `inlay.calibrate`; all are used. The model is then first loaded
            whole, in the dtype it is stored in.
        revision: of the model on a hub.
        trust_remote_code: let the model's repository run its own code.
        overwrite: replace an earlier fold at `out`.
        done: called with the name of each weight that is finished.

    Raises:
        ValueError: the method does not fit the model or needs batches, a target is not quantised or not stored, a
            weight holds NaN or Inf, or `out` exists.
    """
    if quantization != "nf4":
        raise ValueError(f"quantization={quantization!r} is not one of nf4")
    check_installed("a fold", "bitsandbytes")
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds={rounds!r} is not a whole number from 1 up")
    if config.folded:
        raise ValueError("this config is of a folded adapter; fold with a fresh one")
    if config.experts:
        raise ValueError(
            "experts: transformers packs linear layers only, so a 4-bit checkpoint keeps experts in 16 bits, and a "
            "fold has nothing to cut them into; leave experts out, or train them with quantize: nf4_offset"
        )
    source = BaseModel(model, revision, trust_remote_code)
    tokenizer, dtype = source.tokenizer(), source.stored_dtype
    blank = source.meta(dtype)
    full = get_keys_to_not_convert(blank)
    plan = FoldPlan(methods_of(blank, config), rounds, done)
    for module in plan.methods:
        if module in full:
            raise ValueError(f"{module} stays in full precision in a 4-bit checkpoint; leave it out of the targets")
    unsettled: list[str] = []
    if needing := {module: method for module, method in plan.methods.items() if method.needs}:
        if batches is None:
            raise ValueError(
                f"{config.method} starts from {next(iter(needing.values())).needs} of the data: give inlay.fold "
                "batches, or let inlay train fold (quantize: nf4)"
            )
        gathered = gather_statistics(source.load(dtype), needing, batches, most=None)
        plan.stats, unsettled = gathered.stats, gathered.unsettled
    with new_folder(Path(out), overwrite, marker=FOLDED) as part:
        try:
            base = source.load(dtype, folding_config(plan, torch.bfloat16))
        finally:
            if plan.failure:
                raise plan.failure
        for module in plan.methods.keys() - plan.starts.keys():
            raise ValueError(f"the checkpoint of {model!r} stores no weight for {module}; leave it out of the targets")
        finish_fold(base)
        about = {"model": model, "method": repr(config.build()), "rounds": rounds}
        base.save_pretrained(str(part / "base"))
        tokenizer.save_pretrained(str(part / "base"))
        save_adapter(base, config, plan.starts, part / "adapter", str((Path(out) / "base").resolve()))
        for folder in (part, part / "base"):
            write_text(folder / FOLDED, json.dumps(about, indent=2))
        rows = [f"{e.module},{e.plain:.5f},{e.folded:.5f},{e.round}" for e in plan.errors]
        write_text(part / "errors.csv", "\n".join(["module,plain,folded,round", *rows]) + "\n")
    return Folded(Path(out), plan.errors, unsettled)
