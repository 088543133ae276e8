"""Optimise by Online Subspace Descent: Adam on a projection of the gradient, which follows it by steps of its own.

    ΔW = −η P Adam(Pᵀ G),   ΔP = −α η Adam(∇_P L),   L(P) = ‖P Pᵀ g − g‖² + λ ‖Pᵀ P − I‖²,   g = G / ‖G‖

Liang, Liu, Chen, Liu 2024, "Memory-Efficient LLM Training with Online Subspace Descent", arXiv 2408.12857: GaLore
(arXiv 2403.03507) without its SVD every few hundred steps. G (short × long) is the gradient, transposed where the
weight is tall, P (short × rank). Weight decay is the same on W and P, as recommended there. P begins as the first
singular vectors of the first gradient that is not zero, and stays in that step, as in the published code. [ours]: λ =
0.1; every matrix whose short side is above `rank` is projected, embeddings too, and everything else gets plain AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inlay.numerics import linalg


class SubspaceDescent(Optimizer):
    """Optimise with Adam's two moments in the subspace (rank × long), and two moments for P (short × rank).

    Args:
        params: as of any optimiser.
        lr, betas, eps, weight_decay: AdamW's.
        rank: columns of P.
        alpha: the rate of P over that of W, α.
        penalty: λ, which keeps P orthonormal.

    Raises:
        ValueError: one of these is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        alpha: float = 5.0,
        penalty: float = 0.1,
    ) -> None:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank={rank!r} is not a whole number from 1 up")
        for name, value in (("lr", lr), ("alpha", alpha), ("penalty", penalty), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} is below 0")
        adamw = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**adamw, "rank": rank, "alpha": alpha, "penalty": penalty})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step of W along P, and one of P."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        lr, decay = group["lr"], group["weight_decay"]
        if p.ndim != 2 or min(p.shape) <= group["rank"]:
            direction = adam(state, "", G, group)
        else:
            G, back = (G.T, True) if p.shape[0] > p.shape[1] else (G, False)
            begins = "P" not in state
            if begins:
                if not G.any():  # no directions yet, as for an A whose B is zero
                    return
                state["P"] = linalg.top_svd(G, group["rank"])[0].to(p.dtype)
            P = state["P"]
            direction = P @ adam(state, "", P.T @ G, group)
            direction = direction.T if back else direction
            if not begins:  # else L is at its minimum already, and Adam would step along rounding errors
                slope = pca_slope(P, G / G.norm().clamp_min(torch.finfo(G.dtype).tiny), group["penalty"])
                P.add_(adam(state, "P_", slope, group) + decay * P, alpha=-group["alpha"] * lr)
        p.add_(direction + decay * p, alpha=-lr)


def adam(state: dict[str, Any], name: str, g: Tensor, group: dict[str, Any]) -> Tensor:
    """Return Adam's direction for a gradient, with its moments in `state` under names that begin with `name`.

    P's steps begin one after W's, whose "step" alone torch keeps in fp32 when a state is loaded: bf16 counts to 256.
    """
    if f"{name}mean" not in state:
        state |= {f"{name}mean": torch.zeros_like(g), f"{name}square": torch.zeros_like(g)}
    step = state.setdefault("step", torch.zeros(()))
    step += not name
    t, (first, second) = step.item() - bool(name), group["betas"]
    mean = state[f"{name}mean"].lerp_(g, 1 - first)
    square = state[f"{name}square"].mul_(second).addcmul_(g, g, value=1 - second)
    return mean / (1 - first**t) / ((square / (1 - second**t)).sqrt() + group["eps"])


def pca_slope(P: Tensor, g: Tensor, penalty: float) -> Tensor:
    """Return ∇_P of ‖P Pᵀ g − g‖² + λ ‖Pᵀ P − I‖², (short × rank), by products no larger than g's."""
    A = g.T @ P
    gA, rest = g @ A, P.T @ P - torch.eye(P.shape[1], dtype=P.dtype, device=P.device)
    return 2 * (P @ (A.T @ A) - gA + gA @ rest) + 4 * penalty * P @ rest
