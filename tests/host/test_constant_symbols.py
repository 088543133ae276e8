"""Symbols that are never trained, the stored start, and hot swap."""

import copy
from dataclasses import dataclass

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from small_models import (
    LINEARS,
    TOKENS,
    config,
    difference,
    logits,
    trainable,
    wander,
)

from inlay import methods
from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, START, InlayLinear
from inlay.method import Method

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """ΔW = diag(d) C with a constant C: the smallest method with a symbol that is kept and never trained."""

    name = "toy"
    title = equation = paper = trains = "a toy"
    frozen = frozenset({"C"})
    zero_init = True

    def start(self, W, stats=None):
        return {"C": torch.randn_like(W), "d": torch.zeros(W.shape[0], device=W.device)}

    def delta(self, p, W):
        return p["d"][:, None] * p["C"]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Toy))
    return InlayConfig(method="toy", target_modules=LINEARS)


def test_constant_symbols_stay_constant_whatever_peft_switches(toy, llama):
    base = logits(llama)
    model = get_peft_model(llama, toy)
    model.add_adapter("other", config("pissa"))
    model.set_adapter("other")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.base_model.set_requires_grad("default", True)
    assert {n.split(PREFIX)[1] for n in trainable(model)} == {"d.default.weight"}
    constant = {n: b.clone() for n, b in model.named_buffers() if ".inlay_C." in n or START in n}
    assert len(constant) == 14 * 3
    assert not any(".inlay_C." in n for n, _ in model.named_parameters())
    assert difference(logits(model), base) == 0
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        adam.step()
    assert difference(logits(model), base) > 1e-4
    assert all(torch.equal(b, constant[n]) for n, b in model.named_buffers() if n in constant)


def test_constant_symbols_are_saved_and_loaded(toy, llama_original, tmp_path):
    model = get_peft_model(copy.deepcopy(llama_original), toy)
    wander(model)
    assert sum(".inlay_C." in n for n in model.state_dict()) == 14
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_the_stored_start_is_a_buffer_that_is_saved(llama):
    model = get_peft_model(llama, config("pissa"))
    buffers = {n for n, _ in model.named_buffers() if START in n}
    assert len(buffers) == 14 * 2
    assert buffers <= set(model.state_dict())
    assert len([n for n in peft.get_peft_model_state_dict(model) if START in n]) == 14 * 2


@pytest.mark.parametrize("left", [["down_proj"], ["layers.0.mlp.down_proj"], r".*layers\.0\..*"])
def test_what_is_left_out_of_all_linear_layers_is_left_out_again(left, llama_original, tmp_path):
    config = InlayConfig(args={"r": 4}, target_modules="all-linear", exclude_modules=left)
    model = get_peft_model(copy.deepcopy(llama_original), config)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), str(tmp_path))
    names = [{n for n, m in each.named_modules() if isinstance(m, InlayLinear)} for each in (model, loaded)]
    assert names[0] == names[1]
    assert not any("layers.0.mlp.down_proj" in name for name in names[0])


def test_hotswap_of_adapters_with_the_same_hyperparameters(llama_original, tmp_path):
    answers = []
    for i in range(2):
        model = get_peft_model(copy.deepcopy(llama_original), config("milora"))
        wander(model)
        model.save_pretrained(tmp_path / str(i))
        answers.append(logits(model))
    model = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path / "0")
    assert torch.equal(logits(model), answers[0])
    for i in (1, 0):
        hotswap_adapter(model, str(tmp_path / str(i)), adapter_name="default")
        assert torch.equal(logits(model), answers[i])


@pytest.mark.parametrize(
    "other",
    [
        config("lora"),
        config("pissa", r=4),
        config("pissa", scale=0.5),
        config("pissa", patterns={"q_proj": {"r": 2}}),
    ],
    ids=["method", "args", "scale", "patterns"],
)
def test_hotswap_refuses_other_hyperparameters(other, llama_original, saved, tmp_path):
    path, answer = saved
    get_peft_model(copy.deepcopy(llama_original), other).save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(copy.deepcopy(llama_original), path)
    with pytest.raises(ValueError, match="incompatible"):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default")
    assert torch.equal(logits(model), answer)
