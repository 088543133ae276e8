"""What Inlay asks of every method, and that this one is PEFT's FourierFT."""

import pytest
import torch
from inlay_fourierft import FourierFT
from peft import FourierFTConfig, get_peft_model
from torch import nn

from inlay.testing import check_method


def dense(p, W):
    """Write ΔW down from the paper's equation, without an FFT: a sum of waves, one to an entry."""
    out, inp = W.shape
    rows, columns = torch.arange(out, dtype=W.dtype)[:, None], torch.arange(inp, dtype=W.dtype)
    phases = [2 * torch.pi * (rows * (e // inp) / out + columns * (e % inp) / inp) for e in p["E"].tolist()]
    return 300 / (out * inp) * sum(c * torch.cos(phase) for c, phase in zip(p["c"], phases, strict=True))


def test_it_keeps_the_contract():
    check_method(FourierFT(n=20), dense)


def test_it_is_that_of_peft():
    config = FourierFTConfig(n_frequency=20, scaling=300, random_loc_seed=777, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(40, 24)), config).base_model.model[0]
    W = layer.weight.detach()
    p = {**FourierFT(n=20).start(W), "c": layer.fourierft_spectrum["default"].detach()}
    torch.testing.assert_close(FourierFT(n=20).delta(p, W), layer.get_delta_weight("default").detach())


def test_more_entries_than_the_weight_has_are_refused():
    with pytest.raises(ValueError, match="choose n <= 960"):
        FourierFT(n=961).start(torch.randn(24, 40))
