"""Load methods that are defined outside the package: by installed distributions, and in modules that a person names.

A distribution names its methods as entry points of the group `inlay.methods`, each under the method's own name; one is
imported when that name is asked for, or when all are listed. A module is imported because a person named it, never
because a file did. What is loaded is kept in `inlay.methods`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from pathlib import Path
from types import ModuleType

from inlay.files.untrusted import regular_file, user_path
from inlay.messages import did_you_mean, one_line
from inlay.method import Method

GROUP = "inlay.methods"
ABOUT = ("title", "equation", "paper", "trains")
NAME = re.compile(r"[A-Za-z_]\w{0,63}")
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
LONGEST = 100  # characters of a name that a file may suggest


class UnknownMethodError(ValueError):
    """Report that no method of a name is known."""


def unknown_method(name: str, known: Sequence[str]) -> UnknownMethodError:
    """Return the error that no method is called `name`, with the one of the `known` names that is probably meant."""
    meant = did_you_mean(name, known)
    hint = f"{meant} Or choose" if meant.startswith("did you mean") else "choose"
    return UnknownMethodError(
        f"unknown method {name!r}; {hint} one of {', '.join(known)}, or name the module of your own with --import"
    )


@cache
def installed_methods() -> dict[str, EntryPoint]:
    """Return the entry points of installed distributions by the names of their methods, without importing them."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def distribution_of(entry: EntryPoint) -> str:
    """Return the name and version of the distribution that an entry point is of."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a distribution"


def load_installed(entry: EntryPoint) -> type[Method]:
    """Import the method that an entry point names.

    Raises:
        ValueError: it cannot be imported, is no method, or has another name; the message names the distribution.
    """
    what = f"{distribution_of(entry)} offers the method {entry.name!r} ({entry.value}), which"
    others = [e for e in entry_points(group=GROUP) if e.name == entry.name and e.value != entry.value]
    if others:
        other = f"{distribution_of(others[0])} ({others[0].value})"
        raise ValueError(f"{what} {other} offers too; uninstall one of the two")
    try:
        method = entry.load()
    except (Exception, SystemExit) as error:  # the code of others fails in its own ways
        raise ValueError(f"{what} cannot be imported: {reason(error)}; upgrade or uninstall that package") from error
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(f"{what} is no subclass of inlay.method.Method; its entry point has to name the class")
    check_class(method)
    if method.name != entry.name:
        raise ValueError(f"{what} is called {method.name!r}; its entry point has to have the method's name")
    return method


def import_module(name: str, folders: Sequence[Path]) -> ModuleType:
    """Import a module by its name, first from the `folders` and then from what is installed, or by its file's path.

    The folders are on the module path during the import alone: later they could hide installed packages.

    Args:
        name: as in `my_method`, `my_package.rows` or `methods/my_method.py`.
        folders: where a person's own modules may lie, and paths begin.

    Raises:
        ValueError: there is none, or it fails.
    """
    file = None
    if name.endswith(".py") or os.sep in name:
        paths = [(folder / user_path(name)).resolve() for folder in folders]
        file = next((path for path in paths if path.suffix == ".py" and regular_file(path).is_file()), None)
        if file is None:
            raise ValueError(f"import: there is no Python file {name} in {' or '.join(map(str, folders))}")
        folders, module = [file.parent], file.stem
    else:
        module = name
    if not MODULE.fullmatch(module) or (file and "." in module):
        raise ValueError(f"import: {name!r} is no name of a Python module; write it as in my_method or a/my_method.py")
    try:
        with searched(folders):
            found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            places = " or ".join(map(str, dict.fromkeys(folders)))
            hint = "give the path of its file, as in folder/my_method.py, or install it"
            raise ValueError(f"import: there is no module {module!r} in {places} or installed; {hint}") from None
        raise ValueError(f"import: {name} cannot be imported: {reason(error)}") from error
    if file and Path(found.__file__ or "").resolve() != file:
        raise ValueError(f"import: {name}: another module is called {module!r} ({found.__file__}); rename the file")
    return found


@contextmanager
def searched(folders: Sequence[Path]) -> Iterator[None]:
    """Put folders in front of the module path for the block."""
    added = [str(folder) for folder in folders]
    importlib.invalidate_caches()  # a file may just have been written
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:  # what the module itself has added stays
            with suppress(ValueError):
                sys.path.remove(folder)


def reason(error: BaseException) -> str:
    """Return in one line why foreign code failed, and in which line of it."""
    where = traceback.extract_tb(error.__traceback__)
    line = f" ({where[-1].filename}, line {where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {one_line(str(error))[:300]}{line}"


def defined_methods(module: ModuleType) -> list[type[Method]]:
    """Return the methods that a module defines or hands on, or a package's modules define, in their order.

    Raises:
        ValueError: there is none, or one is not complete.
    """
    inside = (module.__name__, f"{module.__name__}.")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method)]
    classes += [c for c in descendants(Method) if c.__module__ == inside[0] or c.__module__.startswith(inside[1])]
    found = [c for c in dict.fromkeys(classes) if "name" in vars(c) and not c.__module__.startswith("inlay.")]
    if not found:
        raise ValueError(f"import: {module.__name__} defines no method: no subclass of inlay.method.Method with a name")
    for method in found:
        check_class(method)
    return found


def descendants(cls: type[Method]) -> list[type[Method]]:
    """Return all subclasses of a class that are imported, in the order of their definition within each level."""
    return [d for child in cls.__subclasses__() for d in (child, *descendants(child))]


def check_class(method: type[Method]) -> None:
    """Raise a ValueError where a class lacks what every method has, in words that say what to write."""
    who = title_of(method)
    name = vars(method).get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{who}: name = {name!r} is no name of a method; write letters, digits and _, as in my_method")
    if "__dataclass_params__" not in vars(method):
        raise ValueError(f"{who} is no dataclass; write @dataclass(frozen=True, kw_only=True) above it")
    if missing := [word for word in ABOUT if not any(word in vars(c) for c in method.__mro__)]:
        raise ValueError(f"{who} has no {', '.join(missing)}; inlay methods shows {', '.join(ABOUT)}")
    rate = method.learning_rate
    if rate is not None and (type(rate) not in (int, float) or not 0 < rate < math.inf):
        raise ValueError(f"{who}: learning_rate = {rate!r} is no number above 0; write one, as in learning_rate = 3e-4")
    if inspect.isabstract(method):
        raise ValueError(f"{who} does not define {', '.join(sorted(method.__abstractmethods__))}")
    for f in fields(method):
        if f.default is MISSING:
            raise ValueError(f"{who}: the hyperparameter {f.name!r} has no default, which every method's has")
        if not isinstance(f.metadata.get("help"), str):
            raise ValueError(
                f"{who}: the hyperparameter {f.name!r} has no help; write "
                f'{f.name}: ... = field(default=..., metadata={{"help": "..."}})'
            )


def origin_of(method: type[Method]) -> dict[str, str] | None:
    """Return which module defines a method and, if known, which distribution; None for Inlay's own."""
    module = method.__module__
    if module.startswith("inlay."):
        return None
    top = module.partition(".")[0]
    entry = next((e for e in installed_methods().values() if e.module.partition(".")[0] == top), None)
    names = [entry.dist.name] if entry and entry.dist else distributions().get(top, ())
    return {"module": module, **({"distribution": names[0]} if names else {})}


