"""What `inlay tune` is asked: a recipe; under `tune` the space that its fields are searched in, and how."""

from __future__ import annotations

import copy
import json
import typing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import yaml

from inlay.evaluation.metric import METRIC_HELP, less_is_better
from inlay.experiments.recipe_block import ELSEWHERE, check_held_whole, read_block
from inlay.messages import did_you_mean
from inlay.methods import METHODS
from inlay.recipe.reading import from_values, hyperparameters, non_defaults
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import conform, conform_all, field_of

# What the task is: at other values a loss is of something else. What is no matter of quality is there too.
FIXED = """model revision trust_remote_code data split eval_data eval_size columns system max_length seed eval_every
report_to output overwrite samples encoding tsv_quotes empty_answers ignore""".split()
TUNED = [f.name for f in fields(Recipe) if f.name not in (*FIXED, *ELSEWHERE)]
EXAMPLES = "{low: 1e-5, high: 1e-2, log: true} or {choices: [4, 8, 16]}"
Value = bool | int | float | str | None


@dataclass(frozen=True)
class Range:
    """What one field is searched in: numbers from `low` to `high`, `whole` ones or not, by their logarithm or not; or,
    if there are any, `choices`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that a mistake would show at."""
        return self.choices or (self.low, self.high)

    @property
    def labels(self) -> dict[Value, Any]:
        """The choices by what a study keeps of them: a list or a mapping by its text."""
        return {json.dumps(c) if isinstance(c, list | dict) else c: c for c in self.choices}


@dataclass
class Rescore:
    """The `rescore` block: how the best few trials are judged again."""

    top: int = field_of(3, "trials that are trained again; 0: the least loss wins", min=0)
    metric: str | dict | None = field_of(None, f"{METRIC_HELP} (default: the held-out loss)")
    direction: Literal["maximize", "minimize"] | None = field_of(
        None, "what is better in the metric (default: maximize; of perplexity, minimize)"
    )

    def __post_init__(self) -> None:
        conform_all(self)
        if self.direction is None:
            self.direction = "minimize" if self.metric and less_is_better(self.metric) else "maximize"


@dataclass
class SearchSpec:
    """The `tune` block of a recipe."""

    space: dict = field_of(dict, f"fields, or args.NAME, trainer.NAME, ...: each {EXAMPLES}")
    trials: int = field_of(30, "runs in all; more of them go on with the same search", min=1)
    sampler: Literal["tpe", "nomad"] = field_of(
        "tpe", "tpe: Optuna's; nomad: mesh adaptive search, one trial at a time"
    )
    pruner: Literal["median", "hyperband", "none"] = field_of("median", "ends trials that fall behind")
    evaluations: int = field_of(5, "of a trial while it trains, evenly spaced: what the pruner sees", min=1)
    selection: int = field_of(48, "training examples that are held out to judge trials by", min=1)
    rescore: dict = field_of(dict, "{top: 3, metric: ..., direction: maximize}: the best few, trained again")

    def __post_init__(self) -> None:
        conform_all(self)
        rescore(self.rescore)
        if not self.space:
            raise ValueError(f"tune: space is empty; give it fields, as learning_rate: {EXAMPLES}")


@dataclass(frozen=True)
class SearchPlan:
    """A search whose ranges are settled."""

    ask: SearchSpec
    recipe: Recipe
    ranges: dict[str, Range]
    rescore: Rescore

    def to_yaml(self) -> str:
        """The recipe that asks for it; where it is kept and run is no part of it."""
        return yaml.safe_dump(
            {**non_defaults(self.recipe), "tune": asdict(self.ask)}, sort_keys=False, allow_unicode=True
        )


def same_values(old: str, new: str) -> bool:
    """Whether two of `Plan.to_yaml` are one search: it may have more trials, and be judged otherwise in the end."""
    one, other = ({**(found := yaml.safe_load(text)), "tune": {**found["tune"]}} for text in (old, new))
    for key in ("trials", "rescore"):
        for found in (one, other):
            found["tune"].pop(key, None)
    return one == other


def load_search(path: str, output: str | None = None, overwrite: bool = False) -> SearchPlan:
    """A search from a YAML file.

    Raises:
        ValueError: the file, a key or a value cannot be used.
    """
    values, given = read_block(path, "tune", SearchSpec)
    more = {"output": output or values.get("output"), "overwrite": overwrite}
    return plan_search(from_values({**values, **more}, {}, path), SearchSpec(**given))


