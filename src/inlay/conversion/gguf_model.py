"""A whole model as one GGUF file, for llama.cpp and Ollama: its shape, its tokenizer and its weights.

Only what this file knows to be right is written: four families of models, byte-level BPE tokenizers whose way to split
a text has a name in llama.cpp. For all else the error says which of llama.cpp's own scripts to run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import ROPE_INIT_FUNCTIONS, PreTrainedTokenizerBase

from inlay.conversion.gguf_lora import ARCHITECTURES, close_writer, interleaved
from inlay.conversion.gguf_types import BY_LLAMA_CPP, PACKED, lost_share, packed, quantize_file
from inlay.conversion.merge_weights import New
from inlay.files.untrusted import read_regular

FILE = "model.gguf"
MODELS = ("llama", "mistral", "qwen2", "qwen3")
KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


# How a tokenizer splits a text before its merges, and llama.cpp's name for that.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    (WORDS % r"\p{N}", "bytes"): "qwen2",
}


def write_merged(
    folder: Path,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Iterable[New],
    out: str,
    kind: str | None = None,
) -> tuple[list[New], dict[str, float]]:
    """Write a merged model with its tokenizer into a folder that will be `out`.

    The tensors pass through a temporary file, in $TMPDIR, of the model's size. `kind` is the type of the matrices (see
    `gguf_types`); None: that of the tensors' dtype. Beside the tensors, what packing lost of each is returned.
    """
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        config.save_pretrained(saved)
        split = check_model(config, Path(saved), out)
        written, lost = write_model(folder / FILE, config, Path(saved), split, tensors, kind)
    if kind in BY_LLAMA_CPP:
        quantize_file(folder / FILE, kind)
    return written, lost


def check_model(config: Any, tokenizer: Path, out: str) -> str:
    """Return llama.cpp's name for how a model's tokenizer splits a text.

    Raises:
        ValueError: the model or its tokenizer is none that is written here; it says what to run.
    """
    split, unknown = pre_tokenizer(tokenizer), None
    if config.model_type not in MODELS:
        unknown = f"{config.model_type} models are"
    elif config.hidden_act != "silu":
        unknown = f"models with {config.hidden_act} in place of silu are"
    elif len(set(getattr(config, "layer_types", None) or ())) > 1:
        unknown = "models with several kinds of attention are"
    elif config.rope_parameters["rope_type"] not in ("default", "llama3"):
        unknown = f"positions of type {config.rope_parameters['rope_type']} are"
    elif split is None:
        unknown = "its tokenizer is"
    if unknown:
        raise ValueError(
            f"{unknown} not written as GGUF here; merge without --to gguf, then run llama.cpp's "
            f"convert_hf_to_gguf.py {out}"
        )
    return str(split)


def pre_tokenizer(folder: Path) -> str | None:
    """Return llama.cpp's name for how a byte-level BPE tokenizer splits a text; None for any other tokenizer."""
    file = folder / "tokenizer.json"
    content = json.loads(read_regular(file)) if file.exists() else {}
    first = content.get("pre_tokenizer") or {}
    steps = []
    for step in first.get("pretokenizers", [first]):
        kinds = {"ByteLevel": "ByteLevel" if step.get("use_regex", True) else "bytes"}
        pattern = step.get("pattern", {}).get("Regex") if step.get("behavior") == "Isolated" else None
        steps.append(kinds.get(step.get("type"), pattern or step.get("type")))
        if step.get("add_prefix_space") or (step.get("type") == "Digits" and not step.get("individual_digits")):
            return None
    return SPLITS.get(tuple(steps)) if content.get("model", {}).get("type") == "BPE" else None


def write_model(
    path: Path, config: Any, tokenizer: Path, split: str, tensors: Iterable[New], kind: str | None = None
) -> tuple[list[New], dict[str, float]]:
    """Write a whole model as one GGUF file, its tensors one at a time, and return them without their values.

    Beside them, the share of each packed weight's norm that was lost is returned.

    Args:
        path: of the file.
        config: the model's.
        tokenizer: the folder with the tokenizer's files.
        split: what `check_model` gave.
        tensors: matrices keep their dtype (fp32, fp16 or bf16), vectors are fp32, as llama.cpp wants them.
        kind: a type of `PACKED`, in which matrices are written instead.
    """
    arch = ARCHITECTURES[config.model_type][0]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    add_settings(writer, config)
    add_tokenizer(writer, config, tokenizer, split)
    if kind in PACKED:
        writer.add_file_type(PACKED[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    written = []
    lost: dict[str, float] = {}
    for new in tensors:
        if new.name.endswith("rotary_emb.inv_freq"):
            continue
        module, _, end = new.name.rpartition(".")
        name = names.get_name(module)
        if name is None:
            raise ValueError(f"{new.name} has no name in llama.cpp; merge without --to gguf")
        value = interleaved(new.value, module, config)
        if value.ndim > 1 and kind in PACKED:
            numbers = value.float().contiguous().numpy()
            made, chosen = packed(numbers, f"{name}.{end}", kind)
            writer.add_tensor(f"{name}.{end}", made, raw_dtype=chosen)
            lost[new.name] = lost_share(numbers, made, chosen)
        else:
            add_tensor(writer, f"{name}.{end}", value if value.ndim > 1 else value.float())
        written.append(New(new.key, new.name, new.value.new_empty(0), new.lost))
    for name, value in rope_factors(config):
        add_tensor(writer, name, value)
    close_writer(writer)
    return written, lost


def add_tensor(writer: gguf.GGUFWriter, name: str, value: Tensor) -> None:
    """Add one tensor, in its own dtype."""
    kind = KINDS[value.dtype]
    numbers: Any = gguf.quants.quantize(value.float().contiguous().numpy(), kind)
    writer.add_tensor(name, numbers, raw_dtype=kind)


def rope_factors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield Llama 3's slowed rotations, as factors on the usual ones."""
    if config.rope_parameters["rope_type"] == "llama3":
        usual = config.rope_parameters["rope_theta"] ** -(
            torch.arange(0, head_dim(config), 2).float() / head_dim(config)
        )
        yield "rope_freqs.weight", usual / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]


def head_dim(config: Any) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    """Add the model's shape."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(config.sliding_window)


def add_tokenizer(writer: gguf.GGUFWriter, config: Any, folder: Path, split: str) -> None:
    """Add tokens, merges, special tokens and the chat template."""
    content = json.loads(read_regular(folder / "tokenizer.json"))
    kinds = {i: (token, gguf.TokenType.NORMAL) for token, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        kinds[token["id"]] = token["content"], kind
    rest = gguf.TokenType.UNUSED
    tokens, types = zip(*(kinds.get(i, (f"[PAD{i}]", rest)) for i in range(config.vocab_size)), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size).add_to_gguf(writer, quiet=True)
