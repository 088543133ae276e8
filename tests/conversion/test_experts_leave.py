"""Adapters of experts leave: merged from file to file in the checkpoint's own layout, and as PEFT's LoRA."""

import json

import pytest
import torch
from moe import adapt, config, layers, logits, mixtral, model_of, wander
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import inlay
from inlay.recipe.recipe import Recipe


def saved(base, folder, name, tmp_path, **more):
    """An adapter of a base that is saved, and the answers with it."""
    base.save_pretrained(folder)
    model = adapt(AutoModelForCausalLM.from_pretrained(folder).eval(), name, **more)
    wander(model)
    model.save_pretrained(tmp_path / "a")
    return logits(model).detach()


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("name", ["pissa", "bat"])
def test_merged_from_file_to_file(kind, name, tmp_path):
    base = mixtral() if kind == "Mixtral" else model_of(kind, "grouped_mm")
    y = saved(base, tmp_path / "base", name, tmp_path, target_modules=["q_proj"], size=2)
    made = inlay.merge(tmp_path / "a", tmp_path / "m")
    assert made.logit_error < 1e-3
    old, new = (load_file(tmp_path / where / "model.safetensors") for where in ("base", "m"))
    assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    changed = {k for k, v in old.items() if not torch.equal(v, new[k])}
    assert changed == {k for k in old if (".experts." in k and "bias" not in k) or "q_proj.weight" in k}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(merged), y, rtol=1e-3, atol=1e-3)
    if kind == "Mixtral":
        key = next(k for k in old if k.endswith("experts.1.w2.weight"))
        base.model.layers[0].mlp.experts.down_proj.data[1] *= 2
        base.save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="cut from another base"):
            inlay.merge(tmp_path / "a", tmp_path / "n")
        assert key in changed


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", pytest.param("Llama4", marks=pytest.mark.slow)])
def test_exported_as_pefts_lora(kind, tmp_path):
    base = mixtral() if kind == "Mixtral" else model_of(kind, "eager")
    y = saved(base, tmp_path / "base", "pissa", tmp_path, target_modules=["q_proj"], size=2)
    made = inlay.export_lora(tmp_path / "a", tmp_path / "l")
    assert max(made.errors.values()) < 1e-5
    assert len(made.errors) == 9
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "l").eval()
    assert not layers(plain)
    torch.testing.assert_close(logits(plain), y, rtol=1e-3, atol=1e-3)


def test_a_full_rank_change_of_experts_is_no_lora(tmp_path):
    saved(mixtral(), tmp_path / "base", "bat", tmp_path)
    with pytest.raises(ValueError, match="or merge the adapter, which is exact"):
        inlay.export_lora(tmp_path / "a", tmp_path / "l")


def test_each_expert_is_a_line_of_inspect(tmp_path):
    saved(mixtral(), tmp_path / "base", "pissa", tmp_path, target_modules=["q_proj"], size=2)
    changed = inlay.inspect_adapter(tmp_path / "a")
    assert len(changed) == 9
    assert {name.rpartition("layers.0.")[2] for name in changed} == {
        "self_attn.q_proj", *(f"mlp.experts.{part}.{e}" for part in ("gate_up_proj", "down_proj") for e in range(4)),
    }  # fmt: skip
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a")
    for path, layer in layers(model).items():
        D = layer.get_delta_weight("default").detach()
        for e in range(4):
            right = (D[e].norm() / layer.pristine()[e].norm()).item()
            assert changed[f"{path}.{e}"].size == pytest.approx(right, rel=1e-3)


def test_experts_are_not_folded(tmp_path):
    with pytest.raises(ValueError, match=r"keeps experts in 16 bits.* nf4_offset"):
        inlay.fold("any", tmp_path / "f", config())
    with pytest.raises(ValueError, match="take nf4_offset, which keeps them in 16 bits, or leave experts out"):
        Recipe(experts=True, quantize="nf4")
    with pytest.raises(ValueError, match="does not reach experts"):
        Recipe(experts=True, flat_noise=0.05)


def test_experts_without_an_adapter_leave_too(tmp_path):
    chosen = {"mlp.experts": [1, 2]}
    y = saved(mixtral(), tmp_path / "base", "pissa", tmp_path, experts=chosen, patterns={r"gate_up_proj\.1": {"r": 2}})
    assert inlay.merge(tmp_path / "a", tmp_path / "m").logit_error < 1e-3
    old, new = (load_file(tmp_path / where / "model.safetensors") for where in ("base", "m"))
    changed = {k.rpartition("experts.")[2] for k, v in old.items() if not torch.equal(v, new[k])}
    assert changed == {f"{e}.{part}.weight" for e in (1, 2) for part in ("w1", "w2", "w3")}
    inlay.export_lora(tmp_path / "a", tmp_path / "l")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "l").eval()
    torch.testing.assert_close(logits(plain), y, rtol=1e-3, atol=1e-3)
    assert len(inlay.inspect_adapter(tmp_path / "a")) == 4


