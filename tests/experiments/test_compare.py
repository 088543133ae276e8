"""Comparing methods: the decisions by hand, sizes for a budget by search, a whole comparison, its page."""

import csv
import html
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

from inlay.cli import main
from inlay.evaluation.ask_model import mean_token_loss
from inlay.evaluation.paired import Difference, holm, paired
from inlay.experiments import trial
from inlay.experiments.compare import compare as compare_module
from inlay.experiments.compare.budget import budget_cost, largest_within, method_size_field, solve_size
from inlay.experiments.compare.compare import compare, shared_examples, sweep_rates
from inlay.experiments.compare.halving import pareto, row_noise, rungs, survivors
from inlay.experiments.compare.outcome import Outcome, spread_text
from inlay.experiments.compare.plots import allocated, comparison_figures, memory_stack, ranks_plot, spectra_of
from inlay.experiments.compare.result_files import results_table
from inlay.experiments.compare.spec import Comparison, Entry, load_comparison, plan_comparison
from inlay.experiments.compare.sweep import Sweep
from inlay.experiments.compare.tables import best_recipe
from inlay.experiments.runner import Runner, origin
from inlay.experiments.trial import LOG, SAMPLES, read_trial, run_trial, unrelated
from inlay.files.atomic import locked
from inlay.inspection.figures import INK
from inlay.models.base import BaseModel
from inlay.models.sizes import count_parameters
from inlay.recipe.recipe import Recipe
from inlay.training.examples import load_examples
from inlay.training.peft_extras import Allocation
from inlay.training.train import train

SILENT = Console(quiet=True)
INF = math.inf
PLOTS = """differences curves parameters memory seconds stack forgetting rates rate_forgetting
subspaces maps spectra""".split()  # no ranks


# -- decisions --------------------------------------------------------------------------------------------------------


