"""Keep compressed or sampled forms of x for the gradient of A."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Velora:
    """Keep of each token's parts only their lengths along one direction v (VeLoRA): x̂ = (x v) vᵀ, and dA = gᵀ x̂.

    A token has 32 (or fewer) parts, and v is the mean part of this batch. Miles, Reddy, Elezi, Deng 2024, "VeLoRA:
    Memory Efficient Training using Rank-1 Sub-Token Projections", arXiv 2405.17991. Biased: what of x is orthogonal to
    v is lost, in every step. [ours]: v is of each batch, where the paper keeps that of the first; so there is no state.
    """

    @staticmethod
    def keep(x: Tensor) -> tuple[Tensor, ...]:
        parts = x.unflatten(1, (math.gcd(x.shape[1], 32), -1))
        v = F.normalize(parts.mean((0, 1), dtype=torch.promote_types(x.dtype, torch.float32)), dim=0).to(x.dtype)
        return parts @ v, v

    @staticmethod
    def product(g: Tensor, c: Tensor, v: Tensor) -> Tensor:
        return ((g.T @ c)[:, :, None] * v).flatten(1)


class WTACRS:
    """Keep k = 0.3 T of the T tokens, the c longest as they are and the rest sampled (WTA-CRS), so that E[dA] = gᵀ x.

    k − c tokens are drawn from the rest by their lengths, and weighted. Liu et al. 2023, "Winner-Take-All Column Row
    Sampling for Memory Efficient Adaptation of Language Model", arXiv 2305.15265. c gives the least bound on the
    variance, (1 − P) / (k − c) with P the share of the longest. [ours]: shares by ‖x_i‖ alone; the paper also uses the
    norms of earlier gradients.
    """

    @staticmethod
    def keep(x: Tensor) -> tuple[Tensor, ...]:
        k = max(1, math.ceil(0.3 * len(x)))
        share, order = x.norm(dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).sort(descending=True)
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        rest = 1 - F.pad(share.cumsum(0)[: k - 1], (1, 0))  # the share that is left when c = 0, 1, ... k - 1 are taken
        c = int((rest / torch.arange(k, 0, -1, device=x.device)).argmin())
        left = share[c:].clamp_min(torch.finfo(share.dtype).tiny)
        drawn = torch.multinomial(left, k - c, replacement=True)
        weight = F.pad(left.sum() / ((k - c) * left[drawn]), (c, 0), value=1.0)
        chosen = order[torch.cat([torch.arange(c, device=x.device), drawn + c])]
        return x[chosen], chosen, weight.to(x.dtype)

    @staticmethod
    def product(g: Tensor, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        return (g[chosen] * weight[:, None]).T @ x


SAVERS = {"velora": Velora, "wta_crs": WTACRS}  # `keep` a form of x (T × in); estimate gᵀ x from it and g (T × r)
