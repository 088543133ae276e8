"""Drop out with a mask that is drawn again from its seed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.numerics.ops import shared
from inlay.numerics.ops.shared import scratch


@dataclass(frozen=True)
class Dropout:
    """Apply this step's dropout with probability p; `saver` is how `low_rank` keeps x where A is trained (`SAVERS`)."""

    p: float = 0.0
    saver: str = "none"

    def __call__(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p) if self.p else x


keep = Dropout()


def masks(shape: Sequence[int], like: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield a seed's scaled dropout mask for a (rows × width) tensor in strips of rows; p is rounded to 2⁻¹⁶."""
    generator = None if like.is_meta else torch.Generator(like.device).manual_seed(seed)
    size = scratch(like) if like.is_cuda else shared.SCRATCH >> 2  # less memory on a CPU, in about the same time
    height, dropped = max(1, size // shape[1]), min(round(p * 65536), 65535)
    for i in range(0, shape[0], height):
        rows = slice(i, min(i + height, shape[0]))
        yield rows, draw_mask(like.new_empty(rows.stop - i, shape[1]), dropped, generator)


def draw_mask(out: Tensor, dropped: int, generator: torch.Generator | None) -> Tensor:
    """Fill `out` with a mask whose entries are 0 with a probability of dropped / 65536.

    One random number of 64 bits serves four entries, as torch's own Bernoulli takes six times as long on many CPUs.
    """
    drawn = out.new_empty(-(-out.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = drawn.view(torch.int16)[: out.numel()].view(out.shape)
    return torch.ge(bits, dropped - 32768, out=out).mul_(65536 / (65536 - dropped))