def test_the_interval_is_students():
    """By hand: differences .1, .2, .3 have mean .2 and deviation .1; t at 97.5 % with 2 degrees is 4.302653."""
    found = paired([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)
    assert found.error == pytest.approx(0.1 / math.sqrt(3))
    assert found.detectable == pytest.approx(half + 1.060660 * 0.1 / math.sqrt(3), abs=1e-6)  # t at 80 %
    assert found.verdict("lora") == f"cannot tell from lora: these runs would show {found.detectable:.3f}"
    assert found.verdict("lora", margin=0.5) == "equivalent to lora within 0.5"
    assert found.verdict("lora", margin=0.4).startswith("cannot tell")  # 0.2 + half is .448


def test_intervals_of_many_methods_hold_together():
    """Holm by hand: of three p-values the smallest is judged at α / 3, the next at α / 2; it fails, as do the rest."""
    one = Difference(-1.0, 0, 0, 0.1, 5)  # t = -10, p = .00056
    two = Difference(0.3, 0, 0, 0.1, 5)  # t = 3, p = .0399: alone it would be a difference
    three = Difference(0.25, 0, 0, 0.1, 5)  # t = 2.5, p = .0668
    assert two.at(0.95).low > 0
    found = holm({"three": three, "one": one, "two": two, "none": paired([1.0], [2.0])})
    assert [found[k].confidence for k in ("one", "two", "three")] == pytest.approx([1 - 0.05 / 3, 0.975, 0.975])
    assert found["one"].verdict("lora") == "better than lora by 1.000"
    assert found["two"].verdict("lora").startswith("cannot tell from lora")
    assert found["two"].low == pytest.approx(0.3 - 0.1 * 3.495406, abs=1e-6)  # t at 98.75 % with 4 degrees
    assert math.isnan(found["none"].low)


def test_pairs_take_away_what_seeds_share():
    """Seeds that differ by 1 and a method that is always .1 ± .01 better: unpaired it would drown."""
    found = paired([0.91, 1.90, 2.89], [1.0, 2.0, 3.0])
    assert found.high < 0
    assert found.verdict("lora") == "better than lora by 0.100"
    assert paired([1.0, 2.0, 3.0], [0.91, 1.90, 2.89]).verdict("lora") == "worse than lora by 0.100"


def test_what_cannot_be_compared_is_not():
    assert paired([1.0], [2.0]).verdict("lora") == paired([1.0] * 3, [1.001] * 3).verdict("lora")
    assert paired([1.0], [2.0]).verdict("lora").startswith("cannot tell: noise is not known")
    assert paired([1.0] * 3, [1.0] * 3).verdict("lora", 0.01) == "equivalent to lora within 0.01"
    assert paired([1.0, INF], [1.0, 1.0]).verdict("lora") == "no comparison: a run failed or diverged"
    assert math.isnan(paired([1.0, 2.0], []).mean)


def test_a_method_that_diverged_with_a_seed_is_not_the_best():
    plan = plan_comparison(Recipe(), Comparison(methods=["lora", "bone", "pissa"], learning_rates=[1e-3, 2e-3]))
    run = {"before": 2.0, "forgetting": None, "parameters": 1, "parameters_last": 1, "seconds": 1.0, "memory": 1}
    losses = {"lora": [1.0, 1.1, 1.2], "bone": [0.5, None, 0.5], "pissa": [0.8, 0.9, 0.9]}
    finals = {name: [{**run, "after": loss} for loss in own] for name, own in losses.items()}
    ends = {"lora": [1e-3, 2e-3, 3e-3], "bone": [1e-3, 2e-3, 3e-3], "pissa": [2e-3, 3e-3]}
    sweeps = {name: Sweep([2e-3], rungs=[(2, dict.fromkeys(tried, 1.0))]) for name, tried in ends.items()}
    made = Outcome(plan, Path(), dict.fromkeys(losses, 6), sweeps, finals, {})
    assert [row.method for row in made.standings()] == ["bone", "pissa", "lora"]
    assert yaml.safe_load(best_recipe(made))["method"] == "lora"  # PiSSA's rate is at an end
    made.finals["lora"][0]["after"] = None
    assert yaml.safe_load(best_recipe(made))["method"] == "pissa"


@pytest.mark.parametrize(
    ("rates", "steps", "factor", "expected"),
    [
        (4, 100, 2, [(4, 25), (2, 50), (1, 100)]),
        (3, 60, 3, [(3, 20), (1, 60)]),
        (5, 90, 3, [(5, 10), (2, 30), (1, 90)]),
        (1, 60, 3, [(1, 60)]),
        (9, 3, 3, [(9, 1), (3, 1), (1, 3)]),
    ],
)
def test_rungs_are_prefixes_of_the_steps(rates, steps, factor, expected):
    assert rungs(rates, steps, factor) == expected


def test_survivors_are_the_best_that_did_not_diverge():
    losses = {1e-4: 2.0, 1e-3: 1.5, 1e-2: 1.5, 1e-1: INF}
    assert survivors(losses, 2) == [1e-3, 1e-2]
    assert survivors(losses, 9) == [1e-3, 1e-2, 1e-4]
    assert survivors({1e-1: INF}, 1) == []
    assert survivors({1e-3: 2.0, 1e-2: 2.1, 1e-1: 2.5}, 1, {1e-2: 0.15, 1e-1: 0.15}) == [1e-3, 1e-2]


def swept(loss, rates, steps=90, rows=None, **more) -> Sweep:
    """A sweep of rates whose loss after so many steps is loss(rate, steps)."""
    sweep = Sweep(list(rates), rungs(len(rates), steps, 3), **more)
    while due := sweep.due():
        sweep.take({rate: {"after": loss(rate, at), "rows": rows and rows(rate)} for at, rate in due})
    return sweep


def valley(rate, steps) -> float:
    """Lowest at 1e-2, everywhere more than any noise apart."""
    return abs(math.log10(rate) + 2)


def test_a_best_rate_at_an_end_extends_the_grid_until_it_is_inside():
    sweep = swept(valley, [1e-5, 1e-4, 1e-3], extend=4)
    assert sweep.rates == [1e-2]
    assert sweep.tried == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert (sweep.edge, sweep.untuned) == ("", "")
    low = swept(valley, [1e-1, 3e-1, 9e-1], extend=9)
    assert low.tried[:4] == pytest.approx([0.00370, 0.0111, 0.0333, 0.1], rel=1e-2)
    assert low.rates == [low.tried[1]]


def test_a_best_rate_that_stays_at_an_end_is_not_tuned():
    sweep = swept(valley, [1e-7, 1e-6, 1e-5], extend=2)
    assert sweep.tried[-1] == 1e-3
    assert sweep.untuned == "its rate is the highest tried"
    assert swept(valley, [1e-2], extend=2).untuned == "one rate was tried"


def test_a_grid_that_diverges_goes_down():
    sweep = swept(lambda rate, steps: valley(rate, steps) if rate < 0.1 else INF, [0.1, 1, 10], extend=4)
    assert sweep.rates == [1e-2]


def test_no_rate_is_dropped_on_a_difference_within_noise():
    """Two rates whose losses differ by .01, each example's by .01 ± .05: both run on, and the later loss decides."""
    signs = [1, -1] * 8

    def rows(rate):
        return [[1.0, 1 + (0.01 + 0.05 * sign if rate == 1e-2 else 0)] for sign in signs]

    def loss(rate, steps):
        return {1e-3: 1.0 + (steps == 90), 1e-2: 1.01, 1e-1: 3.0, 1e-4: 3.0}[rate]

    sweep = swept(loss, [1e-3, 1e-2, 1e-1, 1e-4][:4], rows=rows, extend=1)
    assert [sorted(losses) for _, losses in sweep.rungs] == [[1e-4, 1e-3, 1e-2, 1e-1], [1e-3, 1e-2], [1e-3, 1e-2]]
    assert [steps for steps, _ in sweep.rungs] == [10, 30, 90]
    assert sweep.rates == [1e-2]
    sure = swept(loss, [1e-3, 1e-2, 1e-1], noise=0.001)  # no rows: the noise that is given
    assert sure.rates == [1e-3]


def test_the_noise_of_rows_is_that_of_paired_means():
    """By hand, for rows of one token: the standard deviation of the differences over √n."""
    a, b = [[1, 1.0], [1, 2.0], [1, 4.0]], [[1, 1.5], [1, 2.0], [1, 3.0]]
    assert row_noise(a, b) == pytest.approx(statistics.stdev([-0.5, 0.0, 1.0]) / math.sqrt(3))
    assert row_noise([[2, 2.0], [6, 9.0]], [[2, 1.0], [6, 6.0]]) == pytest.approx(0.0)  # .5 a token in both


def test_the_front_is_what_nothing_beats():
    points = [(1, 3.0), (2, 2.0), (3, 2.0), (4, 1.0), (4, 1.0), (4, 1.5)]
    assert pareto(points) == [True, True, False, True, True, False]


@pytest.mark.parametrize("limit", [0, 1, 49, 50, 51, 2499, 2500, 9999])
def test_bisection_finds_what_search_finds(limit):
    options, asked = list(range(1, 51)), []

    def rising(size):
        asked.append(size)
        return size * size

    expected = max((n for n in options if n * n <= limit), default=None)
    assert largest_within(options, rising, limit) == expected
    assert len(asked) <= 2 + 6  # both ends, and the logarithm of 50
    falling = max((n for n in options if 2500 / n <= limit), key=lambda n: 2500 / n, default=None)
    assert largest_within(options, lambda n: 2500 / n, limit) == falling


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("compare: {method: [lora]}", "did you mean 'methods'?"),
        ("compare: {methods: []}", "methods is empty"),
        ("compare: {methods: [dora]}", "unknown method 'dora'"),
        ("compare: {methods: ['peft:dorra']}", "PEFT has no method 'dorra'; did you mean 'dora'?"),
        ("compare: {methods: [{method: 'peft:lora', args: {use_dorra: true}}]}", "did you mean 'use_dora'?"),
        ("compare: {methods: [{method: 'peft:lora', args: {init_lora_weights: corda}}]}", "a pass over data"),
        ("compare: {methods: [{method: lora, steps: 3}]}", "'steps' cannot differ between methods"),
        ("compare: {methods: [{method: full, args: {r: 3}}]}", "it trains the whole model"),
        ("compare: {methods: [lora, lora]}", "two are called 'lora'"),
        ("compare: {methods: ['peft:dora', {method: lora, name: peft-dora}]}", "two are called 'peft:dora'"),
        ("compare: {methods: [3]}", "neither a name nor a mapping"),
        ("compare: {learning_rates: [0]}", "learning_rates: 0.0 is not above 0"),
        ("compare: {seeds: [a]}", "seeds: 'a' is not a whole number"),
        ("compare: {seeds: [0, 1, 0]}", "seeds: [0, 1, 0] are not different"),
        ("compare: {seeds: [-1]}", "from 0 up"),
        ("compare: {methods: [{method: lora, learning_rates: 1.0e-3}]}", "must be a list with one or more, not 0.001"),
        ("compare: {methods: [{method: lora, learning_rates: []}]}", "learning_rates of lora must be a list"),
        ("compare: {methods: [{method: lora, name: [a]}]}", "name: ['a'] is not"),
        ("compare: {methods: [{method: lora, name: '$x$'}]}", "has a $, which plots read as a formula"),
        ("{streaming: true, steps: 3, data: a.jsonl}", "streaming is for inlay train"),
        ("compare: {budget: {flops: 3}}", "is not one of {parameters: trained parameters}"),
        ("compare: {budget: {parameters: 3, time: 3}}", "is not one of"),
        ("compare: {reference: bone, methods: [lora]}", "reference: 'bone' is not one of the methods lora"),
        ("compare: {halving: 1}", "halving: 1 is below 2"),
        ("compare: {metric: {task: quiz, data: builtin}}", "metric: task 'quiz' is not one of"),
        ("compare: {metric: {task: gsm8k}}", "has no data"),
        ("batch_size: auto", "batch_size: auto would give"),
        ("{early_stopping: 2, eval_every: 3}", "early_stopping is for single runs"),
    ],
)
def test_bad_comparisons_say_what_is_wrong(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        load_comparison(str(tmp_path / "c.yaml"))


def test_methods_lie_over_the_recipe_and_have_their_own_rates(tmp_path):
    own = {"method": "milora", "name": "middle", "args": {"side": "middle"}, "learning_rates": [3e-3, "1e-3"]}
    asked = {"weight_decay": 0.1, "compare": {"methods": ["lora", own], "learning_rates": [1e-4]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(asked))
    plan = load_comparison(str(tmp_path / "c.yaml"))
    assert [e.name for e in plan.entries] == ["lora", "middle"]
    assert plan.entries[1].rates == (1e-3, 3e-3)
    assert plan.entries[1].recipe == Recipe(method="milora", args={"side": "middle"}, weight_decay=0.1)
    (tmp_path / "again.yaml").write_text(plan.to_yaml())
    assert load_comparison(str(tmp_path / "again.yaml")) == plan


def test_a_recipe_without_a_block_compares_the_usual_methods(tmp_path):
    (tmp_path / "r.yaml").write_text("steps: 3")
    names = [e.name for e in load_comparison(str(tmp_path / "r.yaml")).entries]
    assert names == ["lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "peft:dora"]
    rates = {e.name: e.rates for e in load_comparison(str(tmp_path / "r.yaml")).entries}
    assert rates["lora"] == (1e-3, 3e-3, 9e-3)  # a third, once and three times its default
    assert rates["bone"] == (1.7e-4, 5e-4, 1.5e-3)


def test_train_does_not_take_a_comparison(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("compare: {}")
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "c.yaml")])
    assert "inlay compare runs it" in capsys.readouterr().err


# -- budgets ----------------------------------------------------------------------------------------------------------


def entry(tiny, method, **args):
    return Entry(method, Recipe(model=tiny, method=method, args=args), (1e-3,))


@pytest.mark.parametrize("method", ["lora", "dota", "bat", "peft:dora", "peft:adalora", "peft:randlora"])
def test_the_solved_size_is_the_largest_within_the_budget(method, tiny):
    """Against a search through all sizes, on the meta device."""
    asked, limit = entry(tiny, method), 12000
    name = method_size_field(method)
    counts = {}
    for size in range(1, 33):
        try:
            counts[size] = count_parameters(BaseModel(tiny), replace(asked.recipe, args={name: size}).adapter())
        except ValueError:  # Bat's must divide the sides
            continue
    best = max((n for n in counts if counts[n] <= limit), key=lambda n: counts[n])
    found = solve_size(asked, budget_cost("parameters", None), limit)
    assert counts[found.recipe.args[name]] == counts[best]
    assert any(count > limit for count in counts.values())


def test_sizes_within_a_memory_budget(tiny, records):
    recipe = Recipe(model=tiny, data=records, batch_size=2, dtype="float32")
    rows = load_examples(recipe, BaseModel(tiny).tokenizer(), SILENT)
    cost = budget_cost("memory", rows)
    four = cost(replace(recipe, method="lora", args={"r": 4}))
    asked = Entry("lora", replace(recipe, method="lora"), (1e-3,))
    assert solve_size(asked, cost, four).recipe.args == {"r": 4}
    with pytest.raises(ValueError, match="lora: no r fits the budget"):
        solve_size(asked, cost, four / 100)
    assert cost(replace(recipe, method="full")) > four


def test_a_size_that_is_given_stays(tiny):
    asked = entry(tiny, "lora", r=3)
    assert solve_size(asked, budget_cost("parameters", None), 12000) is asked


def test_a_budget_counts_what_is_trained_in_the_end(tiny):
    """LaMDA's B is frozen by then: 14 weights with a core of r² each."""
    cost = budget_cost("parameters", None)
    assert cost(entry(tiny, "lamda", r=8).recipe) == 14 * 64
    assert solve_size(entry(tiny, "lamda"), cost, 14 * 15**2 + 1).recipe.args == {"r": 15}
    half = cost(entry(tiny, "xgblora", r=2).recipe)  # one of two layers is trained in any round
    assert half == cost(entry(tiny, "lora", r=2).recipe) / 2


def test_full_fine_tuning_has_no_size(tiny):
    asked = entry(tiny, "full")
    assert solve_size(asked, budget_cost("parameters", None), 1) is asked
    assert count_parameters(BaseModel(tiny), None) == sum(
        p.numel() for p in BaseModel(tiny).meta(torch.float32).parameters()
    )


# -- methods that are not ours ----------------------------------------------------------------------------------------


def short(tiny, records, folder, method, **values) -> Recipe:
    usual = {"steps": 3, "batch_size": 4, "eval_size": 4, "samples": 0, "learning_rate": 1e-2, "dtype": "float32"}
    return Recipe(model=tiny, data=records, method=method, output=str(folder), **{**usual, **values})


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT about its own defaults
@pytest.mark.parametrize(
    "method",
    ["dora", *(pytest.param(n, marks=pytest.mark.slow) for n in "rslora olora eva vera randlora miss oft ia3".split())],
)
def test_methods_of_peft_train(method, tiny, records, tmp_path):
    found = train(short(tiny, records, tmp_path / "run", f"peft:{method}"), SILENT)
    assert found.after < found.before
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "import inlay" not in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_full_fine_tuning_leaves_a_model(tiny, records, tmp_path):
    found = train(short(tiny, records, tmp_path / "run", "full", learning_rate=1e-3), SILENT)
    assert found.parameters == found.base_parameters
    assert found.after < found.before
    before, after = (load_file(Path(f) / "model.safetensors") for f in (tiny, tmp_path / "run" / "model"))
    assert all(not torch.equal(before[name], after[name]) for name in after)


def test_adaloras_penalty_is_the_one_that_peft_adds_to_a_loss(llama):
    """Its gradient, against PEFT's own with and without a weight; and ranks fall while it trains."""
    args = {"init_r": 6, "target_r": 2, "orth_reg_weight": 3.0, "tinit": 1, "tfinal": 1}
    model = get_peft_model(llama, Recipe(method="peft:adalora", args=args).adapter(steps=6))
    ids, parts = torch.arange(16)[None], [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]

    def gradients(weight):
        model.peft_config["default"].orth_reg_weight = weight
        return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parts)

    expected = [a - b for a, b in zip(gradients(3.0), gradients(0.0), strict=True)]
    model.peft_config["default"].orth_reg_weight = 3.0
    callback = Allocation()
    for p in parts:
        p.grad = torch.zeros_like(p)
    callback.on_pre_optimizer_step(None, None, None, model=model)
    for p, gradient in zip(parts, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)
    values = [p for n, p in model.named_parameters() if "lora_E" in n]
    for p in values:
        torch.nn.init.normal_(p)
    for step in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        callback.on_pre_optimizer_step(None, None, None, model=model)
        callback.on_optimizer_step(None, SimpleNamespace(global_step=step), None, model=model)
    assert 0 < sum(int((p != 0).sum()) for p in values) <= 2 * len(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "peft:lora", "patterns": {"q_proj": {"r": 2}}}, "give the fields of PEFT's config under args"),
        ({"method": "peft:lora", "quantize": "nf4"}, "nf4_offset is"),
        ({"method": "full", "quantize": "int8"}, "none is"),
        ({"method": "full", "modules_to_save": ["lm_head"]}, "it trains the whole model"),
        ({"method": "peft:lora", "args": {"r": -1}}, "positive integer"),
    ],
)
def test_what_only_our_methods_have_is_refused(values, says, tiny):
    with pytest.raises(ValueError, match=says):
        count_parameters(BaseModel(tiny), Recipe(model=tiny, **values).adapter())


