"""The Triton kernels in Triton's interpreter, against torch in fp64. A GPU runs the same lines compiled."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay.numerics import ops

BESIDE = Path(__file__).parents[2] / ".triton"  # where `make test` puts it; with torch for a GPU it comes by itself

CHECK = """
import os
import torch
from inlay.methods import DoTA
from inlay.numerics import ops, tensor_trains, triton_kernels
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for a, i, d, o, i2 in ((2, 3, 5, 4, 7), (3, 20, 33, 2, 70), (1, 1, 1, 1, 1)):
        left, right = (torch.randn(s, dtype=dtype, device=device) for s in ((a, i, d), (d, o, i2)))
        found = triton_kernels.train_rows(left, right)
        known = tensor_trains.rows(0, a * o, left.double(), right.double())
        assert found.dtype == dtype and found.shape == known.shape
        assert (found.double() - known).norm() <= tolerance * known.norm(), (dtype, a, i, d, o, i2)

# From here on through the methods, which must come to them and to the same numbers.
called = []
real = triton_kernels.train_rows
triton_kernels.train_rows = lambda *a: called.append(a) or real(*a)


class Base:
    def __init__(self, W):
        self.weight, self.linear = W, (W, None)

    def __call__(self, x):
        return x @ self.weight.T


for method in (DoTA(bond=2, cores=2), DoTA(bond=3, cores=3, init="random")):
    W = 0.1 * torch.randn(24, 40, device=device)
    p0 = method.start(W)
    p = {k: (v + 0.1 * torch.randn_like(v)).requires_grad_() for k, v in p0.items()}
    start = None if method.stores_no_start else p0
    both = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
        for on in ("1", "0"):
            os.environ["INLAY_TRITON"] = on
            before = len(called)
            y = method.apply(p, start, x, Base(W.to(dtype)))
            assert (len(called) > before) is (on == "1")
            both.append([y, *torch.autograd.grad(y.square().sum(), (x, *p.values()))])
        for ours, theirs in zip(*both, strict=True):
            assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()
        both.clear()
print("ok")
"""


@pytest.mark.skipif(
    not BESIDE.exists() and importlib.util.find_spec("triton") is None, reason="needs Triton: make .triton"
)
def test_kernels_are_their_references():
    """In a process of its own: Triton reads the switch of its interpreter when it is imported."""
    switches = {"INLAY_TRITON": "1"} if torch.cuda.is_available() else {"INLAY_TRITON": "1", "TRITON_INTERPRET": "1"}
    path = os.pathsep.join([str(BESIDE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **switches, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr


def test_torch_does_it_where_triton_cannot(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as if it were there
    monkeypatch.setitem(sys.modules, "inlay.numerics.triton_kernels", None)
    monkeypatch.delattr("inlay.numerics.triton_kernels", raising=False)
    ops.kernels_on.cache_clear()
    with pytest.warns(UserWarning, match="Triton cannot be used"):
        assert ops.fused(torch.ones(2)) is None
    ops.kernels_on.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert ops.fused(torch.ones(2)) is None  # on a CPU there is nothing to say
