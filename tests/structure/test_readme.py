"""What the README and CONTRIBUTING say is run: tiny twins here, the real thing in `make test-all`."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from inlay import methods
from inlay.cli import main
from inlay.cli.recipe_reference import recipe_reference
from inlay.experiments.compare.spec import load_comparison
from inlay.experiments.tune.spec import load_search
from inlay.host.config import InlayConfig
from inlay.methods.lamda import LaMDA
from inlay.recipe.rates import RATES, rates_table
from inlay.recipe.reading import load_recipe, read_yaml
from inlay.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()
SMALL = """
model: {model}
data: mine.jsonl
steps: 1
batch_size: 4
eval_size: 4
compare: {{methods: [lora, bone], learning_rates: [1e-3], seeds: [0], budget: {{parameters: 9000}}, selection: 4}}
"""
SEARCH = """
model: {model}
data: mine.jsonl
steps: 1
batch_size: 4
eval_size: 4
tune: {{space: {{learning_rate: {{low: 1e-4, high: 1e-2}}}}, trials: 1, selection: 4, rescore: {{top: 0}}}}
"""
TWIN = ["--steps", "1", "--batch-size", "4", "--samples", "1", "--eval-size", "4", "--r", "4"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "inlay"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as a user's: their data, our recipes."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}!"} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_and_of_the_list_of_commands_runs(workplace, tiny, capsys, monkeypatch):
    watched = []
    monkeypatch.setattr("inlay.training.live_page.serve", lambda runs, *_: watched.append(runs))  # it would not end
    served = []
    monkeypatch.setattr("inlay.serving.endpoint.serve_models", lambda models, **_: served.append(models) or True)
    verbs = []
    minutes = []
    monkeypatch.setattr(
        "inlay.experiments.compare.in_minutes.compare_in_minutes", lambda recipe, given, *_: minutes.append(given)
    )
    assert [words[0] for words in commands(README)] == ["train", "generate", "serve", "compare", "merge"]
    first = len(commands(README))
    for count, words in enumerate(commands(README) + commands(COMMANDS)):
        if count == first:  # the list of commands makes these again
            shutil.rmtree(workplace / "runs" / "mine")
            shutil.rmtree(workplace / "merged")
        words = [tiny if word == "builtin" else word for word in words]
        if words[0] == "compare" and "--minutes" not in words:
            (workplace / "small.yaml").write_text(SMALL.format(model=tiny))
            words = ["compare", "small.yaml"]
        if words[0] == "tune":
            (workplace / "search.yaml").write_text(SEARCH.format(model=tiny))
            words = ["tune", "search.yaml"]
        extra = {"train": ["--model", tiny, *TWIN], "methods": ["--model", tiny]}
        extra |= {verb: ["--tokens", "4"] for verb in ("generate", "eval")}
        main([*words, *extra.get(words[0], [])])
        verbs.append(words[0])
    rest = "compare tune ui methods methods plan eval generate serve inspect inspect".split()
    rest += "fold export import export merge merge".split()
    assert verbs == ["train", "generate", "serve", "compare", "merge", "train", "train", "train", *rest]
    assert minutes == [30]
    assert watched == ["runs"]
    assert served == [["runs/mine"], ["runs/mine"]]
    assert (workplace / "runs" / "small" / "report.html").exists()
    assert (workplace / "runs" / "search" / "best.yaml").exists()
    assert (workplace / "spectra" / "spectra.json").exists()
    assert (workplace / "changes" / "changes.json").exists()
    assert (workplace / "folded" / "base" / "model.safetensors").exists()
    assert (workplace / "runs" / "mine" / "adapter" / "adapter_model.safetensors").exists()
    assert (workplace / "lora" / "adapter_model.safetensors").exists()
    assert (workplace / "imported" / "adapter_model.safetensors").exists()
    assert (workplace / "mix" / "adapter_model.safetensors").exists()
    assert (workplace / "merged" / "model.safetensors").exists()
    assert (workplace / "served" / "model.gguf").exists()


def test_the_python_of_the_readme_and_of_its_page_runs(workplace, tiny):
    (code,), (loop, strength) = (blocks(text, "python") for text in (README, (ROOT / "docs" / "python.md").read_text()))
    scope: dict = {}
    exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", tiny), scope)
    merged = scope["merged"](input_ids=torch.arange(8)[None]).logits
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)(input_ids=torch.arange(8)[None]).logits
    assert torch.equal(merged, base)  # nothing was trained in between
    lamda = InlayConfig(method=LaMDA(r=4), target_modules=["q_proj", "v_proj"])
    scope = {"model": get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lamda)}
    exec(loop, scope)
    assert scope["trained"] == 4 * 16
    with torch.no_grad():
        exec(strength, scope)
    assert not torch.equal(scope["full"], scope["base"])
    assert not torch.equal(scope["half"], scope["full"])


def test_the_tables_are_what_the_package_tells():
    """docs/methods.md, docs/papers.md, docs/recipe.md and the flags; where one is not, `make docs-tables` writes it."""
    tables = runpy.run_path(str(ROOT / "checks" / "docs_tables.py"))
    for path, text in tables["pages"]().items():
        assert path.read_text() == text, f"{path}: run make docs-tables"
    page = (ROOT / "docs" / "methods.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` .*?\| ([\d,]{4,}) \|", page, re.MULTILINE))
    assert {name for name, _ in told} == {method.name for method in methods.METHODS}
    assert ("lora", "4,884,480") in told


def test_make_knows_what_the_readme_says():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {words.split()[1] for b in blocks(README, "bash") for words in b.splitlines() if words.startswith("make ")}
    assert asked == {"demo", "test"}
    assert asked <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "distributed"),
    ids=lambda path: path.name,
)
def test_every_recipe_is_valid(path):
    loaders = {"compare": load_comparison, "tune": load_search}
    kind = next((name for name in loaders if name in read_yaml(str(path))), None)
    loaders[kind](str(path)) if kind else load_recipe(str(path), {})


def recipes_of(path: Path) -> list[Recipe]:
    """Return the recipe of a run, or those of a comparison's methods."""
    values = read_yaml(str(path))
    if "tune" in values:
        return []
    return (
        [e.recipe for e in load_comparison(str(path)).entries] if "compare" in values else [load_recipe(str(path), {})]
    )