# -- a comparison -----------------------------------------------------------------------------------------------------

ASKED = {
    "steps": 6,
    "batch_size": 4,
    "eval_size": 4,
    "dtype": "float32",
    "compare": {
        "methods": ["bone", "lora", {"method": "full", "learning_rates": [1e-3]}],
        "learning_rates": [1e-3, 1e-2, 1e-1],
        "seeds": [3, 4],
        "budget": {"parameters": 9000},
        "selection": 4,
    },
}


@pytest.fixture(scope="module")
def at_once():
    """Trials run within this process: what is tested here is not that they have their own."""

    def wait(self, folder, bar):
        try:
            trial.run_trial(folder)
        except RuntimeError as error:
            (folder / LOG).write_text(f"RuntimeError: {error}")
            return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "wait", wait)
        yield patch


@pytest.fixture(scope="module")
def asked(tiny, records, tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "small.yaml"
    path.write_text(yaml.safe_dump({"model": tiny, "data": records, **ASKED}))
    return path


@pytest.fixture(scope="module")
def compared(asked, at_once, painted, tmp_path_factory) -> Path:
    with painted():
        return compare(str(asked), output=str(tmp_path_factory.mktemp("out") / "c"), console=SILENT)


def results(folder: Path) -> dict[str, dict]:
    return {str(p.parent.relative_to(folder / "runs")): json.loads(p.read_text()) for p in folder.rglob("result.json")}


def table(folder: Path) -> dict[str, dict[str, str]]:
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return {row["method"]: row for row in rows}


def outcome(folder: Path, asked: Path) -> Outcome:
    """A comparison from its finished runs, without its sweeps."""
    plan, found = load_comparison(str(asked)), sorted(results(folder).items())
    finals = {
        e.name: [r for name, r in found if name.startswith(f"{e.name}/") and name.endswith("final")]
        for e in plan.entries
    }
    sweeps = {e.name: Sweep(list(e.rates)[:1]) for e in plan.entries}
    return Outcome(plan, folder, {e.name: 6 for e in plan.entries}, sweeps, finals, {})


def test_every_method_gets_the_rate_that_did_best(compared):
    found = results(compared)
    rows = table(compared)
    sweeps = json.loads((compared / "results.json").read_text())["sweeps"]
    for method in ("bone", "lora"):
        assert {1e-3, 1e-2, 1e-1} <= set(map(float, sweeps[method][0]["losses"]))
        for rung in sweeps[method]:
            told = {rate: f"{method}/lr-{float(rate)}-seed-3-{rung['steps']}-of-6" for rate in rung["losses"]}
            assert rung["losses"] == {rate: found[name]["after"] for rate, name in told.items()}
        last = sweeps[method][-1]["losses"]
        assert float(rows[method]["learning_rate"]) == float(min(last, key=last.get))
    assert float(rows["full"]["learning_rate"]) == 1e-3
    assert len(found) == sum(len(rung["losses"]) for rungs in sweeps.values() for rung in rungs) + 3 * 2


def test_a_rung_is_the_beginning_of_the_whole_run(compared):
    found = results(compared)
    rate = json.loads((compared / "results.json").read_text())["methods"]
    rate = next(row["learning_rate"] for row in rate if row["method"] == "lora")
    rung, whole = (found[f"lora/lr-{rate:g}-seed-3-{kind}"] for kind in ("2-of-6", "6-of-6-final"))
    assert rung["curve"] == whole["curve"][:2]
    assert rung["before"] != whole["before"]  # judged by other examples


def test_the_results_are_those_of_the_runs(compared):
    found, data = results(compared), json.loads((compared / "results.json").read_text())
    rows = {row["method"]: row for row in data["methods"]}
    for method, row in rows.items():
        finals = [r for name, r in sorted(found.items()) if name.startswith(f"{method}/") and name.endswith("final")]
        assert row["losses"] == [r["after"] for r in finals]
        assert row["loss"] == pytest.approx(sum(r["after"] for r in finals) / 2)
        assert row["forgetting"] == pytest.approx(sum(r["forgetting"] for r in finals) / 2)
        assert all(r["steps"] == 6 and r["memory"] > 2**20 for r in finals)
    apart = [b - a for a, b in zip(rows["lora"]["losses"], rows["bone"]["losses"], strict=True)]
    half = 25.451700 * abs(apart[0] - apart[1]) / 2  # t with one degree at α / 2; s / √2 of two values
    assert rows["bone"]["difference_low"] == pytest.approx(sum(apart) / 2 - half, rel=1e-5)
    assert rows["lora"]["verdict"].startswith("the reference")
    assert re.fullmatch(r"not tuned: one rate was tried; [\d.]+ times the budget", rows["full"]["verdict"])
    assert rows["lora"]["size"] == "r=4"
    assert rows["lora"]["budget_share"] == pytest.approx(8192 / 9000)


def test_a_finished_comparison_runs_nothing(compared, asked, at_once, painted, monkeypatch):
    monkeypatch.setattr(Runner, "wait", lambda *_: pytest.fail("a finished run was repeated"))
    before = (compared / "results.csv").read_bytes()
    with painted():
        compare(str(asked), output=str(compared), console=SILENT)
    assert (compared / "results.csv").read_bytes() == before


def test_a_stopped_comparison_goes_on_where_it_was(compared, asked, at_once, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(compared, folder)
    name = next(name for name in results(folder) if name.startswith("lora/") and name.endswith("seed-4-6-of-6-final"))
    lost = results(folder)[name]
    (folder / "runs" / name / "result.json").unlink()
    begun, real = [], Runner.wait
    monkeypatch.setattr(Runner, "wait", lambda self, at, bar: (begun.append(at), real(self, at, bar))[1])
    compare(str(asked), output=str(folder), console=SILENT)
    assert begun == [folder / "runs" / name]
    assert results(folder)[name]["after"] == lost["after"]


def test_final_runs_are_scored_by_a_metric(compared, records, tiny, at_once, tmp_path):
    """Their mean and spread, and Student's interval of the differences; without a metric nothing says a word of it."""
    judged = {"task": "perplexity", "data": records, "limit": 3}
    block = {"methods": ["bone", "lora"], "learning_rates": [1e-2], "seeds": [3, 4], "selection": 4}
    ask = {**ASKED, "model": tiny, "data": records, "compare": {**block, "metric": judged}, "steps": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(ask))
    out = Console(record=True, width=200, file=io.StringIO())
    folder = compare(str(tmp_path / "c.yaml"), output=str(tmp_path / "c"), console=out)
    found = {name: r["metric"] for name, r in results(folder).items()}
    scores = {m: [v for name, v in sorted(found.items()) if name.startswith(m)] for m in ("bone", "lora")}
    for method, row in table(folder).items():
        assert float(row["metric"]) == pytest.approx(statistics.fmean(scores[method]))
        assert float(row["metric_sd"]) == pytest.approx(statistics.stdev(scores[method]))
    apart = [a - b for a, b in zip(scores["bone"], scores["lora"], strict=True)]
    half = 12.706205 * abs(apart[0] - apart[1]) / 2
    assert float(table(folder)["bone"]["metric_difference_high"]) == pytest.approx(statistics.fmean(apart) + half)
    told, page = out.export_text(), (folder / "report.html").read_text()
    assert "perplexity" in next(line for line in told.splitlines() if "− lora" in line)
    assert "bone: " in told
    assert "bone: not tuned: one rate was tried" in told
    assert "<button>perplexity</button>" in page
    assert f"{statistics.fmean(scores['lora']):.3f} ± " in page
    for path in ("compare.yaml", "results.csv", "results.json", "report.html"):
        assert "metric" not in (compared / path).read_text()


def test_another_comparison_does_not_go_into_the_folder(compared, asked, at_once, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(asked.read_text().replace("steps: 6", "steps: 7"))
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(other), "--output", str(compared)])
    assert stop.value.code == 2
    assert "holds another comparison" in capsys.readouterr().err
    assert "steps: 6" in (compared / "compare.yaml").read_text()
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ValueError, match="not made by this command"):
        compare(str(other), output=str(tmp_path), overwrite=True, console=SILENT)
    assert (tmp_path / "precious").exists()


