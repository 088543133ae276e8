"""How much of a small update reaches the output of a layer in bf16?

    python benchmarks/dota_bf16.py [--size 2048] [--tokens 256] [--out benchmarks/results]

A bf16 weight and input, fp32 cores of DoTA (5 cores, bond 16) that have moved by a relative step; the reference is the
change x ΔWᵀ in fp64. "DoTA" is what the layer adds to its base; "sum" is the change of a layer that adds ΔW to its
weight in bf16 first, judged in fp64 so that only the rounding of that sum counts. "arrives" is the part of the update
that is in the change: its regression on the reference. The last four columns (y) are the same after a layer's output
has been rounded to bf16 as well. That takes from both, as it does from any adapter on a bf16 layer: a change below half
a rounding step of y is lost where it is added.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.methods.dota import DoTA


class Base:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def judge(change: Tensor, exact: Tensor) -> tuple[float, float]:
    """The relative error of a change, and how much of the exact one it contains."""
    change = change.double()
    error = (change - exact).norm() / exact.norm()
    return error.item(), ((change * exact).sum() / exact.square().sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.manual_seed(0)
    n = options.size
    W, x = (torch.randn(n, n) / n**0.5).bfloat16(), torch.randn(options.tokens, n).bfloat16()
    base, method = Base(W), DoTA()
    p0 = method.start(W.float())
    lines = [
        "| step of the cores | ‖ΔW‖ / ‖W‖ | weights that do not move | DoTA: error | arrives | sum: error | arrives "
        "| y, DoTA: error | arrives | y, sum: error | arrives |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in (1e-1, 1e-2, 1e-3):
        p = {k: v * (1 + step * torch.randn_like(v)) for k, v in p0.items()}
        wide = [{k: v.double() for k, v in q.items()} for q in (p, p0)]
        D = method.delta(wide[0], W) - method.delta(wide[1], W)
        exact = F.linear(x.double(), D)
        summed = W + D.bfloat16()
        before = base(x).double()
        cells = [f"{D.norm() / W.double().norm():.1e}", f"{(summed == W).double().mean():.1%}"]
        for change in (
            method.apply(p, p0, x, lambda x: torch.zeros_like(x)),
            F.linear(x.double(), summed.double() - W.double()),
        ):
            error, arrives = judge(change, exact)
            cells += [f"{error:.4f}", f"{arrives:.2f}"]
        for y in (method.apply(p, p0, x, base), F.linear(x, summed)):
            error, arrives = judge(y.double() - before, exact)
            cells += [f"{error:.2f}", f"{arrives:.2f}"]
        lines.append(f"| {step:g} | {' | '.join(cells)} |")
    text = (
        f"A {n} × {n} weight in bf16, {options.tokens} tokens, 5 cores of bond 16 in fp32; PyTorch "
        f"{torch.__version__}, {platform.machine()}. `python benchmarks/dota_bf16.py`\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "dota_bf16.md").write_text(text)


if __name__ == "__main__":
    main()
