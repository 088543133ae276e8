"""The tasks a recipe may name, and the transformers model that each one trains.

What a task does with data, losses and answers is in `tasks`; here is what planning, merging and cards need too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)


@dataclass(frozen=True)
class ModelClass:
    """Hold a task's name, PEFT's name for it, the class that loads its models, the hub's tag, and its loss."""

    name: str
    peft: str
    auto: Any
    tag: str
    loss: str = "loss (nats per answer token)"

    @property
    def causal(self) -> bool:
        """Return whether the task's models are causal, and so can be planned, folded, exported and compared."""
        return self.auto is AutoModelForCausalLM


CAUSAL = "CAUSAL_LM"  # PEFT's names of tasks
SEQUENCE = "SEQ_CLS"
SEQ2SEQ = "SEQ_2_SEQ_LM"

MODEL_CLASSES = (
    ModelClass("instruction", CAUSAL, AutoModelForCausalLM, "text-generation"),
    ModelClass("language_modelling", CAUSAL, AutoModelForCausalLM, "text-generation", "loss (nats per token)"),
    ModelClass("preference", CAUSAL, AutoModelForCausalLM, "text-generation", "DPO's loss (nats per pair)"),
    ModelClass(
        "classification", SEQUENCE, AutoModelForSequenceClassification, "text-classification", "loss (per example)"
    ),
    ModelClass("seq2seq", SEQ2SEQ, AutoModelForSeq2SeqLM, "summarization"),
    ModelClass("vision", CAUSAL, AutoModelForImageTextToText, "image-text-to-text"),
)


def find_model_class(name: str) -> ModelClass:
    """Return the model class of a recipe's task."""
    return next(kind for kind in MODEL_CLASSES if kind.name == name)


def auto_class(config: Any, task_type: str | None) -> Any:
    """Return the class that loads the base of an adapter, by the base's configuration and the adapter's task type.

    Raises:
        ValueError: no task here trains such a model.
    """
    task = str(task_type or CAUSAL)
    text, sees = (type(config) in m for m in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING))
    if task == CAUSAL and sees and not text:
        return AutoModelForImageTextToText
    for kind in MODEL_CLASSES:
        if kind.peft == task:
            return kind.auto
    raise ValueError(
        f"an adapter for {task} is not handled here ({', '.join({k.peft: 0 for k in MODEL_CLASSES})} are); in Python, "
        "PeftModel.from_pretrained(...).merge_and_unload() merges any"
    )