def test_other_data_or_another_model_does_not_go_on(compared, asked, tiny, at_once, tmp_path, monkeypatch):
    """The name is the same, what it stands for is not; a folder of before says nothing of it and goes on."""
    folder, real = tmp_path / "c", shared_examples
    shutil.copytree(compared, folder)
    once_more = {"path": str(asked), "output": str(folder), "console": SILENT}
    (folder / "origin.json").rename(folder / "kept.json")
    compare(**once_more)
    (folder / "kept.json").rename(folder / "origin.json")

    def rows_of(plan, console):
        rows = real(plan, console)
        return replace(rows, train=[{**rows.train[0], "completion": rows.train[1]["completion"]}, *rows.train[1:]])

    monkeypatch.setattr(compare_module, "shared_examples", rows_of)
    with pytest.raises(ValueError, match="the data changed since"):
        compare(**once_more)
    shutil.copytree(tiny, tmp_path / "m")
    recipe, rows = Recipe(model=str(tmp_path / "m")), real(load_comparison(str(asked)), SILENT)
    before = origin(recipe, rows)
    assert before == origin(replace(recipe, model=tiny), rows)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, tmp_path / "m" / "model.safetensors")
    assert origin(recipe, rows) == {"data": before["data"], "model": origin(recipe, rows)["model"]}
    assert origin(recipe, rows) != before


