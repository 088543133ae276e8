"""Define the plan of a comparison: a recipe that all runs share and, under `compare`, what they differ in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import yaml

from inlay.evaluation.metric import METRIC_HELP, on_task
from inlay.experiments.recipe_block import ELSEWHERE, check_held_whole, positive_numbers, read_block
from inlay.messages import one_line, slug
from inlay.models.model_classes import find_model_class
from inlay.recipe.reading import from_values, non_defaults
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import conform, conform_all, field_of

BUDGETS = {"parameters": "trained parameters", "memory": "GiB at the peak of a step", "time": "seconds of training"}

# Fields of a recipe in which methods may differ; all others define the task, which all share.
OF_METHOD = """method args scale dropout target_modules exclude_modules layers_to_transform experts modules_to_save
patterns allocate bias quantize fold_rounds scheduler warmup weight_decay optimizer optimizer_args lr_ratio
core_ratio step step_args flat_noise saver max_grad_norm gradient_checkpointing group_by_length trainer""".split()


@dataclass
class Comparison:
    """Define the `compare` block of a recipe."""

    methods: list = field_of(
        lambda: ["lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "peft:dora"],
        "names (lora, peft:dora, full), or mappings of recipe fields in which methods may differ, with name and "
        "learning_rates: {method: milora, args: {side: minor}, learning_rates: [1e-3]}",
    )
    learning_rates: list | Literal["auto"] = field_of(
        "auto",
        "learning rates from which each method's own is chosen; auto: its default, a third and three times of it",
    )
    seeds: list = field_of(lambda: [0, 1, 2], "seeds of the runs at the chosen rate; the rate is chosen with the first")
    budget: dict = field_of(
        dict,
        "one of {parameters: N} (in the end) and {memory: GiB}, for which sizes are solved that no method gives, or "
        "{time: seconds}, which limits steps",
    )
    halving: int = field_of(
        3, "factor of successive halving: one rate in so many continues, with so many times the steps", min=2
    )
    extend: int = field_of(
        4, "rates beyond its own that a method may be tried at, while its best is the lowest or the highest", min=0
    )
    margin: float = field_of(
        0.02, "differences of the loss up to here do not matter: an interval within is called equivalent", min=0
    )
    reference: str | None = field_of(None, "method that the others are compared with (default: lora, or the first)")
    selection: int = field_of(48, "training examples held out to choose rates on", min=1)
    unrelated: str | None = field_of(
        None, "text on which forgetting is measured (default: paragraphs that Inlay includes)"
    )
    metric: str | dict | None = field_of(
        None,
        "measured on the final runs, beside their loss: a figure of the task (accuracy, f1, matthews; its first is the "
        f"default), {METRIC_HELP}",
    )

    def __post_init__(self) -> None:
        conform_all(self)
        for name in ("methods", "learning_rates", "seeds"):
            if not vars(self)[name]:
                raise ValueError(f"compare: {name} is empty")
        if self.learning_rates != "auto":
            self.learning_rates = positive_numbers("learning_rates", self.learning_rates)
        self.seeds = [conform("seeds", int, seed) for seed in self.seeds]
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds: {self.seeds} are not different whole numbers from 0 up; a repeated seed is the same run"
            )
        if self.budget and (len(self.budget) != 1 or not self.budget.keys() <= BUDGETS.keys()):
            raise ValueError(
                f"budget: {self.budget} is not one of {', '.join(f'{{{k}: {v}}}' for k, v in BUDGETS.items())}"
            )
        if isinstance(self.metric, dict):
            on_task(self.metric)
        self.budget = {kind: positive_numbers("budget", [limit])[0] for kind, limit in self.budget.items()}

    @property
    def limit(self) -> tuple[str, float] | None:
        """Return the budget's kind and size."""
        return next(iter(self.budget.items()), None)


@dataclass(frozen=True)
class Entry:
    """Hold one method of a comparison: its recipe, without rate and seed, and the rates it is tried at."""

    name: str
    recipe: Recipe
    rates: tuple[float, ...]


