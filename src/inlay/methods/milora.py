"""MiLoRA trains the minor singular components of the weight and keeps the principal ones fixed.

    W = U Σ Vᵀ,   ΔW = B A,   B₀ = U_m √(Σ_m / s),   A₀ = √(Σ_m / s) V_mᵀ     (m: the last r triplets)

Wang et al. 2024, "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", arXiv
2406.09044, section 3. Only the start is constrained, not the training. It needs LoRA-like learning rates (3e-4 at r 32
to 64; PiSSA's 2e-5 is too small) and gives no benefit to quantisation: the minor part carries no energy.
`side="middle"` and `"random"` are the paper's ablations (they need a full SVD; the random one draws for each weight);
the principal side is PiSSA. `skip` moves the middle: so many larger triplets are left out. Quercia et al. 2026, "Least
but not Last", arXiv 2602.03493, find the least forgetting between the ends of the spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from inlay.method import LowRank, Params, check_rank
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class MiLoRA(LowRank):
    name = "milora"
    title = "MiLoRA: the minor singular components"
    equation = "ΔW = B A from the r smallest triplets of W"
    paper = "Wang et al. 2024, arXiv 2406.09044"
    trains = "A (r × in), B (out × r)"

    side: Literal["minor", "middle", "random"] = field(
        default="minor",
        metadata={
            "help": "which singular triplets", "choices": ("minor", "middle", "random"), "draws": ("random",)
        },
    )  # fmt: skip

    skip: int | None = field(
        default=None, metadata={"help": "larger triplets left out, for side middle (default: centred)", "min": 0}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip is not None and self.side != "middle":
            raise ValueError(f"milora: skip={self.skip} is for side=middle, not {self.side}; leave one of them out")

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        if self.skip is not None and self.skip + self.r > min(W.shape):
            raise ValueError(
                f"milora: skip={self.skip} leaves less than r={self.r} of the {W.shape[0]} × {W.shape[1]} weight's "
                f"triplets; choose skip <= {min(W.shape) - self.r}"
            )
        U, S, Vh = linalg.svd(W, self.r, self.side, self.skip)
        root = (S / self.s).sqrt()
        return {"A": root[:, None] * Vh, "B": U * root}
