"""Vocabularies that grew before training: the adapter's file then holds the embeddings, and the base is grown alike."""

from __future__ import annotations

import re
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from inlay.files.untrusted import regular_file
from inlay.host.adapter_state import ROOT

COPY = (
    r"\.(original_module|modules_to_save|token_adapter\.base_layer|base_layer)\.weight$"  # of what is under the wrapper
)


def stored_name(key: str) -> str:
    """Return the base's name of a weight that an adapter's file holds under `key`."""
    return re.sub(COPY, ".weight", key.removeprefix(ROOT))


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights of a model's input embeddings and head, where it has them."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [f"{name}.weight" for module in modules for name, m in model.named_modules() if m is module]


def fit_vocabulary(model: PreTrainedModel, adapter: Path) -> bool:
    """Give `model` as many tokens as the embeddings in an adapter's folder have; return whether it had another number.

    Raises:
        ValueError: the file does not hold all of the embeddings that grew.
    """
    try:
        with safe_open(regular_file(adapter / "adapter_model.safetensors"), "pt") as file:
            sizes = {stored_name(key): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError:  # whoever loads it says what is wrong
        return False
    names = embedding_names(model)
    there = {name: model.get_parameter(name).shape[0] for name in names}
    rows = {sizes[name][0] for name in names if name in sizes and sizes[name][0] != there[name]}
    if not rows:
        return False
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    lost = [name for name in names if name not in sizes and not tied]
    if len(rows) > 1 or lost:
        raise ValueError(
            f"{adapter} was trained on a vocabulary of {max(rows)} and holds no {', '.join(lost) or 'one size of it'}; "
            "save the base with the grown vocabulary, and name that as the base"
        )
    model.resize_token_embeddings(rows.pop(), mean_resizing=False)
    return True


def grew(model: PreTrainedModel | PeftModel, config: PretrainedConfig) -> bool:
    """Return whether `model` has another number of tokens than its base's `config` says."""
    now, before = (getattr(c.get_text_config(), "vocab_size", None) for c in (model.config, config))
    return now != before
