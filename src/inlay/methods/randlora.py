"""RandLoRA builds full-rank updates from fixed random bases, of which only the mixture is trained.

    ΔW = 2/√N Σ_j B_j diag(λ_j) A diag(γ_j),   N = ⌈short / r⌉,   λ (N × r) = 0,   γ (N × short) = 1 / short
    B_j (long × r) and A (r × short) random with variance 1; short and long are W's sides (transposed where out < in)

Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987. N r is at
least the smaller side: the rank is full once the γ_j differ. N (r + short) parameters are trained, fewer as r grows.
2/√N is the paper's scale; PEFT's default is 20, `scale` 10 √N here. The bases follow from `basis_seed` (the same on
every machine), are not stored, and are shared by all weights of a shape [ours: PEFT takes all from one of the largest
shape]. They are as large as one such W, and a pass costs up to two layers more; x and N r numbers per token are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.method import Base, Drop, Method, Params, check_rank, keep
from inlay.numerics import linalg, ops


@dataclass(frozen=True, kw_only=True)
class RandLoRA(Method):
    name = "randlora"
    title = "RandLoRA: a trained mixture of fixed random bases"
    equation = "ΔW = 2/√N Σ_j B_j diag(λ_j) A diag(γ_j)"
    paper = "Albert et al. 2025, arXiv 2502.00987"
    trains = "λ (N × r), γ (N × short), N = ⌈short / r⌉"
    size = "r"
    zero_init = True
    roles = {"lambda": "magnitude", "gamma": "magnitude"}

    r: int = field(default=32, metadata={"help": "rank of each basis", "min": 1})
    basis_seed: int = field(default=0, metadata={"help": "seed of the random bases", "min": 0, "max": 1 << 20})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        check_rank(self, self.r, W)
        short = min(W.shape)
        N = -(-short // self.r)
        gamma = torch.full((N, short), 1 / short, dtype=torch.float32, device=W.device)
        return {"lambda": torch.zeros(N, self.r, device=W.device), "gamma": gamma}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        D = self.bases(p, max(W.shape), p["lambda"].dtype) @ self.mixture(*p.values())
        return D if W.shape[0] >= W.shape[1] else D.T

    def bases(self, p: Params, long: int, dtype: torch.dtype) -> Tensor:
        """Return [B_1 ... B_N], (long × N r)."""
        return linalg.uniform_noise(long, p["lambda"].numel(), 2 * self.basis_seed, dtype, p["lambda"].device)

    def mixture(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """Return 2/√N diag(λ_j) A diag(γ_j) of all j below each other, (N r × short)."""
        A = linalg.uniform_noise(self.r, gamma.shape[1], 2 * self.basis_seed + 1, lam.dtype, lam.device)
        return (2 / math.sqrt(len(lam)) * lam[:, :, None] * A * gamma[:, None]).flatten(0, 1)

    def apply(self, p: Params, p0: Params | None, x: Tensor, base: Base, drop: Drop = keep) -> Tensor:
        tall = p["gamma"].shape[1] == x.shape[-1]

        def product(linear: ops.Linear | None, out: int) -> Tensor:
            B = self.bases(p, max(out, x.shape[-1]), x.dtype)

            def build(*values: Tensor) -> tuple[Tensor, Tensor]:
                A = self.s * self.mixture(*values)
                return (B, A) if tall else (A.T, B.T)

            return ops.low_rank(x, linear, build, tall, drop, *p.values())

        if (linear := ops.plain_linear(base, x)) is not None:
            return product(linear, len(linear[0]))
        y = base(x)
        return y + product(None, y.shape[-1])
