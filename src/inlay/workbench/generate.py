"""Answers from a base model or an adapted one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from inlay.workbench.data import plain, templated

Chat = list[dict[str, str]]


def prompt_text(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """A conversation as the text the model continues, in its chat template or, without one, the plain one."""
    if tokenizer.chat_template:
        return str(templated(tokenizer, chat, tokenize=False, add_generation_prompt=True))
    return plain({"prompt": chat, "completion": [{"role": "assistant", "content": ""}]})["prompt"]


@torch.no_grad()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, chats: list[Chat], tokens: int = 64, **options: Any
) -> list[str]:
    """The model's answers to several conversations at once, greedy unless `options` of `generate` say otherwise."""
    texts = [prompt_text(tokenizer, chat) for chat in chats]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    was_training = model.training
    model.eval()
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": tokenizer.pad_token_id, **options}
    out = model.generate(**inputs.to(model.device), **options)
    model.train(was_training)
    return [t.strip() for t in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