def test_a_comparison_that_runs_is_left_alone(compared, asked, at_once):
    with locked(compared), pytest.raises(ValueError, match="another process"):
        compare(str(asked), output=str(compared), console=SILENT)


def test_the_trial_of_another_version_is_none(compared, tmp_path):
    """Which had fields that a recipe has not."""
    folder = next(compared.rglob("trial.json")).parent
    shutil.copytree(folder, tmp_path / "t")
    made = read_trial(folder)
    assert made.result(tmp_path / "t")
    told = json.loads(made.to_json())
    (tmp_path / "t" / "trial.json").write_text(json.dumps({**told, "recipe": {**told["recipe"], "older": 1}}))
    assert made.result(tmp_path / "t") is None


def test_a_method_that_fails_is_said_and_the_rest_goes_on(asked, at_once, tmp_path, monkeypatch, capsys):
    real = run_trial

    def run(folder):
        if "bone" in str(folder):
            raise RuntimeError("out of luck")
        real(folder)

    monkeypatch.setattr(trial, "run_trial", run)
    path = tmp_path / "c.yaml"
    short = {"methods": ["bone", "lora"], "learning_rates": [1e-2], "seeds": [0], "selection": 4}
    path.write_text(yaml.safe_dump({**yaml.safe_load(asked.read_text()), "steps": 1, "compare": short}))
    folder = compare(str(path), output=str(tmp_path / "out"), console=Console(width=200))
    assert "bone/lr-0.01-seed-0-1-of-1-final failed: RuntimeError: out of luck" in capsys.readouterr().out
    rows = table(folder)
    assert rows["bone"]["verdict"] == "failed"
    assert rows["lora"]["loss"]
    monkeypatch.setattr(trial, "run_trial", real)
    compare(str(path), output=str(folder), console=SILENT)
    assert {row["failed"] for row in table(folder).values()} == {"0"}


