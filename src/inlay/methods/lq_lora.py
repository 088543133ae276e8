"""LQ-LoRA splits a weight into a low-rank part and a quantised rest, where the loss is sensitive.

    D₁ W D₂ = U Σ Vᵀ,   ΔW = B A,   B₀ = D₁⁻¹ U_r √(Σ_r / s),   A₀ = √(Σ_r / s) V_rᵀ D₂⁻¹
    D₁, D₂ = the square roots of the row and column means of the Fisher information F = E[g²]

Guo, Greengard, Xing, Kim 2023, "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model
Finetuning", arXiv 2311.12023. Folding (`quantize: nf4`, `fold_rounds`) is the paper's alternation: the weighted start
from the rest of W beside Q; then Q from the rest beside that; the iterate with the smallest ‖D₁ (W − Q − B A) D₂‖ is
kept. `weights="none"` is the unweighted form, as in LoftQ. [ours]: F takes one gradient per batch, so use batches of
one example for the usual estimate; D is floored at 1e-3 of its mean, so that it can be divided by. Mixed precision is
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from inlay.method import LowRank, Params, check_rank, check_seen
from inlay.numerics import linalg


@dataclass(frozen=True, kw_only=True)
class LQLoRA(LowRank):
    name = "lq_lora"
    title = "LQ-LoRA: low rank plus quantised, weighted by sensitivity"
    equation = "ΔW = B A from the r largest triplets of D₁ W D₂"
    paper = "Guo et al. 2023, arXiv 2311.12023"
    trains = "A (r × in), B (out × r)"

    weights: str = field(
        default="fisher",
        metadata={"help": "weights of LQ-LoRA's errors: fisher or none", "choices": ("fisher", "none")},
    )

    @property
    def needs(self) -> Literal["gradients"] | None:  # type: ignore[override]
        return "gradients" if self.weights == "fisher" else None

    def statistic(self, seen: Tensor) -> Params:
        F = seen.square()
        return {"rows": F.mean(1), "columns": F.mean(0)}

    def diagonals(self, stats: Params | None, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return D₁ (out × 1) and D₂ (in), up to factors that change nothing; ones where there are no weights."""
        if self.weights == "none" or W.is_meta:
            return W.new_ones(W.shape[0], 1), W.new_ones(W.shape[1])
        seen = check_seen(self, stats)
        roots = [(seen[k] / seen[k].mean().clamp(min=1e-30)).sqrt().to(W.device) for k in ("rows", "columns")]
        D1, D2 = (D.clamp(min=1e-3 * D.mean().clamp(min=1e-30).item()) for D in roots)
        return D1[:, None], D2

    def weigh(self, E: Tensor, stats: Params | None) -> Tensor:
        D1, D2 = self.diagonals(stats, E)
        return D1 * E * D2

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        D1, D2 = self.diagonals(stats, W)
        U, S, Vh = linalg.top_svd(D1 * W * D2, self.r)
        root = (S / self.s).sqrt()
        return {"A": root[:, None] * Vh / D2, "B": U * root / D1}
