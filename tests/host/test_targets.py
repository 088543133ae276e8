"""Which modules a config adapts, which it refuses, and what it leaves alone."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from sizes import DEPARTS
from small_models import (
    LINEARS,
    TOKENS,
    Mixed,
    adapted_names,
    config,
    difference,
    every_method,
    layers_of,
    logits,
    trainable,
    wander,
)
from torch import nn

from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX
from inlay.methods.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"target_modules": {"q_proj"}}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*\.(up|down)_proj"}, {"layers.1.mlp.up_proj", "layers.1.mlp.down_proj"}),
        ({"target_modules": ["model.layers.0.mlp.up_proj"]}, {"layers.0.mlp.up_proj"}),
        (
            {"target_modules": ["up_proj", "v_proj"], "layers_to_transform": 1},
            {"layers.1.self_attn.v_proj", "layers.1.mlp.up_proj"},
        ),
        (
            {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            {"layers.0.self_attn.v_proj"},
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, {"layers.1.self_attn.q_proj"}),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_target_modules(more, expected, llama):
    model = get_peft_model(llama, InlayConfig(**more))
    assert adapted_names(model) == expected


def test_all_linear_is_every_linear_layer_but_the_head(llama):
    model = get_peft_model(llama, config("bone", "all-linear"))
    assert {n.rpartition(".")[2] for n in layers_of(model)} == set(LINEARS)
    assert len(layers_of(model)) == 14


def test_defaults_for_a_known_model(llama):
    """Without target_modules PEFT's table for the model type is used."""
    model = get_peft_model(llama, InlayConfig())
    assert {n.rpartition(".")[2] for n in layers_of(model)} == {"q_proj", "v_proj"}


def test_the_defaults_work_on_a_small_layer():
    net, x = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 2)), torch.randn(3, 10)
    before = net(x)
    model = get_peft_model(net, InlayConfig(target_modules=["0"]))
    assert torch.equal(model(x), before)


@every_method
def test_init_weights_false_starts_away_from_the_base(name, llama):
    base = logits(llama)
    assert difference(logits(get_peft_model(llama, config(name, init_weights=False))), base) > 1e-4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"target_modules": ["q_poj"]}, "q_poj"),
        ({"target_modules": ["q_proj", "q_poj"]}, "q_poj"),
        ({"target_modules": r".*\.q_poj"}, "q_poj"),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["q_proj"]}, "'q_proj' matches no module"),
        ({"target_modules": ["q_proj"], "patterns": {"k_proj": {"r": 4}}}, "k_proj"),
        ({"target_modules": ["q_proj"], "patterns": {"(": {"r": 4}}}, "regular expression"),
        ({"target_modules": ["q_proj"], "patterns": {"q_proj": {"rank": 4}}}, "rank"),
        ({"target_modules": ["q_proj"], "bias": "some"}, "'some' is not one of none, all, inlay_only"),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts"]}, "target_parameters"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "q_proj"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_the_model_is_left_alone(more, words, llama):
    modules = dict(llama.named_modules())
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        get_peft_model(llama, InlayConfig(method="bone", args={"r": 8}, **more))
    assert dict(llama.named_modules()) == modules


