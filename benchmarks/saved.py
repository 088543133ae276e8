"""What one adapted layer keeps for its backward pass.

    python benchmarks/saved.py [--size 4096] [--tokens 2048] [--out benchmarks/results]

A hook on saved tensors counts storages, each once. Parameters, buffers and their views are there anyway and not
counted; the input x has its own column, as the layer before it may keep it too. Values are random, so nothing is
decomposed. LaMDA appears while B lives and after its schedule has frozen it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import report
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from inlay.method import Method
from inlay.methods import METHODS, find

RANK = 32
SIZES = {"dota": {"bond": 16}}  # all others: r = RANK


class Base:
    def __init__(self, weight: Tensor) -> None:
        self.weight, self.linear = weight, (weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def saved(forward: Callable[[Tensor], Tensor], x: Tensor, own: list[Tensor]) -> tuple[int, int]:
    """Bytes kept of x, and beyond x and the tensors in `own`."""
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(x)
    mine = kept.pop(x.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return 0 if mine is None else x.nbytes, sum(t.untyped_storage().nbytes() for t in kept.values())


def theta(method: Method, W: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Random θ and θ₀ of the right shapes."""

    def drawn(v: Tensor, size: float) -> Tensor:
        return size * torch.randn(v.shape) if v.is_floating_point() else torch.zeros(v.shape, dtype=v.dtype)

    p0 = {k: drawn(v, 0.01) for k, v in method.start(W.to("meta")).items()}
    p = {k: (v + drawn(v, 0.001)).requires_grad_(k not in method.frozen) for k, v in p0.items()}
    start = {k: v for k, v in p0.items() if k not in method.frozen}
    return p, None if method.stores_no_start else {**start, **{k: p[k] for k in method.frozen}}


def rows(W: Tensor, x: Tensor) -> Iterator[tuple[str, tuple[int, int]]]:
    base = Base(W)
    yield "frozen linear", saved(base, x, [W])
    net = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device))
    peft = get_peft_model(net, LoraConfig(r=RANK, target_modules=["0"]))
    yield f"LoRA in PEFT, r = {RANK}", saved(peft, x, [*peft.parameters(), *peft.buffers()])
    for cls in METHODS:
        size = SIZES.get(cls.name, {"r": RANK})
        method = find(cls.name)(**size)
        p, p0 = theta(method, W)
        own = [W, *p.values(), *(p0 or {}).values()]
        label = f"{cls.name}, {', '.join(f'{k} = {v}' for k, v in size.items())}"
        yield label, saved(lambda x, m=method, p=p, p0=p0: m.apply(p, p0, x, base), x, own)
        frozen = method.schedule(p, 1.0)
        if frozen:
            q = {k: v.detach().requires_grad_(v.requires_grad and k not in frozen) for k, v in p.items()}
            own = [W, *q.values(), *(p0 or {}).values()]
            yield f"{label}, B frozen", saved(lambda x, m=method, p=q, p0=p0: m.apply(p, p0, x, base), x, own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.manual_seed(0)
    W = torch.randn(options.size, options.size) / options.size**0.5
    x = torch.randn(options.tokens, options.size, requires_grad=True)
    body = [[name, f"{kept / 2**20:.2f}", f"{more / 2**20:.2f}"] for name, (kept, more) in rows(W, x)]
    about = (
        f"Kept for the backward pass by one {options.size} × {options.size} layer, {options.tokens:,} tokens, fp32, "
        "parameters and buffers not counted. `python benchmarks/saved.py`"
    )
    report(options.out, "saved", about, ["layer", "x, MiB", "beyond x, MiB"], body)


if __name__ == "__main__":
    main()
