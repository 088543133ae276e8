"""PEFT's own adapters as Inlay adapters: stock PEFT is the judge of what they compute."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import inlay
from inlay.cli import main
from inlay.host.layer import InlayLinear

IDS = torch.arange(24)[None]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["up_proj", "down_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),  # PEFT's, of a second adapter
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def base(folder: str, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def shake(model: torch.nn.Module, scale: float = 0.02) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=scale)


def theirs(folder: str, out: Path, config, scale: float = 0.02, initial: Path | None = None) -> PeftModel:
    """An adapter of PEFT's, trained a little, saved in `out` (and before that in `initial`)."""
    model = get_peft_model(base(folder), config).eval()
    if initial is not None:
        model.save_pretrained(str(initial))
    shake(model, scale)
    model.save_pretrained(str(out))
    return model


def ours(folder: str, adapter: Path, **more) -> PeftModel:
    return PeftModel.from_pretrained(base(folder), str(adapter), **more).eval()


def same(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(IDS).logits, other(IDS).logits, rtol=tolerance, atol=tolerance)


LORAS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "regex": {"target_modules": r".*layers\.1\..*(k|up)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "absent": {"target_modules": ["q_proj", "query"]},
    "rslora": {"use_rslora": True, "lora_alpha": 7, "target_modules": ATTENTION},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2, r"layers\.1\..*": 6},
        "alpha_pattern": {"(k|v)_proj": 3, "model.layers.0.mlp.up_proj": 32},
    },
    "rslora with patterns": {
        "use_rslora": True,
        "target_modules": ATTENTION,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "dropout": {"target_modules": ATTENTION, "lora_dropout": 0.1},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "random": {"target_modules": ATTENTION, "init_lora_weights": False},
    "orthogonal": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
    "more ranks than outputs": {"target_modules": ATTENTION, "r": 80},
    "whole modules": {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "norm"]},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": [3, 5]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "pissa": {"target_modules": "all-linear", "init_lora_weights": "pissa"},
    "pissa, scaled": {"target_modules": ATTENTION, "init_lora_weights": "pissa", "lora_alpha": 12, "use_rslora": True},
    "pissa, patterns": {"target_modules": ATTENTION, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 7}},
    "olora": {"target_modules": "all-linear", "init_lora_weights": "olora"},
    "olora, nearly full": {"target_modules": ATTENTION, "init_lora_weights": "olora", "r": 24},
}


@pytest.mark.parametrize("case", LORAS)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
@pytest.mark.filterwarnings("ignore:.*lm_head.*:UserWarning")
def test_a_lora_computes_the_same(case, tiny, tmp_path):
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **LORAS[case]}
    model = theirs(tiny, tmp_path / "peft", LoraConfig(**settings))
    done = inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
    start = str(settings.get("init_lora_weights"))
    assert done.method == ("pissa" if "pissa" in start else "lora")
    mine = ours(tiny, done.folder)
    same(mine, model)
    with torch.no_grad(), mine.disable_adapter():
        if "modules_to_save" not in settings and "trainable_token_indices" not in settings:
            assert torch.equal(mine(IDS).logits, base(tiny)(IDS).logits)
