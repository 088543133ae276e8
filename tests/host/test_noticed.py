"""What would be silently wrong is noticed: layers that take no part, parts of checkpoints, modules that files name."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, XLoraConfig, get_peft_model
from sizes import SIZES
from torch import nn
from transformers import AutoModelForCausalLM, WavLMConfig, WavLMModel

from inlay import methods
from inlay.host.config import InlayConfig, check_imports
from inlay.host.layer import InlayLinear
from inlay.models.adapters import Adapter

NAMES = [method.name for method in methods.METHODS if not method.needs]
RANDOM = {
    "dota": {"bond": 4, "init": "random"},
    "lamda": {"r": 4, "init": "kaiming"},
    "snell": {"r": 4},
}
TOKENS = torch.arange(24).view(2, 12)

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")


def adapted(model: nn.Module, name="bone", where=("a",), **more) -> nn.Module:
    args = more.pop("args", SIZES[name])
    return get_peft_model(model, InlayConfig(method=name, args=args, target_modules=list(where), **more))


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


# -- layers that take no part -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


def test_a_weight_that_is_read_past_its_layer_is_an_error_in_the_first_pass():
    model = adapted(Net(lambda net, x: F.linear(net.b(x), net.a.weight)))
    with pytest.raises(ValueError, match="a is never called, and this model reads its weight past the layer"):
        model(torch.randn(2, 8))


def test_a_layer_that_takes_no_part_is_told_of_once():
    model = adapted(Net(lambda net, x: net.b(x)), where=["a", "b"])
    assert model.base_model.model.a.weight.dtype == torch.float32  # looking at a weight is no forward pass
    with pytest.warns(UserWarning, match="a took no part in the model's first forward pass"):
        model(torch.randn(2, 8))
    model(torch.randn(2, 8))


def test_who_asks_for_a_dtype_and_calls_is_not_told_anything():
    model = adapted(Net(lambda net, x: net.b(net.a(x.to(net.a.weight.dtype)))), where=["a", "b"])
    model(torch.randn(2, 8))
    assert not model.base_model.model._forward_hooks
    copy.deepcopy(adapted(model.unload()))(torch.randn(2, 8))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))}) for _ in "ab"
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer["experts"][1](x)
        return x


def test_experts_that_no_token_came_to_are_nothing_to_tell_of():
    model = get_peft_model(Experts(), InlayConfig(method="bone", args={"r": 4}, target_modules=r".*experts\.\d"))
    model(torch.randn(2, 8))
    assert sum(isinstance(m, InlayLinear) for m in model.modules()) == 6


def test_layers_dropped_at_random_are_looked_at_in_evaluation():
    net = Net(lambda net, x: net.b(x) if net.training else net.b(net.a(x)))
    model = adapted(net, where=["a", "b"])
    net.config = SimpleNamespace(layerdrop=0.1)
    model.train()(torch.randn(2, 8))
    model.eval()(torch.randn(2, 8))
    assert not net._forward_hooks


def test_attention_of_wavlm_is_refused_by_name():
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_stride=(2,), conv_kernel=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=False,
    )  # fmt: skip
    model = WavLMModel(config)
    for target in ("q_proj", "k_proj", "v_proj", "out_proj"):
        with pytest.raises(ValueError, match=f"{target}: WavLMAttention reads this weight past its layer"):
            adapted(model, where=[target])
    assert not any(isinstance(m, InlayLinear) for m in model.modules())


def test_torchs_own_encoder_is_refused_where_its_fast_path_is_on():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"linear1: nn\.TransformerEncoderLayer reads this weight past its layer"):
        adapted(encoder, where=["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model, x = adapted(encoder, where=["linear1"]).eval(), torch.randn(1, 3, 8)
        with torch.no_grad():
            before = model(x)
            assert not torch.equal(trained(model)(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_layer_with_an_adapter_of_pefts_is_named_as_such():
    model = get_peft_model(Net(lambda net, x: net.b(net.a(x))), LoraConfig(r=2, target_modules=["a"]))
    with pytest.raises(ValueError, match=r"a carries an adapter of PEFT's already \(lora Linear\).*merge or remove"):
        adapted(model.base_model.model)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_a_layer_answers_in_its_dtype(name):
    model = adapted(Net(lambda net, x: net.b(net.a(x))), name, where=["a"]).base_model.model.a
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(3, 8), torch.randn(3, 8, dtype=torch.bfloat16)):
            assert model.train()(x).dtype == model.eval()(x).dtype == model.base_layer(x).dtype == torch.bfloat16


# -- checkpoints of the trained parameters alone ------------------------------------------------------------------


def reloaded(original, name, seed, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model computes, and another one that was given its trained parameters alone."""
    where = ["q_proj", "down_proj"]
    torch.manual_seed(123)
    model = trained(adapted(copy.deepcopy(original), name, where, seed=seed, **more))
    kept = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(999)
    other = adapted(copy.deepcopy(original), name, where, seed=seed, **more)
    other.load_state_dict(kept, strict=False)
    return logits(other), logits(model)


