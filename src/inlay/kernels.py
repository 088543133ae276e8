"""Triton kernels for what plain torch does in several passes over memory. Imported only where they are switched on.

They are off unless INLAY_TRITON=1: each equals its reference in Triton's interpreter (tests/test_kernels.py), but none
has been measured on a GPU yet, and a kernel is worth its lines only where a measurement says so (docs/log.md).
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where a product of bf16 comes out wrong


@triton.jit
def _train_rows(
    left, right, out, o, i, i2, rank, X: tl.constexpr, Y: tl.constexpr, K: tl.constexpr, wide: tl.constexpr
):
    """One tile of a row of blocks: out[a o + b, x i2 + y] = Σ_k left[a, x, k] right[k, b, y]."""
    row = tl.program_id(0)
    a, b = row // o, row % o
    tiles = tl.cdiv(i2, Y)
    x = (tl.program_id(1) // tiles) * X + tl.arange(0, X)
    y = (tl.program_id(1) % tiles) * Y + tl.arange(0, Y)
    total = tl.zeros((X, Y), tl.float32)
    for start in range(0, rank, K):
        k = start + tl.arange(0, K)
        known = (x[:, None] < i) & (k[None, :] < rank)
        L = tl.load(left + (a * i + x[:, None]) * rank + k[None, :], mask=known, other=0.0)
        known = (k[:, None] < rank) & (y[None, :] < i2)
        R = tl.load(right + (k[:, None] * o + b) * i2 + y[None, :], mask=known, other=0.0)
        if wide:
            L, R = L.to(tl.float32), R.to(tl.float32)
        total += tl.dot(L, R, input_precision="ieee")
    here = row * i * i2 + x[:, None] * i2 + y[None, :]
    tl.store(out + here, total.to(out.dtype.element_ty), mask=(x[:, None] < i) & (y[None, :] < i2))


def train_rows(left: Tensor, right: Tensor) -> Tensor:
    """The matrix (a o × i i2) of two halves (a, i, d) and (d, o, i2): written once, in its order; sums are in fp32.

    torch multiplies in another order and sorts in a second pass.
    """
    a, i, rank = left.shape
    _, o, i2 = right.shape
    out = left.new_empty(a * o, i * i2)
    X, Y, K = (max(16, min(64, triton.next_power_of_2(n))) for n in (i, i2, rank))
    grid = (a * o, triton.cdiv(i, X) * triton.cdiv(i2, Y))
    _train_rows[grid](left.contiguous(), right.contiguous(), out, o, i, i2, rank, X, Y, K, INTERPRETED)  # type: ignore[arg-type]
    return out


@triton.jit
def _block_sum(x, out, n, inp, r, N: tl.constexpr, M: tl.constexpr, R: tl.constexpr):
    """A few rows: out[t, c] = Σ_j x[t, j r + c], M blocks at a time."""
    t = tl.program_id(0) * N + tl.arange(0, N)
    c = tl.arange(0, R)
    total = tl.zeros((N, R), tl.float32)
    for start in range(0, tl.cdiv(inp, r), M):
        column = (start + tl.arange(0, M))[None, :, None] * r + c[None, None, :]
        inside = (t[:, None, None] < n) & (column < inp) & (c[None, None, :] < r)
        total += tl.sum(tl.load(x + t[:, None, None] * inp + column, mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(out + t[:, None] * r + c[None, :], total, mask=(t[:, None] < n) & (c[None, :] < r))


def block_sum(x: Tensor, r: int) -> Tensor:
    """Σ_j x[..., jr : (j+1)r], (..., r), in fp32; a last block may be short. x is read once, in its own dtype."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(len(flat), r, dtype=torch.float32, device=x.device)
    R = triton.next_power_of_2(r)
    N = 4
    _block_sum[(triton.cdiv(len(flat), N),)](flat, out, len(flat), flat.shape[1], r, N, max(1, 512 // R), R)  # type: ignore[arg-type]
    return out.view(*x.shape[:-1], r)
