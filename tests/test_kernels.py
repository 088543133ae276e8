"""The Triton kernels in Triton's interpreter, against torch in fp64. A GPU runs the same lines compiled."""

import os
import subprocess
import sys

import pytest
import torch

from inlay import ops

pytest.importorskip("triton", reason="Triton comes with torch on a GPU machine, and with the extra 'dev'")

CHECK = """
import os
import torch
from inlay.methods import Bone, DoTA
from inlay import kernels, ops, trains
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for a, i, d, o, i2 in ((2, 3, 5, 4, 7), (3, 20, 33, 2, 70), (1, 1, 1, 1, 1)):
        left, right = (torch.randn(s, dtype=dtype, device=device) for s in ((a, i, d), (d, o, i2)))
        found, known = kernels.train_rows(left, right), trains.rows(0, a * o, left.double(), right.double())
        assert found.dtype == dtype and found.shape == known.shape
        assert (found.double() - known).norm() <= tolerance * known.norm(), (dtype, a, i, d, o, i2)
    for shape, r in (((2, 5, 12), 4), ((3, 43), 5), ((1, 600), 16), ((9, 3), 8)):
        x = torch.randn(shape, dtype=dtype, device=device)
        found, known = kernels.block_sum(x, r), ops.block_sum(x.double(), r)
        assert found.dtype == torch.float32 and found.shape == known.shape
        assert (found.double() - known).norm() <= 1e-6 * known.norm(), (dtype, shape, r)

# From here on through the methods, which must come to them and to the same numbers.
called = []
for name in ("block_sum", "train_rows"):
    real = getattr(kernels, name)
    setattr(kernels, name, lambda *a, real=real, name=name: called.append(name) or real(*a))


class Base:
    def __init__(self, W):
        self.weight, self.linear = W, (W, None)

    def __call__(self, x):
        return x @ self.weight.T


for method in (Bone(r=4), DoTA(bond=2, cores=2)):
    W = 0.1 * torch.randn(24, 40, device=device)
    p0 = method.start(W)
    p = {k: (v + 0.1 * torch.randn_like(v)).requires_grad_() for k, v in p0.items()}
    start = None if method.zero_init else p0
    both = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
        for on in ("1", "0"):
            os.environ["INLAY_TRITON"] = on
            y = method.apply(p, start, x, Base(W.to(dtype)))
            both.append([y, *torch.autograd.grad(y.square().sum(), (x, *p.values()))])
        for ours, theirs in zip(*both, strict=True):
            assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()
        both.clear()
assert set(called) == {"block_sum", "train_rows"}, called
print("ok")
"""


def test_kernels_are_their_references():
    """In a process of its own: Triton reads the switch of its interpreter when it is imported."""
    switches = {"INLAY_TRITON": "1"} if torch.cuda.is_available() else {"INLAY_TRITON": "1", "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", CHECK], env={**os.environ, **switches}, capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr


def test_kernels_are_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("INLAY_TRITON", raising=False)
    assert ops.fused(torch.ones(2)) is None
