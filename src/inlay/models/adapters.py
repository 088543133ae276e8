"""An adapter in its folder: its base model, its configuration, and both loaded together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from inlay.files.untrusted import LENGTH, DamagedFileError, from_json
from inlay.host.config import check_imports
from inlay.messages import loading
from inlay.models.folded import FOLDED
from inlay.models.loading import load_base, load_config, load_model, resolve, stored_dtype
from inlay.models.model_classes import SEQUENCE, auto_class
from inlay.models.vocabulary import fit_vocabulary


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
    return read_adapter_config(adapter).revision


def read_adapter_config(adapter: Path) -> PeftConfig:
    """An adapter's configuration.

    Raises:
        ValueError: it is none.
    """
    with loading(f"{adapter}/adapter_config.json", DamagedFileError):
        config = PeftConfig.from_pretrained(str(adapter))
    check_imports(config)
    return config


def label_settings(adapter: Path) -> dict[str, Any]:
    """What of its base's configuration an adapter brings along: the labels of a classification.

    Raises:
        ValueError: it is of a classification and does not say them.
    """
    if read_adapter_config(adapter).task_type != SEQUENCE:
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


def may_modify_base(adapter: Path) -> bool:
    """Whether an adapter may change what lies under it: a fold, and PEFT's, several starts of which do."""
    config = PeftConfig.from_pretrained(str(adapter))
    return config.peft_type != "INLAY" or getattr(config, "folded", False)


def load_unadapted_base(
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
    auto = auto_class(load_config(name, trust_remote_code, revision), config.task_type)
    return load_model(name, dtype, revision, trust_remote_code, auto=auto, **label_settings(adapter))


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
    name, settings, options = name or base_of(adapter), label_settings(adapter), (revision, trust_remote_code)
    auto = auto_class(
        load_config(name, trust_remote_code, revision), PeftConfig.from_pretrained(str(adapter)).task_type
    )
    dtype = dtype or stored_dtype(name, trust_remote_code)
    base, tokenizer = load_base(name, dtype, *options, folded=True, auto=auto, **settings)
    if (template := adapter / "chat_template.jinja").is_file():  # that it was trained with, in place of its base's
        with template.open(encoding="utf-8") as file:
            tokenizer.chat_template = file.read(LENGTH)
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
    read_adapter_config(adapter)
    fit_vocabulary(model, adapter)
    with loading(f"adapter {adapter}", DamagedFileError):
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable, low_cpu_mem_usage=light)
