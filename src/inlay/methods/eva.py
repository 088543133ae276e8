"""EVA is LoRA that starts from the directions in which the layer's inputs vary most.

    ΔW = B A,   A₀ (r × in) = the first r right singular vectors of the centred inputs X (tokens × in),   B₀ = 0

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv
2410.07170. X comes in batches, and its vectors are kept up to date by incremental SVD (Ross et al. 2008). A layer has
seen enough when each of its r vectors has a cosine of at least τ with itself one batch earlier; layers that do not
reach this within the batches are reported. From batch to batch 2 r vectors are kept, as in the published code (ρ r, ρ =
2), or the last of the r would be those that truncation spoils. The global ranks are `allocate: variance`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import LowRank, Params, check_rank, check_seen
from inlay.numerics import linalg

KEPT = 2  # times r


@dataclass(frozen=True, kw_only=True)
class EVA(LowRank):
    name = "eva"
    title = "EVA: where the layer's inputs vary most"
    equation = "ΔW = B A, A₀ the top right singular vectors of the inputs"
    paper = "Paischer et al. 2024, arXiv 2410.07170"
    trains = "A (r × in), B (out × r)"
    zero_init = True
    needs = "activations"

    tau: float = field(default=0.99, metadata={"help": "cosine τ from which EVA's vectors count as settled", "max": 1})

    def observe(self, stats: Params, seen: Tensor) -> Params:
        """Return V (k × in) and S (k,) of all inputs so far, k <= 2 r, their mean, scatter and number; `cosine`."""
        n, mean = len(seen), seen.mean(0)
        X = seen - mean
        total, count = X.square().sum(), torch.tensor(float(n))
        rows = X
        if stats:
            count = stats["tokens"] + n
            shift = (stats["mean"] - mean) * (stats["tokens"] * n / count).sqrt().item()
            rows = torch.cat([stats["S"][:, None] * stats["V"], X, shift[None]])
            total = stats["total"] + total + shift.square().sum()
            mean = stats["mean"] + (mean - stats["mean"]) * (n / count.item())
        _, S, V = linalg.top_svd(rows, min(KEPT * self.r, *rows.shape))
        k = len(stats.get("V", ()))
        cosine = torch.cosine_similarity(V[:k], stats["V"]).abs() if k else V.new_zeros(0)
        return {"V": V, "S": S, "mean": mean, "total": total, "tokens": count, "cosine": cosine}

    def settled(self, stats: Params) -> bool:
        cosine = stats["cosine"][: self.r]
        return len(cosine) == self.r and bool((cosine >= self.tau).all())

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        out, inp = W.shape
        V = torch.empty(self.r, inp, device=W.device) if W.is_meta else check_seen(self, stats)["V"]
        if len(V) < self.r:
            raise ValueError(f"eva: r={self.r} vectors cannot be computed from {len(V)} inputs; give more batches")
        return {"A": V[: self.r].to(W.device, copy=True), "B": torch.zeros(out, self.r, device=W.device)}
