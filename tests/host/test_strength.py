"""The strength of an adapter: a factor on its change at inference, in merges and in exports; and hot swaps."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from sizes import SIZES
from torch import nn
from transformers import AutoModelForCausalLM

import inlay
from inlay import methods
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear

NAMES = [method.name for method in methods.METHODS if not method.needs]
TOKENS = torch.arange(24).view(2, 12)
WHERE = ["q_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")


def config(name: str, **more) -> InlayConfig:
    return InlayConfig(method=name, args=SIZES[name], target_modules=WHERE, **more)


@torch.no_grad()
def trained(model: nn.Module, seed: int = 1, size: float = 0.05) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def layers(model: nn.Module) -> list[InlayLinear]:
    return [module for module in model.modules() if isinstance(module, InlayLinear)]


def dense(original: nn.Module, model: nn.Module, strengths: dict[str, float]) -> nn.Module:
    """The base with W + Σ m_i s_i (ΔW_i(θ) − ΔW_i(θ₀)), each read at strength 1, without Inlay's forward pass."""
    base = copy.deepcopy(original)
    for layer in layers(model):
        name = next(iter(layer.cuts.values())).module
        W = base.get_submodule(name).weight.data
        for adapter, strength in strengths.items():
            cut = layer.cuts[adapter]
            _, p, p0 = layer.theta(adapter)
            with torch.no_grad():
                W = W + strength * cut.method.s * cut.method.offset(p, p0, W)
        base.get_submodule(name).weight.data = W
    return base


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [0.3, -1.5])
def test_a_scale_multiplies_the_change_of_every_method(name, strength, llama, llama_original):
    model = trained(get_peft_model(llama, config(name)))
    full = logits(model)
    expected = logits(dense(llama_original, model, {"default": strength}))
    with inlay.scaled(model, strength):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), full)
    with inlay.scaled(model, 0.0):
        assert torch.equal(logits(model), logits(llama_original))


@pytest.mark.parametrize("name", ["lora", "bone", "bat", "pissa"])
def test_what_users_of_peft_write_works(name, llama, llama_original):
    model, base = trained(get_peft_model(llama, config(name))), logits(llama_original)
    half = logits(dense(llama_original, model, {"default": 0.5}))
    for layer in layers(model):
        layer.scaling["default"] *= 0.0
    assert torch.equal(logits(model), base)
    for layer in layers(model):
        layer.set_scale("default", 0.25)
        layer.scale_layer(2.0)
    torch.testing.assert_close(logits(model), half, rtol=1e-4, atol=1e-4)
    for layer in layers(model):
        layer.unscale_layer(0.5)
        assert layer.scaling == {"default": 1.0}


@pytest.mark.parametrize(("one", "other"), [("lora", "bone"), ("bat", "pissa"), ("lamda", "lamda")])
def test_active_adapters_each_have_a_weight(one, other, llama, llama_original):
    model = trained(get_peft_model(llama, config(one), adapter_name="one"))
    model.add_adapter("other", config(other))
    model.base_model.set_adapter(["one", "other"])
    trained(model, seed=2)
    weights = {"one": 0.7, "other": -0.4}
    inlay.set_scale(model, weights)
    expected = logits(dense(llama_original, model, weights))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    rows = model.eval()(input_ids=TOKENS, adapter_names=["one", "__base__"]).logits
    torch.testing.assert_close(rows[0], logits(dense(llama_original, model, {"one": 0.7}))[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], logits(llama_original)[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_scales_that_mean_nothing_are_refused(llama):
    model = get_peft_model(llama, config("pissa"))
    with pytest.raises(ValueError, match="no adapter of Inlay's is called 'other'; there are default"):
        inlay.set_scale(model, {"other": 1.0})
    with pytest.raises(ValueError, match="scale=nan is not a finite number"):
        inlay.set_scale(model, float("nan"))
    with pytest.raises(ValueError, match=r"export_lora.*"):
        model.add_weighted_adapter(["default"], [0.5], "mix")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; unmerge it"):
        inlay.set_scale(model, 0.5)
    with pytest.raises(ValueError, match="nothing to scale"):
        inlay.set_scale(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}, {"bias": "all"}])
def test_what_was_trained_whole_has_no_strength(more, llama):
    model = get_peft_model(llama, config("pissa", **more))
    with pytest.raises(ValueError, match="have no strength; leave its scale at 1"):
        inlay.set_scale(model, 0.5)
    inlay.set_scale(model, 1.0)


