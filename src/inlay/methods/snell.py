"""SNELL is a sparse update whose entries come from a kernel between two low-rank factors.

    K[o, i] = c (‖B_1[o] − A_1[i]‖ − ‖B_2[o] − A_2[i]‖),   A (2 × in × r/2), B (2 × out × r/2) Kaiming-uniform
    ΔW[o, i] = K[o, i] where |K[o, i]| is above the `sparsity`-quantile of |K|, else 0

Shen et al. 2024, "Expanding Sparse Tuning for Low Memory Usage", arXiv 2411.01800: entries compete in every pass, no
index is stored, and the kernel (the published code's; c = 0.1) gives K full rank. ΔW(θ₀) is not 0, so it is offset: the
entries that change are those alive now or at the start. [ours]: survivors keep their value; the code multiplies them by
|K| once more. Each pass builds ΔW at r operations per entry and selects among all of them: for models of vision's size
(the paper's), slow for larger ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Method, Params


@dataclass(frozen=True, kw_only=True)
class SNELL(Method):
    name = "snell"
    title = "SNELL: sparse, from a kernel between low-rank factors"
    equation = "ΔW = the largest entries of κ(B, A)"
    paper = "Shen et al. 2024, arXiv 2411.01800"
    trains = "A (2 × in × r/2), B (2 × out × r/2)"
    size = "r"
    roles = {"A": "in", "B": "out"}
    draws = True  # type: ignore[assignment]

    r: int = field(default=8, metadata={"help": "parameters per row and column, even", "min": 2})
    sparsity: float = field(default=0.9, metadata={"help": "share of ΔW that is 0", "min": 0, "max": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % 2:
            raise ValueError(f"snell: r={self.r} is odd; each kernel takes half of it, so choose an even number")

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        p = {k: torch.empty(2, n, self.r // 2, device=W.device) for k, n in (("A", W.shape[1]), ("B", W.shape[0]))}
        for factor in p.values():
            torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        return p

    def delta(self, p: Params, W: Tensor) -> Tensor:
        A, B = (p[k].to(torch.promote_types(p[k].dtype, torch.float32)) for k in "AB")
        plus, minus = torch.cdist(B, A, compute_mode="donot_use_mm_for_euclid_dist")
        K = 0.1 * (plus - minus)
        size = K.detach().abs()
        dead = min(int(self.sparsity * K.numel()), K.numel() - 1)  # torch.quantile stops at 2²⁴ numbers
        return K if dead < 1 else torch.where(size > size.flatten().kthvalue(dead).values, K, 0)
