"""Rewards of answers for task grpo, as a recipe names them: built in, or functions of the user's.

A function is imported because a person named it, in a recipe of their own or with a flag, never because a run, a URL or
an adapter did.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from inlay.messages import did_you_mean
from inlay.outside import import_module

EXACT, FORMAT = "exact_match", "format"
ACCEPTED = (
    "exact_match, {format: REGEX}, module:function, file.py:function, or a list of such, each {reward: ..., weight: 2}"
)
PASSED = ("prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric")
OF_RUN = ("steps_per_generation", "generation_batch_size", "num_iterations")  # of GRPOConfig: not resumed exactly

Function = Callable[..., Sequence[float | None]]
_functions: dict[str, Function] = {}
_places: dict[str, tuple[Path, ...]] = {}


@dataclass(frozen=True)
class RewardTerm:
    """Hold one reward of a recipe.

    Attributes:
        name: exact_match, format, or a function as module:function.
        pattern: of a format, the regex.
        weight: its factor in the sum.
    """

    name: str
    pattern: str | None = None
    weight: float = 1.0

    @property
    def is_function(self) -> bool:
        """Return whether it is a function of the user's."""
        return ":" in self.name and self.pattern is None


def reward_terms(given: Any) -> list[RewardTerm]:
    """Return the rewards that a recipe's `reward` names.

    Raises:
        ValueError: it has another form.
    """
    return [reward_term(item) for item in (given if isinstance(given, list) else [given])]


def reward_term(item: Any) -> RewardTerm:
    """Return one reward.

    Raises:
        ValueError: it has another form.
    """
    values = {"reward": item} if isinstance(item, str) else item
    if not isinstance(values, dict) or not values.keys() & {"reward", FORMAT}:
        raise ValueError(f"reward: {item!r:.100} is no reward; accepted: {ACCEPTED}")
    if len(values.keys() & {"reward", FORMAT}) > 1:
        raise ValueError(f"reward: {item!r:.100} names two; write a list with an item for each")
    for key in values:
        if key not in ("reward", FORMAT, "weight"):
            raise ValueError(f"reward: no {key!r}; {did_you_mean(str(key), ['reward', FORMAT, 'weight'])}")
    weight = values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"reward: weight {weight!r:.100} is not a number")
    if FORMAT in values:
        pattern = values[FORMAT]
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"reward: format {pattern!r:.100} is no regular expression: {error}") from None
        return RewardTerm(FORMAT, pattern, float(weight))
    name = values["reward"]
    if not isinstance(name, str) or (name != EXACT and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", name)):
        hint = "format needs its regular expression, {format: '#### -?[0-9]+'}" if name == FORMAT else ACCEPTED
        raise ValueError(f"reward: {name!r:.100} is no reward; accepted: {hint}")
    return RewardTerm(name, weight=float(weight))


def import_reward(name: str, folders: Sequence[Path] = ()) -> None:
    """Import a function that rewards answers, so that recipes may name it.

    Args:
        name: as my_rewards:brevity, or rewards.py:brevity. It is called as trl calls rewards, with lists under
            `prompts`, `completions` (messages), `answer` (references, or None) and more; it returns a number for each.
        folders: where the module is looked for first; the working folder is the last of them.

    Raises:
        ValueError: it cannot be imported, or cannot be called so.
    """
    module, _, function = name.rpartition(":")
    where = tuple(dict.fromkeys([*(folder.resolve() for folder in folders), Path.cwd()]))
    try:
        found = vars(import_module(module, where)).get(function)
    except ValueError as error:
        raise ValueError(f"reward: {name}: {str(error).removeprefix('import: ')}") from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise ValueError(f"reward: {module} has no function {function!r} that returns a list of numbers")
    try:
        inspect.signature(found).bind(**dict.fromkeys(PASSED))
    except TypeError as error:
        raise ValueError(
            f"reward: {name} cannot be called with {', '.join(PASSED)} ({error}); write "
            f"def {function}(completions, **kwargs)"
        ) from None
    _functions[name], _places[name] = cast(Function, found), where


def import_rewards(given: Any, folders: Sequence[Path] = ()) -> None:
    """Import the functions that a recipe's `reward` names."""
    for term in reward_terms(given):
        if term.is_function:
            import_reward(term.name, folders)


def reward_places() -> Mapping[str, Sequence[Path]]:
    """Return the functions that were imported, and where from, for another process to import them again."""
    return dict(_places)


def find_function(name: str, given: Any) -> Function:
    """Return a function that was imported.

    Raises:
        ValueError: it was not, as no person named it in this process.
    """
    if name not in _functions:
        text = yaml.safe_dump(given, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
        raise ValueError(
            f"reward: {name} is a function, and nothing is imported because a file of a run, or from elsewhere, names "
            f"it; if you trust it, add --reward {text!r} (from Python: inlay.import_reward({name!r}))"
        )
    return _functions[name]
