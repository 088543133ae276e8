"""Searching: what is asked, the search itself on runs that are only made up, one real search, kill and resume."""

import csv
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import fails
from rich.console import Console

from inlay.cli import main
from inlay.evaluation.metric import load_metric, metric_score
from inlay.experiments.runner import Processes, Runner
from inlay.experiments.trial import Trial, read_trial, run_trial
from inlay.experiments.tune.nomad import box, value_at
from inlay.experiments.tune.search import tune
from inlay.experiments.tune.spec import Range, lay_over, load_search, range_of
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.training.progress import read_history
from inlay.training.train import train

pytest.importorskip("optuna", reason="Optuna is not installed")
SILENT = Console(quiet=True)
RATE = {"low": 1e-4, "high": 1e-1, "log": True}
SPACE = {"learning_rate": RATE, "args.r": {"choices": [2, 4]}, "weight_decay": {"low": 0, "high": 0.1}}
SHORT = {"steps": 8, "batch_size": 4, "eval_size": 4, "dtype": "float32", "method": "lora"}


def ask(path: Path, tiny: str, records: str, space: dict | None = None, **values) -> str:
    """A recipe file that asks for a search."""
    usual = {"space": space or SPACE, "trials": 8, "selection": 4, "evaluations": 4, "rescore": {"top": 2}}
    path.write_text(yaml.safe_dump({"model": tiny, "data": records, **SHORT, "tune": {**usual, **values}}))
    return str(path)


def test_flags_override_the_recipe_of_a_search(tmp_path, monkeypatch, capsys):
    """But not what is searched. Without a recipe, one line makes one that works."""
    path = ask(
        tmp_path / "t.yaml",
        "builtin",
        "a.jsonl",
        {"args.r": {"choices": [2, 4]}, "weight_decay": SPACE["weight_decay"]},
    )
    called = []
    monkeypatch.setattr("inlay.experiments.tune.search.tune", lambda *given: called.append(given))
    main(["tune", path, "--data", "b.jsonl", "--learning-rate", "1e-3", "--method", "milora", "--steps", "3"])
    recipe = load_search(path, given=called[0][-1]).recipe
    assert (recipe.data, recipe.learning_rate, recipe.method, recipe.steps) == ("b.jsonl", 1e-3, "milora", 3)
    for name in ("r", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name}: .* searches it, under tune; leave it out here"):
            load_search(path, given={name: 1})
    said = fails(capsys, "tune", "--data", "my data.jsonl", "--r", "4")
    write, run = said.partition("searched: ")[2].split(" && ")
    assert shlex.split(run) == ["inlay", "tune", "tune.yaml", "--data", "my data.jsonl", "--r", "4"]
    subprocess.run(["bash", "-c", write], cwd=tmp_path, check=True)
    plan = load_search(str(tmp_path / "tune.yaml"), given={"data": "my data.jsonl", "r": 4})
    assert (plan.recipe.data, plan.recipe.args, [*plan.ranges]) == ("my data.jsonl", {"r": 4}, ["learning_rate"])


def quality(told: Recipe) -> float:
    """A loss with its least at a rate of 1e-2, r = 4 and no decay."""
    return 1 + abs(math.log10(told.rate) + 2) + (told.args["r"] == 2) / 4 + told.weight_decay


def pretend(self, folder: Path, bar) -> int | None:
    """A run that trains nothing: its loss falls to `quality`, unless the search ends it."""
    asked, rows = read_trial(folder), [{"step": 0, "eval_loss": 9.0}]
    for step in range(1, asked.stop + 1):
        if asked.recipe.eval_every and step % asked.recipe.eval_every == 0:
            rows.append({"step": step, "eval_loss": quality(asked.recipe) * (1 + (asked.stop - step) / asked.stop)})
        if self.hopeless(folder, rows):
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            self.pruned.add(folder)
            return -9
    numbers = dict.fromkeys(("forgetting", "seconds", "memory", "parameters", "steps"), 1)
    # Trained again, the order is the other way round.
    after = -quality(asked.recipe) if asked.final else quality(asked.recipe)
    score = {"metric": quality(asked.recipe)} if asked.metric else {}
    (folder / "result.json").write_text(json.dumps({"before": 9.0, "after": after, **numbers, **score}))
    return 0


