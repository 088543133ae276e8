"""Define where a run's records come from: one source, or a mixture of several with weights of their own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from inlay.messages import did_you_mean
from inlay.recipe.schema import conform_all, field_of

MOST = 1000.0  # the largest weight


@dataclass
class Source:
    """Describe one file, folder or hub data set of a mixture; the recipe's fields are its defaults."""

    path: str = field_of("", "file, folder or hub data set")
    weight: float = field_of(
        1.0, "how often an epoch has each of its rows: 2: twice; 0.5: half of them, drawn by the seed"
    )
    split: str | None = field_of(None, "split of a folder or hub data set")
    columns: dict = field_of(dict, "the column of each role")
    system: str | None = field_of(None, "system message before every example")

    def __post_init__(self) -> None:
        conform_all(self)
        if not self.path:
            raise ValueError("path is missing")
        if not 0 < self.weight <= MOST:
            raise ValueError(
                f"weight: {self.weight} is not above 0 and at most {MOST:g}; leave the source out for none"
            )


def sources(recipe: Any) -> list[Source]:
    """Return the sources of a recipe, in order.

    Raises:
        ValueError: `data` is an empty list, or an entry of it has an unknown key or a value that does not fit.
    """
    entries = recipe.data if isinstance(recipe.data, list) else [recipe.data]
    if not entries:
        raise ValueError("data: an empty list; give a file, a folder or a hub data set")
    return [_source(entry, recipe) for entry in entries]


def _source(entry: Any, recipe: Any) -> Source:
    values: Any = {"path": entry} if isinstance(entry, str) else entry
    names = [f.name for f in fields(Source)]
    if not isinstance(values, dict):
        raise ValueError(f"data: {entry!r:.100} is not a path, or a mapping of {', '.join(names)}")
    for key in values:
        if key not in names:
            raise ValueError(f"data: a source has no {key!r}; {did_you_mean(key, names)}")
    try:
        source = Source(**values)
    except ValueError as error:
        raise ValueError(f"data: {entry!r:.100}: {error}") from None
    system = recipe.system if source.system is None else source.system
    return replace(source, split=source.split or recipe.split, columns=source.columns or recipe.columns, system=system)


def source_names(recipe: Any) -> str:
    """Return the sources of a recipe in one line, with their weights where these are not 1."""
    names = [one.path + ("" if one.weight == 1 else f" ×{one.weight:g}") for one in sources(recipe)]
    return ", ".join(names)


def check_sources(recipe: Any) -> None:
    """Refuse sources that cannot be read as the recipe says, before anything is read."""
    every = sources(recipe)
    if recipe.streaming and (named := next((one for one in every if one.split is not None), None)):
        raise ValueError(f"streaming takes no split, as {named.split!r} of {named.path}; name the files")
    try:
        "".encode(recipe.encoding)
    except (LookupError, ValueError):
        raise ValueError(f"encoding: {recipe.encoding!r} is no text encoding; utf-8, cp1252, utf-16, ... are") from None
