"""Finding and loading a base model, and an adapter on it, with errors a person can act on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inlay.folding import FOLDED
from inlay.host import processes
from inlay.host.layer import readable
from inlay.workbench import builtin, kinds
from inlay.workbench.files import DamagedFileError, from_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
START = "start"  # within the folder of a run that folded: the adapter before training


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


def fold_at(name: str) -> Path | None:
    """The adapter of a fold, if a model's name is the folder of one."""
    adapter = Path(name).expanduser() / "adapter"
    return adapter if (adapter.parent / FOLDED).exists() and (adapter / "adapter_config.json").exists() else None


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


def auto_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """What loads a model that is judged: a classifier or an encoder-decoder where its configuration says so."""
    config = load_config(name, trust_remote_code, revision)
    classifies = any(str(head).endswith("ForSequenceClassification") for head in config.architectures or [])
    return kinds.auto_for(
        config, kinds.SEQUENCE if classifies else kinds.SEQ2SEQ if config.is_encoder_decoder else None
    )


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
    device = torch.device("cuda" if torch.cuda.is_available() and not processes.sharded() else "cpu")
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


def adapter_folder(path: str) -> Path:
    """The adapter in a run folder, or the folder itself.

    Raises:
        ValueError: there is no adapter.
    """
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ValueError(f"{path} holds no adapter: neither {path}/adapter_config.json nor {path}/adapter/ is there")


def base_of(adapter: Path) -> str:
    """The base model an adapter names; a folded one's is beside it, wherever the two were moved."""
    try:
        config = from_json((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        name = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{adapter}/adapter_config.json is not an adapter's configuration: {error!r}") from None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{adapter} does not name its base model; give it with --model")
    beside = adapter.resolve().parent / "base"
    return str(beside) if config.get("folded") and (beside / FOLDED).exists() else name


def revision_of(adapter: Path) -> str | None:
    """The revision of its base that an adapter names."""
    return read_config(adapter).revision


def read_config(adapter: Path) -> PeftConfig:
    """An adapter's configuration.

    Raises:
        ValueError: it is none.
    """
    with loading(f"{adapter}/adapter_config.json", DamagedFileError):
        return PeftConfig.from_pretrained(str(adapter))


def settings_of(adapter: Path) -> dict[str, Any]:
    """What of its base's configuration an adapter brings along: the labels of a classification.

    Raises:
        ValueError: it is of a classification and does not say them.
    """
    if read_config(adapter).task_type != kinds.SEQUENCE:
        return {}
    if not (adapter / "config.json").is_file():
        raise ValueError(
            f"{adapter} classifies and does not say its labels; put the config.json of its model beside it "
            "(model.config.save_pretrained), as inlay train does"
        )
    with loading(f"{adapter}/config.json", DamagedFileError):
        config = AutoConfig.from_pretrained(str(adapter / "config.json"))
    names = ("num_labels", "id2label", "label2id", "problem_type")
    return {name: getattr(config, name) for name in names}


def cuts_base(adapter: Path) -> bool:
    """Whether an adapter may change what lies under it: a fold, and PEFT's, several starts of which do."""
    config = PeftConfig.from_pretrained(str(adapter))
    return config.peft_type != "INLAY" or getattr(config, "folded", False)


def intact(
    adapter: Path, dtype: torch.dtype, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The base of an adapter as it is without it; a fold's is the model it was made of.

    Raises:
        ValueError: it cannot be loaded, or a fold does not say what it was made of.
    """
    config, name = PeftConfig.from_pretrained(str(adapter)), base_of(adapter)
    revision = revision or config.revision
    if getattr(config, "folded", False):
        try:
            name = from_json((Path(name) / FOLDED).read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{name} does not say which model was folded into it; leave out --base") from None
    auto = kinds.auto_for(load_config(name, trust_remote_code, revision), config.task_type)
    return load_model(name, dtype, revision, trust_remote_code, auto=auto, **settings_of(adapter))


def load_adapted(
    adapter: Path,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """An adapter on its base (or another one named), and the tokenizer; without a dtype, in the stored one. The base is
    what the adapter's task takes, in the revision that it was trained on."""
    revision = revision or (None if name else revision_of(adapter))
    name, settings, options = name or base_of(adapter), settings_of(adapter), (revision, trust_remote_code)
    auto = kinds.auto_for(
        load_config(name, trust_remote_code, revision), PeftConfig.from_pretrained(str(adapter)).task_type
    )
    dtype = dtype or stored_dtype(name, trust_remote_code)
    base, tokenizer = load_base(name, dtype, *options, folded=True, auto=auto, **settings)
    model = load_adapter(base, adapter, trainable)
    model.peft_config["default"].base_model_name_or_path = resolve(name)
    return model, tokenizer


def load_adapter(model: PreTrainedModel, adapter: Path, trainable: bool = False, light: bool = False) -> PeftModel:
    """The adapter on its base, checked whole; `light`: a base that has no memory gets θ alone.

    Raises:
        ValueError: a file is missing or broken, or the tensors do not fit the model.
    """
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ValueError(f"{adapter} has no adapter_model.safetensors")
    with loading(f"adapter {adapter}", DamagedFileError):
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable, low_cpu_mem_usage=light)


@contextmanager
def loading(what: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Around a library that loads a file: of a damaged one, each raises what it trips over."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise kind(f"{what} cannot be loaded: {first_line(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's memory, or the machine's, has ended."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    ended = "allocate memory" in said or "not enough memory" in said
    return ended or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # of a key alone nobody would know what it is
    text = " ".join(text.partition("Exception raised from ")[0].split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def quiet() -> None:
    """Keep the libraries' own bars and notices out of a command's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of every product that it rounds
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