def test_patterns_give_modules_their_own_hyperparameters(llama, tmp_path):
    base = copy.deepcopy(llama)
    patterns = {r"layers\.1\.self_attn\.q_proj": {"r": 2}, "q_proj": {"r": 4, "scale": 0.5}, "mlp.*": {"dropout": 0.1}}
    model = get_peft_model(llama, config("lora", LINEARS, patterns=patterns))
    found = {n.split("layers.")[-1]: layer.cuts["default"].method for n, layer in layers_of(model).items()}
    assert found["0.self_attn.q_proj"] == LoRA(r=4, scale=0.5)
    assert found["1.self_attn.q_proj"] == LoRA(r=2)
    assert found["0.self_attn.k_proj"] == LoRA(r=8)
    assert found["1.mlp.up_proj"] == LoRA(r=8, dropout=0.1)
    wander(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    again = {n.split("layers.")[-1]: layer.cuts["default"].method for n, layer in layers_of(loaded).items()}
    assert again == found


def test_modules_to_save(llama_original, tmp_path):
    model = get_peft_model(copy.deepcopy(llama_original), config("pissa", ["q_proj"], modules_to_save=["lm_head"]))
    head = {n for n in trainable(model) if PREFIX not in n}
    assert len(head) == 1
    assert "lm_head.modules_to_save" in next(iter(head))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    wander(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("bias", "expected"), [("none", set()), ("inlay_only", {"0"}), ("all", {"0", "1"})])
def test_bias_options(bias, expected, tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    fresh, x = copy.deepcopy(net), torch.randn(3, 16)
    model = get_peft_model(net, config("bone", ["0"], bias=bias))
    trained = {n for n in trainable(model) if "bias" in n}
    assert {n.split("model.")[-1][0] for n in trained} == expected
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trained:
                p.add_(1.0)
    wander(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_trainable_token_indices(llama_original, tmp_path):
    model = get_peft_model(copy.deepcopy(llama_original), config("bone", ["q_proj"], trainable_token_indices=[3, 5]))
    assert any("token_adapter" in n for n in trainable(model))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    untouched = torch.full((1, 4), 9)
    assert difference(logits(model), logits(llama_original)) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, untouched), logits(llama_original, untouched))


@every_method
def test_gpt2_with_conv1d(name, gpt2_original, tmp_path):
    targets = ["c_attn", "c_fc", "c_proj"]
    base, model = logits(gpt2_original), get_peft_model(copy.deepcopy(gpt2_original), config(name, targets))
    assert (difference(logits(model), base) == 0) != (name in DEPARTS)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        adam.step()
    trained = logits(model)
    assert difference(trained, base) > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(gpt2_original), tmp_path)), trained)
    model.merge_adapter()
    assert difference(logits(model), trained) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    assert difference(logits(model.merge_and_unload()), trained) < 1e-4


@pytest.mark.parametrize(("target", "kind"), [("conv", "Conv2d"), ("embed", "Embedding")])
def test_an_unsupported_module_is_refused_and_the_model_left_unwrapped(target, kind):
    net = Mixed()
    with pytest.raises(ValueError, match=f"{target} is a {kind}, which Inlay does not adapt"):
        get_peft_model(net, config("bone", ["first", target, "last"]))
    assert [type(m) for m in net.children()] == [nn.Linear, nn.Conv2d, nn.Embedding, nn.Linear]


@pytest.mark.parametrize(
    "broken",
    [
        config("bone", ["last", "first", "conv"]),
        config("bone", ["last", "first", "nothing"]),
        config("bat", ["last", "first"], r=5),
        config("lora", ["last", "first"], patterns={"first": {"r": 17}}),
    ],
    ids=["unsupported", "no match", "no fit", "no fit by pattern"],
)
def test_a_second_adapter_that_fails_leaves_the_first_as_it_was(broken):
    model, x = get_peft_model(Mixed(), config("pissa", ["first", "last"])), torch.randn(3, 16)
    wander(model)
    before, names, trained = model(x), set(model.state_dict()), trainable(model)
    with pytest.raises(ValueError, match=r"."):
        model.add_adapter("second", broken)
    assert set(model.state_dict()) == names
    assert trainable(model) == trained
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x), before)
    model.add_adapter("second", config("bone", ["first", "last"]))
    model.set_adapter("default")
    assert torch.equal(model(x), before)


def test_multihead_attention_is_refused():
    net = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="reads this weight past its layer"):
        get_peft_model(net, InlayConfig(args={"r": 2}, target_modules=["out_proj"]))
    assert type(net[0].out_proj).__name__ == "NonDynamicallyQuantizableLinear"
