"""Answers as they grow: the text of every new token, and why an answer ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from inlay.data.chats import Example
from inlay.data.render import prompt_ids
from inlay.evaluation.generate import Chat, encoder_text
from inlay.evaluation.sampling import Sampling

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first tokens of a character that takes several become
END = "end"  # why an answer ended: the model's own end, a stop text, no more tokens, nobody waits for it
STOP = "stop"
CUT = "cut"
CANCELLED = "cancelled"


def nowhere(text: str) -> None:
    """Take a piece of an answer that nobody waits for."""


def never() -> bool:
    """Return that nobody has lost interest in an answer."""
    return False


@dataclass
class Growing:
    """Follow one answer while it is generated; its text has no whitespace around it.

    Attributes:
        most: tokens at most.
        stop: texts that end the answer, which lacks them.
        written: called with every new piece of the text.
        cancelled: asked after every token whether the answer is no longer wanted.
        text: so far.
        ended: why: the model's own end, a stop text, cut at `most`, or cancelled; empty before.
        ids: the tokens so far.
    """

    most: int
    stop: tuple[str, ...] = ()
    written: Callable[[str], object] = nowhere
    cancelled: Callable[[], bool] = never
    text: str = ""
    ended: str = ""
    ids: list[int] = field(default_factory=list)
    _raw: str = ""
    _start: int = 0  # tokens that the next ones are decoded with: a tokenizer may write a word's first one otherwise
    _read: int = 0  # tokens whose text is in _raw

    @property
    def cut(self) -> bool:
        """Return whether the answer was longer than it could be."""
        return self.ended == CUT

    def push(self, token: int, ends: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Add a token and return whether the answer has ended."""
        self.ids.append(token)
        if token in ends:
            self.ended = END
        elif len(self.ids) >= self.most:
            self.ended = CUT
        elif self.cancelled():
            self.ended = CANCELLED
        self._read_on(tokenizer)
        places = [place for text in self.stop if (place := self._raw.find(text)) >= 0]
        if places:
            self._raw = self._raw[: min(places)]
            self.ended = STOP
        self._write()
        return bool(self.ended)

    def _read_on(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the tokens that make whole characters; at the end of the answer, all."""
        before = text_of(tokenizer, self.ids[self._start : self._read])
        now = text_of(tokenizer, self.ids[self._start :])
        if len(now) > len(before) and (self.ended or not now.endswith(UNFINISHED)):
            self._raw += now[len(before) :]
            self._start, self._read = self._read, len(self.ids)

    def _write(self) -> None:
        """Hand on what is new and sure to stay: no whitespace that may be the last, no beginning of a stop text."""
        whole = self._raw
        if self.stop and not self.ended:
            whole = whole[: max(0, len(whole) - max(map(len, self.stop)) + 1)]
        whole = whole.strip()
        if len(whole) > len(self.text):
            piece, self.text = whole[len(self.text) :], whole
            self.written(piece)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of tokens, without special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


class Watch(StoppingCriteria):
    """Hand every new token of a batch to its answers, and end the rows whose answers have ended."""

    def __init__(self, answers: Sequence[Growing], ends: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> None:
        self.answers = answers
        self.ends = ends
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:  # type: ignore[override]
        done = []
        for answer, token in zip(self.answers, input_ids[:, -1].tolist(), strict=True):
            done.append(bool(answer.ended) or answer.push(token, self.ends, self.tokenizer))
        return torch.tensor(done, device=input_ids.device)


def prompt_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, chat: Chat | Example
) -> list[int]:
    """Return a prompt's tokens, as `answer` has them."""
    if config_of(model).is_encoder_decoder:
        return list(tokenizer(encoder_text(chat), truncation=True)["input_ids"])
    return prompt_ids(chat, tokenizer)


@torch.no_grad()
def grow(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    answers: Sequence[Growing],
    sampling: Sampling | None = None,
) -> None:
    """Generate the answers to some prompts at once; each one is handed its tokens as they come.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompts: as tokens (see `prompt_tokens`).
        answers: one for each prompt, not yet begun.
        sampling: how the next token is chosen; its seed is the caller's to set.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    side = "right" if config_of(model).is_encoder_decoder else "left"
    inputs = tokenizer.pad({"input_ids": list(prompts)}, padding_side=side, return_tensors="pt")
    untyped = cast(Any, model)  # PEFT hands on what it wraps
    ends = untyped.generation_config.eos_token_id if untyped.generation_config is not None else None
    watch = Watch(answers, frozenset([ends] if isinstance(ends, int) else ends or ()), tokenizer)
    untyped.generate(
        **inputs.to(untyped.device),
        **(sampling or Sampling()).options,
        max_new_tokens=max(answer.most for answer in answers),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([watch]),
    )


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """Return how many tokens prompt and answer may have together; None where the model does not say."""
    return config_of(model).get_text_config().to_dict().get("max_position_embeddings")


def config_of(model: PreTrainedModel | PeftModel) -> PretrainedConfig:
    """Return the configuration of a model, adapted or not."""
    return cast(Any, model).config
