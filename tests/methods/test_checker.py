"""`inlay.testing.check_method`: every method of the package passes, and each kind of mistake is named."""

from dataclasses import dataclass

import pytest
import torch
from contract import CONTRACT
from sizes import sized

from inlay.method import Method
from inlay.methods import METHODS
from inlay.testing import check_method

FAST = ("lora", "dota", "bat", "smt", "eva", "psoft", "kasa")  # one of each kind
EACH = [pytest.param(m, id=m.name, marks=() if m.name in FAST else pytest.mark.slow) for m in METHODS]


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("method", EACH)
def test_every_method_passes(method):
    row = next(row for row in CONTRACT.values() if type(row.method) is method)
    check_method(method(**sized(method.name, 8)), row.delta)


@dataclass(frozen=True, kw_only=True)
class Right(Method):
    name = "right"
    title = equation = paper = trains = "these tests"
    zero_init = True
    reads_weight = True

    def start(self, W, stats=None):
        return {"d": torch.zeros(len(W), device=W.device)}

    def delta(self, p, W):
        return p["d"][:, None] * W.to(p["d"].dtype)


def noisy(self, W, stats=None):
    return {"d": torch.randn(len(W), device=W.device)}


def twice(self, p, p0, x, base, drop=None):
    return base(x) + 2 * self.s * x @ self.delta(p, base.weight).to(x.dtype).T


MISTAKES = [
    ({"reads_weight": False}, "ΔW depends on W, so say `reads_weight = True`"),
    ({"zero_init": False}, r"ΔW\(θ₀\) is 0, so say `zero_init = True`"),
    ({"start": lambda self, W, stats=None: {"d": torch.ones(len(W), device=W.device)}}, "so say `zero_init = False`"),
    ({"start": noisy}, "draws random numbers, and the class does not say so: `draws = True`"),
    ({"start": lambda self, W, stats=None: {"d": W[:, 0]}, "zero_init": False}, "shares its memory"),
    ({"start": lambda self, W, stats=None: {"d": torch.zeros(len(W))}}, "on a meta tensor gives a real d"),
    (
        {"start": lambda self, W, stats=None: {"d": torch.zeros(len(W), device=W.device, dtype=torch.float64)}},
        "d is torch.float64, and has to be float32",
    ),
    ({"frozen": frozenset({"d"})}, "start gives nothing that is trained"),
    ({"apply": twice}, "apply is not the equation"),
    ({"delta": lambda self, p, W: p["d"] * W.T.to(p["d"].dtype)}, r"ΔW is \(40, 24\), and W is \(24, 40\)"),
]


@pytest.mark.parametrize(("wrong", "says"), MISTAKES, ids=[says for _, says in MISTAKES])
def test_each_mistake_is_named(wrong, says):
    cls = dataclass(frozen=True, kw_only=True)(type("Wrong", (Right,), {"name": "wrong", **wrong}))
    with pytest.raises(AssertionError, match=says):
        check_method(cls())


def test_a_delta_that_is_not_the_reference_is_named():
    check_method(Right(), lambda p, W: torch.diag(p["d"]) @ W)
    with pytest.raises(AssertionError, match="delta is not the reference"):
        check_method(Right(), lambda p, W: torch.diag(p["d"]) @ W * 1.01)
