"""Small adapted models and what is read off them, for the tests of this folder."""

import pytest
import torch
from sizes import sized
from torch import Tensor, nn

from inlay import methods
from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, InlayLinear

NAMES = [m.name for m in methods.METHODS if not m.needs]


FIRST = ("lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "bat_col")  # on the real model in the fast suite


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


TOKENS = torch.arange(24).view(2, 12)


KINDS = "lora pissa lamda dota bat lorta xgblora spiel".split()  # of what a start stores, shares, notes


def in_fast_suite(names):
    marks = {n: () if n in names else pytest.mark.slow for n in NAMES}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=mark) for n, mark in marks.items()])


every_method, every_kind = pytest.mark.parametrize("name", NAMES), in_fast_suite(KINDS)


def config(name="pissa", target_modules=LINEARS, r=8, **more) -> InlayConfig:
    """Of any method; `r` is its size, whatever the method calls that."""
    return InlayConfig(method=name, args=sized(name, r), target_modules=target_modules, **more)


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


def difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def wander(model: nn.Module, size: float = 0.05) -> None:
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and PREFIX in n:
                p.add_(torch.randn_like(p), alpha=size)


def layers_of(model: nn.Module) -> dict[str, InlayLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, InlayLinear)}


def adapted_names(model: nn.Module) -> set[str]:
    """Short names of the adapted layers."""
    return {n.split("model.")[-1] for n in layers_of(model)}


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


class Mixed(nn.Module):
    """Layers we adapt between layers we do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.embed, self.last = (
            nn.Linear(16, 16), nn.Conv2d(1, 1, 3), nn.Embedding(8, 16), nn.Linear(16, 16)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))
