"""Write the README.md beside a trained adapter."""

from __future__ import annotations

import json
import os
import re

from inlay.messages import one_line, printable
from inlay.methods import find
from inlay.models.builtin import MODEL
from inlay.models.model_classes import SEQUENCE, find_model_class
from inlay.outside import origin_of
from inlay.recipe.peft_methods import FULL, is_inlay
from inlay.reports.result import Result
from inlay.reports.run_page import page_title, run_facts, versions

BUILTIN_BASE = """from inlay.models.builtin import load_builtin_model  # also registers the adapter type with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(load_builtin_model(), "path/to/this/folder")"""
MERGING = "\nTo serve it without Inlay, merge it first: `inlay merge path/to/this/folder merged/`.\n"


def markdown(text: str) -> str:
    """Return a text from outside as Markdown that shows it, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", one_line(text))


def fenced(text: str) -> str:
    """Return a text as a block of code, whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{printable(text).rstrip()}\n{fence}"


def loader_of(result: Result) -> str:
    """Return the name of the class of transformers or PEFT that loads what was trained."""
    name = find_model_class(result.recipe.task).auto.__name__
    if result.recipe.method == FULL:
        return name
    return name.replace("Auto", "AutoPeft", 1) if "ImageText" not in name else "AutoPeftModel"


def model_card(result: Result) -> str:
    """Return the README, for a model hub, of what was trained."""
    name, method = result.recipe.model, result.recipe.method
    base = f"base_model: {json.dumps(name)}\n" if not os.path.exists(name) and "/" in name else ""
    table = "\n".join(f"| {markdown(key)} | {markdown(value)} |" for key, value in run_facts(result).items())
    kind = find_model_class(result.recipe.task)
    library, loader = "transformers" if method == FULL else "peft", loader_of(result)
    labelled = method != FULL and kind.peft == SEQUENCE
    more = f", num_labels={result.labels}" if labelled else ""
    register = "import inlay  # registers the adapter type with PEFT\n" if is_inlay(method) else ""
    own = ""
    if is_inlay(method) and (origin := origin_of(find(method))):
        own = f"import {origin['module']}  # defines the method\n"
    opening = f"""{register}{own}from {library} import {loader}

model = {loader}.from_pretrained("path/to/this/folder"{more})"""
    if method != FULL and name == MODEL:
        opening = f"{own}{BUILTIN_BASE}"
    merging = "" if method == FULL else MERGING
    return f"""---
{base}library_name: {library}
pipeline_tag: {kind.tag}
tags: [inlay, "{method}"]
---
# {markdown(page_title(result))}

| | |
|---|---|
{table}

```python
{opening}
```
{merging}
The recipe, where it differs from the defaults:

{fenced(result.recipe.differences())}

Versions: {", ".join(versions().splitlines())}
"""