def test_no_recipe_decays_a_pretrained_weight():
    """Where the start holds a part of W, weight decay would pull that to 0."""
    decayed = [recipe for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "distributed"
               for recipe in recipes_of(path) if recipe.weight_decay]  # fmt: skip
    assert {(recipe.method, recipe.args.get("init")) for recipe in decayed} == {("lamda", "kaiming")}
    assert all(recipe.config().build().zero_init for recipe in decayed)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "papers").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_a_paper_names_its_twins(path):
    """What of it runs on two cores; or why nothing does."""
    told = re.search(r"Twins?: (none|[^#]*?\.yaml(?:, [^#\s]*\.yaml)*)", path.read_text())
    twins = [] if told[1] == "none" else [name.removeprefix("recipes/") for name in told[1].split(", ")]
    assert [name for name in twins if not (ROOT / "recipes" / name).is_file()] == []


def test_the_demo_recipe_is_what_inlay_train_does():
    assert load_recipe(str(ROOT / "recipes" / "e2e.yaml"), {}) == Recipe().resolved()


def test_the_method_of_contributing_trains_saves_reloads_and_merges(tmp_path, monkeypatch):
    (code,) = blocks((ROOT / "CONTRIBUTING.md").read_text(), "python")
    assert len(code.strip().splitlines()) <= 32
    (tmp_path / "rows.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from rows import Rows

    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Rows))
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(5, 6)
    W, b = net[0].weight.clone(), net[0].bias.clone()
    before = net(x)
    model = get_peft_model(net, InlayConfig(method="rows", target_modules=["0"]))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    gains = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        gains -= gains.grad
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = nn.functional.linear(x, W + gains[:, None] * W, b)
    torch.testing.assert_close(model.base_model.model[0](x), expected)
    torch.testing.assert_close(model.merge_and_unload()[0](x), expected)


def test_the_default_rates_in_the_docs_are_those_of_the_table():
    assert rates_table() in (ROOT / "docs" / "methods.md").read_text()
    assert {m.name for m in methods.METHODS} < set(RATES)
    assert {"full", "peft:lora", "peft:dora"} < set(RATES)


def test_the_recipe_reference_is_the_recipe():
    assert (ROOT / "docs" / "recipe.md").read_text() == recipe_reference()


def test_the_papers_page_shows_what_was_measured():
    """Its table is the benchmark's, with a row for every small recipe."""
    page = (ROOT / "docs" / "papers.md").read_text()
    measured = (ROOT / "benchmarks" / "results" / "papers.md").read_text()
    assert page.endswith(measured)
    rows = set(re.findall(r"^\| (\w+) \| \w+ \| \d", measured, re.MULTILINE))
    assert rows == {path.stem for path in (ROOT / "recipes" / "small").glob("*.yaml")}


@pytest.mark.slow
def test_the_demo_for_real(workplace):
    """The README's main job, as a user runs it: the loss falls below 1.6, the answers become E2E sentences."""
    run = [sys.executable, "-m", "inlay"]
    said = subprocess.run([*run, "train"], check=True, capture_output=True, text=True).stdout
    before, after = (float(re.search(rf"held-out loss {when}: +([\d.]+)", said)[1]) for when in ("before", "after"))
    assert before > 2
    assert after < 1.6
    prompt = "name[Aromi], eatType[coffee shop], area[riverside]"
    folder = "runs/builtin-bone"
    answer = subprocess.run([*run, "generate", folder, "--prompt", prompt], check=True, capture_output=True, text=True)
    assert "Aromi" in answer.stdout
    assert "coffee shop" in answer.stdout
    subprocess.run([*run, "merge", folder, "merged"], check=True, capture_output=True)
    assert (workplace / "mix" / "adapter_model.safetensors").exists()
    assert (workplace / "merged" / "model.safetensors").exists()
    assert (workplace / "served" / "model.gguf").exists()
