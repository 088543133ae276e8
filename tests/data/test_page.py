"""The pages about data (docs/data.md, files.md, chats.md): every example gives what the page says below it."""

import re
from pathlib import Path

import pytest
import yaml

from inlay.data.chats import is_learned
from inlay.data.formats import convert_records
from inlay.data.readers import read_records
from inlay.recipe.reading import from_flag
from inlay.recipe.recipe import Recipe
from inlay.recipe.sources import sources
from inlay.training.mixture import reading_of, rules_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in ("data.md", "files.md", "chats.md"))
BLOCKS = re.findall(r"^```(\S+) ([^\n]+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def cases():
    """Each claim of the page with the file above it: (name, content), and (what is claimed, text)."""
    file = ("", "")
    for _, info, content in BLOCKS:
        if info.split()[0] in ("learned", "refused"):
            yield pytest.param(*file, info, content, id=f"{file[0]}: {info}")
        else:
            file = (info, content)


def shown(example):
    """An example as the page writes it."""
    if "text" in example:
        return f"⟦{example['text']}⟧"
    chat = [(message, False) for message in example["prompt"]]
    chat += [(message, is_learned(message)) for message in example["completion"]]
    return "\n".join(f"{m['role']}: " + (f"⟦{m['content']}⟧" if learned else m["content"]) for m, learned in chat)


@pytest.mark.parametrize(("name", "file", "info", "claim"), list(cases()))
def test_an_example_of_the_page(name, file, info, claim, tmp_path):
    claimed, _, flags = info.partition(" with ")
    settings = {"data": str(tmp_path / name)}
    if flags:
        flag, value = flags.removeprefix("--").split(" ", 1)
        settings[flag.replace("-", "_")] = from_flag(flag.replace("-", "_"), value)
    (tmp_path / name).write_text(file, encoding="utf-8")
    recipe = Recipe(**settings)

    def read():
        return convert_records(read_records(settings["data"], None, reading_of(recipe)), rules=rules_of(recipe))

    if claimed == "learned":
        assert "\n\n".join(map(shown, read())) == claim.rstrip("\n")
        return
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the page says what it says
        read()
    for line in claim.splitlines():
        assert line in str(caught.value)


def test_the_page_has_examples_of_both_kinds():
    claims = [info.split()[0] for _, info, _ in BLOCKS]
    assert claims.count("learned") >= 7
    assert claims.count("refused") >= 3


def test_the_mixture_on_the_page_is_one():
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert [one.weight for one in sources(Recipe(**yaml.safe_load(block)))] == [1, 2, 0.5]
