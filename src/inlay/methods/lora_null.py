"""LoRA-Null starts in the directions that the layer's inputs hardly use, so that what they carry is kept.

    ΔW = B A,   B₀ A₀ = W N Nᵀ,   N (in × r) = the eigenvectors of mean X Xᵀ with the r smallest eigenvalues

Tang et al. 2025, "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models", arXiv 2503.02659. Calibrate
it with the data to keep. W N = U Σ Vᵀ is shared out as B₀ = U √(Σ / s), A₀ = √(Σ / s) Vᵀ Nᵀ. `variant="v2"`
never trains A, so that an input without a part in N is answered as before. The calibration holds mean X Xᵀ, (in × in),
for each distinct input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank, check_seen
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class LoRANull(LowRank):
    name = "lora_null"
    title = "LoRA-Null: the null space of the layer's inputs"
    equation = "ΔW = B A, B₀ A₀ = W projected onto what the inputs hardly use"
    paper = "Tang et al. 2025, arXiv 2503.02659"
    trains = "A (r × in) unless `variant: v2`, B (out × r)"
    needs = "activations"

    variant: Literal["v1", "v2"] = field(
        default="v1", metadata={"help": "LoRA-Null's: v2 keeps A as it starts", "choices": ("v1", "v2")}
    )

    @property
    def frozen(self) -> frozenset[str]:  # type: ignore[override]
        """Return A in the variant that freezes it."""
        return frozenset({"A"} if self.variant == "v2" else ())

    def statistic(self, seen: Tensor) -> Params:
        return {"C": seen.mT @ seen / len(seen)}

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        if W.is_meta:
            return dict(zip("BA", linalg.svd(W, self.r, "top")[::2], strict=True))
        N = torch.linalg.eigh(check_seen(self, stats)["C"].to(W.device).double()).eigenvectors[:, : self.r]
        U, S, Vh = torch.linalg.svd(W.double() @ N, full_matrices=False)
        root = (S / self.s).sqrt()
        return {"B": (U * root).float(), "A": (root[:, None] * Vh @ N.mT).float()}