def test_a_budget_of_time_cuts_the_steps(asked, at_once, tmp_path, monkeypatch):
    real = run_trial

    def run(folder):
        real(folder)
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(
            json.dumps({**result, "seconds_per_step": 0.5 if "bone" in str(folder) else 9})
        )

    monkeypatch.setattr(trial, "run_trial", run)
    path = tmp_path / "c.yaml"
    short = {"methods": ["bone", "lora"], "learning_rates": [1e-2], "seeds": [0], "selection": 4, "budget": {"time": 1}}
    path.write_text(yaml.safe_dump({**yaml.safe_load(asked.read_text()), "steps": 3, "compare": short}))
    folder = compare(str(path), output=str(tmp_path / "out"), console=SILENT)
    steps = {method: row["steps"] for method, row in table(folder).items()}
    assert steps == {"bone": "2", "lora": "1"}


def test_forgetting_is_the_loss_over_all_tokens(tiny):
    """Against one text at a time by transformers' own loss, weighted by tokens."""
    model, tokenizer = BaseModel(tiny).load(torch.float32), BaseModel(tiny).tokenizer()
    texts = unrelated(None)[:3]
    own = [tokenizer(text=text, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        means = [model(input_ids=ids, labels=ids).loss.item() for ids in own]
    counts = [ids.shape[1] - 1 for ids in own]
    expected = sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts)
    assert mean_token_loss(texts, model, tokenizer, 512) == pytest.approx(expected, rel=1e-5)


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, ids, references and cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.refs, self.values = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        refs = [found[key] for key in ("href", "xlink:href") if key in found]
        self.refs += [ref.removeprefix("#") for ref in refs if not ref.startswith("data:image/png;base64,")]
        self.values += [found["data-value"]] if "data-value" in found else []


def test_the_page_stands_alone(compared):
    text = (compared / "report.html").read_text()
    page = Page(text)
    assert "http" not in text
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == len(PLOTS)
    assert set(page.refs) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert {path.name for path in (compared / "plots").iterdir()} == {
        f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")
    }


def test_the_page_says_what_was_found_and_how_to_repeat_it(compared):
    text = (compared / "report.html").read_text()
    rows = json.loads((compared / "results.json").read_text())["methods"]
    values = Page(text).values
    assert all(row["method"] in values and repr(row["loss"]) in values for row in rows)
    assert len(values) == 12 * len(rows)
    for label in ("loss (nats per answer token)", "peak memory (GiB)", "training time (s)", "trained parameters"):
        assert f">{label}</text>" in text
    assert text.count(">Pareto front</text>") == 3
    assert (compared / "compare.yaml").read_text().splitlines()[0] in text
    assert "torch" in text


def test_the_page_has_what_each_method_answers(compared):
    """The first held-out prompts, and nothing of it in results.json."""
    text, found = (compared / "report.html").read_text(), results(compared)
    kept = {name: r["samples"] for name, r in found.items() if "samples" in r}
    assert len(kept) == 3
    assert {len(rows) for rows in kept.values()} == {SAMPLES}
    for row in (row for rows in kept.values() for row in rows):
        assert all(html.escape(row[name]) in text for name in ("prompt", "reference", "before", "after"))
    assert text.count("<h3>") == SAMPLES
    assert "samples" not in (compared / "results.json").read_text()


def test_what_was_foreseen_of_memory_stands_over_what_was_measured(compared, asked):
    made = outcome(compared, asked)
    axes = memory_stack(made).axes[0]
    lengths = [bar.get_width() for bar in axes.patches]
    rows = made.standings()
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.method for row in rows]
    for place, row in enumerate(rows):
        *parts, measured = lengths[5 * place : 5 * place + 5]
        assert measured == row.memory / 2**30
        assert sum(parts) == pytest.approx(sum(made.kept("memory_planned")[row.method].values()) / 2**30)