def named_origin(method: type[Method]) -> str:
    """Return in words where a method is from, which is not Inlay's own: its distribution, if any, and its module."""
    origin = origin_of(method) or {}
    return ", ".join(filter(None, (origin.get("distribution"), f"module {origin.get('module')}")))


@cache
def distributions() -> Mapping[str, Sequence[str]]:
    """Return which installed distributions each importable name is of; reading them all takes its time."""
    return packages_distributions()


def where_from(origin: dict[str, str] | None) -> str:
    """Return in words how to get a method whose adapter says that it is of `origin`; nothing where it says nothing.

    The words of a file are used only where they are names, as nothing else belongs in a command that is suggested.
    """
    module, distribution = ((origin or {}).get(key) for key in ("module", "distribution"))
    if not is_plain_name(module, MODULE):
        return ""
    if module == "__main__":
        return "it was defined in a script or a notebook: run that code first, or put the class in a module to import"
    get = f"add --import {module} (from Python: import {module}); nothing is imported because a file names it"
    if is_plain_name(distribution, DISTRIBUTION):
        return f"{distribution} defines it (module {module}): if you trust it, pip install {distribution}, or {get}"
    return f"the module {module} defines it: {get}"


def is_plain_name(text: object, pattern: re.Pattern[str]) -> bool:
    """Return whether a value from a file is a name of the form `pattern`, and not too long."""
    return isinstance(text, str) and len(text) <= LONGEST and pattern.fullmatch(text) is not None


def title_of(method: type[Method]) -> str:
    """Return a class with its module."""
    return f"{method.__module__}.{method.__qualname__}"


def redefines(method: type[Method], other: type[Method]) -> bool:
    """Return whether a class is another one, or was defined in its place when its module was loaded again."""
    return title_of(method) == title_of(other) and not method.__module__.startswith("inlay.")
