"""`--scale`: the strength of an adapter in generate, eval, merge and export."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import fails
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli import main
from inlay.evaluation import answering

TEXT = "The Vaults is a pub."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, small_tokenizer):
    folder = tmp_path_factory.mktemp("scale") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(small_tokenizer), max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


def save_adapter(tiny, folder, method="pissa", **more):
    config = inlay.InlayConfig(method=method, args={"r": 4}, target_modules=["q_proj", "down_proj"], **more)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def adapter(tiny, tmp_path):
    return save_adapter(tiny, tmp_path / "adapter", task_type="CAUSAL_LM")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None]).logits


def at(tiny, adapter, scale: float) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)
    inlay.set_scale(model, scale)
    return logits(model)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.5])
def test_merge_and_export_write_the_adapter_at_its_scale(scale, tiny, adapter, tmp_path, capsys):
    main(["merge", adapter, str(tmp_path / "merged"), "--scale", str(scale)])
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, at(tiny, adapter, scale), rtol=1e-5, atol=1e-5)
    main(["export", adapter, str(tmp_path / "lora"), "--scale", str(scale)])
    lora = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "lora"))
    torch.testing.assert_close(lora, at(tiny, adapter, scale), rtol=1e-5, atol=1e-5)
    if scale == 0:
        assert torch.equal(merged, logits(AutoModelForCausalLM.from_pretrained(tiny)))
    else:
        assert (merged - logits(AutoModelForCausalLM.from_pretrained(tiny))).abs().max() > 0.01


def test_merging_at_half_the_scale_is_halfway(tiny, adapter, tmp_path, capsys):
    for scale in (0.5, 1.0):
        main(["merge", adapter, str(tmp_path / f"at-{scale}"), "--scale", str(scale), "--no-probe"])
    base, half, whole = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (tiny, tmp_path / "at-0.5", tmp_path / "at-1.0")
    )
    for name in base:
        torch.testing.assert_close(half[name], (base[name] + whole[name]) / 2, rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        base["model.layers.0.self_attn.q_proj.weight"], half["model.layers.0.self_attn.q_proj.weight"]
    )


def test_generate_answers_with_the_adapter_at_its_scale(tiny, adapter, capsys, monkeypatch):
    asked = []

    def grow(model, *_, **__):
        asked.append(logits(model))

    monkeypatch.setattr(answering, "grow", grow)
    for scale in ("0", "0.5"):
        main(["generate", adapter, "--prompt", TEXT, "--scale", scale, "--dtype", "float32"])
    assert torch.equal(asked[0], logits(AutoModelForCausalLM.from_pretrained(tiny)))
    torch.testing.assert_close(asked[1], at(tiny, adapter, 0.5))


def test_eval_judges_the_adapter_at_its_scale(tiny, adapter, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": TEXT}))
    out = tmp_path / "scores"
    ask = ["--task", "perplexity", "--data", str(tmp_path / "d.jsonl"), "--dtype", "float32", "--output", str(out)]
    main(["eval", adapter, *ask, "--base"])
    for more in (["--scale", "0"], ["--scale", "0.5"], ["--scale", "0.5", "--merged"]):
        main(["eval", adapter, *ask, *more])
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    start = f"perplexity-{tmp_path.name}-d"
    assert sorted(found) == sorted(
        f"{start}{end}" for end in ("", "-base", "-scale-0", "-scale-0-5", "-merged-scale-0-5")
    )
    figures = {name.removeprefix(start): about["figures"] for name, about in found.items()}
    assert figures["-scale-0"] == figures["-base"] != figures[""]
    value = {name: f[0]["value"] for name, f in figures.items()}
    assert value["-scale-0-5"] == pytest.approx(value["-merged-scale-0-5"], rel=1e-4)
    assert value["-scale-0-5"] not in (value[""], value["-base"])
    assert found[f"{start}-scale-0-5"]["scale"] == 0.5


def test_a_scale_that_means_nothing_is_one_line(tiny, adapter, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": TEXT}))
    ask = ["--task", "perplexity", "--data", str(tmp_path / "d.jsonl")]
    for verb in (["generate", adapter, "--prompt", "a"], ["merge", adapter, str(tmp_path / "m")]):
        assert "scale=nan is not a finite number" in fails(capsys, *verb, "--scale", "nan")
    assert "there is no adapter" in fails(capsys, "generate", "--prompt", "a", "--scale", "0.5")
    assert "--scale are for one" in fails(capsys, "eval", str(tiny), *ask, "--scale", "0.5")
    biased = save_adapter(tiny, tmp_path / "biased", task_type="CAUSAL_LM", bias="all")
    whole = save_adapter(tiny, tmp_path / "whole", task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    for folder, what in ((biased, "trained biases"), (whole, "lm_head")):
        for verb in (
            ["generate", folder, "--prompt", "a"],
            ["merge", folder, str(tmp_path / "m")],
            ["eval", folder, *ask],
        ):
            assert what in fails(capsys, *verb, "--scale", "0.5")
    assert not (tmp_path / "m").exists()


def test_a_fold_and_an_adapter_of_peft_have_no_scale(tiny, tmp_path, capsys):
    """A fold's base is not whole without it: at 0 it would be a residual."""
    folder = save_adapter(tiny, tmp_path / "piece", task_type="CAUSAL_LM")
    path = tmp_path / "piece" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "folded": True, "hyperparameters": None, "seals": None})
    )
    for verb in ("generate", "merge", "export"):
        where = [] if verb == "generate" else [str(tmp_path / "out")]
        assert "by a fold" in fails(capsys, verb, folder, *where, "--scale", "0.5")
    peft = tmp_path / "peft"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(peft)
    assert "one of PEFT's own" in fails(capsys, "generate", str(peft), "--prompt", "a", "--scale", "0.5")
