"""The files of a release agree: one version everywhere, a changelog in its form, issue forms that parse."""

import re
from pathlib import Path

import pytest
import yaml

import inlay

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == inlay.__version__
    assert re.search(r"^## \[([\d.]+)\]", CHANGELOG, re.MULTILINE)[1] == inlay.__version__  # type: ignore[index]


def test_the_changelog_has_the_form_of_keep_a_changelog():
    heads = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert [head for head in heads if not re.fullmatch(r"\[[\d.]+\]( - (unreleased|\d{4}-\d{2}-\d{2}))?", head)] == []
    kinds = re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert len(kinds) == len(set(kinds)) or len(heads) > 2


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_an_issue_form_is_one(form):
    values = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem == "config":
        return
    assert values["name"]
    assert values["description"]
    assert all(
        part["type"] in ("input", "textarea", "markdown") and part["attributes"]["label"] for part in values["body"]
    )
