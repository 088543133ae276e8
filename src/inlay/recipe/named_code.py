"""Digests of the code that a recipe names but does not hold, by which a change under the same name is seen."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from inlay.files.untrusted import regular_file
from inlay.methods import find
from inlay.recipe.peft_methods import is_inlay
from inlay.recipe.recipe import Recipe
from inlay.recipe.rewards import find_function, reward_terms


def code_digests(recipe: Recipe) -> dict[str, str]:
    """Return the digests of the files of a recipe's rewards and of its method, where these are not Inlay's own.

    A script that is running is none of them: it changes for many reasons.
    """
    made = {f"method {recipe.method}": find(recipe.method).__module__} if is_inlay(recipe.method) else {}
    if recipe.reward is not None:
        functions = [term.name for term in reward_terms(recipe.reward) if term.is_function]
        made |= {f"reward {name}": find_function(name, recipe.reward).__module__ for name in functions}
    own = {what: name for what, name in made.items() if name != "__main__" and not name.startswith("inlay.")}
    files = {what: vars(sys.modules[name]).get("__file__") for what, name in own.items() if name in sys.modules}
    return {what: file_digest(Path(file)) for what, file in files.items() if file and Path(file).is_file()}


def file_digest(path: Path) -> str:
    """Return a digest of a file."""
    return hashlib.sha256(regular_file(path).read_bytes()).hexdigest()[:16]
