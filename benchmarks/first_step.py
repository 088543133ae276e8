"""How far a first step at rate 1 moves the update, per symbol: which rate a method needs, and whether one fits all.

    python benchmarks/first_step.py [--layer 15] [--out benchmarks/results/first_step.md]

AdamW's first step changes every entry by the learning rate, whatever the size of its gradient. So each trained symbol
moves alone, every entry by rate × the sign of its gradient (for a Gaussian gradient in W, seeded), and
‖ΔW(θ + step) − ΔW(θ)‖ / (rate ‖W‖) is taken in float64 at a rate of 1e-6: medians over the linear weights of one layer
of the built-in model. 0: the symbol's gradient is zero at the start, so that it moves only after another has; such a
symbol is not compared. A method whose symbols differ by more than ten times is named: one rate can hardly train both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from inlay.method import Method, Params
from inlay.methods import METHODS
from inlay.methods.lamda import LaMDA
from inlay.models.base import BaseModel

RATE = 1e-6
APART = 10.0
SIZES = {"dota": {"bond": 16}, "lamda": {"r": 32}, "bat": {"r": 16}, "bat_col": {"r": 16}, "smt": {"r": 32}}


def moved(method: Method, p: Params, W: Tensor, direction: Tensor) -> dict[str, float]:
    """Return how far ΔW moves per unit of rate, relative to W, by symbol; blocks of one symbol move together."""
    W, theta = W.double(), {k: v.double() if v.is_floating_point() else v for k, v in p.items()}
    trained = [k for k, v in theta.items() if k not in method.frozen and v.is_floating_point()]
    for k in trained:
        theta[k].requires_grad_()
    before = method.delta(theta, W)
    slopes = torch.autograd.grad((direction * before).sum(), [theta[k] for k in trained], allow_unused=True)
    steps = {k: slope.sign() for k, slope in zip(trained, slopes, strict=True) if slope is not None}
    found = {}
    with torch.no_grad():
        for symbol in dict.fromkeys(k.partition("_")[0] for k in trained):
            after = {k: v - RATE * steps[k] if k in steps and k.startswith(symbol) else v for k, v in theta.items()}
            change = method.s * (method.delta(after, W) - before)
            found[symbol] = (change.norm() / (RATE * W.norm())).item()
    return found


def of_method(method: Method, weights: Sequence[Tensor]) -> dict[str, float]:
    """Return the medians over the weights that take the method, by symbol."""
    each: dict[str, list[float]] = {}
    for W in weights:
        torch.manual_seed(0)
        shape = W.shape if method.needs == "gradients" else (512, W.shape[1])
        stats = method.observe({}, torch.randn(shape)) if method.needs else None
        try:
            start = method.start(W, stats)
        except ValueError:  # a size that does not divide this weight
            continue
        for symbol, far in moved(method, start, W, torch.randn(W.shape, dtype=torch.float64)).items():
            each.setdefault(symbol, []).append(far)
    return {symbol: statistics.median(values) for symbol, values in each.items()}


def apart(found: dict[str, float]) -> float:
    """Return how many times further the symbol that moves most moves than the one that moves least."""
    moving = [far for far in found.values() if far > 0]
    return max(moving) / min(moving) if moving else 1.0


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the figures as Markdown, and the methods whose symbols are far apart in a sentence."""
    lines = ["| method | per unit of rate, relative to ‖W‖ | apart |", "|---|---|---|"]
    for name, found in rows.items():
        shown = ", ".join(f"{symbol} {far:.2g}" for symbol, far in found.items())
        lines.append(f"| {name} | {shown} | {apart(found):.1f} |")
    far = [f"{name} ({apart(found):.0f})" for name, found in rows.items() if apart(found) > APART]
    return "\n".join([*lines, "", f"More than ten times apart: {', '.join(far) or 'none'}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    mine, model = f".layers.{asked.layer}.", BaseModel("builtin").load(torch.float32)
    weights = [v.detach() for k, v in model.named_parameters() if mine in k and k.endswith("proj.weight")]
    methods = {cls.name: cls(**SIZES.get(cls.name, {})) for cls in METHODS}
    methods |= {f"lamda {init}": LaMDA(r=32, init=init) for init in ("svd_core", "svd_zero", "kaiming")}
    text = table({name: of_method(method, weights) for name, method in methods.items()})
    print(text)
    if asked.out:
        head = f"`python benchmarks/first_step.py --layer {asked.layer}`"
        asked.out.write_text(f"# How far a first step at rate 1 moves the update\n\n{head}\n\n{text}\n")


if __name__ == "__main__":
    main()
