"""Questions put to a model in batches: by generation, by likelihood, by loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from inlay.data.chats import Example
from inlay.data.render import prompt_ids
from inlay.evaluation.eval_tasks import Question
from inlay.evaluation.generate import Chat, answer
from inlay.models.scored_positions import logits_at


def similar_batches(sizes: list[int], size: int, what: str, console: Console) -> Iterator[list[int]]:
    """Return places in batches of similar length, the longest first, so that what does not fit shows at once."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    yield from track(parts, what, console=console, disable=not console.is_terminal)


def generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: list[Question], tokens: int, size: int, console: Console
) -> list[str]:
    """Return the model's answer to each question."""
    answers = [""] * len(questions)
    for places in similar_batches([len(str(q.chat)) for q in questions], size, "answers", console):
        batch = answer(model, tokenizer, [questions[i].prompt for i in places], tokens)
        for i, text in zip(places, batch, strict=True):
            answers[i] = text
    return answers


def likeliest(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: list[Question], size: int, console: Console
) -> list[str]:
    """Return the option of each question whose words the model finds likeliest, by their mean log-likelihood."""
    texts = [(i, q.prompt, f"the correct answer is {o}") for i, q in enumerate(questions) for o in q.options]
    losses = token_losses(model, tokenizer, [(prompt, text) for _, prompt, text in texts], size, console)
    best: dict[int, tuple[float, str]] = {}
    for (i, _, text), (total, count) in zip(texts, losses, strict=True):
        best[i] = min(best.get(i, (math.inf, "")), (total / count, text.rpartition(" ")[2]))
    return [best[i][1] for i in range(len(questions))]


@torch.no_grad()
def token_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Chat | Example | str, str]],
    size: int,
    console: Console,
    most: int = 1024,
) -> list[tuple[float, int]]:
    """Return the loss (nats) summed over the tokens of each text after its prompt, and the number of these tokens.

    A prompt is a conversation, or a text as it is. Texts longer than `most` tokens keep only their last `most`. Texts
    that differ in their last token alone, as options do, share a pass.
    """
    rows = []
    for prompt, text in pairs:
        before = prompt_ids(prompt, tokenizer)
        after = tokenizer(text=text, add_special_tokens=False)["input_ids"]
        ids = [*before, *after][-most:]
        rows.append((ids, min(len(after), len(ids) - 1)))
    passes: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, count) in enumerate(rows):
        if count > 0:
            passes.setdefault(tuple(ids[:-1]), []).append(i)
    heads = list(passes)
    losses: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for places in similar_batches([len(head) for head in heads], size, "losses", console):
        longest = max(len(heads[i]) for i in places)
        ids, mask, scored = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(3))
        for k, i in enumerate(places):  # padded on the right: what comes after does not reach what came before
            ids[k, : len(heads[i])], mask[k, : len(heads[i])] = torch.tensor(heads[i]), 1
            scored[k, len(heads[i]) - max(rows[j][1] for j in passes[heads[i]]) : len(heads[i])] = 1
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        logits = logits_at(model, scored.bool(), **inputs)
        for i, row_logits in zip(places, logits.split(scored.sum(1).tolist()), strict=True):
            for j in passes[heads[i]]:
                ids, count = rows[j]
                want = torch.tensor(ids[len(ids) - count :], dtype=torch.long, device=logits.device)
                losses[j] = cross_entropy(row_logits[-count:].float(), want, reduction="sum").item(), count
    return losses


@torch.no_grad()
def mean_token_loss(texts: Sequence[str], model: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> float:
    """Return the mean loss, in nats per token, over all tokens but the first of each text, truncated to `length`."""
    was_training = model.training
    total = 0.0
    count = 0
    model.eval()
    for text in texts:
        ids = torch.tensor([tokenizer(text=text)["input_ids"][:length]], device=model.device)
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]  # without the positions of a learned prompt
        total += cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    model.train(was_training)
    return total / max(1, count)
