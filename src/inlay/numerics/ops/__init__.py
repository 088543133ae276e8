"""Provide autograd functions that keep as little for the backward pass as the mathematics allows, with references.

All of them compute y = x (W + ΔW)ᵀ + bias, differentiable in x and in what ΔW is built from. Where the layer under the
change is a plain frozen nn.Linear (`plain_linear`), its product and the small ones are joined: they are added into its
output, and into its dx, so that no second tensor of such a size is written and read again. Elsewhere W is None, y is
the change alone, and the caller adds the layer's own output. ΔW's tensors are kept by reference and what is built of
them is built twice; x is kept by reference, in no other dtype, or not at all.
"""

from inlay.numerics.ops.bat import bat, bat_reference
from inlay.numerics.ops.blocks import blocks, blocks_reference
from inlay.numerics.ops.dense import Rows, bat_col_delta, dense, dense_reference, watched
from inlay.numerics.ops.dropout import Dropout, keep, masks
from inlay.numerics.ops.low_rank import Core, Pair, low_rank, low_rank_reference, sum_pays, times
from inlay.numerics.ops.savers import SAVERS, WTACRS, Velora
from inlay.numerics.ops.shared import (
    Factors,
    Linear,
    add_blocks,
    all_finite,
    block_sum,
    fused,
    kernels_on,
    mean_of_all,
    of_the_first,
    plain_linear,
    second_derivatives,
    seed_of,
    tiled,
    tiles,
)
from inlay.numerics.ops.weight_noise import gaussian_rows, weight_noise

__all__ = [
    "SAVERS",
    "WTACRS",
    "Core",
    "Dropout",
    "Factors",
    "Linear",
    "Pair",
    "Rows",
    "Velora",
    "add_blocks",
    "all_finite",
    "bat",
    "bat_col_delta",
    "bat_reference",
    "block_sum",
    "blocks",
    "blocks_reference",
    "dense",
    "dense_reference",
    "fused",
    "gaussian_rows",
    "keep",
    "kernels_on",
    "low_rank",
    "low_rank_reference",
    "masks",
    "mean_of_all",
    "of_the_first",
    "plain_linear",
    "second_derivatives",
    "seed_of",
    "sum_pays",
    "tiled",
    "tiles",
    "times",
    "watched",
    "weight_noise",
]
