"""Finding and loading a base model, and an adapter on it, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from inlay.host import distributed
from inlay.host.bitsandbytes_guard import readable
from inlay.messages import loading
from inlay.models import builtin
from inlay.models.folded import FOLDED, fold_at
from inlay.models.model_classes import SEQ2SEQ, SEQUENCE, auto_class

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str) -> str:
    """A model's name as a folder or hub id; the built-in one also under the folder another machine kept it in.

    Raises:
        ValueError: it looks like a path and nothing is there.
    """
    if name == builtin.MODEL or (not Path(name).exists() and Path(name).name.startswith(builtin.FOLDER)):
        return str(builtin.model_dir())
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        raise ValueError(f"{name} is packed for llama.cpp; give the folder or hub id of the model it was made of")
    if path.exists():
        path = path / "base" if fold_at(name) else path
        if (path / "recipe.yaml").exists() and (path / "model" / "config.json").exists():  # a run of full fine-tuning
            path = path / "model"
        if not (path / "config.json").exists():
            raise ValueError(f"{name} is no model folder: it has no config.json")
        return str(path.resolve())  # an adapter names its base, and may be used from another folder
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model folder {name} does not exist; give a folder, a hub id (owner/name) or builtin")
    return name


def dtype_for(name: str) -> torch.dtype:
    """The dtype to compute in. `auto`: bf16 where the hardware multiplies it (a CPU without is 2.7 times slower)."""
    if name != "auto":
        return DTYPES[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capable = torch.cpu.get_capabilities()
    return torch.bfloat16 if capable.get("amx_bf16") or capable.get("avx512_bf16") else torch.float32


def stored_dtype(name: str, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype a model's checkpoint is in."""
    dtype = load_config(name, trust_remote_code).get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype), torch.float32)


def load_base(
    name: str, dtype: torch.dtype, revision: str | None = None, trust_remote_code: bool = False, **more: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer; as `load_model`."""
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    return load_model(name, dtype, revision, trust_remote_code, **more), tokenizer


def evaluated_auto_class(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """What loads a model that is judged: a classifier or an encoder-decoder where its configuration says so."""
    config = load_config(name, trust_remote_code, revision)
    classifies = any(str(head).endswith("ForSequenceClassification") for head in config.architectures or [])
    return auto_class(config, SEQUENCE if classifies else SEQ2SEQ if config.is_encoder_decoder else None)


def load_model(
    name: str,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Any = None,
    folded: bool = False,
    auto: Any = AutoModelForCausalLM,
    **settings: Any,
) -> PreTrainedModel:
    """A causal language model, or what else `auto` loads with `settings` of its configuration, on the GPU if there is
    one and nothing shards it; quantised on the way, if so asked.

    Raises:
        ValueError: it cannot be loaded, is to be quantised and is so already, or (unless `folded`) is half of a fold.
    """
    where = resolve(name)
    if (Path(where) / FOLDED).exists() and not folded:
        raise ValueError(f"{name} is a folded base, no model without its adapter; give the folder of both")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, **settings}
    if quantization is not None:
        if getattr(load_config(name, trust_remote_code, revision), "quantization_config", None):
            raise ValueError(f"model {name!r} is quantised already; adapt it as it is, with quantize: none")
        options["quantization_config"] = quantization
    with loading(f"model {name!r}"):
        model = auto.from_pretrained(where, dtype=dtype, **options)
    for module in model.modules():
        readable(module)
    settle_dtype(model, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() and not distributed.sharded() else "cpu")
    return cast(Any, model).to(device)


def settle_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model that was stored quantised compute in the dtype asked for, which transformers ignores."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.pre_quantized:
        return
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype  # type: ignore[assignment]


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A model's tokenizer, or one that lies in a folder without a model."""
    where = name if (Path(name) / "tokenizer.json").exists() else resolve(name)
    with loading(f"the tokenizer of {name!r}"):
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)


def load_config(name: str, trust_remote_code: bool = False, revision: str | None = None, **settings: Any) -> Any:
    """A model's configuration alone, with `settings` in place of its own."""
    where = resolve(name)
    with loading(f"model {name!r}"):
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, revision=revision, **settings)
