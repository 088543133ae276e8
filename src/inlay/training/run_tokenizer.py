"""The tokenizer of a run, and whether the model has room for what it makes of the data."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from inlay.data.chat_templates import mentions, read_template, template_text
from inlay.data.chats import template_arguments
from inlay.messages import did_you_mean
from inlay.models.model_classes import find_model_class
from inlay.recipe.recipe import Recipe


def run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe's model, with the chat template and the end token that the recipe gives it.

    Raises:
        ValueError: it has no end token, the template cannot be read, or does not read an argument it is given.
    """
    tokenizer = recipe.base_model.tokenizer()
    if recipe.trainer.get("eos_token") or recipe.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)  # the base model's own stays as it was read
    if end := recipe.trainer.get("eos_token"):
        if end not in tokenizer.get_vocab():
            raise ValueError(f"trainer: eos_token {end!r} is not a token of {recipe.model}'s tokenizer")
        tokenizer.eos_token = end
    if recipe.chat_template is not None:
        tokenizer.chat_template = read_template(recipe.chat_template, tokenizer)
    text = template_text(tokenizer.chat_template or "")
    for name in template_arguments(recipe.chat_template_kwargs, "chat_template_kwargs"):
        if not mentions(text, name):
            words = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)) or {"none"}
            raise ValueError(f"chat_template_kwargs: the chat template reads no {name!r}; {did_you_mean(name, words)}")
    causal = find_model_class(recipe.task).causal
    if causal and tokenizer.eos_token is None and (recipe.task != "language_modelling" or tokenizer.pad_token is None):
        raise ValueError(
            f"the tokenizer of {recipe.model} has no end token, so no answer could be learned to end; give one of its "
            'tokens as "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def padding_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return a run's tokenizer that pads, as decoders' often do not: with the end token, as in instruction tuning.

    Raises:
        ValueError: it has no end token either.
    """
    tokenizer = run_tokenizer(recipe)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {recipe.model} has neither a pad token nor an end token to pad with; give one of "
            'its tokens as "pad_token" in its tokenizer_config.json'
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def answer_ends(recipe: Recipe) -> frozenset[int]:
    """Return the tokens at which a recipe's model stops by its own generation settings."""
    ends = recipe.base_model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def check_limits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, largest: int, length: int) -> None:
    """Refuse token ids, and lengths of rows, that the model has no embedding for.

    Raises:
        ValueError: the tokenizer has more tokens than the embedding and the data has them, or rows are longer than the
            positions that the model learned.
    """
    config = recipe.base_model.config()
    rows = getattr(config.get_text_config(), "vocab_size", None)
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    last: int = max(largest, pad or 0)
    if rows is not None and last >= rows:
        raise ValueError(
            f"the tokenizer of {recipe.model} has {len(tokenizer):,} tokens, its embedding {rows:,} rows and none for "
            f"{tokenizer.convert_ids_to_tokens(last)!r}; resize it (model.resize_token_embeddings({len(tokenizer)})) "
            "and save the model, or take the added tokens out of the tokenizer"
        )
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most - 2 and (most := learned_positions(recipe)) is not None and length > most:
        raise ValueError(
            f"{recipe.model} has {most} learned positions, and a row may have {length} tokens; --max-length {most} cuts"
        )


def learned_positions(recipe: Recipe) -> int | None:
    """Return how many positions a model has an embedding for; None where it computes them."""
    model = recipe.base_model.meta(torch.float32, 1, find_model_class(recipe.task).auto)
    found = [
        module.num_embeddings
        - int(getattr(module, "offset", 0))
        - (1 + module.padding_idx if module.padding_idx else 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"pos|wpe", name.rpartition(".")[2])
    ]
    return min(found, default=None)
