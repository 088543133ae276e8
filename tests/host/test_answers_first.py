"""A model answers under torch.inference_mode before it is trained: what is cached for both is made for both."""

import pytest
import torch
from peft import get_peft_model
from sizes import SIZES
from torch import nn

from inlay import methods
from inlay.host.config import InlayConfig

NAMES = [method.name for method in methods.METHODS if not method.needs]


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_training_may_follow_an_answer(name):
    """In a shape that no other test has, so that nothing is cached yet."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(112, 80)), InlayConfig(method=name, args=SIZES[name], target_modules=["0"])
    )
    x = torch.randn(3, 112)
    with torch.inference_mode():
        before = model(x)
    y = model(x)
    assert torch.equal(y, before)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)
