"""Build the rows of a tensor train by a Triton kernel, in one pass where torch takes several (docs/log.md).

Imported where CUDA tensors reach it; INLAY_TRITON=0 leaves the work to torch. tests/numerics/test_kernels.py runs it in
Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where bf16 products are wrong


@triton.jit
def _train_rows(
    left, right, out, o, i, i2, rank, X: tl.constexpr, Y: tl.constexpr, K: tl.constexpr, wide: tl.constexpr
):
    """Compute one tile of a row of blocks: out[a o + b, x i2 + y] = Σ_k left[a, x, k] right[k, b, y]."""
    row = tl.program_id(0)
    a, b = row // o, row % o
    tiles = tl.cdiv(i2, Y)
    x = (tl.program_id(1) // tiles) * X + tl.arange(0, X)
    y = (tl.program_id(1) % tiles) * Y + tl.arange(0, Y)
    total = tl.zeros((X, Y), tl.float32)
    for start in range(0, rank, K):
        k = start + tl.arange(0, K)
        inside = (x[:, None] < i) & (k[None, :] < rank)
        L = tl.load(left + (a * i + x[:, None]) * rank + k[None, :], mask=inside, other=0.0)
        inside = (k[:, None] < rank) & (y[None, :] < i2)
        R = tl.load(right + (k[:, None] * o + b) * i2 + y[None, :], mask=inside, other=0.0)
        if wide:
            L, R = L.to(tl.float32), R.to(tl.float32)
        total += tl.dot(L, R, input_precision="ieee")
    here = row * i * i2 + x[:, None] * i2 + y[None, :]
    tl.store(out + here, total.to(out.dtype.element_ty), mask=(x[:, None] < i) & (y[None, :] < i2))


def train_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix (a o × i i2) of two halves (a, i, d) and (d, o, i2), written once, in order, summed in fp32.

    torch multiplies in another order and sorts in a second pass.
    """
    a, i, rank = left.shape
    _, o, i2 = right.shape
    out = left.new_empty(a * o, i * i2)
    X, Y, K = (max(16, min(64, triton.next_power_of_2(n))) for n in (i, i2, rank))
    grid = (a * o, triton.cdiv(i, X) * triton.cdiv(i2, Y))
    _train_rows[grid](left.contiguous(), right.contiguous(), out, o, i, i2, rank, X, Y, K, INTERPRETED)  # type: ignore[arg-type]
    return out
