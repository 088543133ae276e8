"""Define the plan of a search: a recipe and, under `tune`, the space its fields are searched in, and how."""

from __future__ import annotations

import copy
import json
import typing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import yaml

from inlay.evaluation.metric import METRIC_HELP, less_is_better
from inlay.experiments.recipe_block import ELSEWHERE, check_held_whole, read_block
from inlay.files.untrusted import from_yaml
from inlay.messages import did_you_mean
from inlay.methods import every
from inlay.recipe.reading import from_values, hyperparameters, non_defaults
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import conform, conform_all, field_of

# Fields that define the task, so that losses at other values do not compare; and fields that do not affect quality.
FIXED = """model revision trust_remote_code data split eval_data eval_size columns system max_length seed eval_every
report_to output overwrite samples encoding tsv_quotes empty_answers ignore imports task reward answers unlabelled
chat_template chat_template_kwargs""".split()
TUNED = [f.name for f in fields(Recipe) if f.name not in (*FIXED, *ELSEWHERE)]
EXAMPLES = "{low: 1e-5, high: 1e-2, log: true} or {choices: [4, 8, 16]}"
Value = bool | int | float | str | None


@dataclass(frozen=True)
class Range:
    """Define the values of one field: an interval of numbers, or a list of choices.

    Attributes:
        low, high: the ends of the interval.
        log: whether the interval is searched by logarithms.
        whole: whether the numbers are whole.
        choices: if any, the values instead of an interval.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """Return the values at which a wrong range would show."""
        return self.choices or (self.low, self.high)

    @property
    def labels(self) -> dict[Value, Any]:
        """Return the choices by the labels that a study stores; a list or a mapping is labelled by its JSON text."""
        return {json.dumps(c) if isinstance(c, list | dict) else c: c for c in self.choices}


@dataclass
class Rescore:
    """Define the `rescore` block: how the best few trials are evaluated again."""

    top: int = field_of(3, "best trials that are trained again; 0: the lowest loss wins", min=0)
    metric: str | dict | None = field_of(None, f"{METRIC_HELP} (default: the held-out loss)")
    direction: Literal["maximize", "minimize"] | None = field_of(
        None, "direction in which the metric is better (default: maximize; for perplexity: minimize)"
    )

    def __post_init__(self) -> None:
        conform_all(self)
        if self.direction is None:
            self.direction = "minimize" if self.metric and less_is_better(self.metric) else "maximize"


@dataclass
class SearchSpec:
    """Define the `tune` block of a recipe."""

    space: dict = field_of(dict, f"fields, or args.NAME, trainer.NAME, ...: each {EXAMPLES}")
    trials: int = field_of(30, "runs in all; with more, the same search resumes", min=1)
    sampler: Literal["tpe", "nomad"] = field_of(
        "tpe", "tpe: of Optuna; nomad: mesh adaptive direct search, one trial at a time"
    )
    pruner: Literal["median", "hyperband", "none"] = field_of("median", "rule that ends trials which fall behind")
    evaluations: int = field_of(5, "evaluations of a trial while it trains, evenly spaced, that the pruner sees", min=1)
    selection: int = field_of(48, "training examples held out to evaluate trials on", min=1)
    rescore: dict = field_of(
        dict, "{top: 3, metric: ..., direction: maximize}: how the best few are trained again and compared"
    )

    def __post_init__(self) -> None:
        conform_all(self)
        rescore(self.rescore)
        if not self.space:
            raise ValueError(f"tune: space is empty; give it fields, such as learning_rate: {EXAMPLES}")


@dataclass(frozen=True)
class SearchPlan:
    """Hold a search whose ranges are settled."""

    spec: SearchSpec
    recipe: Recipe
    ranges: dict[str, Range]
    rescore: Rescore

    def to_yaml(self) -> str:
        """Return the recipe of the search as YAML, without the fields for the run folder."""
        return yaml.safe_dump(
            {**non_defaults(self.recipe), "tune": asdict(self.spec)}, sort_keys=False, allow_unicode=True
        )


def same_values(old: str, new: str) -> bool:
    """Return whether two `SearchPlan.to_yaml` are one search: trials may be added and `rescore` may differ."""
    try:
        searches = [from_yaml(text) for text in (old, new)]
        for search in searches:
            search["tune"] = {key: value for key, value in search["tune"].items() if key not in ("trials", "rescore")}
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):
        return False  # somebody changed the file
    return searches[0] == searches[1]


def load_search(
    path: str, output: str | None = None, overwrite: bool = False, given: dict[str, object] | None = None
) -> SearchPlan:
    """Read a search from a YAML file, of which the fields and hyperparameters `given` override its own.

    Raises:
        ValueError: the file, a key or a value cannot be used, or what is given is searched.
    """
    given = given or {}
    values, block = read_block(path, "tune", SearchSpec)
    more = {"output": output or values.get("output"), "overwrite": overwrite}
    spec = SearchSpec(**block)
    for name in given:
        if name in spec.space or f"args.{name}" in spec.space:
            raise ValueError(f"{name}: {path} searches it, under tune; leave it out here, or out of the space there")
    return plan_search(from_values({**values, **more}, given, path), spec)


def plan_search(recipe: Recipe, spec: SearchSpec) -> SearchPlan:
    """Return a search with every range read, and tested at its ends."""
    for name in ELSEWHERE:
        if vars(recipe)[name]:
            raise ValueError(f"{name} is for single runs; trials leave only results")
    check_held_whole(recipe)
    ranges = {name: range_of(name, values) for name, values in spec.space.items()}
    first = {name: r.ends[0] for name, r in ranges.items()}
    for name, r in ranges.items():
        for value in r.ends:
            try:
                tried = lay_over(recipe, {**first, name: value})
            except ValueError as error:
                raise ValueError(f"space: {name} cannot be {value!r}: {error}") from None
            if tried.batch_size == "auto":
                raise ValueError("batch_size: auto would give each trial its own; give a number, or tune it")
    return SearchPlan(spec, recipe, ranges, rescore(spec.rescore))


def rescore(block: dict[str, Any]) -> Rescore:
    """Return the `rescore` block as an object."""
    names = [f.name for f in fields(Rescore)]
    for key in block:
        if key not in names:
            raise ValueError(f"rescore has no {key!r}; {did_you_mean(key, names)}")
    return Rescore(**block)


def range_of(name: str, values: object) -> Range:
    """Return one range of `space`, the field `name` with its `values`.

    Raises:
        ValueError: there is no such field, it belongs to the task, or the range cannot be read.
    """
    head, *inner = name.split(".")
    if head not in TUNED:
        if head in FIXED or head in ELSEWHERE:
            raise ValueError(f"space: {head} cannot be tuned: it defines the task, not how well it is learned")
        hint = f"write it as args.{head}" if head in hyperparameters() else did_you_mean(head, TUNED)
        raise ValueError(f"space: a recipe has no {head!r}; {hint}")
    hint = typing.get_type_hints(Recipe)[head]
    if inner and hint is not dict:
        raise ValueError(f"space: {head} has no parts; write {head} instead of {name}")
    if not isinstance(values, dict) or not ({"low", "high"} <= values.keys() or "choices" in values):
        raise ValueError(f"space: {name}: {values!r} is not a range; write {EXAMPLES}")
    if "choices" in values:
        if len(values) > 1 or not isinstance(values["choices"], list) or not values["choices"]:
            raise ValueError(f"space: {name}: {values!r} is not a list of choices; write {{choices: [4, 8, 16]}}")
        return Range(choices=tuple(values["choices"]))
    for key in values:
        if key not in ("low", "high", "log"):
            raise ValueError(f"space: {name} has no {key!r}; {did_you_mean(key, ('low', 'high', 'log'))}")
    options = typing.get_args(hint) or (hint,)
    if not inner and not {int, float} & set(options):
        raise ValueError(f"space: {name} is not a number; write {{choices: [...]}}")
    low, high = (conform(f"space: {name}", float, values[end]) for end in ("low", "high"))
    log = conform(f"space: {name}: log", bool, values.get("log", False))
    if low >= high or (log and low <= 0):
        raise ValueError(f"space: {name}: low {low:g} is not below high {high:g}" + (", and above 0" if log else ""))
    fraction = float in options or (bool(inner) and takes_fractions(head, inner[0]))
    whole = not fraction and all(isinstance(values[end], int) for end in ("low", "high"))
    if not inner and not fraction and not whole:
        raise ValueError(f"space: {name} takes whole numbers; {values['low']} to {values['high']} are not")
    return Range(int(low), int(high), log, True) if whole else Range(low, high, log)


def takes_fractions(head: str, key: str) -> bool:
    """Return whether a key within the field `head` is known to take fractions."""
    from transformers import TrainingArguments

    classes: dict[str, tuple[type, ...]] = {"args": every(), "trainer": (TrainingArguments,)}
    types = [str(f.type) for cls in classes.get(head, ()) for f in fields(cls) if f.name == key]
    return bool(types) and all("float" in text for text in types)


def lay_over(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Return a recipe with values of the space in it; a dotted name is a key within a field.

    Raises:
        ValueError: the recipe refuses one of them.
    """
    replaced: dict[str, Any] = {}
    for name, value in values.items():
        head, *inner = name.split(".")
        if not inner:
            replaced[head] = value
            continue
        mapping = replaced.setdefault(head, copy.deepcopy(vars(recipe)[head]))
        for key in inner[:-1]:
            mapping = mapping.setdefault(key, {})
        mapping[inner[-1]] = value
    return replace(recipe, **replaced)
