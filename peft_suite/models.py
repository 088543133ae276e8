"""Tiny random models under the hub ids that PEFT's tests ask for, laid out as the hub's own cache lays them out."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t

REVISION = "0" * 40
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 1024}
LLAMA = {**WIDE, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 512}
BERT = {**WIDE, "intermediate_size": 37, "max_position_embeddings": 512, "pad_token_id": 0}
OPT = {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512}
NF4 = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 12}  # 4-bit blocks are 64 wide
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 1024, "n_positions": 512, "bos_token_id": 0}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 1024, "max_position_embeddings": 512,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 1024,
    "decoder_start_token_id": 0,
}  # fmt: skip
DEBERTA = {**BERT, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 64}

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, t.OPTConfig, OPT),
    "peft-internal-testing/opt-125m": (t.OPTForCausalLM, t.OPTConfig, {**OPT, **NF4}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, t.GPT2Config, GPT),
    "peft-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, t.GPT2Config, GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (t.GPTJForCausalLM, t.GPTJConfig, {**GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig, LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, GEMMA),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        t.T5ForConditionalGeneration, t.T5Config, T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        t.BartForConditionalGeneration, t.BartConfig, BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": (t.BertModel, t.BertConfig, BERT),
    "peft-internal-testing/tiny-random-RobertaModel": (t.RobertaModel, t.RobertaConfig, BERT),
    "peft-internal-testing/tiny-random-DebertaModel": (t.DebertaModel, t.DebertaConfig, DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": (t.DebertaV2Model, t.DebertaV2Config, DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        t.BertForSequenceClassification, t.BertConfig, BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        t.RobertaForSequenceClassification, t.RobertaConfig, BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        t.LlamaForSequenceClassification, t.LlamaConfig, LLAMA,
    ),
}  # fmt: skip


def write(hub: Path) -> None:
    """Fill a hub cache, as `HF_HUB_CACHE` names it, with whichever models it lacks."""
    for name, (model, config, values) in MODELS.items():
        folder = hub / f"models--{name.replace('/', '--')}"
        if not (folder / "refs" / "main").exists():
            torch.manual_seed(0)
            model(config(**values)).save_pretrained(folder / "snapshots" / REVISION)
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / "main").write_text(REVISION)
