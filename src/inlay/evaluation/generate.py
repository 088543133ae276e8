"""Answers from a base model or an adapted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from inlay.data.chats import Example, Message
from inlay.data.render import prompt_ids

Chat = list[Message]


@torch.no_grad()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat | Example], tokens: int = 64, **options: Any
) -> list[str]:
    """Return the model's answers to several conversations at once, greedy unless `options` of `generate` say otherwise.

    Prompts have exactly the tokens that training used; an encoder reads the text alone, as task seq2seq has it. An
    example stands for its prompt, with its tools and the rest.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.is_encoder_decoder:
        texts = list(map(encoder_text, chats))
        inputs, before = tokenizer(texts, return_tensors="pt", padding=True, truncation=True), 0
    else:
        ids = {"input_ids": [prompt_ids(chat, tokenizer) for chat in chats]}
        inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
        before = inputs["input_ids"].shape[1]
    was_training = model.training
    model.eval()
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": tokenizer.pad_token_id, **options}
    out = model.generate(**inputs.to(model.device), **options)
    model.train(was_training)
    return [text.strip() for text in tokenizer.batch_decode(out[:, before:], skip_special_tokens=True)]


def encoder_text(chat: Chat | Example) -> str:
    """Return what an encoder reads of a conversation: the text alone."""
    turns = chat if isinstance(chat, list) else chat["prompt"]
    return "".join(turn["content"] for turn in turns)
