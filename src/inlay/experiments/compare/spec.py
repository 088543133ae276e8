"""What `inlay compare` is asked: a recipe that all runs share; under `compare` the methods, rates, seeds and budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from inlay.evaluation.metric import METRIC_HELP, on_task
from inlay.experiments.recipe_block import ELSEWHERE, check_held_whole, positive_numbers, read_block
from inlay.messages import slug
from inlay.recipe.reading import from_values, non_defaults
from inlay.recipe.recipe import Recipe
from inlay.recipe.schema import conform, conform_all, field_of

BUDGETS = {"parameters": "trained numbers", "memory": "GiB at the peak of a step", "time": "seconds of training"}


# Fields of a recipe in which methods may differ; all others are the task, which is one.
OF_METHOD = """method args scale dropout target_modules exclude_modules layers_to_transform modules_to_save patterns
allocate bias quantize fold_rounds scheduler warmup weight_decay optimizer optimizer_args lr_ratio step
step_args flat_noise saver max_grad_norm gradient_checkpointing trainer""".split()


@dataclass
class Comparison:
    """The `compare` block of a recipe."""

    methods: list = field_of(
        lambda: ["lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "peft:dora"],
        "names (lora, peft:dora, full), or mappings of recipe fields in which methods may differ, with name and "
        "learning_rates: {method: milora, args: {side: minor}, learning_rates: [1e-3]}",
    )
    learning_rates: list = field_of(lambda: [2e-4, 6e-4, 2e-3], "what each method's own rate is chosen from")
    seeds: list = field_of(lambda: [0, 1, 2], "of the runs at the chosen rate; the rate is chosen with the first")
    budget: dict = field_of(
        dict, "one of {parameters: N}, {memory: GiB}: sizes are solved for it; {time: seconds}: steps are cut to it"
    )
    halving: int = field_of(3, "of the rates, one in so many goes on to a rung with so many times the steps", min=2)
    reference: str | None = field_of(None, "the method the others are compared with (default: lora, or the first)")
    selection: int = field_of(48, "training examples that are held out to choose rates on", min=1)
    unrelated: str | None = field_of(
        None, "text on which forgetting is measured (default: paragraphs that come with it)"
    )
    metric: str | dict | None = field_of(None, f"of the final runs, beside their loss: {METRIC_HELP}")

    def __post_init__(self) -> None:
        conform_all(self)
        for name in ("methods", "learning_rates", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"compare: {name} is empty")
        self.learning_rates = positive_numbers("learning_rates", self.learning_rates)
        self.seeds = [conform("seeds", int, seed) for seed in self.seeds]
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: {self.seeds} are not different whole numbers from 0 up; a seed twice is one run")
        if self.budget and (len(self.budget) != 1 or not self.budget.keys() <= BUDGETS.keys()):
            raise ValueError(
                f"budget: {self.budget} is not one of {', '.join(f'{{{k}: {v}}}' for k, v in BUDGETS.items())}"
            )
        if isinstance(self.metric, dict):
            on_task(self.metric)
        self.budget = {kind: positive_numbers("budget", [limit])[0] for kind, limit in self.budget.items()}

    @property
    def limit(self) -> tuple[str, float] | None:
        """The budget's kind and size."""
        return next(iter(self.budget.items()), None)


@dataclass(frozen=True)
class Entry:
    """One method of a comparison: its recipe, all but rate and seed, and the rates it is tried at."""

    name: str
    recipe: Recipe
    rates: tuple[float, ...]


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison whose methods are settled."""

    ask: Comparison
    recipe: Recipe
    entries: tuple[Entry, ...]

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return self.ask.reference or next((e.name for e in self.entries if e.name == "lora"), self.entries[0].name)

    def to_yaml(self) -> str:
        """The recipe that asks for it; where it is kept and run is no part of it."""
        asked = {key: value for key, value in asdict(self.ask).items() if key != "metric" or value is not None}
        return yaml.safe_dump({**non_defaults(self.recipe), "compare": asked}, sort_keys=False, allow_unicode=True)


def load_comparison(path: str, output: str | None = None, overwrite: bool = False) -> ComparisonPlan:
    """A comparison from a YAML file; one without a `compare` block compares the default methods on that task.

    Raises:
        ValueError: the file, a key or a value cannot be used.
    """
    values, given = read_block(path, "compare", Comparison)
    more = {"output": output or values.get("output"), "overwrite": overwrite}
    return plan_comparison(from_values({**values, **more}, {}, path), Comparison(**given))


def plan_comparison(recipe: Recipe, ask: Comparison) -> ComparisonPlan:
    """A comparison with every method's recipe made and checked."""
    for name in ELSEWHERE:
        if getattr(recipe, name):
            raise ValueError(f"{name} is for single runs: here all methods train as long, and only results are kept")
    check_held_whole(recipe)
    if recipe.task != "instruction":
        raise ValueError(f"task: {recipe.task} is for single runs; inlay compare compares on task instruction")
    if recipe.batch_size == "auto":
        raise ValueError("batch_size: auto would give each method another one; give a number")
    entries = tuple(entry_of(recipe, ask, item) for item in ask.methods)
    names = [e.name for e in entries]
    folders = list(map(slug, names))
    for name in names:
        if folders.count(slug(name)) > 1:
            raise ValueError(
                f"methods: two are called {name!r}; give one of them another name: {{method: ..., name: ...}}"
            )
    if ask.reference not in (None, *names):
        raise ValueError(f"reference: {ask.reference!r} is not one of the methods {', '.join(names)}")
    return ComparisonPlan(ask, recipe, entries)


def entry_of(recipe: Recipe, ask: Comparison, item: Any) -> Entry:
    """One of `methods`, laid over the recipe that all share."""
    given: Any = {"method": item} if isinstance(item, str) else item
    if not isinstance(given, dict) or "method" not in given:
        raise ValueError(f"methods: {item!r} is neither a name nor a mapping with method")
    rates, name = given.get("learning_rates", ask.learning_rates), given.get("name", given["method"])
    if not isinstance(rates, list) or not rates:
        raise ValueError(f"methods: learning_rates of {name} must be a list with one or more, not {rates!r}")
    rates = positive_numbers("learning_rates", rates)
    own = {key: value for key, value in given.items() if key not in ("name", "learning_rates")}
    for key in own:
        if key not in OF_METHOD:
            raise ValueError(f"methods: {key!r} cannot differ between methods; these can: {', '.join(OF_METHOD)}")
    made = replace(recipe, **{"args": {}, **own})
    if "$" in str(name):
        raise ValueError(f"methods: name {name!r} has a $, which plots take for a formula; leave it out")
    return Entry(conform("methods: name", str, name), made, tuple(sorted(set(rates))))
