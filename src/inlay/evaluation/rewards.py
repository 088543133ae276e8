"""Rewards of answers, by a model with one output: the score of a conversation at its last token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from inlay.data.chats import Example
from inlay.data.preferences import SIDES
from inlay.data.render import encode_example


def encode_pairs(pairs: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of whole conversations: of all chosen ones, then of all rejected ones."""
    return [encode_example({**pair, "completion": pair[side]}, tokenizer).ids for side in SIDES for pair in pairs]


@torch.no_grad()
def pair_rewards(model: Any, tokenizer: PreTrainedTokenizerBase, pairs: list[Example]) -> list[tuple[float, float]]:
    """Return the rewards of the chosen and of the rejected answer of each pair.

    Args:
        model: a classifier with one output.
        tokenizer: of the model; it pads.
        pairs: each a prompt, and under chosen and rejected an answer, as messages.
    """
    was_training = model.training
    model.eval()
    ids = {"input_ids": encode_pairs(pairs, tokenizer)}
    padded = tokenizer.pad(ids, padding_side="right", return_tensors="pt").to(model.device)
    scores = model(**padded).logits.float().squeeze(-1).tolist()
    model.train(was_training)
    return list(zip(scores[: len(pairs)], scores[len(pairs) :], strict=True))
