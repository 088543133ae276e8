"""The Triton kernel against what runs in its place without it, on a GPU: the time of one call, as a CUDA graph.

python benchmarks/triton_kernels.py [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, report, spread, wait
from torch import Tensor

from inlay.methods.dota import DoTA
from inlay.numerics import tensor_trains, triton_kernels

BURST = 50


def alone(work: Callable[[], object], repeats: int = 9) -> float:
    """Microseconds of a call, the median."""
    work()
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        work()
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        for _ in range(BURST):
            graph.replay()
        wait()
        found.append((time.perf_counter() - begin) / BURST)
    return 1e6 * spread(found)[0]


def halves(out: int, inp: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Those of DoTA's difference train, bond 16."""
    cores = DoTA(bond=16).start(torch.empty(out, inp, device="meta"))
    train = [torch.randn(core.shape, device="cuda") for core in cores.values()]
    left, right = tensor_trains.halves(tensor_trains.difference(train, [0.5 * core for core in train]))
    return left.to(dtype), right.to(dtype)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    rows = []
    for out, inp in ((4096, 4096), (14336, 4096), (4096, 14336)):
        for dtype in (torch.float32, torch.bfloat16):
            left, right = halves(out, inp, dtype)
            plain = alone(lambda a=left, b=right, n=out: tensor_trains.rows(0, n, a, b))
            mine = alone(lambda a=left, b=right: triton_kernels.train_rows(a, b))
            rows.append(("rows of a train", f"{out} × {inp}, bond 2 × 16", dtype, plain, mine))
    body = [
        [name, size, str(dtype).removeprefix("torch."), f"{plain:.0f}", f"{mine:.0f}", f"{mine / plain:.2f}"]
        for name, size, dtype, plain, mine in rows
    ]
    about = f"Microseconds of one call as a CUDA graph. {machine()}. `python benchmarks/triton_kernels.py`"
    report(asked.out, "triton_kernels", about, ["kernel", "size", "dtype", "torch", "Triton", "ratio"], body)


if __name__ == "__main__":
    main()