def plan_search(recipe: Recipe, ask: SearchSpec) -> SearchPlan:
    """A search with every range read, and tried at its ends."""
    for name in ELSEWHERE:
        if getattr(recipe, name):
            raise ValueError(f"{name} is for single runs: here trials leave only results")
    check_held_whole(recipe)
    ranges = {name: range_of(name, given) for name, given in ask.space.items()}
    first = {name: r.ends[0] for name, r in ranges.items()}
    for name, r in ranges.items():
        for value in r.ends:
            try:
                tried = lay_over(recipe, {**first, name: value})
            except ValueError as error:
                raise ValueError(f"space: {name} cannot be {value!r}: {error}") from None
            if tried.batch_size == "auto":
                raise ValueError("batch_size: auto would give each trial another one; give a number, or tune it")
    return SearchPlan(ask, recipe, ranges, rescore(ask.rescore))


def rescore(given: dict[str, Any]) -> Rescore:
    """The `rescore` block."""
    names = [f.name for f in fields(Rescore)]
    for key in given:
        if key not in names:
            raise ValueError(f"rescore has no {key!r}; {did_you_mean(key, names)}")
    return Rescore(**given)


def range_of(name: str, given: Any) -> Range:
    """One range of `space`.

    Raises:
        ValueError: there is no such field, it belongs to the task, or the range cannot be read.
    """
    head, *inner = name.split(".")
    if head not in TUNED:
        if head in FIXED or head in ELSEWHERE:
            raise ValueError(f"space: {head} cannot be tuned: it says what the task is, not how well it is learned")
        hint = f"write it as args.{head}" if head in hyperparameters() else did_you_mean(head, TUNED)
        raise ValueError(f"space: a recipe has no {head!r}; {hint}")
    hint = typing.get_type_hints(Recipe)[head]
    if inner and hint is not dict:
        raise ValueError(f"space: {head} has no parts; write {head} in place of {name}")
    if not isinstance(given, dict) or not ({"low", "high"} <= given.keys() or "choices" in given):
        raise ValueError(f"space: {name}: {given!r} is no range; write {EXAMPLES}")
    if "choices" in given:
        if len(given) > 1 or not isinstance(given["choices"], list) or not given["choices"]:
            raise ValueError(f"space: {name}: {given!r} is no list of choices; write {{choices: [4, 8, 16]}}")
        return Range(choices=tuple(given["choices"]))
    for key in given:
        if key not in ("low", "high", "log"):
            raise ValueError(f"space: {name} has no {key!r}; {did_you_mean(key, ('low', 'high', 'log'))}")
    options = typing.get_args(hint) or (hint,)
    if not inner and not {int, float} & set(options):
        raise ValueError(f"space: {name} has no numbers between others; write {{choices: [...]}}")
    low, high = (conform(f"space: {name}", float, given[end]) for end in ("low", "high"))
    log = conform(f"space: {name}: log", bool, given.get("log", False))
    if low >= high or (log and low <= 0):
        raise ValueError(f"space: {name}: low {low:g} is not below high {high:g}" + (", and above 0" if log else ""))
    fraction = float in options or (bool(inner) and takes_fractions(head, inner[0]))
    whole = not fraction and all(isinstance(given[end], int) for end in ("low", "high"))
    if not inner and not fraction and not whole:
        raise ValueError(f"space: {name} takes whole numbers; {given['low']} to {given['high']} are not")
    return Range(int(low), int(high), log, True) if whole else Range(low, high, log)


def takes_fractions(head: str, key: str) -> bool:
    """Whether a key within a field is a number that need not be whole, as far as that is known."""
    from transformers import TrainingArguments

    classes: dict[str, Any] = {"args": METHODS, "trainer": (TrainingArguments,)}
    types = [str(f.type) for cls in classes.get(head, ()) for f in fields(cls) if f.name == key]
    return bool(types) and all("float" in text for text in types)


def lay_over(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """A recipe with values of the space laid over it; a dotted name is a key within a field.

    Raises:
        ValueError: the recipe does not take one of them.
    """
    made: dict[str, Any] = {}
    for name, value in values.items():
        head, *inner = name.split(".")
        if not inner:
            made[head] = value
            continue
        at = made.setdefault(head, copy.deepcopy(getattr(recipe, head)))
        for key in inner[:-1]:
            at = at.setdefault(key, {})
        at[inner[-1]] = value
    return replace(recipe, **made)
