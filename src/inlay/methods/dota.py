"""DoTA trains a truncated tensor train (a matrix product operator) of the weight.

    ΔW = MPO(T1..TN),   MPO[o, i] = T1[o_1, i_1] T2[o_2, i_2] ... TN[o_N, i_N],   T_k (d_{k-1} × o_k × i_k × d_k)
    θ₀ = the MPO of W with every bond truncated to d_k = min(R, full bond)

Hu et al. 2024, "DoTA: Weight-Decomposed Tensor Adaptation for Large Language Models", arXiv 2412.20891. No code was
published. The paper's residual W − MPO(W) is the host's offset form; it has no scale. [ours], where it is silent: the
factors of each dimension (`factorise`), TT-SVD from left to right, and the gauge: the root of each bond's singular
values on both sides and cores of equal norm, or one learning rate would not fit all. The random start, the paper's
ablation, is Gaussian with the norm of the truncated MPO in expectation.

ΔW is formed once per pass and multiplied once: core by core would cost more than the layer itself, and keep activations
R times as wide. It has full rank, so its export to LoRA has an error; merging has none.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from inlay.method import Base, Method, Params, like
from inlay.numerics import ops, tensor_trains


@dataclass(frozen=True, kw_only=True)
class DoTA(Method):
    name = "dota"
    title = "DoTA: a truncated tensor train of the weight"
    equation = "ΔW = MPO(T1..TN) from the truncated tensor train of W"
    paper = "Hu et al. 2024, arXiv 2412.20891"
    trains = "T1..TN (d × o × i × d)"
    size = "bond"

    bond: int = field(default=16, metadata={"help": "largest bond dimension R", "min": 1})
    cores: int = field(default=5, metadata={"help": "number N of cores", "min": 1, "max": 64})
    shapes: Any = field(
        default=None, hash=False, metadata={"help": "factors: [[o1..oN], [i1..iN]] or {dimension: factors}"}
    )
    init: Literal["mpo", "random"] = field(
        default="mpo", metadata={"help": "start of the cores", "choices": ("mpo", "random"), "draws": ("random",)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shapes", tensor_trains.read_factors(self.name, self.shapes, self.cores))

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        shapes = tensor_trains.shapes(*tensor_trains.choose_factors(self.name, self.shapes, self.cores, W), self.bond)
        if W.is_meta:
            return {f"T{k}": W.new_empty(shape, dtype=torch.float32) for k, shape in enumerate(shapes, 1)}
        count = sum(math.prod(shape) for shape in shapes)
        if count > W.numel() / 10:
            text = f"dota: the train of a {W.shape[0]} × {W.shape[1]} weight has {count} entries, over a tenth of it"
            warnings.warn(f"{text}; a lower bond or other cores and shapes make it smaller", stacklevel=2)
        train = tensor_trains.decompose(W, shapes)
        train = tensor_trains.balance(train) if self.init == "mpo" else tensor_trains.gaussian(train)
        return {f"T{k}": core for k, core in enumerate(train, 1)}

    def delta(self, p: Params, W: Tensor) -> Tensor:
        return tensor_trains.contract(list(p.values()))

    def offset(self, p: Params, p0: Params | None, W: Tensor) -> Tensor:
        start = None if p0 is None else list(like(p0, p).values())
        return tensor_trains.contract(tensor_trains.difference(list(p.values()), start))

    def rows(self, p: Params, p0: Params | None, base: Base) -> ops.Rows:
        start = None if p0 is None else list(like(p0, p).values())
        heights = [core.shape[1] for core in p.values()]
        return ops.Rows(
            lambda *cores: tensor_trains.halves(tensor_trains.difference(cores, start, self.s)),
            tensor_trains.rows,
            out=math.prod(heights),
            step=math.prod(heights[tensor_trains.middle(list(p.values())) :]),
        )
