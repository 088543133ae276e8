"""The head of a causal model at labelled positions alone, on every device.

trl's trainers give their model a fused head, which takes the log-probability of each label without keeping the logits.
Where Triton runs it scores labelled positions alone; elsewhere it scores all of them and drops the rest, because there
are accelerators that compile anew for every number of positions. A CPU does not, and neither does a GPU without Triton.
"""

from __future__ import annotations

import functools
import types
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from inlay.data.render import IGNORED
from inlay.models.scored_positions import only_at

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of trl's FusedCausalLMOutput


def score_labelled_positions(causal: Any) -> None:
    """Let trl's fused head of a model see labelled positions alone; its outputs are the same, zero elsewhere.

    Like trl's `add_fused_lm_head`, which has to have been called, this sets `forward` on this one model.
    """
    fused = causal.forward

    @functools.wraps(type(causal).forward)  # `generate` checks its arguments against this signature
    def forward(
        self: Any,
        *args: Any,
        labels: Any = None,
        shift_labels: Any = None,
        token_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not kwargs.get("fused_lm_head") or shift_labels is not None:
            given = {"labels": labels, "shift_labels": shift_labels}
            return fused(*args, **{key: value for key, value in given.items() if value is not None}, **kwargs)
        next_labels = labels[:, 1:]
        labelled = next_labels != IGNORED
        scored = labelled if labelled.any() else first_position(labelled)  # else nothing would depend on the model
        with only_at(self, pad(scored, (0, 1))):
            output = fused(*args, shift_labels=next_labels[scored][None], **kwargs)
        whole = {name: spread(value, scored) for name in PER_TOKEN if (value := getattr(output, name)) is not None}
        if token_weights is not None:  # those of a prompt that is learned stand before
            weights = pad(token_weights, (labels.shape[1] - token_weights.shape[1], 0))[:, 1:]
            whole["log_probs"] = whole["log_probs"] * weights.to(whole["log_probs"])
        return replace(output, **whole, label_mask=labelled)

    causal.forward = types.MethodType(forward, causal)


def first_position(labelled: Tensor) -> Tensor:
    """Choose the first position of a batch in which none is labelled."""
    chosen = labelled.clone()
    chosen[0, 0] = True
    return chosen


def spread(values: Tensor, scored: Tensor) -> Tensor:
    """Put the values of the scored positions where they belong, and zero elsewhere."""
    return values.new_zeros(scored.shape).masked_scatter(scored.to(values.device), values)
