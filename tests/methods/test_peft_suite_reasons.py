"""What is said of PEFT's tests in peft_suite (why some fail, why some sizes are others) is so."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from inlay.host.config import InlayConfig
from peft_suite.cases import MORE


class Tokens(nn.Module):
    """PEFT's ModelEmbConv1D: a weight of one row, and numbers of 0.02."""

    def __init__(self, larger: float) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(1, 5), nn.Linear(10, 2)
        with torch.no_grad():
            self.conv1d.weight *= larger

    def forward(self, X):
        return self.lin0(self.conv1d(self.emb(X)).relu().flatten(1)).log_softmax(-1)


def moved(model: nn.Module, X: torch.Tensor, rate: float) -> list[bool]:
    """Which tensors three steps move by more than 1e-4, as test_only_params_are_updated asks."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=rate)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
    return [not torch.allclose(before[name], p, atol=1e-4, rtol=1e-4) for name, p in trained.items()]


def test_peanut_moves_where_its_weight_is_not_small_and_its_relu_is_on():
    """B's gradient is as large as the weight, A's as its square; where the ReLU is off for all of W nothing moves."""
    X = torch.arange(90).view(9, 10)

    def share(rate: float, larger: float, sign: int) -> float:
        count = 0
        for seed in range(8):
            torch.manual_seed(seed)
            base = Tokens(larger)
            base.conv1d.weight.data.abs_()
            model = get_peft_model(base, InlayConfig(method="peanut", args={"r": 1}, target_modules=["conv1d"]))
            next(p for name, p in model.named_parameters() if "inlay_A" in name).data.abs_().mul_(sign)
            count += all(moved(model, X, rate))
        return count / 8

    assert share(0.5, 1, 1) < 0.3
    assert share(0.5, 50, 1) > 0.7
    assert share(1000, 1, 1) > 0.7
    assert share(1000, 50, -1) == 0


@pytest.mark.parametrize(("epsilon", "moves"), [(1e-3, False), (MORE["deep_lora"]["epsilon"], True)])
def test_deep_lora_moves_at_once_where_its_start_is_not_small(epsilon, moves):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2), nn.LogSoftmax(-1))
    args = {"r": 2, "epsilon": epsilon}
    model = get_peft_model(base, InlayConfig(method="deep_lora", args=args, target_modules=["0"]))
    assert all(moved(model, torch.arange(90.0).view(9, 10), 0.5)) == moves


def test_oplora_moves_a_by_the_square_of_the_rate():
    """B starts at 0 between two projections: three steps at 0.5 move A by less than 1e-4 on some draws."""

    def share(rate: float) -> float:
        count = 0
        for seed in range(8):
            torch.manual_seed(seed)
            norms = nn.LayerNorm(10, eps=10), nn.LayerNorm(20, eps=20)  # as in PEFT's MLP_LayerNorm
            base = nn.Sequential(norms[0], nn.Linear(10, 20), nn.ReLU(), norms[1], nn.Linear(20, 2), nn.LogSoftmax(-1))
            config = InlayConfig(method="oplora", args={"r": 1}, target_modules=["1", "4"])
            count += all(moved(get_peft_model(base, config), torch.arange(90.0).view(9, 10), rate))
        return count / 8

    assert share(0.5) < 1
    assert share(50) == 1


def test_lorta_has_as_many_tensors_for_one_layer_as_for_all():
    def tensors(method: str, layers: list[int] | None) -> int:
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
        )
        where = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": layers}
        model = get_peft_model(LlamaForCausalLM(config), InlayConfig(method=method, args={"r": 2}, **where))
        return sum("inlay_" in name for name, _ in model.named_parameters())

    assert tensors("lorta", [0]) == tensors("lorta", None)
    assert 2 * tensors("lora", [0]) == tensors("lora", None)
