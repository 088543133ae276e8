"""What PEFT, torch and accelerate call or keep under private names, and what goes wrong in silence without it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from inlay.host.calibrate import without_adapters
from inlay.host.config import InlayConfig
from inlay.host.layer import Frozen, InlayLinear
from inlay.host.slot import Slot

HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda *_: None).remove,
    "forward_pre": lambda layer: layer.register_forward_pre_hook(lambda *_: None).remove,
    "backward": lambda layer: layer.register_full_backward_hook(lambda *_: None).remove,
    "backward_pre": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None).remove,
    "of all modules": lambda layer: register_module_forward_hook(lambda *_: None).remove,
}


def adapt(model: nn.Module, **more) -> PeftModel:
    """A model with a trained adapter."""
    model = get_peft_model(model, InlayConfig(method="lora", args={"r": 4}, **more))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    return model


def reads(layer: InlayLinear) -> bool:
    return Frozen(layer, (), {}).linear is not None


@pytest.mark.parametrize("kind", HOOKS)
def test_a_plain_layer_is_read_and_one_with_a_hook_is_called(kind):
    """`ops` takes an attribute error for a layer that cannot be read, so a renamed list of hooks would only be slow."""
    layer = InlayLinear(nn.Linear(4, 3).requires_grad_(False))
    assert reads(layer)
    remove = HOOKS[kind](layer.base_layer)
    assert not reads(layer)
    remove()
    assert reads(layer)


def test_a_layer_with_accelerates_hook_is_called():
    layer = InlayLinear(nn.Linear(4, 3).requires_grad_(False))
    add_hook_to_module(layer.base_layer, ModelHook())
    assert not reads(layer)
    remove_hook_from_module(layer.base_layer)
    assert torch.equal(layer(torch.ones(2, 4)), layer.base_layer(torch.ones(2, 4)))


def test_a_base_in_bf16_does_not_round_what_is_loaded(llama, tmp_path):
    """PEFT gives an adapter that it loads without memory the dtype of the layer."""
    base = llama.bfloat16()
    model = adapt(copy.deepcopy(base), target_modules=["v_proj"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=True)
    trained = {name: p for name, p in model.named_parameters() if "inlay_" in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    found = dict(loaded.named_parameters())
    assert all(found[name].dtype == p.dtype and torch.equal(found[name], p) for name, p in trained.items())


def test_what_is_loaded_in_place_of_a_parameter_is_what_a_cast_returns_to():
    slot, value = Slot(torch.randn(5), trainable=True), torch.randn(5)
    slot.watch()
    slot.load_state_dict({"weight": value.clone()}, assign=True)
    slot.weight.data = slot.weight.data.bfloat16()
    slot.restore()
    assert torch.equal(slot.weight, value)


@pytest.mark.parametrize(("kind", "target"), [("mamba", "out_proj"), ("falcon_h1", "conv1d")])
def test_a_layer_that_mamba_reads_past_is_refused(kind, target):
    net = nn.Module()
    net.config = SimpleNamespace(to_dict=lambda: {"model_type": kind})
    net.mixer = nn.ModuleDict({target: nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=f"{target} of a {kind} model is read past its layer"):
        get_peft_model(net, InlayConfig(method="lora", args={"r": 2}, target_modules=[target]))


def test_without_adapters_a_model_is_its_base_and_then_itself_again(llama):
    """Unlike PEFT's `disable_adapter_layers`, this changes no `requires_grad`."""
    ids = torch.arange(24).view(2, 12)
    base = llama(ids).logits
    model = adapt(llama, target_modules=["v_proj"])
    adapted = model(ids).logits
    trained = [p.requires_grad for p in model.parameters()]
    with without_adapters(m for m in model.modules() if isinstance(m, InlayLinear)):
        assert torch.equal(model(ids).logits, base)
        assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(model(ids).logits, adapted)