@pytest.fixture
def made_up(monkeypatch):
    begun = []

    def wait(self, folder, bar):
        begun.append(folder.name)
        return pretend(self, folder, bar)

    monkeypatch.setattr(Runner, "wait", wait)
    return begun


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


# -- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tune: {}", "space is empty"),
        ("tune: {spaces: {}}", "did you mean 'space'?"),
        ("tune: {space: {data: {choices: [a]}}}", "data cannot be tuned: it defines the task"),
        ("tune: {space: {answers: {choices: [all, last]}}}", "answers cannot be tuned: it defines the task"),
        ("tune: {space: {r: {choices: [4]}}}", "write it as args.r"),
        ("tune: {space: {learning_rat: {choices: [4]}}}", "did you mean 'learning_rate'?"),
        ("tune: {space: {dropout.x: {choices: [4]}}}", "dropout has no parts"),
        ("tune: {space: {learning_rate: 3}}", "3 is not a range; write {low: 1e-5, high: 1e-2, log: true}"),
        ("tune: {space: {learning_rate: {low: 1e-3}}}", "is not a range"),
        ("tune: {space: {learning_rate: {low: 1e-3, high: 1e-3}}}", "low 0.001 is not below high 0.001"),
        ("tune: {space: {learning_rate: {low: 0, high: 1, log: true}}}", "and above 0"),
        ("tune: {space: {learning_rate: {low: a, high: 1}}}", "'a' is not a number"),
        ("tune: {space: {learning_rate: {low: 0, high: 1, logs: true}}}", "did you mean 'log'?"),
        ("tune: {space: {learning_rate: {choices: []}}}", "is not a list of choices"),
        ("tune: {space: {method: {low: 0, high: 1}}}", "is not a number; write {choices: [...]}"),
        ("tune: {space: {accumulation: {low: 1, high: 2.5}}}", "takes whole numbers"),
        ("tune: {space: {args.rr: {choices: [4]}}}", "args.rr cannot be 4"),
        ("{method: bone, tune: {space: {args.r: {choices: [4, -1]}}}}", "args.r cannot be -1"),
        ("tune: {space: {method: {choices: [bone, dorra]}}}", "unknown method 'dorra'"),
        ("{batch_size: auto, tune: {space: {dropout: {choices: [0]}}}}", "batch_size: auto would give"),
        ("{push_to_hub: a/b, tune: {space: {dropout: {choices: [0]}}}}", "push_to_hub is for single runs"),
        ("tune: {space: {dropout: {choices: [0]}}, trials: 0}", "trials: 0 is below 1"),
        ("tune: {space: {dropout: {choices: [0]}}, sampler: grid}", "one of tpe, nomad"),
        ("tune: {space: {dropout: {choices: [0]}}, rescore: {best: 3}}", "rescore has no 'best'"),
        ("tune: {space: {dropout: {choices: [0]}}, rescore: {top: -1}}", "top: -1 is below 0"),
    ],
)
def test_bad_searches_say_what_is_wrong(tmp_path, text, says):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        load_search(str(tmp_path / "t.yaml"))


def test_ranges_are_read_as_their_fields_are():
    assert range_of("learning_rate", {"low": "1e-5", "high": 1, "log": True}) == Range(1e-5, 1.0, True, False)
    assert range_of("batch_size", {"low": 2, "high": 8}) == Range(2, 8, False, True)
    assert range_of("args.r", {"low": 2, "high": 8, "log": True}) == Range(2, 8, True, True)
    assert range_of("args.eta", {"low": 0.5, "high": 1}) == Range(0.5, 1.0)
    for name in ("args.eta", "trainer.adam_beta2"):  # which are no whole numbers, however their ends are written
        assert range_of(name, {"low": 0, "high": 1}) == Range(0.0, 1.0)
    made = range_of("target_modules", {"choices": [["q_proj", "v_proj"], "all-linear"]})
    assert made.labels == {'["q_proj", "v_proj"]': ["q_proj", "v_proj"], "all-linear": "all-linear"}


def test_values_lie_over_a_recipe():
    first = Recipe(method="lora", args={"alpha": 8}, patterns={"k_proj": {"r": 2}})
    values = {"learning_rate": 3e-3, "args.r": 4, "patterns.k_proj.r": 3, "trainer.adam_beta2": 0.9}
    made = lay_over(first, values)
    assert made == Recipe(
        method="lora", args={"alpha": 8, "r": 4}, patterns={"k_proj": {"r": 3}}, learning_rate=3e-3,
        trainer={"adam_beta2": 0.9},
    )  # fmt: skip
    assert first.patterns == {"k_proj": {"r": 2}}


