"""PEFT's own adapters: what their configurations ask for is held against their files before it is built."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from inlay.models.adapters import WEIGHTS, Adapter

TOKENS = torch.arange(16).view(2, 8)
WHERE = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
CONFIGS = {
    "lora": LoraConfig(r=2, **WHERE),
    "patterns": LoraConfig(r=2, rank_pattern={"q_proj": 3}, **WHERE),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", **WHERE),
    "dora": LoraConfig(r=2, use_dora=True, **WHERE),
    "head": LoraConfig(r=2, modules_to_save=["lm_head"], **WHERE),
    "tokens": LoraConfig(r=2, trainable_token_indices=[1, 2], **WHERE),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, **WHERE),
    "ia3": IA3Config(feedforward_modules=["down_proj"], **WHERE),
    "loha": LoHaConfig(r=2, **WHERE),
    "vera": VeraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def saved(name: str, base, folder) -> torch.Tensor:
    """Save an adapter whose parameters have moved; its logits."""
    model = get_peft_model(base, copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn_like(p))
        model.save_pretrained(str(folder))
        return model(input_ids=TOKENS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_that_peft_saves_is_read_as_it_was(name, llama, llama_original, tmp_path):
    before = saved(name, llama, tmp_path)
    model = Adapter.open(tmp_path, "base").attach(copy.deepcopy(llama_original)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lora", {"r": 10**9}),
        ("lora", {"rank_pattern": {".*": 10**9}}),
        ("lora", {"r": 10**9, "init_lora_weights": "pissa"}),
        ("loha", {"r": 10**9}),
        ("vera", {"r": 10**9}),
        ("prefix", {"num_virtual_tokens": 10**9}),
        ("prompt", {"num_virtual_tokens": 10**9}),
    ],
)
def test_a_size_that_the_file_does_not_have_takes_no_memory(name, changes, llama, llama_original, tmp_path):
    saved(name, llama, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"its configuration asks for \S+ of (64|.*10{9}).* numbers; its file has"):
        Adapter.open(tmp_path, "base").attach(llama_original)


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_lacks_a_tensor_is_refused(llama, llama_original, tmp_path):
    """PEFT warns, and computes with what it drew at random."""
    saved("lora", llama, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(key for key in tensors if "lora_A" in key)
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"asks for {name}, which its file does not hold"):
        Adapter.open(tmp_path, "base").attach(llama_original)
