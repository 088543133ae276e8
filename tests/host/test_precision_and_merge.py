"""Casts, copies, merges and unmerges of adapters in a model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from sizes import DEPARTS
from small_models import (
    TOKENS,
    Mixed,
    config,
    difference,
    every_kind,
    every_method,
    layers_of,
    logits,
    wander,
)
from torch import nn

from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


@every_method
def test_the_start_survives_a_cast_of_the_parameters(name, llama):
    """TRL casts trainable parameters to bf16 on a quantised base; the stored start stays fp32."""
    base = logits(llama)
    model = get_peft_model(llama, config(name))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    assert (difference(logits(model), base) == 0) != (name in DEPARTS)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@every_kind
def test_autocast_adapter_dtype_false(name, llama_original, tmp_path):
    """ZeRO-3 asks for one dtype; the default keeps fp32 parameters on a bf16 base."""
    base = copy.deepcopy(llama_original).to(torch.bfloat16)
    before = logits(base)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(copy.deepcopy(base), config(name), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert difference(logits(model), before) == 0
        wander(model)
        folder = tmp_path / str(autocast)
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=autocast)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["pissa", "bone", "bat", "bat_col"])
def test_no_layer_keeps_a_copy_of_its_input(name):
    """PEFT casts x to fp32 in every adapted layer of a bf16 model."""
    net = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    model = get_peft_model(net, config(name, ["0"]))
    x = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    copies = {t.data_ptr() for t in kept if t.numel() >= x.numel() and t.data_ptr() != x.data_ptr()}
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert len(copies) <= (name == "bat")  # Bat hands x + t to the base, which may keep it


@every_method
def test_merge_and_unload_and_unload(name, llama_original):
    base = logits(llama_original)
    model = get_peft_model(copy.deepcopy(llama_original), config(name))
    wander(model)
    trained = logits(model)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert difference(logits(merged), trained) < 1e-4
    assert set(merged.state_dict()) == set(llama_original.state_dict())
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert all(torch.equal(v, llama_original.state_dict()[k]) for k, v in plain.state_dict().items())


def test_merging_several_adapters_at_once(llama):
    model = get_peft_model(llama, config("pissa"), adapter_name="first")
    model.add_adapter("second", config("bat"))
    model.base_model.set_adapter(["first", "second"])
    wander(model)
    both = logits(model)
    model.merge_adapter(["first", "second"])
    assert difference(logits(model), both) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)


def test_disabling_a_merged_adapter_gives_the_base_back(llama):
    base = logits(llama)
    model = get_peft_model(llama, config("pissa"))
    wander(model)
    trained = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert difference(logits(model), trained) < 1e-4


@every_kind
def test_safe_merge_refuses_nan_and_leaves_the_base_alone(name, llama):
    model = get_peft_model(llama, config(name))
    layer = next(iter(layers_of(model).values()))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        next(p for n, p in layer.named_parameters() if PREFIX in n).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"default.*NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_a_merged_adapter_cannot_be_deleted(llama):
    base = logits(llama)
    model = get_peft_model(llama, config("pissa"), adapter_name="first")
    model.add_adapter("second", config("bone"))
    wander(model)
    model.merge_adapter(["first"])
    with pytest.raises(ValueError, match="first"):
        model.delete_adapter("first")
    model.unmerge_adapter()
    model.set_adapter("second")
    model.delete_adapter("first")
    assert difference(logits(model), base) == 0


def test_an_empty_adapter_says_so():
    """Reading slots that nothing has filled is an error, never NaN."""
    model, x = get_peft_model(Mixed(), config("pissa", ["first"])), torch.randn(3, 16)
    layer = next(iter(layers_of(model).values()))
    with torch.no_grad():
        layer.inlay_A["default"].weight.fill_(float("nan"))
    layer.cuts["default"].pending = True
    with pytest.raises(ValueError, match=r"not loaded whole.*inlay_A\.default"):
        model(x)


def test_a_deep_copy_and_a_pickle_are_independent(llama, tmp_path):
    model = get_peft_model(llama, config("pissa"))
    twin = copy.deepcopy(model)
    before = logits(model)
    wander(twin)
    assert torch.equal(logits(model), before)
    assert difference(logits(twin), before) > 1e-3
    torch.save(twin, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(twin))


def test_extra_positional_and_keyword_arguments_reach_the_base():
    class Scaled(nn.Linear):
        def forward(self, x, factor=1.0, *, shift=0.0):
            return factor * super().forward(x) + shift

    net = nn.Sequential(Scaled(16, 16))
    model, x = get_peft_model(net, config("bone", ["0"])), torch.randn(3, 16)
    layer = model.base_model.model[0]
    assert torch.equal(layer(x, 2.0, shift=1.0), 2 * F.linear(x, net[0].base_layer.weight, net[0].base_layer.bias) + 1)


def test_a_tied_head_is_not_merged(llama):
    llama.lm_head.weight = llama.model.embed_tokens.weight
    before = llama.model.embed_tokens.weight.clone()
    model = get_peft_model(llama, InlayConfig(args={"r": 4}, target_modules=["lm_head"]))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="shares its weight with another module"):
            merge()
    assert torch.equal(llama.model.embed_tokens.weight, before)


def test_a_merge_survives_a_change_of_dtype(llama):
    model = get_peft_model(llama, InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"]))
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert model(torch.arange(8)[None]).logits.dtype == torch.float64


def test_an_unmerged_adapter_counts_beside_a_merged_one(llama):
    def config():
        return InlayConfig(args={"r": 4}, target_modules=["q_proj"], init_weights=False)

    model = get_peft_model(llama, config(), adapter_name="one")
    model.add_adapter("two", config())
    model.base_model.set_adapter(["one", "two"])
    both = model(torch.arange(8)[None]).logits
    model.merge_adapter(adapter_names=["one"])
    torch.testing.assert_close(model(torch.arange(8)[None]).logits, both)


def test_trained_tokens_merge_and_unload(llama):
    config = InlayConfig(method="bone", args={"r": 4}, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = get_peft_model(llama, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected)