def test_train_does_not_take_a_search(tmp_path, capsys):
    (tmp_path / "t.yaml").write_text("tune: {}")
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "t.yaml")])
    assert "inlay tune runs it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "verb", "extra"), [("optuna", "tpe", "tune"), ("PyNomad", "nomad", "nomad"), ("tensorboard", "", "ui")]
)
def test_what_is_not_installed_is_one_line(missing, verb, extra, tmp_path, tiny, records, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    path = ask(tmp_path / "t.yaml", tiny, records, sampler=verb) if verb else str(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["tune" if verb else "ui", path])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"pip install 'inlay[{extra}]'" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("norm", "is not written as module:function"),
        ("no_such_module:norm", "ModuleNotFoundError"),
        ("math:no_such", "AttributeError"),
        ("math:pi", "is no function"),
    ],
)
def test_a_metric_that_cannot_be_used_is_said_at_once(name, says):
    with pytest.raises(ValueError, match=says):
        load_metric(name)


def test_a_metric_is_a_finite_number(tmp_path, monkeypatch, llama):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = "def good(model, tokenizer):\n    return int(not model.training)\ndef bad(*_):\n    return float('nan')\n"
    (tmp_path / "mine_for_a_test.py").write_text(code)
    assert metric_score("mine_for_a_test:good", llama.train(), None) == 1.0
    assert llama.training
    with pytest.raises(ValueError, match="is nan"):
        metric_score("mine_for_a_test:bad", llama, None)


# -- the search, on runs that are made up -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tiny, records, painted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch, painted():
        patch.setattr(Runner, "wait", pretend)
        path = ask(folder / "t.yaml", tiny, records, trials=24)
        return tune(path, output=str(folder / "out"), console=SILENT)


