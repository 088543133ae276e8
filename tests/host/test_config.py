"""The adapter type in PEFT, and configs that are saved, loaded and reused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model
from safetensors.torch import load_file
from small_models import (
    TOKENS,
    config,
    difference,
    every_kind,
    logits,
    wander,
)

from inlay.host import seal
from inlay.host.config import InlayConfig
from inlay.methods.milora import MiLoRA

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


def test_the_type_is_a_real_member_of_pefts_enum():
    member = PeftType.INLAY
    assert PeftType("INLAY") is PeftType["INLAY"] is member
    assert isinstance(member, PeftType)
    assert (member.value, member.name, str.__str__(member)) == ("INLAY", "INLAY", "INLAY")
    assert member in list(PeftType)
    assert member == "INLAY"
    assert InlayConfig().peft_type is member


@pytest.mark.slow
def test_reloading_the_module_changes_nothing():
    code = """
import importlib, inlay, peft, torch
member, count = peft.PeftType.INLAY, len(peft.PeftType)
module = importlib.reload(inlay.host.tuner)
importlib.reload(inlay.host)
importlib.reload(inlay)
assert peft.PeftType.INLAY is member and len(peft.PeftType) == count
net = torch.nn.Sequential(torch.nn.Linear(16, 16))
model = peft.get_peft_model(net, module.InlayConfig(method="bone", args={"r": 8}, target_modules=["0"]))
assert type(model.base_model) is module.InlayModel
print("fine")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr[-2000:]


def test_a_config_survives_json(tmp_path):
    original = InlayConfig(
        method=MiLoRA(r=4, side="middle", scale=0.5, dropout=0.1),
        patterns={"k_proj": {"r": 2}},
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["lm_head"],
        layers_to_transform=[0],
        task_type="CAUSAL_LM",
    )
    original.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "INLAY"
    assert (stored["method"], stored["args"], stored["format_version"]) == (
        "milora",
        {"r": 4, "side": "middle", "skip": None},
        1,
    )
    for cls in (PeftConfig, InlayConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is InlayConfig
        same = {"format_version": None, "inference_mode": None, "peft_version": None, "auto_mapping": None}
        assert {**loaded.to_dict(), **same} == {**original.to_dict(), **same}
        assert loaded.build("k_proj") == MiLoRA(r=2, side="middle", scale=0.5, dropout=0.1)


@every_kind
def test_a_config_from_a_checkpoint_starts_a_fresh_adapter(name, llama_original, tmp_path):
    """The config says that it was loaded, but no tensors follow: the start must be computed, not left empty."""
    model = get_peft_model(copy.deepcopy(llama_original), config(name))
    wander(model)
    model.save_pretrained(tmp_path)
    reused = InlayConfig.from_pretrained(tmp_path)
    reused.inference_mode = False
    fresh, base = get_peft_model(copy.deepcopy(llama_original), reused), logits(llama_original)
    assert difference(logits(fresh), base) == 0
    adam = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-2)
    fresh(TOKENS, labels=TOKENS).loss.backward()
    adam.step()
    assert all(v.isfinite().all() for v in fresh.state_dict().values())
    assert difference(logits(fresh), base) > 1e-4


@every_kind
def test_a_fresh_adapter_of_a_loaded_config_can_be_saved_or_merged_at_once(name, llama_original, tmp_path):
    get_peft_model(copy.deepcopy(llama_original), config(name)).save_pretrained(tmp_path / "one")
    reused = InlayConfig.from_pretrained(tmp_path / "one")
    fresh = get_peft_model(copy.deepcopy(llama_original), reused)
    fresh.save_pretrained(tmp_path / "two")
    stored = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert all(v.isfinite().all() for v in stored.values())
    merged = get_peft_model(copy.deepcopy(llama_original), InlayConfig.from_pretrained(tmp_path / "one"))
    assert torch.equal(logits(merged.merge_and_unload()), logits(llama_original))


def test_a_name_used_twice_replaces_the_adapter(llama):
    get_peft_model(llama, InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="second time|peft_config"):
        model = get_peft_model(llama, InlayConfig(method="bone", args={"r": 4}, target_modules=["q_proj"]))
    assert all("inlay_D" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not [name for name in model.state_dict() if "inlay_A" in name or "inlay_start" in name]


@pytest.mark.parametrize("name", ["a.b", "keys", "items"])
def test_impossible_adapter_names_are_refused(llama, name):
    with pytest.raises(ValueError, match="cannot be called"):
        get_peft_model(llama, InlayConfig(args={"r": 4}, target_modules=["q_proj"]), adapter_name=name)


def test_a_reference_adapter_of_a_reused_config_is_filled(llama, tmp_path):
    """trl's DPO adds a second adapter under the config of the first, which may not have run yet."""
    first = InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"])
    get_peft_model(copy.deepcopy(llama), first).save_pretrained(str(tmp_path))
    model = get_peft_model(llama, InlayConfig.from_pretrained(str(tmp_path)))
    model.add_adapter("ref", model.peft_config["default"])
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


def test_an_adapter_from_before_a_hyperparameter_loads(llama, tmp_path):
    get_peft_model(llama, InlayConfig(method="milora", target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    del stored["args"]["skip"]
    stored["hyperparameters"] = seal.of_values(["milora", stored["args"], None, 0.0, {}])
    file.write_text(json.dumps(stored))
    assert InlayConfig.from_pretrained(tmp_path).build() == MiLoRA()
    stored["args"]["r"] = 9
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="were edited after it was saved"):
        InlayConfig.from_pretrained(tmp_path)


def test_every_hyperparameter_is_stored(llama, tmp_path):
    config = InlayConfig(method="milora", target_modules=["q_proj"])
    get_peft_model(llama, config).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["args"] == {"r": 8, "side": "minor", "skip": None}
