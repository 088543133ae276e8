"""A run of `inlay train` on a mixture of experts, of which the busiest are trained."""

import json

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from inlay.recipe.recipe import Recipe
from inlay.training.dry_run import dry_run
from inlay.training.train import train


@pytest.mark.slow
def test_a_run_trains_the_busiest_experts(tmp_path, small_tokenizer, records):
    torch.manual_seed(0)
    settings = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, vocab_size=len(small_tokenizer), bos_token_id=small_tokenizer.bos_token_id,
        eos_token_id=small_tokenizer.eos_token_id, pad_token_id=small_tokenizer.pad_token_id,
    )  # fmt: skip
    MixtralForCausalLM(settings).save_pretrained(tmp_path / "base")
    small_tokenizer.save_pretrained(tmp_path / "base")
    recipe = Recipe(
        model=str(tmp_path / "base"), data=records, output=str(tmp_path / "run"), method="pissa", args={"r": 2},
        experts=2, steps=2, batch_size=2, eval_size=4, samples=1, dtype="float32", calibration=2,
    )  # fmt: skip
    console = Console(record=True, width=200)
    dry_run(recipe, console)
    assert "memory at the peak of a step" in console.export_text()
    train(recipe, console)
    said = console.export_text()
    assert "2 experts of each layer are trained, which get" in said
    assert "stay frozen" not in said
    chosen = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["experts"]
    assert [len(own) for own in chosen.values()] == [2, 2]
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    shapes = {k.rpartition("layers.0.")[2]: v.shape for k, v in tensors.items()}
    assert shapes["mlp.experts.down_proj.inlay_A.weight"] == (2, 2, 24)
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["experts"] == chosen
