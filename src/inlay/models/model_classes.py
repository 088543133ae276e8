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
    """Describe the models of a task.

    Attributes:
        name: of the task.
        peft: PEFT's name for it.
        auto: the class that loads its models.
        tag: the hub's.
        loss: its title, with its unit.
        chats: whether its examples begin with conversations, which a chat template renders.
        planned: whether a step's memory is predicted.
        any_optimizer: whether its trainer takes optimisers beside transformers' own.
    """

    name: str
    peft: str
    auto: Any
    tag: str
    loss: str = "loss (nats per answer token)"
    chats: bool = False
    planned: bool = False
    any_optimizer: bool = True

    @property
    def new_head(self) -> bool:
        """Return whether its models get a head that begins at random."""
        return self.peft == SEQUENCE

    @property
    def causal(self) -> bool:
        """Return whether the task's models are causal, and so can be planned, folded, exported and compared."""
        return self.auto is AutoModelForCausalLM


CAUSAL = "CAUSAL_LM"  # PEFT's names of tasks
SEQUENCE = "SEQ_CLS"
SEQ2SEQ = "SEQ_2_SEQ_LM"
GENERATION = "text-generation"
BY_TRL = {"chats": True, "any_optimizer": False}  # of trl's trainers that create their optimiser by transformers' names

MODEL_CLASSES = (
    ModelClass("instruction", CAUSAL, AutoModelForCausalLM, GENERATION, chats=True, planned=True),
    ModelClass("language_modelling", CAUSAL, AutoModelForCausalLM, GENERATION, "loss (nats per token)", planned=True),
    ModelClass("preference", CAUSAL, AutoModelForCausalLM, GENERATION, "DPO's loss (nats per pair)", **BY_TRL),
    ModelClass("orpo", CAUSAL, AutoModelForCausalLM, GENERATION, "ORPO's loss (nats)", **BY_TRL),
    ModelClass("simpo", CAUSAL, AutoModelForCausalLM, GENERATION, "SimPO's loss (nats per pair)", **BY_TRL),
    ModelClass("kto", CAUSAL, AutoModelForCausalLM, GENERATION, "KTO's loss (per answer)", **BY_TRL),
    ModelClass(
        "reward",
        SEQUENCE,
        AutoModelForSequenceClassification,
        "text-classification",
        "loss (nats per pair)",
        chats=True,
    ),
    ModelClass("grpo", CAUSAL, AutoModelForCausalLM, GENERATION, "loss (negative mean reward)", **BY_TRL),
    ModelClass(
        "classification", SEQUENCE, AutoModelForSequenceClassification, "text-classification", "loss (per example)"
    ),
    ModelClass("seq2seq", SEQ2SEQ, AutoModelForSeq2SeqLM, "summarization"),
    ModelClass("vision", CAUSAL, AutoModelForImageTextToText, "image-text-to-text"),
)


CHAT_TASKS = tuple(kind.name for kind in MODEL_CLASSES if kind.chats)
PLANNED_TASKS = tuple(kind.name for kind in MODEL_CLASSES if kind.planned)


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