def read_matrices(folder) -> dict:
    """B A of a LoRA folder, its scale included, by the names of the modules that it names."""
    tensors, about = load_file(folder / "adapter_model.safetensors"), json.loads((folder / CONFIG_NAME).read_text())
    factors = {k.removesuffix(".lora_A.weight"): v for k, v in tensors.items() if k.endswith("lora_A.weight")}
    scale = about["lora_alpha"] / about["r"]
    return {
        name.removeprefix("base_model.model."): scale * tensors[f"{name}.lora_B.weight"] @ A
        for name, A in factors.items()
    }


PARTS = {  # of each architecture whose checkpoint has a matrix per expert: where it is, and the gate, up and down
    "Mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "Qwen3Moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "Olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "DeepseekV3": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("kind", ["Mixtral", *(pytest.param(k, marks=pytest.mark.slow) for k in list(PARTS)[1:])])
def test_exported_for_vllm_by_the_names_of_the_checkpoints_matrices(kind, tmp_path):
    base = mixtral() if kind == "Mixtral" else model_of(kind, "eager")
    few = {"mlp.experts": [0, 2]}
    saved(base, tmp_path / "base", "pissa", tmp_path, target_modules=["o_proj"], size=2, experts=few)
    made = inlay.export_lora(tmp_path / "a", tmp_path / "l", to="vllm")
    assert max(made.errors.values()) < 1e-5
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a")
    where, (gate, up, down) = PARTS[kind]
    expected = {}
    for path, layer in layers(model).items():
        for e, D in enumerate(layer.get_delta_weight("default").detach()):
            at = f"model.layers.0.{where}.experts.{e}"
            halves = D.chunk(2) if path.endswith("gate_up_proj") else (D,)
            expected |= {
                f"{at}.{n}": d for n, d in zip((gate, up) if len(halves) == 2 else (down,), halves, strict=True)
            }
    found = read_matrices(tmp_path / "l")
    assert set(found) == {*expected, "model.layers.0.self_attn.o_proj"}
    assert {f"{name}.weight" for name in expected} <= load_file(tmp_path / "base/model.safetensors").keys()
    for name, D in expected.items():
        torch.testing.assert_close(found[name], D, rtol=1e-4, atol=1e-5)
        assert found[name].any() == (".experts.0." in name or ".experts.2." in name)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of PEFT's conversion
@pytest.mark.parametrize("kind", ["Mixtral", pytest.param("Qwen3Moe", marks=pytest.mark.slow)])
def test_what_vllm_reads_peft_reads_too(kind, tmp_path):
    """It has had this form since transformers kept experts as modules, and fuses it."""
    base = mixtral() if kind == "Mixtral" else model_of(kind, "eager")
    y = saved(base, tmp_path / "base", "pissa", tmp_path, target_modules=["q_proj"], size=2)
    inlay.export_lora(tmp_path / "a", tmp_path / "l", to="vllm")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "l").eval()
    torch.testing.assert_close(logits(plain), y, rtol=1e-3, atol=1e-3)


def test_vllm_reads_fused_experts_of_gpt_oss_as_peft_writes_them(tmp_path):
    """Stacked as its `_stack_moe_lora_weights` takes them apart: A (E r, in), B (out, r E), gate_up_proj inside."""
    saved(model_of("GptOss", "eager"), tmp_path / "base", "pissa", tmp_path, size=2)
    inlay.export_lora(tmp_path / "a", tmp_path / "l", to="vllm", pad=False)
    tensors = load_file(tmp_path / "l/adapter_model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a")
    for part, inside in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        at = f"base_model.model.model.layers.0.mlp.experts{inside}"
        A = tensors[f"{at}.lora_A.weight"].unflatten(0, (4, -1))
        B = tensors[f"{at}.lora_B.weight"].unflatten(1, (-1, 4)).permute(2, 0, 1)
        D = layers(model)[f"model.layers.0.mlp.experts.{part}"].change(
            "default", torch.empty(4, *B.shape[1:2], A.shape[2])
        )
        torch.testing.assert_close(B @ A, D.detach(), rtol=1e-4, atol=1e-5)


def test_experts_that_vllm_has_no_form_for_are_merged(tmp_path):
    saved(model_of("GptOss", "eager"), tmp_path / "base", "pissa", tmp_path, size=2, exclude_modules=["down_proj"])
    with pytest.raises(
        ValueError, match=r"no form for these experts \(.*down_proj has no adapter\); merge the adapter"
    ):
        inlay.export_lora(tmp_path / "a", tmp_path / "l", to="vllm")
    saved(model_of("GraniteMoe", "eager"), tmp_path / "base", "pissa", tmp_path, size=2)
    with pytest.raises(ValueError, match=r"is stored fused, in a layout of its own\); merge the adapter"):
        inlay.export_lora(tmp_path / "a", tmp_path / "l", to="vllm")
    assert not (tmp_path / "l").exists()
