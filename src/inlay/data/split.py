"""Which examples are held out."""

from __future__ import annotations

import random
from collections.abc import Callable

from inlay.data.formats import Example


def split_examples(
    examples: list[Example], eval_size: int | float, seed: int | None, key: Callable[[Example], str] | None = None
) -> tuple[list[Example], list[Example]]:
    """Train and held-out parts, in file order: `eval_size` rows, or that share of them, drawn by `seed`.

    Examples with the same `key` (by default the first question: all turns of a chat) stay together, so that none is on
    both sides; the held-out part may come out a little smaller for it. With seed None the last rows are held out: the
    built-in data is ordered for that.
    """
    total = len(examples)
    if eval_size < 0 or (isinstance(eval_size, float) and eval_size >= 1):
        raise ValueError(f"eval_size is {eval_size}; accepted: a number of rows, or a share below 1.0")
    size = max(1, int(eval_size * total)) if 0 < eval_size < 1 else int(eval_size)
    if size >= total:
        raise ValueError(f"eval_size {eval_size} leaves none of {total} examples to train on; accepted: a smaller one")
    keys = list(map(key or _first_question, examples))
    groups: dict[str, list[int]] = {}
    for i, same in enumerate(keys):
        groups.setdefault(same, []).append(i)
    order = [list(range(total - size, total))] if seed is None else list(groups.values())
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= size:
            held.update(group)
    train_keys = {keys[i] for i in range(total) if i not in held}
    if (size and not held) or any(keys[i] in train_keys for i in held):
        raise ValueError(
            f"{size} of {total} examples cannot be held out: prompts repeat, {len(groups)} are distinct; give "
            "other rows to hold out, as eval_data"
        )
    return [examples[i] for i in range(total) if i not in held], [examples[i] for i in sorted(held)]


def _first_question(example: Example) -> str:
    if "text" in example or isinstance(example["prompt"], str):
        return example.get("text") or example["prompt"]
    return next(m["content"] for m in example["prompt"] if m["role"] == "user")
