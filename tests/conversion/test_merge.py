"""A merged checkpoint: the adapter's outputs in stock transformers, from files that were never all in memory."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from test_export import IDS, adapter, base, every_method
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli import main
from inlay.host.config import InlayConfig
from inlay.models.adapters import Adapter
from inlay.models.quantized import quantization_config

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")


@every_method
def test_the_merged_model_is_the_adapter(method, tiny, tmp_path):
    model = adapter(tiny, tmp_path / "a", method)
    made = inlay.merge(tmp_path / "a", tmp_path / "m")
    torch.testing.assert_close(base(tmp_path / "m")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert made.logit_error < 1e-4
    assert len(made.lost) == 14
    assert max(made.lost.values()) < 1e-5
    about = json.loads((tmp_path / "m" / "merged_from.json").read_text())
    assert (about["largest_logit_difference"], about["lost_in_rounding"]) == (made.logit_error, made.lost)


@pytest.mark.parametrize("untied", [False, True])
def test_files_are_sharded_and_keep_dtypes_names_and_ties(untied, tmp_path, copy_tokenizer):
    """A bf16 base with one fp32 norm comes out as one, in files of the size asked for, all else bit for bit."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
        tie_word_embeddings=not untied, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    stored["model.norm.weight"] = stored["model.norm.weight"].float()
    save_file(stored, file, metadata={"format": "pt"})
    copy_tokenizer(tmp_path / "base")
    model = get_peft_model(
        base(tmp_path / "base"), InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"])
    )
    perturb(model).save_pretrained(str(tmp_path / "a"))
    made = inlay.merge(tmp_path / "a", tmp_path / "m", shard="40kB")
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert all(f.stat().st_size < 42_000 for f in files)
    new = {k: v for f in files for k, v in load_file(f).items()}
    assert index["weight_map"] == {k: f.name for f in files for k in load_file(f)}
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in new.values())
    assert set(new) == set(stored)
    assert {k for k, v in stored.items() if v.dtype != new[k].dtype} == set()
    assert {k for k, v in stored.items() if not torch.equal(v, new[k])} == {k for k in stored if "q_proj" in k}
    assert base(tmp_path / "m").config.tie_word_embeddings is not untied
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.bfloat16
    for name, lost in made.lost.items():  # rounded once, from the fp32 sum
        layer = model.get_submodule(f"base_model.model.{name}")
        D = layer.get_delta_weight("default").detach()
        exact = stored[f"{name}.weight"].float() + D
        assert torch.equal(new[f"{name}.weight"], exact.bfloat16())
        assert lost == pytest.approx(((exact.bfloat16().float() - exact).norm() / D.norm()).item(), rel=1e-3)


def perturb(model, scale=0.05):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=scale)
    return model.eval()