@pytest.mark.parametrize("name", RANDOM)
def test_trained_parameters_alone_are_whole_with_a_seed_and_refused_without(name, llama_original):
    found, expected = reloaded(llama_original, name, 7, args=RANDOM[name])
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=rf"is missing, and what a fresh {name} adapter has.*set `seed`"):
        reloaded(llama_original, name, None, args=RANDOM[name])


@pytest.mark.parametrize("name", ["spiel", "xgblora"])
@pytest.mark.parametrize("seed", [None, 7])
def test_trained_parameters_are_a_part_where_the_rest_changes_in_training(name, seed, llama_original):
    with pytest.raises(RuntimeError, match="is missing, and what a fresh"):
        reloaded(llama_original, name, seed)


@pytest.mark.parametrize("name", ["lora", "pissa", "bone", "olora", "randlora", "lorta", "peanut"])
def test_trained_parameters_alone_are_whole_where_the_rest_follows_from_the_weight(name, llama_original):
    found, expected = reloaded(llama_original, name, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_training_froze_on_the_way_is_part_of_a_checkpoint(llama_original):
    from inlay import step

    model = adapted(copy.deepcopy(llama_original), "lamda", ["q_proj"], args={"r": 4, "eta": 0.5})
    step(model, 0.25)
    kept = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    other = adapted(copy.deepcopy(llama_original), "lamda", ["q_proj"], args={"r": 4, "eta": 0.5})
    with pytest.raises(RuntimeError, match=r"inlay_B_1\.default\.weight is missing"):
        other.load_state_dict(kept, strict=False)
    other.load_state_dict(model.state_dict())


def test_a_seed_draws_the_same_whatever_was_drawn_before_and_draws_nothing_of_torchs():
    nets = [Net(None) for _ in range(3)]
    state = torch.get_rng_state()
    models = [adapted(net, "snell", seed=seed) for net, seed in zip(nets, (3, 3, 4), strict=True)]
    assert torch.equal(state, torch.get_rng_state())
    one, same, other = (model.base_model.model.a.inlay_A["default"].weight for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# -- names in files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"},
        {"megatron_config": {"a": 1}},
        {"megatron_core": "evil"},
    ],
)
def test_no_module_is_imported_because_a_configuration_names_it(more, llama_original, tmp_path, monkeypatch):
    llama_original.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    (tmp_path / "megatron").mkdir()
    for evil in (tmp_path / "megatron" / "evil.py", tmp_path / "evil.py", tmp_path / "megatron" / "core.py"):
        evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="PEFT imports the module that is named there"):
        Adapter.open(tmp_path / "adapter").attach(copy.deepcopy(llama_original))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["inner", "someone/adapter"])
def test_adapters_that_an_adapter_names_are_looked_at_too(where, llama_original, tmp_path, monkeypatch):
    """X-LoRA's configuration names adapters, which PEFT opens, or fetches, in their turn."""
    monkeypatch.chdir(tmp_path)
    llama_original.save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base", use_cache=False)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("inner")
    path = tmp_path / "inner" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"megatron_config": {"a": 1}, "megatron_core": "evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    outer = XLoraConfig(hidden_size=64, adapters={"0": where}, base_model_name_or_path="base", task_type="CAUSAL_LM")
    outer.save_pretrained("outer")
    with pytest.raises(ValueError, match=r"PEFT imports the module|is not the folder of an adapter on this machine"):
        Adapter.open("outer").config  # noqa: B018
    assert not (tmp_path / "ran").exists()
    check_imports(SimpleNamespace(tokenizer_kwargs=5))  # which PEFT's own error says
    (tmp_path / "inner" / "adapter_config.json").write_text('{"adapters": {"0": "inner"}}')
    check_imports(SimpleNamespace(adapters={"0": "inner"}))  # one that names itself
    with pytest.raises(ValueError, match=r"adapters: \['a'\] is not a mapping"):
        check_imports(SimpleNamespace(adapters=["a"]))


def test_a_configuration_cannot_ask_for_code_of_a_repository():
    from peft import PromptTuningConfig

    config = PromptTuningConfig(
        num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="x",
        tokenizer_kwargs={"trust_remote_code": True}, task_type="CAUSAL_LM",
    )  # fmt: skip
    with pytest.raises(ValueError, match="trust_remote_code would run code"):
        check_imports(config)
