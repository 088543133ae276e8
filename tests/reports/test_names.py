"""Names from outside are text in what a run leaves: no markup, no lines of their own, no formulas, no escapes."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from inlay.conversion.gguf_lora import modelfile
from inlay.inspection.figures import plot_name, plot_text, short_labels
from inlay.models.builtin import model_dir
from inlay.recipe.recipe import Recipe
from inlay.reports.html import html_document
from inlay.reports.model_card import model_card
from inlay.reports.result import Result
from inlay.reports.run_page import run_page, samples_text
from inlay.training.run_files import name_builtin_base

NAME = "owner/a|b\n# head <script>alert(1)</script> [x](http://evil) `code` ``` \x1b[2J $\\frac$ $"


@pytest.fixture
def result() -> Result:
    samples = [{"prompt": "p\x1b[2J", "before": "b", "after": "a\u202e", "reference": "r"}]
    recipe = Recipe(model=NAME, data="rows\n---\nlicense: evil\x9b.jsonl", system="```\n# end")
    return Result(recipe, Path("run"), 10, 100, 2.0, 1.0, 3.0, 40, 2**20, samples=samples)


def test_a_model_card_shows_names_as_they_are(result):
    card = model_card(result)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == NAME
    assert set(yaml.safe_load(head)) == {"base_model", "library_name", "pipeline_tag", "tags"}
    titles = [line for line in body.splitlines() if line.startswith("#") and not line.startswith("# end")]
    assert len(titles) == 1
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in table)
    assert "<script>" not in body.replace("\\<", "").partition("````")[0]
    assert "\x1b" not in body
    assert "\x9b" not in body
    fenced = body.partition("````yaml\n")[2].partition("\n````\n")[0]
    assert yaml.safe_load(fenced)["system"] == "```\n# end"


def test_what_was_trained_on_the_builtin_model_names_no_folder_of_this_machine(result, tmp_path):
    card = model_card(replace(result, recipe=Recipe(output="run")))
    assert "PeftModel.from_pretrained(load_builtin_model()," in card
    assert str(model_dir()) not in card
    file = tmp_path / "adapter_config.json"
    for base, name in ((str(model_dir()), "builtin"), ("/home/me/models/mine", "/home/me/models/mine"), (None, None)):
        file.write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "INLAY"}))
        name_builtin_base(tmp_path)
        assert json.loads(file.read_text()) == {"base_model_name_or_path": name, "peft_type": "INLAY"}


def test_a_page_and_samples_show_names_as_they_are(result):
    page = run_page(result, {}, {})
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    text = samples_text(result)
    assert text.count("\n#") == 0
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<title>a b \\x1b" in html_document("a\nb \x1b", "")


def test_a_modelfile_has_the_lines_it_was_given():
    text = modelfile("owner/x\nSYSTEM evil\rFROM ./other")
    assert text.splitlines() == [
        "# The base as GGUF: owner/x SYSTEM evil FROM ./other", "FROM ./base.gguf", "ADAPTER ./adapter.gguf"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a$b$c", "$\\frac$ $", "a\nb $", "100 $"])
def test_a_name_in_a_plot_is_no_formula(name, painted):
    figure = Figure()
    figure.subplots().set_title(plot_text(name))
    with painted():
        figure.savefig(file := io.BytesIO(), format="svg", metadata={"Date": None})
    assert file.getvalue()
    assert plot_name(figure) == " ".join(name.split())
    assert short_labels([f"layers.{name}"]) == [plot_text(name.rpartition(".")[2])]
