"""Questions put to a model in batches: by generation, by likelihood, by loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy

from inlay.data.chats import Example
from inlay.data.render import prompt_ids
from inlay.evaluation.eval_tasks import Question
from inlay.evaluation.generate import Chat, answer


def similar_batches(sizes: list[int], size: int, what: str, console: Console) -> Iterator[list[int]]:
    """Places in batches of similar length, the longest first, so that what does not fit shows at once."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    yield from track(parts, what, console=console, disable=not console.is_terminal)


def generated(model: Any, tokenizer: Any, asked: list[Question], tokens: int, size: int, console: Console) -> list[str]:
    """The answer to each question."""
    said = [""] * len(asked)
    for places in similar_batches([len(str(q.chat)) for q in asked], size, "answers", console):
        answers = answer(model, tokenizer, [asked[i].asked for i in places], tokens)
        for i, text in zip(places, answers, strict=True):
            said[i] = text
    return said


def likeliest(model: Any, tokenizer: Any, asked: list[Question], size: int, console: Console) -> list[str]:
    """The option of each question whose words the model finds most likely, by their mean log-likelihood."""
    texts = [(i, q.asked, f"the correct answer is {o}") for i, q in enumerate(asked) for o in q.options]
    found = token_losses(model, tokenizer, [(chat, said) for _, chat, said in texts], size, console)
    best: dict[int, tuple[float, str]] = {}
    for (i, _, said), (total, count) in zip(texts, found, strict=True):
        best[i] = min(best.get(i, (math.inf, "")), (total / count, said.rpartition(" ")[2]))
    return [best[i][1] for i in range(len(asked))]


@torch.no_grad()
def token_losses(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Chat | Example | str, str]],
    size: int,
    console: Console,
    most: int = 1024,
) -> list[tuple[float, int]]:
    """The loss (nats) summed over the tokens of each text after its prompt (a conversation, or a text as it is), and
    how many they are. Of what is longer than `most` tokens the last are taken. What differs in its last token alone,
    as options do, shares a pass."""
    rows = []
    for prompt, text in pairs:
        before = prompt_ids(prompt, tokenizer)
        own = tokenizer(text=text, add_special_tokens=False)["input_ids"]
        ids = [*before, *own][-most:]
        rows.append((ids, min(len(own), len(ids) - 1)))
    passes: dict[tuple[int, ...], list[int]] = {}
    for i, (ids, count) in enumerate(rows):
        if count > 0:
            passes.setdefault(tuple(ids[:-1]), []).append(i)
    heads = list(passes)
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for places in similar_batches([len(head) for head in heads], size, "losses", console):
        longest = max(len(heads[i]) for i in places)
        ids, mask = (torch.zeros(len(places), longest, dtype=torch.long) for _ in range(2))
        for k, i in enumerate(places):  # padded on the right: what comes after does not reach what came before
            ids[k, : len(heads[i])], mask[k, : len(heads[i])] = torch.tensor(heads[i]), 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        for k, i in [(k, i) for k, place in enumerate(places) for i in passes[heads[place]]]:
            own, count = rows[i]
            slope: Tensor = logits[k, len(own) - count - 1 : len(own) - 1].float()
            want = torch.tensor(own[len(own) - count :], dtype=torch.long, device=slope.device)
            found[i] = cross_entropy(slope, want, reduction="sum").item(), count
    return found
