"""A change that depends on the input by more than a matrix: it trains, starts and reloads, and is no weight."""

from dataclasses import dataclass

import pytest
import torch
from helpers import fails
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import inlay
from inlay.host.config import InlayConfig
from inlay.method import Base, Method, Params


@dataclass(frozen=True, kw_only=True)
class Routed(Method):
    """Two gains per output, between which a gate on the input chooses; not zero at the start."""

    name = "routed"
    title = "Routed gains"
    equation = "Δy = σ(G x) D"
    paper = "this test"
    trains = "G (2 × in), D (2 × out)"
    linear = False

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        G = torch.zeros(2, W.shape[1], device=W.device)
        return {"G": G, "D": torch.ones(2, W.shape[0], device=W.device)}

    def change(self, p: Params, x: Tensor, base: Base) -> Tensor:
        return torch.softmax(x @ p["G"].to(x.dtype).T, -1) @ p["D"].to(x.dtype)


def adapted(**more) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6)
    before = net(x).detach()
    return get_peft_model(net, InlayConfig(method=Routed(**more), target_modules=["0"])), x, before


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_starts_at_the_pretrained_layer(dtype):
    model, x, _ = adapted()
    model.to(dtype)
    with model.disable_adapter():
        before = model(x.to(dtype))
    assert torch.equal(model(x.to(dtype)), before)


def test_the_layer_is_the_formula_with_its_gradients():
    model, x, before = adapted(scale=0.7)
    layer = moved(model).base_model.model[0]
    _, p, p0 = layer.theta("default")
    y = model(x)
    expected = before + 0.7 * (torch.softmax(x @ p["G"].T, -1) @ p["D"] - torch.softmax(x @ p0["G"].T, -1) @ p0["D"])
    torch.testing.assert_close(y, expected)
    leaves = list(p.values())
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_it_is_saved_and_loaded(tmp_path):
    model, x, _ = adapted()
    moved(model).save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 4)), tmp_path)
    assert torch.equal(again(x), model(x))


def test_what_needs_a_matrix_is_refused_by_name(tiny, tmp_path, capsys):
    model, _, _ = adapted()
    with pytest.raises(ValueError, match="routed: its change depends on the input"):
        model.merge_adapter()
    config = InlayConfig(method=Routed(), target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(str(tmp_path / "a"))
    for verb in ("merge", "export"):
        capsys.readouterr()  # bars of what was loaded
        error = fails(capsys, verb, str(tmp_path / "a"), str(tmp_path / "out"))
        assert "routed: its change depends on the input, so there is no ΔW to merge, export or fold" in error
    with pytest.raises(ValueError, match="routed: its change depends on the input"):
        inlay.fold(tiny, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_linear_method_says_what_it_lacks():
    class Empty(Method):
        name = "empty"

        def start(self, W: Tensor, stats: Params | None = None) -> Params:
            return {}

    with pytest.raises(NotImplementedError, match="empty has neither `delta` nor `factors`"):
        Empty().delta({}, torch.empty(2, 2))