@pytest.fixture
def copy_tokenizer(small_tokenizer):
    return small_tokenizer.save_pretrained


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    "more",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["norm"]},
    ],
    ids=["head", "embedding", "tokens", "head adapted", "norm"],
)
def test_what_is_tied_and_what_was_trained_whole(more, tiny, tmp_path):
    """The base ties its head to its embedding; where one of them changed alone, the merged model has both."""
    model = adapter(tiny, tmp_path / "a", "bone", **more)
    inlay.merge(tmp_path / "a", tmp_path / "m")
    merged = base(tmp_path / "m")
    assert (model(IDS).logits - base(tiny)(IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings == ("trainable_token_indices" in more)


@pytest.mark.parametrize("bias", ["all", "inlay_only"])
def test_trained_biases(bias, gpt2_original, tmp_path, copy_tokenizer):
    """And transformers' Conv1D, whose weight is kept as (in × out)."""
    gpt2_original.save_pretrained(tmp_path / "gpt2")
    copy_tokenizer(tmp_path / "gpt2")
    more = {"target_modules": ["c_attn", "c_fc", "c_proj"], "bias": bias}
    model = adapter(str(tmp_path / "gpt2"), tmp_path / "a", "bat", **more)
    inlay.merge(tmp_path / "a", tmp_path / "m")
    torch.testing.assert_close(base(tmp_path / "m")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("model", ["tiny", "gpt2"])
def test_a_quantised_checkpoint_merges_to_16_bits(quantize, model, tiny, gpt2_original, tmp_path, copy_tokenizer):
    pytest.importorskip("bitsandbytes")
    folder = tiny
    if model == "gpt2":
        gpt2_original.save_pretrained(tmp_path / "gpt2")
        copy_tokenizer(tmp_path / "gpt2")
        folder = str(tmp_path / "gpt2")
    packed = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config(quantize, torch.float32)
    )
    packed.save_pretrained(tmp_path / "q")
    copy_tokenizer(tmp_path / "q")
    targets = ["q_proj", "down_proj"] if model == "tiny" else ["c_attn"]
    adapter(str(tmp_path / "q"), tmp_path / "a", "pissa", target_modules=targets)
    adapted = Adapter.open(tmp_path / "a").load(torch.float32)[0].eval()
    inlay.merge(tmp_path / "a", tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert getattr(half.config, "quantization_config", None) is None
    inlay.merge(tmp_path / "a", tmp_path / "full", dtype="float32")
    tolerance = 2e-3 if quantize == "nf4" else 0.05  # int8 rounds the activations as well
    torch.testing.assert_close(base(tmp_path / "full")(IDS).logits, adapted(IDS).logits, rtol=tolerance, atol=tolerance)


MEASURED = """
import resource, sys, torch, inlay
import inlay.conversion.merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inlay.merge(sys.argv[1], sys.argv[2], shard="64MB", probe=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_holds_a_file_and_a_weight_not_the_model(tmp_path, copy_tokenizer):
    """A model of 360 MB in fp32 whose largest weight has 16 MB is merged in less than half of its size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8, vocab_size=512
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="64MB")
    copy_tokenizer(tmp_path / "base")
    size = sum(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors"))
    assert size > 300e6
    model = get_peft_model(
        base(tmp_path / "base"), InlayConfig(method="bone", args={"r": 16}, target_modules="all-linear")
    )
    perturb(model).save_pretrained(str(tmp_path / "a"))
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "a"), str(tmp_path / "m")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(run.stdout.split()[-1]) * 1024 < size / 2
    torch.testing.assert_close(base(tmp_path / "m")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_under_other_names(tmp_path, tiny, copy_tokenizer):
    """Of a base model without its head, whose names lack the leading module."""
    small = base(tiny)
    small.model.save_pretrained(tmp_path / "base")
    copy_tokenizer(tmp_path / "base")
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    model = adapter(str(tmp_path / "base"), tmp_path / "a", "milora")
    inlay.merge(tmp_path / "a", tmp_path / "m")
    torch.testing.assert_close(base(tmp_path / "m")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_twin_that_is_stored_as_well(tiny, tmp_path, copy_tokenizer):
    """A tied head that the file holds too is no longer tied once it differs."""
    base(tiny).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    copy_tokenizer(tmp_path / "base")
    model = adapter(str(tmp_path / "base"), tmp_path / "a", "bone", target_modules=["lm_head"])
    inlay.merge(tmp_path / "a", tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(base(tmp_path / "m")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_base_that_only_others_can_read(tiny, tmp_path, capsys, copy_tokenizer):
    """Nothing is written that lacks the adapter."""
    adapter(tiny, tmp_path / "a", "bone")
    base(tiny).save_pretrained(tmp_path / "other")
    copy_tokenizer(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    stored = load_file(file)
    renamed = {k.replace("q_proj.weight", "q_proj.qweight"): v for k, v in stored.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    missing = "does not store model.layers.0.self_attn.q_proj.weight (nor 1 more) plainly"
    for method, says in ((None, missing), ("gptq", "in the format of gptq")):
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        config |= {"quantization_config": {"quant_method": method, "bits": 4}} if method else {}
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=re.escape(says)):
            inlay.merge(tmp_path / "a", tmp_path / "m", model=str(tmp_path / "other"), probe=False)
        assert not (tmp_path / "m").exists()


def test_a_merge_does_not_write_over_what_it_reads(tiny, tmp_path):
    adapter(tiny, tmp_path / "a", "bone")
    inlay.merge(tmp_path / "a", tmp_path / "one", probe=False)
    adapter(str(tmp_path / "one"), tmp_path / "b", "bone")
    for out in (tmp_path / "one", tmp_path / "b", tmp_path):
        with pytest.raises(ValueError, match="which the merge reads"):
            inlay.merge(tmp_path / "b", out, overwrite=True)


def test_the_tokenizer_beside_the_adapter_goes_along(tiny, small_tokenizer, tmp_path):
    adapter(tiny, tmp_path / "a", "bone")
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = "{{ messages }} of the adapter"
    tokenizer.save_pretrained(tmp_path / "a")
    inlay.merge(tmp_path / "a", tmp_path / "m", probe=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == tokenizer.chat_template


def test_a_base_without_a_tokenizer(tiny, tmp_path):
    base(tiny).save_pretrained(tmp_path / "base")
    model = adapter(str(tmp_path / "base"), tmp_path / "a", "bone")
    made = inlay.merge(tmp_path / "a", tmp_path / "m")
    assert made.logit_error < 1e-4
    torch.testing.assert_close(base(tmp_path / "m")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_mistakes_are_named_and_leave_nothing(tiny, tmp_path, capsys, copy_tokenizer):
    adapter(tiny, tmp_path / "a", "bone", scale=1e6)
    torch.manual_seed(1)
    other = base(tiny)
    for p in other.parameters():
        p.data = torch.randn_like(p)
    other.save_pretrained(tmp_path / "other")
    copy_tokenizer(tmp_path / "other")
    before = sorted(p.name for p in tmp_path.iterdir())
    capsys.readouterr()
    cases = {
        ("a", "--shard", "4 eggs"): "'4 eggs' is no size",
        ("a", "--shard", "0"): "'0' is no size",
        ("a", "--dtype", "float16"): "does not fit torch.float16",
        ("a", "--model", str(tmp_path / "other")): "was cut from another base model",
        ("nothing",): "nothing does not exist",
    }
    for (name, *extra), says in cases.items():
        with pytest.raises(SystemExit) as stop:
            main(["merge", str(tmp_path / name), str(tmp_path / "out"), *extra])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert says in said, said
        assert len(said.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
