"""A comparison without a recipe: what fits a time, by hand; and the whole of it on a tiny model."""

import csv
import io
import re
from dataclasses import replace

import pytest
from helpers import fails
from rich.console import Console

from inlay.cli import main
from inlay.experiments import trial
from inlay.experiments.compare import in_minutes
from inlay.experiments.compare.in_minutes import compare_in_minutes, fit_to_time, seconds_of
from inlay.experiments.compare.spec import load_comparison
from inlay.experiments.runner import Runner
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe


def test_the_time_of_a_comparison_by_hand():
    """One method, 3 seeds: 4 first runs of a third of the steps, 1 of all, 3 final ones; 8 beginnings."""
    assert seconds_of(1, 30, 3, step=2.0, start=5.0) == pytest.approx(8 * 5 + (4 * 10 + 30 + 3 * 30) * 2)
    assert seconds_of(4, 30, 3, 2.0, 5.0) == pytest.approx(4 * seconds_of(1, 30, 3, 2.0, 5.0))


@pytest.mark.parametrize("seconds", [500, 1800, 7200, 10**5, 10**6])
def test_what_is_chosen_fits_and_more_would_not(seconds):
    step, start, longest = 0.7, 6.0, 200
    fit = fit_to_time(seconds, step, start, longest)
    assert fit.seconds == pytest.approx(seconds_of(fit.methods, fit.steps, fit.seeds, step, start))
    assert fit.seconds <= seconds
    if fit.steps < longest:
        assert fit.seeds == 3
        assert seconds_of(fit.methods, fit.steps + 1, 3, step, start) > seconds
    else:
        assert fit.seeds == 5 or seconds_of(fit.methods, fit.steps, fit.seeds + 1, step, start) > seconds
    if fit.methods < 8:  # another method would leave too few steps
        assert seconds_of(fit.methods + 1, 60 if fit.steps >= 60 else 20, 3, step, start) > seconds


def test_what_can_be_shown_and_what_is_too_short():
    fit = fit_to_time(10**6, 0.7, 6.0, 200)
    assert (fit.methods, fit.steps, fit.seeds) == (8, 200, 5)
    # Student's t with 4 degrees at 1 - .05 / 14 and at .8
    assert fit.detectable == pytest.approx(0.01 / 5**0.5 * (5.067510 + 0.940965), rel=1e-4)
    with pytest.raises(
        ValueError, match=r"minutes: 1 is too short: two methods with 3 seeds and 20 steps take about 5"
    ):
        fit_to_time(60, 0.7, 6.0, 200)


def test_what_is_missing_or_too_much_is_said(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("steps: 3")
    assert "give a recipe, or --data and --minutes" in fails(capsys, "compare", "--minutes", "3")
    assert "give a recipe, or --data and --minutes" in fails(capsys, "compare", "--data", "a.jsonl")
    recipe = str(tmp_path / "c.yaml")
    assert "--minutes is for a comparison without" in fails(capsys, "compare", recipe, "--minutes", "3")
    assert "--minutes: '-1' is not a number above 0" in fails(capsys, "compare", "--data", "a.jsonl", "--minutes", "-1")


def test_flags_override_the_recipe_of_a_comparison(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("{data: a.jsonl, max_length: 64, compare: {methods: [lora]}}")
    called = []
    monkeypatch.setattr("inlay.experiments.compare.compare.compare", lambda *given: called.append(given))
    main(["compare", str(tmp_path / "c.yaml"), "--data", "b.jsonl", "--batch-size", "2"])
    path, _, output, overwrite, _, _, given = called[0]
    plan = load_comparison(path, output, overwrite, given)
    for recipe in (plan.recipe, plan.entries[0].recipe):
        assert (recipe.data, recipe.batch_size, recipe.max_length) == ("b.jsonl", 2, 64)


@pytest.mark.slow
def test_minutes_choose_and_leave_a_recipe_and_tables(tiny, records, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "wait", lambda self, folder, bar: trial.run_trial(folder))
    monkeypatch.setattr(in_minutes, "ORDER", ("lora", "bone"))
    monkeypatch.setattr(in_minutes, "time_of_runs", lambda *asked: (0.05, 0.1))
    monkeypatch.setattr(in_minutes, "FEWEST", 3)
    asked = Recipe(model=tiny, data=records, batch_size=4, eval_size=2, dtype="float32", output=str(tmp_path / "c"))
    said = Console(record=True, width=400, file=io.StringIO())
    folder = compare_in_minutes(asked, 0.07, said)
    told = said.export_text()
    assert "2 methods (lora, bone), each at a third, once and three times its default rate, " in told
    assert re.search(r"rate, [345] steps of 4, 3 seeds: about 0:0\d", told)
    runs = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
    assert [(r["method"], r["seed"]) for r in runs] == [(m, s) for m in ("lora", "bone") for s in "012"]
    row = next(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    mine = [float(r["after"]) for r in runs if r["method"] == row["method"]]
    assert float(row["loss"]) == pytest.approx(sum(mine) / 3)
    table = (folder / "results.md").read_text().splitlines()
    assert table[0].startswith("| method | size | trained | rate | loss | − lora | verdict |")
    assert f"{float(row['loss']):.3f} ± {float(row['loss_sd']):.3f}" in table[2]
    tex = (folder / "results.tex").read_text()
    assert tex.startswith("\\begin{tabular}{lllllll}\n\\toprule\nmethod & size")
    assert f"{float(row['loss']):.3f} $\\pm$ {float(row['loss_sd']):.3f}" in tex
    best = load_recipe(str(folder / "best.yaml"), {})
    assert best.learning_rate == float(next(r for r in runs if r["method"] == best.method)["learning_rate"])
    assert (best.data, best.model, best.steps) == (records, tiny, int(row["steps"]))
    monkeypatch.setattr(Runner, "wait", lambda *_: pytest.fail("a finished run was repeated"))
    assert compare_in_minutes(asked, 0.07, said) == folder
    assert "goes on in" in said.export_text()
    with pytest.raises(ValueError, match=r"compares on .*; give another --output, or --overwrite"):
        compare_in_minutes(replace(asked, data="other.jsonl"), 0.07, said)
