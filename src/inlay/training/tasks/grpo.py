"""Rewards of the model's own answers: group relative policy optimisation (GRPO; Shao et al., 2402.03300)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from inlay.data.formats import Row
from inlay.data.prompts import prompt_examples
from inlay.data.render import decoded, prompt_ids
from inlay.evaluation.eval_tasks import last_number, strict_number
from inlay.host import distributed
from inlay.methods import find
from inlay.outside import reason
from inlay.recipe.peft_methods import is_inlay
from inlay.recipe.recipe import Recipe
from inlay.recipe.rewards import EXACT, FORMAT, RewardTerm, find_function, reward_terms
from inlay.training.examples import Examples, measured
from inlay.training.mixture import train_and_heldout
from inlay.training.run_tokenizer import check_limits
from inlay.training.tasks.instruction import Settings, Task
from inlay.training.tasks.preference import first_question, with_room
from inlay.training.trainers.trainer import GRPOTrainer


class GRPO(Task):
    """Train by rewards of several answers that the model draws to each prompt, through trl's GRPOTrainer.

    Held-out prompts are answered greedily; the held-out loss is their negative mean reward. GRPO's β, ε and loss types
    go under `trainer`: {beta: 0.04}.
    """

    trainer, arguments = GRPOTrainer, GRPOConfig
    metrics = ("reward", "reward_std", "completions/mean_length", "completions/clipped_ratio")

    def examples(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Examples:
        judges(recipe)
        if distributed.sharded():
            raise ValueError("task grpo generates answers, which a sharded model is too slow for; use DDP")
        train, held = train_and_heldout(recipe, prompt_examples, console, first_question)
        bare = sum(row["answer"] is None for row in (*train, *held))
        if bare and (reasons := needs_answers(recipe)):
            raise ValueError(f"{reasons[0]}, and {bare} of {len(train) + len(held)} rows have none; see --columns")
        train, held = (with_room(self, part, tokenizer, recipe, console) for part in (train, held))
        ids = [prompt_ids(row, tokenizer) for row in train]
        audit = measured(list(map(len, ids)), recipe)
        prompts = int(recipe.batch_size) * recipe.accumulation * distributed.process_count() // recipe.num_generations
        if len(train) < prompts:
            raise ValueError(f"a step answers {prompts} prompts, and there are {len(train)}; lower batch_size")
        console.print(
            f"{len(train)} prompts to train on, {len(held)} held out; longest {audit.longest} tokens; "
            f"{recipe.num_generations} answers to each of {prompts} prompts a step"
        )
        check_limits(recipe, tokenizer, max(map(max, ids)), audit.longest + recipe.max_new_tokens)
        return Examples(train, held, audit, conversations=len(held))

    def unfit(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str | None:
        """Return why a prompt cannot be answered, if so."""
        long = len(prompt_ids(row, tokenizer)) + recipe.max_new_tokens > recipe.max_length
        return f"their prompt and max_new_tokens={recipe.max_new_tokens} exceed" if long else None

    def settings(self, recipe: Recipe) -> Settings:
        return {
            "num_generations": recipe.num_generations,
            "num_generations_eval": 1,
            "max_completion_length": recipe.max_new_tokens,
            "temperature": recipe.temperature,
            "reward_weights": [term.weight for term in reward_terms(recipe.reward)],
        }

    def parts(self, tokenizer: PreTrainedTokenizerBase, rows: Examples, recipe: Recipe) -> Settings:
        return {"reward_funcs": judges(recipe)}

    def dataset(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
        """Return prompts as rewards see them, and as JSON with all that the chat template gets."""
        return Dataset.from_list([
            {"prompt": [{key: message[key] for key in ("role", "content")} for message in row["prompt"]],
             "answer": row["answer"], "example": json.dumps(row)}
            for row in rows
        ])  # fmt: skip

    def batch(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Tensor] | None:
        """Return the reference answers, from which a start's gradients are."""
        return super().batch([answered(row) for row in rows], tokenizer, recipe)

    def questions(self, rows: list[Row], count: int) -> list[Row]:
        return [
            {"input": row, "prompt": row["prompt"][-1]["content"], "reference": row["answer"] or ""}
            for row in rows[:count]
        ]

    def shown(self, row: Row, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> str:
        text = decoded(prompt_ids(row, tokenizer), tokenizer)
        return f"{text}⟦the model's own answer⟧" + ("" if row["answer"] is None else f"\nreference: {row['answer']}")


def answered(row: Row) -> Row:
    """Return a prompt with its reference as the answer."""
    return {**row, "completion": [{"role": "assistant", "content": row["answer"]}]}


def needs_answers(recipe: Recipe) -> list[str]:
    """Return why a recipe needs reference answers."""
    reasons = {
        "reward: exact_match compares with a reference answer": any(
            term.name == EXACT for term in reward_terms(recipe.reward)
        ),
        f"method {recipe.method} starts from reference answers": is_inlay(recipe.method) and find(recipe.method).needs,
        f"allocate={recipe.allocate} reads reference answers": recipe.allocate in ("variance", "blocks"),
        "experts: the busiest are found on reference answers": type(recipe.experts) is int,
    }
    return [text for text, holds in reasons.items() if holds]


def judges(recipe: Recipe) -> list[Callable[..., list[float | None]]]:
    """Return the rewards of a recipe as trl calls them.

    Raises:
        ValueError: a function was not imported.
    """
    return [judge(term, recipe) for term in reward_terms(recipe.reward)]


def judge(term: RewardTerm, recipe: Recipe) -> Callable[..., list[float | None]]:
    """Return one reward, which calls nothing that is not finite a reward."""
    if term.name == EXACT:
        function: Callable[..., Sequence[float | None]] = exact_match
    elif term.pattern is not None:
        pattern = re.compile(term.pattern, re.DOTALL)
        function = lambda completions, **_: [float(bool(pattern.search(one[-1]["content"]))) for one in completions]  # noqa: E731
    else:
        function = find_function(term.name, recipe.reward)

    def rewarded(example: Any = None, **given: Any) -> list[float | None]:
        count = len(given["completions"])
        try:
            found = [None if one is None else float(one) for one in function(**given)]
        except Exception as error:  # the user's code fails in its own ways
            raise ValueError(f"reward: {term.name} failed: {reason(error)}") from error
        if len(found) != count or not all(one is None or math.isfinite(one) for one in found):
            raise ValueError(
                f"reward: {term.name} gave {found!r:.100} for {count} answers; accepted: a number for each"
            )
        return found

    rewarded.__name__ = FORMAT if term.pattern is not None else term.name.rpartition(":")[2]
    return rewarded


def exact_match(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """Return 1 for each answer that is its reference, space around them apart, and 0 for the others.

    Where the reference ends in #### and a number, as GSM8K's do, the last number of the answer is compared with it.
    """
    return [float(agrees(said[-1]["content"], wanted)) for said, wanted in zip(completions, answer, strict=True)]


def agrees(said: str, wanted: str) -> bool:
    """Return whether an answer is its reference."""
    number = strict_number(wanted)
    return last_number(said) == number if number else said.strip() == wanted.strip()
