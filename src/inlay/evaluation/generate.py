"""Answers from a base model or an adapted one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from inlay.data.render import prompt_ids

Chat = list[dict[str, str]]


@torch.no_grad()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, chats: list[Chat], tokens: int = 64, **options: Any
) -> list[str]:
    """The model's answers to several conversations at once, greedy unless `options` of `generate` say otherwise. They
    begin with the very tokens that training showed it; an encoder reads the text alone, as task seq2seq has it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.is_encoder_decoder:
        texts = ["".join(turn["content"] for turn in chat) for chat in chats]
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