@pytest.mark.parametrize("name", ["pissa", "bat"])
def test_merge_and_export_take_a_scale(name, llama_original, tmp_path):
    llama_original.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, config(name, task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    inlay.set_scale(model, 0.5)
    merged = inlay.merge(tmp_path / "adapter", tmp_path / "merged", scale=0.5)
    assert merged.logit_error is not None
    assert merged.logit_error < 1e-4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    rank = 64 if name == "bat" else None
    inlay.export_lora({tmp_path / "adapter": 0.5}, tmp_path / "lora", rank=rank)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


# -- hot swap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bone", "pissa", "spiel"])
@pytest.mark.parametrize("second", ["foobar", "q_proj", "other"])
def test_a_hot_swap_touches_its_own_adapter_alone(name, second, llama, llama_original, tmp_path):
    new = trained(get_peft_model(copy.deepcopy(llama_original), config(name)), seed=9)
    new.save_pretrained(tmp_path)
    model = get_peft_model(llama, config(name), adapter_name="foo")
    model.add_adapter(second, config(name))
    model.set_adapter(second)
    before = logits(trained(model))
    hotswap_adapter(model, str(tmp_path), adapter_name="foo")
    assert torch.equal(logits(model), before)
    model.set_adapter("foo")
    assert torch.equal(logits(model), logits(new))


def test_a_hot_swap_compares_with_the_adapter_that_is_replaced(llama, llama_original, tmp_path):
    get_peft_model(copy.deepcopy(llama_original), config("pissa", scale=0.5)).save_pretrained(tmp_path)
    model = get_peft_model(llama, config("pissa"), adapter_name="foo")
    model.add_adapter("bar", config("pissa", scale=0.5))
    model.set_adapter("bar")  # which PEFT compares with
    with pytest.raises(ValueError, match="Configs are incompatible: for scale"):
        hotswap_adapter(model, str(tmp_path), adapter_name="foo")


# -- bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("dota", {"cores": 10**9}),
        ("dota", {"bond": 10**9}),
        ("snell", {"r": 10**9}),
        ("snell", {"r": 60_000}),
        ("lorta", {"r": 10**9}),
        ("xgblora", {"r": 10**9}),
        ("xgblora", {"rounds": 10**9}),
        ("xgblora", {"rounds": 60_000, "r": 60_000}),
        ("spiel", {"r": 10**9}),
        ("randlora", {"r": 10**9}),
        ("lamda", {"stages": 10**12, "r": 10**9}),
        ("mora", {"r": 10**9}),
        ("bone", {"r": 10**9}),
    ],
)
def test_hyperparameters_are_bounded_by_the_weight(name, args, llama):
    with pytest.raises(ValueError, match=f"{name}.*(is more than|would hold|is above|allows|choose|does not divide)"):
        get_peft_model(llama, InlayConfig(method=name, args=args, target_modules=WHERE))
    assert not layers(llama)


@pytest.mark.filterwarnings("ignore:Adapter name")  # PEFT's, of what stands in the prefix of our tensors
@pytest.mark.parametrize("name", ["", "a.b", "training", "_modules", "keys"])
def test_names_that_no_adapter_can_have_are_refused(name, llama):
    model = get_peft_model(llama, config("bone"))
    with pytest.raises(ValueError, match="an adapter cannot be called"):
        model.add_adapter(name, config("bone"))


@pytest.mark.parametrize(("pattern", "chosen"), [
    ("(?i)Q_PROJ", {"q_proj"}), (r"layers\.(\d)\.self_attn\.q_proj", {"q_proj"}), (r"(q)_proj|(d)own_proj", set(WHERE)),
    (r"(.)\w*_pro\1?j", set(WHERE)), ("(?<=self_attn\\.)q_proj", {"q_proj"}),
])  # fmt: skip
def test_a_regular_expression_means_what_it_says_alone(pattern, chosen, llama_original, tmp_path):
    """In `patterns`, and in `exclude_modules` of an adapter that is loaded again."""
    one = InlayConfig(method="lora", args={"r": 4}, patterns={pattern: {"r": 2}}, target_modules=WHERE)
    model = get_peft_model(copy.deepcopy(llama_original), one)
    small = [layer.cuts["default"] for layer in layers(model) if layer.cuts["default"].method.r == 2]
    assert {cut.module.rpartition(".")[2] for cut in small} == chosen
    left = InlayConfig(method="lora", args={"r": 4}, exclude_modules=f"(?i).*{'K_PROJ'}", target_modules="all-linear")
    model = trained(get_peft_model(copy.deepcopy(llama_original), left))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_leaves_the_range_of_float16_is_refused_and_changes_nothing(merge, llama_original):
    base = copy.deepcopy(llama_original).half()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0, 0] = 60_000.0
    model = get_peft_model(base, config("bone"))
    with torch.no_grad():
        layers(model)[-1].inlay_D["default"].weight.fill_(20_000.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: the merged weight reaches 8e\+04, and float16"):
        getattr(model, merge)()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_scale_that_is_refused_leaves_the_others_as_they_were(llama):
    model = get_peft_model(llama, config("lora"))
    model.add_adapter("other", config("bone"))
    with pytest.raises(ValueError, match="scale=inf is not a finite number"):
        inlay.set_scale(model, {"default": 0.5, "other": float("inf")})
    with pytest.raises(ValueError, match="not a finite"), inlay.scaled(model, {"default": 0.5, "other": float("nan")}):
        pass
    layers = [module for module in model.modules() if isinstance(module, InlayLinear)]
    assert all(value == 1 for layer in layers for value in layer.scaling.values())
