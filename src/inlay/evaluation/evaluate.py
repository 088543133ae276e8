"""How well a model does a task: what it is asked, how its answers are read, and how sure the figure is.

Answers are generated greedily, or, for questions with options, the option is taken that the model finds most likely.
What is read of an answer follows the papers' own scripts; the rule of each task is in its docstring.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerBase

from inlay.data.chats import answer_text
from inlay.data.labelled import one_label
from inlay.data.preferences import SIDES
from inlay.data.readers import Record
from inlay.evaluation.ask_model import generated, likeliest, similar_batches, token_losses
from inlay.evaluation.eval_tasks import EvalTask, Question, questions_for
from inlay.evaluation.label_metrics import classified, correlated
from inlay.evaluation.rewards import pair_rewards
from inlay.evaluation.run_settings import ChatSettings
from inlay.evaluation.scores import Score, overlap_scores, resampled_score, share_score
from inlay.models.model_classes import auto_class


def evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: EvalTask, records: list[Record], by: str = "generation",
    size: int = 8, tokens: int | None = None, console: Console | None = None, settings: ChatSettings | None = None,
) -> tuple[list[Score], list[dict[str, Any]]]:  # fmt: skip
    """Score a model on a task; returns the scores and each example's part in them.

    Raises:
        ValueError: the records are not of the task's form, or a library is missing.
    """
    console = console or Console(quiet=True)
    questions = asked_as_trained(questions_for(task, records, by), settings or ChatSettings())
    was_training, config = model.training, model.config
    if auto_class(config, None) is AutoModelForImageTextToText:
        raise ValueError("the model sees images, and inlay eval asks in text alone; write a --metric of your own")
    if config.is_encoder_decoder and (task.name == "perplexity" or by == "likelihood"):
        raise ValueError("perplexity and --by likelihood are of causal language models; this one has an encoder")
    model.eval()
    try:
        if task.name == "classification":
            return evaluate_classifier(model, tokenizer, questions, size, console)
        if task.name == "reward":
            return evaluate_rewards(model, tokenizer, questions, size, console)
        if is_classifier(model):
            own = "reward" if is_reward_model(model) else "classification"
            raise ValueError(f"the model is a classifier, which says nothing; --task {own}, not {task.name}")
        if task.name == "perplexity":
            return perplexity(model, tokenizer, questions, size, console)
        if by == "likelihood":
            answers = likeliest(model, tokenizer, questions, size, console)
        else:
            answers = generated(model, tokenizer, questions, tokens or task.tokens, size, console)
    finally:
        model.train(was_training)
    both = list(zip(questions, answers, strict=True))
    rows: list[dict[str, Any]] = [
        {"prompt": q.chat[-1]["content"], "wanted": q.wanted, "said": text} for q, text in both
    ]
    figures = []
    for name, read in task.read.items():
        right = [(read(text, q.options) if q.options else read(text)) in q.wanted for q, text in both]
        figures.append(share_score(name, right))
        for row, ok in zip(rows, right, strict=True):
            row[name] = ok
    return (overlap_scores(answers, questions) if task.name == "text" else figures), rows


def perplexity(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[Record], size: int, console: Console
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Compute exp of the mean loss over all tokens of plain text, or over those of the answers."""
    pairs = [("", row["text"]) if "text" in row else (row, answer_text(row["completion"][-1])) for row in examples]
    losses = token_losses(model, tokenizer, pairs, size, console)
    kept = [i for i, (_, count) in enumerate(losses) if count]
    if not kept:
        raise ValueError("the texts have a token each, before which there is nothing; give longer ones")

    def value(places: list[int]) -> float:
        drawn = [losses[kept[i]] for i in places]
        return math.exp(min(700.0, sum(total for total, _ in drawn) / sum(count for _, count in drawn)))

    rows = [
        {"text": text, "loss": total, "tokens": count} for (_, text), (total, count) in zip(pairs, losses, strict=True)
    ]
    return [resampled_score("perplexity", len(kept), value)], rows


