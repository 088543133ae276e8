"""Packed GGUF files, by the package gguf and by llama.cpp's own tool, and Ollama's Modelfile."""

import copy
import json
import stat

import gguf
import numpy as np
import pytest
import torch
from helpers import fails
from test_export import IDS, adapter, base
from transformers import GenerationConfig

import inlay
from inlay.cli import main
from inlay.conversion.gguf_types import BY_LLAMA_CPP, PACKED, lost_share, packed
from inlay.conversion.merge_weights import load_merged
from inlay.conversion.modelfile import message_texts, modelfile

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TEXTS = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")}
LLAMA3 = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", list(PACKED))
def test_packing_is_ggufs_own_and_says_what_it_lost(kind):
    W = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    made, chosen = packed(W, "blk.0.attn_q.weight", kind)
    assert chosen.name == kind.upper()
    assert np.array_equal(made, gguf.quants.quantize(W, chosen))
    back = gguf.quants.dequantize(made, chosen)
    assert lost_share(W, made, chosen) == pytest.approx(np.linalg.norm(back - W) / np.linalg.norm(W), rel=1e-5)
    assert packed(W, "output.weight", kind)[1].name == "Q8_0"
    assert packed(W[:, :40], "blk.0.attn_q.weight", kind)[1].name == "F16"


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 0.01), ("q4_0", 0.12)])
def test_a_packed_model_comes_back(kind, most, tiny, tmp_path, capsys):
    model = adapter(tiny, tmp_path / "a", "bone")
    main(["merge", str(tmp_path / "a"), str(tmp_path / "m"), "--to", "gguf", "--gguf-type", kind])
    said = capsys.readouterr().out
    assert f"{kind}: a matrix is off by" in said
    assert "logit difference" in said
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m" / "model.gguf").tensors}
    assert tensors["blk.1.ffn_down.weight"] == kind.upper()
    assert tensors["token_embd.weight"] == "Q8_0"
    assert tensors["blk.0.attn_norm.weight"] == "F32"
    back = load_merged(tmp_path / "m", base(tiny).config).eval()
    merged = model.merge_and_unload()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        now, then = back.get_parameter(name), merged.get_parameter(name)
        assert 0 < (now - then).norm() / then.norm() < most
    assert (back(IDS).logits - model(IDS).logits).abs().max() < 10 * most


def test_llama_cpps_own_types_are_made_by_its_tool(tiny, tmp_path, monkeypatch, capsys):
    adapter(tiny, tmp_path / "a", "bone")
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "m"), "--to", "gguf", "--gguf-type", "q4_k_m", "--no-probe"]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    said = fails(capsys, *command)
    assert "q4_k_m is made by llama.cpp's llama-quantize, which is not on the PATH" in said
    assert "q8_0" in said
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$3" > "$2"\n/bin/cat "$1" >> "$2"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    main(command)
    assert (tmp_path / "m" / "model.gguf").read_bytes().startswith(b"Q4_K_M\nGGUF")
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"model.gguf", "Modelfile", "merged_from.json"}
    tool.write_text("#!/bin/sh\necho no room >&2\nexit 3\n")
    assert "ended with status 3, and said: no room" in fails(capsys, *command, "--overwrite")
    assert (tmp_path / "m" / "model.gguf").read_bytes().startswith(b"Q4_K_M")
    assert "q4_k_m" in BY_LLAMA_CPP


def test_types_that_do_not_fit_are_one_line(tmp_path, capsys):
    command = ["merge", str(tmp_path / "no"), str(tmp_path / "m")]
    assert "did you mean 'q4_0'?" in fails(capsys, *command, "--to", "gguf", "--gguf-type", "q4-0")
    assert "are for to='gguf'" in fails(capsys, *command, "--gguf-type", "q8_0")
    both = fails(capsys, *command, "--to", "gguf", "--gguf-type", "f16", "--dtype", "bfloat16")
    assert "made of float16; leave out dtype='bfloat16'" in both


@pytest.fixture
def tokenizer(small_tokenizer):
    return copy.deepcopy(small_tokenizer)


def test_a_modelfile_holds_the_template_its_end_and_the_system(small_tokenizer):
    """SmolLM2's template puts a system message in itself where there is none."""
    made = modelfile("model.gguf", small_tokenizer, GenerationConfig(eos_token_id=2)).splitlines()
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert made[0] == "FROM ./model.gguf"
    assert f'SYSTEM """{own}"""' in made
    assert made[-2:] == ['PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0"]
    drawn = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1, eos_token_id=2
    )
    made = modelfile("model.gguf", small_tokenizer, drawn, system="Be short.")
    assert 'SYSTEM """Be short."""' in made
    for line in ("temperature 0.6", "top_p 0.9", "top_k 20", "repeat_penalty 1.1"):
        assert f"PARAMETER {line}\n" in made
    assert own not in made


@pytest.mark.parametrize(
    ("template", "texts", "begin"),
    [
        (CHATML, CHATML_TEXTS, "<|im_start|>assistant\n"),
        (LLAMA3, {r: (f"[{r}]\n\n", "<|im_end|>") for r in CHATML_TEXTS}, "[assistant]\n\n"),
        (CHATML.replace("{% for", "{{ messages | length }}{% for"), None, None),
        (CHATML.replace("<|im_start|>", "{{'{{'}} "), None, None),
        ("{{ messages[-1]['content'] }}", None, None),
        ("{{ raise_exception('no') }}", None, None),
    ],
)
def test_a_template_is_written_where_texts_around_messages_are_all_of_it(template, texts, begin, tokenizer):
    tokenizer.chat_template = template
    found = message_texts(tokenizer)
    assert found == (None if texts is None else (texts, begin, ""))
    made = modelfile("model.gguf", tokenizer, GenerationConfig(eos_token_id=2))
    assert ('TEMPLATE """' in made) is (texts is not None)


def test_go_would_write_the_chat_as_the_template_does(small_tokenizer):
    """Go's branches, done here: what Ollama sends is what training used."""
    texts, begin, own = message_texts(small_tokenizer)
    chat = [("system", own), ("user", "Hello"), ("assistant", "Hi."), ("user", "Bye")]
    made = "".join(f"{texts[role][0]}{content}{texts[role][1]}" for role, content in chat) + begin
    messages = [{"role": role, "content": content} for role, content in chat[1:]]
    assert made == small_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_merge_writes_the_runs_system_message(tiny, tmp_path):
    adapter(tiny, tmp_path / "run" / "adapter", "bone")
    (tmp_path / "run" / "recipe.yaml").write_text("system: Be short.\n")
    main(["merge", str(tmp_path / "run"), str(tmp_path / "m"), "--to", "gguf", "--no-probe"])
    assert 'SYSTEM """Be short."""' in (tmp_path / "m" / "Modelfile").read_text()
    assert json.loads((tmp_path / "m" / "merged_from.json").read_text())["scale"] == 1.0
    with pytest.raises(ValueError, match="are for to='gguf'"):
        inlay.merge(tmp_path / "run", tmp_path / "n", system="x")
    assert torch.is_grad_enabled()
