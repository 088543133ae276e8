"""A merged model as GGUF, read back by transformers, and what is said where it cannot be written."""

import json
import math
from pathlib import Path

import gguf
import pytest
import torch
from test_export import IDS, adapter, base
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import inlay
from inlay.cli import main
from inlay.conversion.gguf_model import pre_tokenizer
from inlay.conversion.merge_weights import load_merged
from inlay.models import builtin

SIZE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def folder_of(small_tokenizer):
    """Makes a random model of a family with the small tokenizer."""

    def make(out: Path, kind: str, **more) -> str:
        cls, own = FAMILIES[kind]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(cls(vocab_size=len(small_tokenizer) + 5, **SIZE, **own, **more))
        with torch.no_grad():
            for p in model.parameters():  # norms and biases that are not ones and zeros
                p.add_(torch.randn_like(p), alpha=0.05)
        model.save_pretrained(out)
        small_tokenizer.save_pretrained(out)
        return str(out)

    return make


def fields(file: Path) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(file)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in FAMILIES), ("llama", "bfloat16")])
def test_a_merged_model_comes_back_from_its_file(kind, dtype, tmp_path, folder_of, small_tokenizer):
    folder = folder_of(tmp_path / "base", kind)
    model = adapter(folder, tmp_path / "a", "bone")
    made = inlay.merge(tmp_path / "a", tmp_path / "m", to="gguf", dtype=dtype, probe=dtype == "bfloat16")
    back = load_merged(tmp_path / "m", base(folder).config).eval()
    tolerance = 1e-4 if dtype == "float32" else 0.1
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=tolerance, atol=tolerance)
    assert (made.logit_error or 0.0) < tolerance
    about, tensors = fields(tmp_path / "m" / "model.gguf")
    kinds = {t.tensor_type.name for t in tensors.values() if len(t.shape) == 2}
    assert kinds == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    assert ("output.weight" in tensors) is not base(folder).config.tie_word_embeddings
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"model.gguf", "Modelfile", "merged_from.json"}
    assert "FROM ./model.gguf" in (tmp_path / "m" / "Modelfile").read_text()
    tokens = about["tokenizer.ggml.tokens"]
    assert tokens[:1000] == small_tokenizer.convert_ids_to_tokens(range(1000))
    assert tokens[-5:] == [f"[PAD{len(small_tokenizer) + i}]" for i in range(5)]
    assert about["tokenizer.ggml.token_type"][:18] == [3] * 17 + [1]
    assert about["tokenizer.ggml.token_type"][-5:] == [5] * 5
    assert about["tokenizer.ggml.eos_token_id"] == small_tokenizer.eos_token_id
    assert about["tokenizer.chat_template"] == small_tokenizer.chat_template


@pytest.mark.slow
def test_the_builtin_model_is_what_its_own_file_says(real_model, tmp_path):
    """Metadata and layout against the file it was published in; only the kind of numbers differs."""
    adapter(str(builtin.model_dir()), tmp_path / "a", "pissa", scale=0.0, target_modules=["q_proj"])
    inlay.merge(tmp_path / "a", tmp_path / "m", to="gguf", probe=False)
    ours, tensors = fields(tmp_path / "m" / "model.gguf")
    theirs, published = fields(builtin.gguf_path())
    assert {t: list(v.shape) for t, v in tensors.items()} == {t: list(v.shape) for t, v in published.items()}
    for name in ("blk.0.attn_q.weight", "blk.3.attn_k.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        numbers = gguf.quants.dequantize(published[name].data, published[name].tensor_type)
        assert torch.equal(torch.from_numpy(numbers.copy()), torch.from_numpy(tensors[name].data.copy()))
    own = {k: v for k, v in theirs.items() if k.startswith(("llama.", "tokenizer.ggml."))}
    for key in ("pre", "add_space_prefix", "add_bos_token"):  # transformers' conversion of the file tells of none
        own.pop(f"tokenizer.ggml.{key}")
    for key, value in own.items():
        assert ours[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def test_llama_3_slows_its_rotations(tmp_path, folder_of):
    """The factors by the formula of its paper's code, not by transformers' function."""
    folder = folder_of(tmp_path / "base", "llama", rope_parameters=LLAMA3)
    adapter(folder, tmp_path / "a", "bone")
    inlay.merge(tmp_path / "a", tmp_path / "m", to="gguf", probe=False)
    _, tensors = fields(tmp_path / "m" / "model.gguf")
    found = tensors["rope_freqs.weight"].data.tolist()
    for i, factor in enumerate(found):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 16)
        smooth = (128 / wavelength - 1.0) / (4.0 - 1.0)
        wanted = 1.0 if wavelength < 128 / 4 else 8.0 if wavelength > 128 else 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(wanted, rel=1e-5)
    assert len(set(found)) > 2


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (split_by(WORDS + r"\p{N}{1,3}" + REST), "llama-bpe"),
        (split_by(WORDS + r"\p{N}" + REST), "qwen2"),
        (split_by("[a-z]+"), None),
        (pre_tokenizers.Metaspace(), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]), None),
    ],
)
def test_how_a_tokenizer_splits(made, name, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = made
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert pre_tokenizer(tmp_path) == name


def test_what_cannot_be_written_says_what_to_run(tmp_path, gpt2_original, capsys, folder_of, small_tokenizer):
    cases = {"positions of type yarn are": {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}}
    folder = folder_of(tmp_path / "base", "llama", **cases["positions of type yarn are"])
    adapter(folder, tmp_path / "a", "bone")
    gpt2_original.save_pretrained(tmp_path / "gpt2")
    small_tokenizer.save_pretrained(tmp_path / "gpt2")
    adapter(str(tmp_path / "gpt2"), tmp_path / "b", "bone", target_modules=["c_attn"])
    other = folder_of(tmp_path / "c", "llama")
    content = json.loads((Path(other) / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (Path(other) / "tokenizer.json").write_text(json.dumps(content))
    adapter(other, tmp_path / "d", "bone")
    adapter(folder_of(tmp_path / "f", "llama", hidden_act="gelu"), tmp_path / "e", "bone")
    capsys.readouterr()
    said_of = {
        "a": "positions of type yarn",
        "b": "gpt2 models",
        "d": "its tokenizer",
        "e": "models with gelu in place of silu",
    }
    for name, says in said_of.items():
        with pytest.raises(SystemExit) as stop:
            main(["merge", str(tmp_path / name), str(tmp_path / "out"), "--to", "gguf"])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert f"{says}" in said
        assert "convert_hf_to_gguf.py" in said
        assert len(said.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