def test_a_search_finds_what_is_good_and_prunes_what_is_not(searched):
    rows = table(searched)
    assert len(rows) == 24
    done = sorted((r for r in rows if r["state"] == "complete"), key=lambda r: float(r["loss"]))
    assert float(done[0]["loss"]) < 1.3  # of 1 to 4.35
    pruned = [r for r in rows if r["state"] == "pruned"]
    assert pruned
    assert all(r["loss"] == "" for r in pruned)
    ended = json.loads((searched / "runs" / pruned[0]["trial"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert ended["step"] < 8
    for row in done:
        told = read_trial(searched / "runs" / row["trial"]).recipe
        assert float(row["loss"]) == quality(told)
        assert float(row["learning_rate"]) == told.learning_rate
    assert {p.name for p in (searched / "plots").iterdir()} == {
        f"{name}.{kind}" for name in ("history", "importance") for kind in ("png", "svg")
    }


def test_the_best_few_are_judged_again_and_the_best_of_them_is_written(searched):
    """The least loss of the search is the second best on the held-out examples."""
    rows = table(searched)
    done = sorted((r for r in rows if r["state"] == "complete"), key=lambda r: float(r["loss"]))
    again = [r for r in rows if r["heldout"]]
    assert {r["trial"] for r in again} == {r["trial"] for r in done[:2]}
    best = next(r for r in rows if r["best"])
    assert best["trial"] == done[1]["trial"]
    seeds = {read_trial(searched / "runs" / "again" / r["trial"]).recipe.seed for r in again}
    assert seeds == {1}
    made = load_recipe(str(searched / "best.yaml"), {})
    assert made.learning_rate == float(best["learning_rate"])
    assert made.args == {"r": int(best["args.r"])}
    assert (made.steps, made.seed, made.eval_every, made.output) == (8, 0, None, None)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_metric_decides_in_its_direction(direction, tmp_path, tiny, records, made_up):
    again = {"top": 3, "metric": "math:fsum", "direction": direction}
    path = ask(tmp_path / "t.yaml", tiny, records, rescore=again, pruner="none", trials=5)
    rows = [r for r in table(tune(path, output=str(tmp_path / "out"), console=SILENT)) if r["metric"]]
    assert len(rows) == 3
    scores = [float(r["metric"]) for r in rows]
    best = next(r for r in rows if r["best"])
    assert float(best["metric"]) == (max if direction == "maximize" else min)(scores)


def test_a_search_that_is_finished_runs_nothing_and_can_have_more_trials(searched, tmp_path, tiny, records, made_up):
    folder = tmp_path / "copy"
    shutil.copytree(searched, folder)
    before = table(folder)
    tune(str(searched.parent / "t.yaml"), output=str(folder), console=SILENT)
    assert made_up == []
    assert table(folder) == before
    tune(ask(tmp_path / "t.yaml", tiny, records, trials=26), output=str(folder), console=SILENT)
    after = table(folder)
    assert len(after) == 26
    assert [r["learning_rate"] for r in after[:24]] == [r["learning_rate"] for r in before]
    assert made_up[:2] == ["trial-024", "trial-025"]
    assert len({r["learning_rate"] for r in after}) == 26  # what was drawn is not drawn again
    with pytest.raises(ValueError, match="holds another search"):
        tune(ask(tmp_path / "t.yaml", tiny, records, sampler="nomad"), output=str(folder), console=SILENT)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_kill_left_is_tried_again_in_its_own_folder(jobs, tmp_path, tiny, records, monkeypatch):
    begun = []

    def wait(self, folder, bar):
        begun.append(folder.name)
        if folder.name == "trial-002" and begun.count("trial-002") == 1:
            raise KeyboardInterrupt
        return pretend(self, folder, bar)

    monkeypatch.setattr(Runner, "wait", wait)
    path, folder = ask(tmp_path / "t.yaml", tiny, records, pruner="none", trials=5), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tune(path, jobs, str(folder), console=SILENT)
    values = read_trial(folder / "runs" / "trial-002").recipe
    finished = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    tune(path, jobs, str(folder), console=SILENT)
    assert read_trial(folder / "runs" / "trial-002").recipe == values
    assert finished == {p: p.stat().st_mtime_ns for p in finished}
    rows = table(folder)
    assert sum(r["state"] == "complete" for r in rows) == 5
    assert sum(r["state"] == "complete" and r["trial"] == "trial-002" for r in rows) == 1
    if jobs == 1:  # several at a time end in another order each time
        whole = tune(path, jobs, str(tmp_path / "whole"), console=SILENT)
        assert table(whole) == [row for row in rows if row["state"] != "fail"]
        assert (whole / "best.yaml").read_text() == (folder / "best.yaml").read_text()


def test_values_that_were_had_are_not_run_again(tmp_path, tiny, records, made_up):
    path = ask(tmp_path / "t.yaml", tiny, records, {"args.r": {"choices": [2, 4]}}, trials=6, rescore={"top": 0})
    folder = tune(path, output=str(tmp_path / "out"), console=SILENT)
    assert len(made_up) == 2
    assert len(table(folder)) == 6
    assert load_recipe(str(folder / "best.yaml"), {}).args == {"r": 4}


def test_a_search_in_which_nothing_runs_says_so(tmp_path, tiny, records, monkeypatch):
    def wait(self, folder, bar):
        (folder / "log.txt").write_text("RuntimeError: out of luck")
        return 1

    monkeypatch.setattr(Runner, "wait", wait)
    path = ask(tmp_path / "t.yaml", tiny, records, trials=2)
    with pytest.raises(ValueError, match="no trial ran to its end"):
        tune(path, output=str(tmp_path / "out"), console=SILENT)
    monkeypatch.setattr(Runner, "wait", pretend)
    folder = tune(path, output=str(tmp_path / "out"), console=SILENT)
    assert [r["state"] for r in table(folder)] == ["fail", "fail", "complete", "complete"]


# -- NOMAD ------------------------------------------------------------------------------------------------------------


def test_nomads_coordinates():
    assert box(Range(1e-4, 1e-2, True)) == (math.log(1e-4), math.log(1e-2), "R")
    assert value_at(Range(1e-4, 1e-2, True), math.log(1e-3)) == pytest.approx(1e-3)
    assert value_at(Range(1e-4, 1e-2, True), math.log(1e-2)) == 1e-2
    assert (box(Range(2, 9, whole=True)), value_at(Range(2, 9, whole=True), 3.0)) == ((2, 9, "I"), 3)
    choices = Range(choices=("a", ["b"]))
    assert (box(choices), value_at(choices, 1.0)) == ((0, 1, "I"), '["b"]')


def test_nomad_searches_and_goes_on_where_it_was(tmp_path, tiny, records, monkeypatch):
    pytest.importorskip("PyNomad", reason="PyNomadBBO is not installed")
    begun, stop = [], 7

    def wait(self, folder, bar):
        begun.append(folder.name)
        if len(begun) == stop:
            raise KeyboardInterrupt
        return pretend(self, folder, bar)

    monkeypatch.setattr(Runner, "wait", wait)
    path = ask(tmp_path / "t.yaml", tiny, records, sampler="nomad", pruner="none", trials=25, rescore={"top": 0})
    with pytest.raises(KeyboardInterrupt):
        tune(path, output=str(tmp_path / "out"), console=SILENT)
    folder = tune(path, output=str(tmp_path / "out"), console=SILENT)
    assert begun.count(begun[6]) == 2  # the one that was stopped
    assert len(begun) == len(set(begun)) + 1
    stop = 0
    straight = tune(path, output=str(tmp_path / "straight"), console=SILENT)
    losses = [[r["loss"] for r in table(at) if r["state"] == "complete"] for at in (folder, straight)]
    assert losses[0] == losses[1]
    assert min(map(float, losses[0])) < 1.1
    with pytest.raises(ValueError, match="leave out --jobs 2"):
        tune(path, 2, str(folder), console=SILENT)


# -- for real ---------------------------------------------------------------------------------------------------------


def test_a_search_trains_and_its_best_recipe_trains(tmp_path, tiny, records, monkeypatch):
    """Within this process; the loss of a trial is that of the run it describes."""
    monkeypatch.setattr(Runner, "wait", lambda self, folder, bar: run_trial(folder))
    path = tmp_path / "t.yaml"
    ask(path, tiny, records, {"learning_rate": RATE}, trials=2, evaluations=2, rescore={"top": 1})
    path.write_text(path.read_text().replace("steps: 8", "steps: 2"))
    folder = tune(str(path), output=str(tmp_path / "out"), console=SILENT)
    rows = table(folder)
    best = next(r for r in rows if r["best"])
    assert float(best["loss"]) == min(float(r["loss"]) for r in rows)
    rates = [read_trial(folder / "runs" / r["trial"]).recipe.learning_rate for r in rows]
    assert rates == [float(r["learning_rate"]) for r in rows]
    again = json.loads((folder / "runs" / "again" / best["trial"] / "result.json").read_text())
    assert float(best["heldout"]) == again["after"] < again["before"]
    told = load_recipe(str(folder / "best.yaml"), {"output": str(tmp_path / "run"), "samples": 0, "save_every": 0})
    found = train(told, SILENT)
    assert found.recipe.learning_rate == float(best["learning_rate"])
    assert found.after < found.before


@pytest.mark.slow
def test_a_hopeless_trial_is_ended_while_it_trains(tmp_path, tiny, records, capsys):
    told = Recipe(model=tiny, data=records, **{**SHORT, "steps": 400}, eval_every=1)
    asked = Trial("lora", told, 400, False, 4, 0, label="trial-000")
    with Runner(tmp_path, Processes(1), Console(width=200), lambda folder, rows: len(rows) > 2) as running:
        assert running.run([asked]) == [None]
    assert running.pruned == {tmp_path / "runs" / "trial-000"}
    assert not running.live
    assert re.search(r"trial-000: pruned at step \d+, loss \d+", capsys.readouterr().out)
    assert len(read_history(tmp_path / "runs" / "trial-000" / "metrics.jsonl")) < 400


@pytest.mark.slow
def test_a_killed_search_goes_on_and_repeats_nothing(tmp_path, tiny, records):
    path, folder = ask(tmp_path / "t.yaml", tiny, records, trials=4, rescore={"top": 1}), tmp_path / "out"
    command = [sys.executable, "-m", "inlay", "tune", path, "--jobs", "2", "--output", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.rglob("result.json")) or len(list(folder.rglob("trial.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    time.sleep(5)  # its trials see that it is gone
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    rows = table(folder)
    assert sum(r["state"] in ("complete", "pruned") for r in rows) == 4
    assert any(r["state"] == "fail" for r in rows)
    assert "are finished already" in said
    assert load_recipe(str(folder / "best.yaml"), {}).method == "lora"
