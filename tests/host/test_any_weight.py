"""Weights that no initialisation gives: every method starts exactly at the base (or departs), learns, stays finite."""

import dataclasses

import pytest
import torch
from contract import Net, adapt, every_method, every_row, largest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning", "ignore:.*(rank|zero).*:UserWarning")
KINDS = {
    "zero": lambda m, n: torch.zeros(m, n),
    "constant": lambda m, n: torch.ones(m, n),
    "of rank one": lambda m, n: torch.linspace(-1, 1, m)[:, None] * torch.linspace(1, 2, n),
    "of repeated singular values": torch.eye,
    "of one entry": lambda m, n: torch.eye(m, n) * (torch.arange(n) == 3),
    "of pruned rows": lambda m, n: normalize(torch.randn(m, n)) * (torch.arange(m) % 3 > 0)[:, None],
    "of any numbers": torch.randn,
}


@every_row
@settings(max_examples=6, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), exponent=st.integers(-36, 30), seed=st.integers(0, 9))
def test_any_weight(row, kind, exponent, seed):
    torch.manual_seed(seed)
    net, x = Net(row.shape), torch.randn(5, row.shape[1])
    with torch.no_grad():
        net.layer.weight.copy_(KINDS[kind](*row.shape) * 10.0**exponent)
    before = net(x)
    model = adapt(net, row.method)
    after = model(x)
    assert row.method.departs or largest(after - before) == 0
    after.square().mean().backward()
    own = [p for p in model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()) for p in own)
    torch.optim.AdamW(own, lr=1e-3).step()
    assert model(x).isfinite().all()


@every_method
@pytest.mark.parametrize("shape", [(1, 24), (24, 1), (1, 1)])
def test_a_layer_of_one_row_or_column(row, shape):
    """It is adapted, or refused by the name of the hyperparameter that does not fit."""
    fields = {f.name for f in dataclasses.fields(row.method)}
    net, x = Net(shape), torch.randn(5, shape[1])
    before, refusal = net(x), None
    try:
        model = adapt(net, dataclasses.replace(row.method, **({"r": 1} if "r" in fields else {})))
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert any(f"{name}=" in refusal or f"{name} " in refusal for name in fields)
        return
    ulp = 2e-7 if shape[1] == 1 else 0  # a product of one term is fused with the bias or not
    assert row.method.departs or largest(model(x) - before) <= ulp
    model(x).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