def asked_as_trained(questions: list, settings: ChatSettings) -> list:
    """Return questions or examples with the system message and the arguments that a run had."""
    made = []
    for one in questions:
        if isinstance(one, Question):
            asked = settings.example(one.prompt)
            about = {key: value for key, value in asked.items() if key != "prompt"}
            made.append(replace(one, chat=asked["prompt"], about=about))
        else:
            made.append(settings.example(one))
    return made


def is_classifier(model: Any) -> bool:
    """Return whether a model, or the base of an adapted one, has a head for labels."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.values()


def is_reward_model(model: Any) -> bool:
    """Return whether a model was trained with task: reward."""
    return is_classifier(model) and list((model.config.id2label or {}).values()) == ["reward"]


def evaluate_rewards(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, Any]], size: int, console: Console
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Score a reward model by how often, and by how much, chosen answers score above rejected ones.

    Raises:
        ValueError: the model gives no rewards.
    """
    if not is_reward_model(model):
        raise ValueError("--task reward is for models trained with task: reward; this one gives no rewards")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as in training
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    rewards: list[tuple[float, float]] = [(0.0, 0.0)] * len(pairs)
    for places in similar_batches([len(str(pair)) for pair in pairs], size, "pairs", console):
        for i, found in zip(places, pair_rewards(model, tokenizer, [pairs[i] for i in places]), strict=True):
            rewards[i] = found
    right = [chosen > rejected for chosen, rejected in rewards]
    margins = [chosen - rejected for chosen, rejected in rewards]
    rows = [
        {
            "prompt": pair["prompt"][-1]["content"],
            **{side: answer_text(pair[side][-1]) for side in SIDES},
            "rewards": found,
            "reward accuracy": ok,
            "margin": margin,
        }
        for pair, found, ok, margin in zip(pairs, rewards, right, margins, strict=True)
    ]
    mean = resampled_score("margin", len(pairs), lambda drawn: sum(margins[i] for i in drawn) / len(drawn))
    return [share_score("reward accuracy", right), mean], rows


@torch.no_grad()
def evaluate_classifier(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]], size: int, console: Console
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Score a classifier by the labels it was trained on: accuracy, F1 and Matthews' correlation, as GLUE has them.

    A model that gives numbers is scored by Pearson's and Spearman's correlation.

    Raises:
        ValueError: the model has no head for labels, or was not trained on one that is asked for.
    """
    if not is_classifier(model):
        raise ValueError(
            "--task classification is for models trained with task: classification; this one has no labels"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as in training
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    scores, names = model.config.num_labels == 1, model.config.label2id
    examples = [{**row, "label": one_label(row["label"], names)} for row in examples]
    if not scores and (strange := next((row["label"] for row in examples if row["label"] not in names), None)):
        raise ValueError(f"label {strange!r} is not one that the model was trained on: {', '.join(names)}")
    wanted = np.array([float(row["label"]) if scores else names[row["label"]] for row in examples])
    logits = np.zeros((len(examples), model.config.num_labels))
    for places in similar_batches(
        [len(row["text"] + (row["pair"] or "")) for row in examples], size, "labels", console
    ):
        pairs = [(examples[i]["text"], examples[i]["pair"]) for i in places]
        texts, seconds = zip(*pairs, strict=True)
        pair = None if seconds[0] is None else list(seconds)
        inputs = tokenizer(list(texts), pair, truncation=True, padding=True, return_tensors="pt").to(model.device)
        logits[places] = model(**inputs).logits.float().cpu().numpy()
    measure = correlated if scores else classified
    figures = [
        resampled_score(name, len(examples), lambda places, name=name: measure(logits[places], wanted[places])[name])
        for name in measure(logits, wanted)
    ]
    answers = logits[:, 0].tolist() if scores else [model.config.id2label[i] for i in logits.argmax(1).tolist()]
    rows = [{**row, "said": answer} for row, answer in zip(examples, answers, strict=True)]
    if not scores:
        right = [row["said"] == row["label"] for row in rows]
        figures[0] = share_score("accuracy", right)
        rows = [{**row, "accuracy": ok} for row, ok in zip(rows, right, strict=True)]
    return figures, rows