def test_spectra_of_the_middle_layer_are_kept(compared, asked):
    made = outcome(compared, asked)
    found = spectra_of(made)
    assert set(found) == {"bone", "lora", "full"}
    assert {re.search(r"layers\.(\d)", module)[1] for of in found.values() for module in of} == {"1"}
    assert all(len(of) == 7 for of in found.values())
    one = next(iter(found["full"].values()))
    assert one.shares.sum().item() == pytest.approx(1, abs=1e-3)
    assert (one.before.diff() <= 0).all()
    assert not torch.equal(one.before, one.after)


def test_ranks_are_drawn_where_they_differ(compared, asked):
    made = outcome(compared, asked)
    assert "ranks" not in dict(comparison_figures(made))
    for place, told in enumerate(made.finals["lora"][0]["changes"].values()):
        told["rank"] = 2 + place
    made = replace(made)  # what it read is kept
    assert list(allocated(made)) == ["lora"]
    assert ranks_plot(made).axes[0].images[0].get_array().max() == 15


def test_where_each_method_changed_the_weights_is_kept(compared, tiny):
    """Of the run with the first seed, and no other; of full fine-tuning against the weights that were saved."""
    told = json.loads((compared / "changes.json").read_text())
    assert list(told) == ["bone", "lora", "full"]
    assert {len(of) for of in told.values()} == {14}
    assert [name for name, r in results(compared).items() if "changes" in r] == [
        name for name in results(compared) if "seed-3" in name and name.endswith("final")
    ]


