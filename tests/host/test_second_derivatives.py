"""Gradients of gradients through adapted layers, of every method: a penalty on gradients, MAML, Hessians."""

from dataclasses import fields

import pytest
import torch
from peft import get_peft_model
from torch import nn

import inlay
from inlay import methods
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear

NAMES = [method.name for method in methods.METHODS]
STEP = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")


class Net(nn.Module):
    """Two adapted layers, the second of which reads what the first one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def adapted(name: str, **more) -> tuple[nn.Module, list[nn.Parameter]]:
    torch.manual_seed(0)
    size = next((f.name for f in fields(methods.find(name)) if f.name in ("r", "bond")), None)
    config = InlayConfig(method=name, args={size: 2} if size else {}, target_modules=["a", "b"], **more)
    model = get_peft_model(Net(), config)
    if methods.find(name).needs or config.build().needs:
        inlay.calibrate(model, [{"x": torch.randn(32, 8)}] * 2, loss=lambda model, batch: model(**batch).pow(2).mean())
    model = model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))
    return model, parameters


def penalty(model, x):
    """A loss and the squared norm of its gradient in the input, as WGAN-GP's."""
    x = x.clone().requires_grad_()
    loss = model(x).pow(2).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.pow(2).sum()


def maml(model, x):
    """The loss after one step of gradient descent."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(model(x).pow(2).sum(), list(trained.values()), create_graph=True)
    moved = {name: p - 0.01 * slope for (name, p), slope in zip(trained.items(), slopes, strict=True)}
    return torch.func.functional_call(model, moved, (x,)).pow(2).sum()


def curvature(model, x):
    """The squared norm of the gradient in θ."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(slope.pow(2).sum() for slope in torch.autograd.grad(model(x).sin().sum(), trained, create_graph=True))


def along(value, parameters, direction):
    """The derivative of `value()` along a direction, by central differences."""
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * STEP)
        ends.append(value().item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * STEP)
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.mark.parametrize("loss", [penalty, maml, curvature])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right(name, loss):
    model, parameters = adapted(name)
    x = torch.randn(3, 8, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in parameters]
    if name == "snell" and loss is not penalty:  # torch has no second derivative of its distances
        with pytest.raises(NotImplementedError):
            torch.autograd.grad(loss(model, x), parameters)
        return
    expected = along(lambda: loss(model, x), parameters, direction)
    for slopes in (torch.autograd.grad(loss(model, x), parameters), backward(loss(model, x), parameters)):
        found = sum((slope * d).sum() for slope, d in zip(slopes, direction, strict=True)).item()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def backward(value, parameters):
    for p in parameters:
        p.grad = None
    value.backward(inputs=parameters)
    return [p.grad for p in parameters]


@pytest.mark.parametrize("name", ["pissa", "bone", "lamda", "dota", "randlora"])
def test_with_dropout_the_mask_of_the_forward_pass_serves(name):
    model, parameters = adapted(name, dropout=0.5)
    model.train()
    x = torch.randn(3, 8, dtype=torch.float64)

    def value():
        torch.manual_seed(7)
        return penalty(model, x)

    direction = [torch.randn_like(p) for p in parameters]
    found = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value(), parameters), direction, strict=True))
    assert found.item() == pytest.approx(along(value, parameters, direction), rel=1e-4)


def test_a_saver_has_none_and_raises():
    model, _ = adapted("lora", saver="velora")
    model.train()
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="saver: what it keeps gives no second derivatives"):
        curvature(model, x)
    with inlay.second_derivatives():
        assert curvature(model, x).requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in torch's own
@pytest.mark.parametrize("name", ["pissa", "bone", "dota", "bat", "lamda", "smt"])
def test_in_their_context_forward_mode_and_func_work_too(name):
    model, _ = adapted(name)
    x, v = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = (model(x + STEP * v) - model(x - STEP * v)) / (2 * STEP)
    with inlay.second_derivatives():
        _, slope = torch.func.jvp(model, (x,), (v,))
        hessian = torch.func.hessian(lambda x: model(x).pow(3).sum())(x[0])
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(torch.autograd.functional.hessian(lambda x: model(x).pow(3).sum(), x[0]), hessian)


def test_spiel_counts_no_gradient_that_is_differentiated_again():
    model, parameters = adapted("spiel")
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.autograd.grad(model(x).sum(), parameters, create_graph=True)
    layer = next(m for m in model.modules() if isinstance(m, InlayLinear))
    assert not layer.inlay_g["default"].weight.any()
    model(x).sum().backward()
    assert layer.inlay_g["default"].weight.any()
    assert not layer.inlay_g["default"].weight.requires_grad
