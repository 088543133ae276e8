"""Logits at chosen positions of a batch: the head of a causal model sees no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor


def base_model_of(model: Any) -> Any:
    """Return the model of transformers that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def only_at(model: Any, chosen: Tensor) -> Iterator[None]:
    """Let `model` compute logits at the chosen positions alone in a `with` block: (1, count, vocabulary).

    The backbone is followed by a hook that keeps these positions of the last hidden state, so that whatever the model's
    own forward pass does after it (a head, a scale, soft-capping) is done for them, and for no others.

    Args:
        model: a causal language model of transformers, adapted or not.
        chosen: of each token (batch, length) whether its logits are wanted. Virtual tokens of a learned prompt, which
            come before the others, are not counted.
    """

    def keep_chosen(backbone: Any, args: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)  # code of a repository's own may give something else
        if hidden is not None:
            output.last_hidden_state = hidden[:, -chosen.shape[1] :][chosen.to(hidden.device)][None]
        return output

    handle = base_model_of(model).base_model.register_forward_hook(keep_chosen)
    try:
        yield
    finally:
        handle.remove()


def logits_at(model: Any, chosen: Tensor, **inputs: Any) -> Tensor:
    """Return the logits of the chosen positions (see `only_at`), row by row: (count, vocabulary)."""
    with only_at(model, chosen):
        logits = model(**inputs).logits
    if logits.shape[:2] == (1, int(chosen.sum())):
        return logits[0]
    return logits[:, -chosen.shape[1] :][chosen.to(logits.device)]  # the head saw all of them
