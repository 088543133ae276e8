"""Adapters of experts leave: merged from file to file in the checkpoint's own layout, and as PEFT's LoRA."""

import pytest
import torch
from moe import adapt, config, layers, logits, mixtral, model_of, wander
from peft import PeftModel
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
    with pytest.raises(ValueError, match="experts: a fold quantises linear layers only"):
        inlay.fold("any", tmp_path / "f", config())
    with pytest.raises(ValueError, match="take nf4_offset, or leave experts out"):
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
