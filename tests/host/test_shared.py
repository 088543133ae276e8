"""Parameters that the layers of a model share, and what a method knows of its weight's place: LoRTA."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, T5Config

import inlay
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear
from inlay.host.place import places
from inlay.method import Place
from inlay.methods.lorta import LoRTA

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FACTORS = {"A", "B", "C_L", "C_M", "C_H"}
TOKENS = torch.arange(24).view(2, 12)


def adapt(model: nn.Module, name: str = "default", r: int = 3, targets=ATTENTION, **more) -> PeftModel:
    config = InlayConfig(method="lorta", args={"r": r}, target_modules=targets, task_type="CAUSAL_LM", **more)
    return get_peft_model(model, config, name)


def wander(model: nn.Module, size: float = 0.2) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=size)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def tensor_of(model: nn.Module) -> Tensor:
    """The whole tensor (d × head × heads × layers × matrices), written down from the paper."""
    p = {name.split("inlay_")[1].split(".")[0]: value for name, value in trained(model).items()}
    assert p.keys() == FACTORS
    return torch.einsum("dr,er,hr,lr,jr->dehlj", p["A"], p["B"], p["C_H"], p["C_L"], p["C_M"])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def test_every_layer_is_a_slice_of_one_tensor(llama):
    """Four heads of 16, of which k and v have two; q, k, v write them and o reads them."""
    model = adapt(llama)
    wander(model)
    T, layers = tensor_of(model), {n: m for n, m in model.named_modules() if isinstance(m, InlayLinear)}
    assert T.shape == (64, 16, 4, 2, 4)
    assert len(layers) == 8
    for name, layer in layers.items():
        index, kind = int(name.split("layers.")[1][0]), name.rpartition(".")[2]
        heads = 2 if kind[0] in "kv" else 4
        piece = T[:, :, :heads, index, ATTENTION.index(kind)].permute(2, 1, 0).flatten(0, 1)  # (heads · 16, d)
        want = piece.T if kind == "o_proj" else piece
        torch.testing.assert_close(layer.get_delta_weight("default"), want, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_one_tensor(llama_original):
    model = adapt(copy.deepcopy(llama_original))
    wander(model)
    model(TOKENS).logits.square().mean().backward()
    dense = copy.deepcopy(llama_original).requires_grad_(False)
    T = tensor_of(model)
    changes = {}
    for i in range(2):
        for j, kind in enumerate(ATTENTION):
            heads = 2 if kind[0] in "kv" else 4
            piece = T[:, :, :heads, i, j].permute(2, 1, 0).flatten(0, 1)
            key = f"model.layers.{i}.self_attn.{kind}.weight"
            changes[key] = dense.get_parameter(key) + (piece.T if kind == "o_proj" else piece)
    out = torch.func.functional_call(dense, changes, (TOKENS,)).logits
    wanted = torch.autograd.grad(out.square().mean(), list(trained(model).values()))
    for p, want in zip(trained(model).values(), wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-6)


def test_gradients_under_autocast_are_as_exact_as_those_of_plain_weights(llama_original):
    """They are sums over all layers. Where the change is several times the weight, bf16 loses more, here as there."""
    model = adapt(copy.deepcopy(llama_original))
    wander(model, 0.02)
    errors = []
    for one in (model, copy.deepcopy(model).merge_and_unload()):
        plain = {n: p.requires_grad_() for n, p in one.named_parameters() if n.split(".")[-2] in ATTENTION}
        weights, grads = list((plain if one is not model else trained(model)).values()), []
        for on in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                loss = one(TOKENS, labels=TOKENS).loss
            grads.append(torch.autograd.grad(loss, weights))
        errors.append([((b - a).norm() / a.norm()).item() for a, b in zip(*grads, strict=True)])
    assert max(errors[0]) < 0.05
    assert max(errors[0]) < 4 * max(errors[1])


def test_the_numbers_are_the_formula_of_the_paper():
    """r (d + head + heads + layers + 4): LLaMA-2-7B, 4,292 numbers a rank, where LoRA has 1,048,576."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    assert sum(p.numel() for p in trained(adapt(base, r=8)).values()) == 8 * (4096 + 128 + 32 + 32 + 4) == 8 * 4292