def test_ink_is_the_pages(compared):
    """Or nothing could be read in the dark."""
    assert INK not in (compared / "report.html").read_text()
    assert "currentColor" in (compared / "report.html").read_text()


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_the_terminals_table_shows_whole_figures_or_leaves_a_column_out(width, compared, asked):
    made = outcome(compared, asked)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results_table(made, width))
    text = console.export_text()
    assert "…" not in text
    for row in made.standings():
        assert row.method in text
        assert spread_text(row.losses) in text
    left = {
        head for head in ("rate", "trained", "forgets", "time", "peak") if head not in text.partition("results.csv")[0]
    }
    assert all(head in text.partition("results.csv also has: ")[2] for head in left)
    assert bool(left) is (width < 100)


def test_one_seed_and_no_halving_still_make_a_page(compared, asked):
    """The plots of a comparison that has no sweep and no noise."""
    plan = load_comparison(str(asked))
    result = next(r for r in results(compared).values() if "changes" in r)
    sweeps = {e.name: Sweep(list(e.rates)[:1]) for e in plan.entries}
    finals = {e.name: [result] if e.name != "full" else [] for e in plan.entries}
    made = Outcome(plan, compared, {e.name: 6 for e in plan.entries}, sweeps, finals, {})
    assert [name for name, _ in comparison_figures(made)] == [name for name in PLOTS if "rate" not in name]
    assert made.standings()[-1].method == "full"


def test_a_rate_whose_run_failed_and_an_edge_of_the_reference_are_said(compared, asked):
    """The rate that is left may not be the best, nor what the others are compared with."""
    plan = load_comparison(str(asked))
    result = next(r for name, r in results(compared).items() if name.endswith("final"))
    lengths = {e.name: 6 for e in plan.entries}

    def run(trials):
        least = max(t.recipe.learning_rate for t in trials)
        return [
            None if (t.method, t.recipe.learning_rate) == ("bone", least)
            else {**result, "after": 1 / t.recipe.learning_rate}
            for t in trials
        ]  # fmt: skip

    sweeps = sweep_rates(SimpleNamespace(run=run), plan, lengths)
    made = Outcome(plan, compared, lengths, sweeps, {e.name: [result] for e in plan.entries}, {})
    found = {row.method: row.verdict for row in made.standings()}
    assert "; failed at rate 0.1" in found["bone"]
    assert "no verdict: lora is not tuned" in found["bone"]
    assert found["lora"] == "the reference; not tuned: its rate is the highest tried"


# -- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_repeats_nothing(asked, tmp_path):
    command = [sys.executable, "-m", "inlay", "compare", str(asked), "--jobs", "2", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(results(tmp_path / "out")) < 3:
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    time.sleep(5)  # its trials see that it is gone
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert said.count(" s\n") == 12 - len(kept)
    assert all(r["memory"] > 2**27 for r in results(tmp_path / "out").values())  # of a process of its own


@pytest.mark.slow
def test_ctrl_c_ends_a_comparison_at_once_and_the_same_command_resumes(tiny, records, tmp_path):
    """As a terminal sends it, to all processes of the group, while the second of two trials runs."""
    small = {"methods": [{"method": "lora", "learning_rates": [1e-2]}], "seeds": [0, 1], "selection": 4}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**ASKED, "model": tiny, "data": records, "compare": small}))
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "inlay", "compare", str(tmp_path / "c.yaml"), "--output", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what is begun in the background ignores it
    )  # fmt: skip
    while len(list(folder.rglob("trial.json"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert len(kept) == 1
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said = next((line for line in process.stdout if "stopping" in line), "")
    answered = time.monotonic() - began
    out, err = process.communicate(timeout=120)
    assert "trials that are running start again" in said
    assert answered < 5
    assert process.returncode == 130
    assert "resumes in" in out
    assert "leaked" not in err
    assert "Traceback" not in err
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert again.count(" s\n") == 1
    assert len(results(folder)) == 2


@pytest.mark.slow
def test_the_page_in_a_browser(compared, phone):
    """Its table sorts, by words and by numbers, up and down."""
    page = phone(compared / "report.html")
    column = "[...document.querySelectorAll('td:nth-child({})')].map(c => c.dataset.value)"
    for number, kind in ((1, str), (3, float)):
        for down in (False, True):
            page.click(f"th:nth-child({number}) button")
            shown = list(map(kind, page.evaluate(column.format(number))))
            assert shown == sorted(shown, reverse=down)