@dataclass(frozen=True)
class ComparisonPlan:
    """Hold a comparison whose methods are settled."""

    spec: Comparison
    recipe: Recipe
    entries: tuple[Entry, ...]

    @property
    def reference(self) -> str:
        """Return the name of the method that the others are compared with."""
        return self.spec.reference or next((e.name for e in self.entries if e.name == "lora"), self.entries[0].name)

    def to_yaml(self) -> str:
        """Return the recipe of the comparison as YAML, without the fields for the run folder."""
        block = {key: value for key, value in asdict(self.spec).items() if key != "metric" or value is not None}
        return yaml.safe_dump({**non_defaults(self.recipe), "compare": block}, sort_keys=False, allow_unicode=True)


def load_comparison(
    path: str, output: str | None = None, overwrite: bool = False, given: dict[str, object] | None = None
) -> ComparisonPlan:
    """Read a comparison from a YAML file; without a `compare` block it compares the default methods on that task.

    The fields `given` override those of the file.

    Raises:
        ValueError: the file, a key or a value cannot be used.
    """
    values, block = read_block(path, "compare", Comparison)
    more = {"output": output or values.get("output"), "overwrite": overwrite}
    return plan_comparison(from_values({**values, **more}, given or {}, path), Comparison(**block))


def plan_comparison(recipe: Recipe, spec: Comparison) -> ComparisonPlan:
    """Return a comparison with every method's recipe built and checked."""
    for name in ELSEWHERE:
        if vars(recipe)[name]:
            raise ValueError(
                f"{name} is for single runs; here all methods train equally long, and only results are kept"
            )
    check_held_whole(recipe)
    kind = find_model_class(recipe.task)
    if recipe.task == "vision":
        raise ValueError("task: vision is for single runs; inlay compare is for all other tasks")
    if "memory" in spec.budget and not kind.planned:
        raise ValueError(
            f"budget: memory is not predicted for task {recipe.task}; give {{parameters: N}} or {{time: s}}"
        )
    if recipe.batch_size == "auto":
        raise ValueError("batch_size: auto would give each method its own; give a number")
    entries = tuple(entry_of(recipe, spec, item) for item in spec.methods)
    names = [e.name for e in entries]
    folders = list(map(slug, names))
    for name in names:
        if folders.count(slug(name)) > 1:
            raise ValueError(
                f"methods: two are called {name!r}; give one of them another name: {{method: ..., name: ...}}"
            )
    if spec.reference not in (None, *names):
        raise ValueError(f"reference: {spec.reference!r} is not one of the methods {', '.join(names)}")
    return ComparisonPlan(spec, recipe, entries)


def entry_of(recipe: Recipe, spec: Comparison, item: object) -> Entry:
    """Return one of `methods`, with its fields in the recipe that all share."""
    values = {"method": item} if isinstance(item, str) else item
    if not isinstance(values, dict) or "method" not in values:
        raise ValueError(f"methods: {item!r} is neither a name nor a mapping with method")
    rates = values.get("learning_rates", spec.learning_rates)
    name = values.get("name", values["method"])
    if rates != "auto" and (not isinstance(rates, list) or not rates):
        raise ValueError(f"methods: learning_rates of {name} must be a list with one or more, not {rates!r}")
    changed = {key: value for key, value in values.items() if key not in ("name", "learning_rates")}
    for key in changed:
        if key not in OF_METHOD:
            raise ValueError(f"methods: {key!r} cannot differ between methods; these can: {', '.join(OF_METHOD)}")
    entry = replace(recipe, **{"args": {}, **changed})
    if "$" in str(name) or one_line(str(name)) != str(name):
        raise ValueError(
            f"methods: name {name!r} has a $, which plots read as a formula, or a line break; leave it out"
        )
    if rates == "auto":
        numbers = grid_around(replace(entry, learning_rate="auto").rate)
    else:
        numbers = positive_numbers("learning_rates", rates)
    return Entry(conform("methods: name", str, name), entry, tuple(sorted(set(numbers))))


def grid_around(rate: float) -> list[float]:
    """Return a third, once and three times a rate."""
    return [float(f"{rate * factor:.2g}") for factor in (1 / 3, 1, 3)]