def test_saved_once_and_loaded_bit_equal(llama_original, tmp_path):
    model = adapt(copy.deepcopy(llama_original))
    wander(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.split("inlay_")[1].split(".")[0] for k in stored} == FACTORS
    assert len(stored) == 5
    for how in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path, **how)
        assert torch.equal(logits(loaded), logits(model))
    last, same = (
        [m for m in net.modules() if isinstance(m, InlayLinear)][-1]
        for net in (PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path), model)
    )  # the first to be asked is not the one that holds the factors
    assert torch.equal(last.get_delta_weight("default"), same.get_delta_weight("default"))
    other = LlamaForCausalLM(LlamaConfig(**{**llama_original.config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(other, tmp_path)


def test_several_of_them_and_a_copy(llama):
    base = logits(llama)
    model = adapt(llama, "one")
    wander(model)
    one = logits(model)
    model.add_adapter("two", InlayConfig(method="lorta", args={"r": 5}, target_modules=["v_proj", "o_proj"]))
    model.set_adapter("two")
    assert torch.equal(logits(model), base)
    assert {p.shape[1] for p in trained(model).values()} == {5}
    wander(model)
    two = logits(model)
    twin = copy.deepcopy(model)
    wander(model)
    assert torch.equal(logits(twin), two)  # it has tensors of its own
    wander(twin)
    assert not torch.equal(logits(twin), two)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    assert torch.equal(logits(model.unload()), base)


def test_what_is_not_attention_has_a_tensor_of_its_own(llama):
    model = adapt(llama, targets="all-linear")
    shapes = {n.split("layers.")[1].replace(".default.weight", ""): tuple(p.shape) for n, p in trained(model).items()}
    assert shapes["0.mlp.gate_proj.inlay_B"] == (96, 3)
    assert shapes["0.mlp.gate_proj.inlay_C_M"] == (3, 3)
    assert len(shapes) == 10


def test_other_hyperparameters_make_another_tensor(llama):
    model = adapt(llama, patterns={"v_proj": {"r": 2}})
    assert sorted(p.shape[1] for p in trained(model).values()) == [2] * 5 + [3] * 5
    owners = {n.split(".inlay_")[0].split("layers.")[1] for n in trained(model)}
    assert owners == {"0.self_attn.q_proj", "0.self_attn.v_proj"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does it to itself
def test_layers_that_share_are_compiled(llama):
    model = adapt(llama)
    wander(model)
    eager = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_merge_from_file_to_file_and_a_lora(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapt(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    wander(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = inlay.merge(tmp_path / "adapter", tmp_path / "merged", tiny)
    assert merged.logit_error < 1e-3
    lora = inlay.export_lora(tmp_path / "adapter", tmp_path / "lora", model=tiny, pad=False)
    assert lora.rank == 3
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path / "lora"
    )
    torch.testing.assert_close(logits(plain), logits(model.eval()), rtol=1e-3, atol=1e-3)


def test_ranks_per_layer_are_refused(tiny):
    with pytest.raises(ValueError, match="shares A, B"):
        inlay.inspect(tiny, method="lorta", r=4)


def test_a_state_dict_alone_is_refused(llama):
    from peft import inject_adapter_in_model

    with pytest.raises(ValueError, match="belong to all layers"):
        inject_adapter_in_model(InlayConfig(method="lorta", target_modules=ATTENTION), llama, state_dict={})


# The places themselves


def found(config, **shapes: tuple[int, int]) -> dict[str, Place]:
    layers = {name: (*shape, LoRTA()) for name, shape in shapes.items()}
    return {name: place for group in places(layers, config) for name, place in group.items()}


def test_places_in_a_model_with_fused_heads():
    made = found(
        GPT2Config(n_embd=64, n_head=4),
        **{f"h.{i}.{n}": s for i in (0, 1) for n, s in {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64)}.items()},
    )
    assert made["h.1.attn.c_attn"] == Place(layer=1, layers=2, module=0, modules=2, heads=12, most=12)
    assert made["h.0.attn.c_proj"] == Place(layer=0, layers=2, module=1, modules=2, heads=4, most=12, writes=True)


def test_places_of_encoder_and_decoder_and_of_layers_that_are_left_out():
    names = ["encoder.block.3.layer.0.SelfAttention.q", "decoder.block.5.layer.1.EncDecAttention.o"]
    made = found(T5Config(d_model=64, num_heads=8, d_kv=16), **{names[0]: (128, 64), names[1]: (64, 128)})
    assert made[names[0]] == Place(layer=0, layers=2, module=0, modules=2, heads=16 // 2, most=8)
    assert made[names[1]] == Place(layer=1, layers=2, module=1, modules=2, heads=8, most=8, writes=True)


def test_a_weight_on_its_own_has_the_place_of_one():
    assert found(None, layer=(24, 40)) == {"layer": Place()}
    assert LoRTA().place == Place()
