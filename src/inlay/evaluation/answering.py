"""A model that is asked in conversations: loaded with its tokenizer, and with what its run said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.chats import Example
from inlay.evaluation.ask_model import similar_batches
from inlay.evaluation.growing import Growing, config_of, context_length, grow, nowhere, prompt_tokens
from inlay.evaluation.run_settings import ChatSettings, chat_settings
from inlay.evaluation.sampling import Sampling
from inlay.models.adapters import Adapter
from inlay.models.base import BaseModel


@dataclass(frozen=True)
class Answering:
    """Hold a model in evaluation mode, its tokenizer, and the system message and arguments that its run had."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    settings: ChatSettings

    def prompt(self, asked: Example) -> list[int]:
        """Return the tokens of a conversation up to a question.

        Raises:
            ValueError: it is longer than the model reads, or its chat template does not take it.
        """
        ids = prompt_tokens(self.model, self.tokenizer, self.settings.example(asked))
        most = context_length(self.model)
        if most is not None and len(ids) >= most and not config_of(self.model).is_encoder_decoder:
            raise ValueError(f"the prompt has {len(ids)} tokens, and this model reads {most} with its answer")
        return ids

    def ask(
        self,
        asked: Example,
        tokens: int,
        sampling: Sampling | None = None,
        written: Callable[[str], object] = nowhere,
    ) -> Growing:
        """Return the answer to one conversation, of at most so many tokens; `written` gets it piece by piece."""
        answer = Growing(tokens, written=written)
        grow(self.model, self.tokenizer, [self.prompt(asked)], [answer], sampling)
        return answer

    def ask_all(
        self, asked: Sequence[Example], tokens: int, sampling: Sampling, size: int, console: Console
    ) -> list[Growing]:
        """Return the answers to many conversations, `size` of similar length at a time."""
        prompts = list(map(self.prompt, asked))
        answers = [Growing(tokens) for _ in asked]
        for places in similar_batches(list(map(len, prompts)), size, "answers", console):
            some = [answers[i] for i in places]
            grow(self.model, self.tokenizer, [prompts[i] for i in places], some, sampling)
        return answers


def load_answering(
    adapter: str | None, model: str | None, dtype: torch.dtype, scale: float = 1.0, system: str | None = None
) -> Answering:
    """Load a base with an adapter, or alone, to be asked.

    Args:
        adapter: a run folder or an adapter folder; None: the base alone.
        model: the base; None: the adapter's, or the built-in model.
        dtype: to compute in.
        scale: the adapter's strength.
        system: in place of the run's system message; empty for none.

    Raises:
        ValueError: it cannot be loaded, or is a classifier; a scale and no adapter.
    """
    settings = chat_settings(adapter or model or "")
    if system is not None:
        settings = replace(settings, system=system or None)
    if adapter:
        opened = Adapter.open(adapter, model)
        check_answers(opened.auto_class, adapter)
        loaded, tokenizer = opened.load(dtype, scale=scale)
    elif scale != 1:
        raise ValueError(f"--scale {scale}: there is no adapter; name one, as in inlay generate runs/mine --scale 0.5")
    else:
        base = BaseModel(model or "builtin")
        auto = base.evaluated_auto_class()
        check_answers(auto, base.name)
        tokenizer = base.tokenizer()
        loaded = base.load(dtype, auto=auto)
    return Answering(loaded.eval(), tokenizer, settings)


def check_answers(auto: object, name: str) -> None:
    """Raise a ValueError where the transformers class `auto` of the model `name` is a classifier's."""
    if auto is AutoModelForSequenceClassification:
        raise ValueError(f"{name} is a classifier, which writes no answers; inlay eval {name} --task classification")
