"""docs/private_names.md lists every private name of another library that the package uses, and no other.

A name of another library is private if it, or a module on the way to it, begins with an underscore; a name of PEFT,
transformers, trl or accelerate, whose modules move between releases, also if their top level does not export it.
Attributes that are undocumented but have no underscore cannot be told from public ones here.
"""

import ast
import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import inlay

PACKAGE, ROOT = Path(inlay.__file__).parent, Path(__file__).parents[2]
DEEP = ("peft", "transformers", "trl", "accelerate")  # of which only the top level counts as public
DOCUMENTED = {"_replace"}  # of named tuples: its underscore only keeps it apart from the fields
BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "__setattr__"}  # functions that take an attribute's name


def is_private(name: str) -> bool:
    return name.startswith("_") and bool(name.strip("_")) and not (name.startswith("__") and name.endswith("__"))


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """What a statement imports from private places, with its path."""
    for alias in node.names:
        path = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        library, *rest = path.split(".")
        deep = library in DEEP and len(rest) > 1 and not hasattr(importlib.import_module(library), rest[-1])
        if deep or (library != "inlay" and any(map(is_private, rest))):
            yield path


def used(tree: ast.AST) -> set[str]:
    """The private names that a file imports, reads, writes, takes or passes, whoever defines them."""
    paths, names = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                paths |= set(imported(node))
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
                names.add(name)
            case ast.Call(func=ast.Name(id=by) | ast.Attribute(attr=by), args=[_, ast.Constant(str(name)), *_]):
                names |= {name} if by in BY_NAME else set()
            case ast.Call(func=ast.Attribute(value=ast.Constant(str(text)), attr="split")):
                names |= set(text.split())
    return paths | set(filter(is_private, names))


def defined(tree: ast.AST) -> set[str]:
    """The private names that a file or class defines: functions, classes, variables and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                names.add(name)
    return set(filter(is_private, names))


def heirs(cls: type) -> Iterator[type]:
    """A class and all that derive from it."""
    yield cls
    for heir in cls.__subclasses__():
        yield from heirs(heir)


def replaced(file: str, cls: ast.ClassDef) -> set[str]:
    """The private names of a class that a class of another library, above it or beside it in an heir, has as well."""
    own = defined(cls) if cls.bases else set()
    if not own:
        return set()
    module = importlib.import_module("inlay." + file.removesuffix(".py").replace("/", "."))
    classes = {base for heir in heirs(getattr(module, cls.name)) for base in heir.__mro__}
    return {name for name in own for base in classes if name in vars(base) and not base.__module__.startswith("inlay.")}


def private_uses(sources: dict[str, str]) -> set[tuple[str, str]]:
    """Each private name of another library, with each file that uses it."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    uses = {file: used(tree) for file, tree in trees.items()}
    called, ours, theirs = set().union(*uses.values()), set().union(*map(defined, trees.values())), {}
    for file, tree in trees.items():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        methods = {node.name for cls in classes for node in cls.body if isinstance(node, ast.FunctionDef)}
        unused = set(filter(is_private, methods)) - called  # nobody here calls them, so a library does
        theirs[file] = unused.union(*(replaced(file, cls) for cls in classes))
    ours = ours - set().union(*theirs.values()) | DOCUMENTED
    return {(name, file) for file in trees for name in (uses[file] - ours) | theirs[file]}


@pytest.fixture(scope="module")
def canary():
    spec = importlib.util.spec_from_file_location("canary", ROOT / "checks" / "canary.py")
    module = sys.modules["canary"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["canary"]


@pytest.fixture(scope="module")
def table(canary):
    return canary.rows(canary.TABLE.read_text(encoding="utf-8"))


def test_every_kind_of_use_is_found():
    source = """
import torch._dynamo, torch.nn, torch.utils._pytree as tree
from torch.nn.modules.module import _has_any_global_hook
from peft import PeftModel
from peft.utils import PeftType, register_peft_method
from inlay._version import __version__
_ours = {}
class Plain:
    def _helper(self, _internal=False):
        self._kept, self.__class__ = self._helper(), None
        layer._modules, f(x, _flag=1), getattr(x, "_text"), "_one _two".split()
        return _ours, "_stderr", t._replace(a=1)
    def _called_by_a_library(self): ...
def _function(): return self._kept
"""
    found = private_uses({"sample.py": source})
    assert found == {(name, "sample.py") for name in (
        "torch._dynamo", "torch.utils._pytree", "torch.nn.modules.module._has_any_global_hook", "_called_by_a_library",
        "peft.utils.register_peft_method", "_internal", "_modules", "_flag", "_text", "_one", "_two",
    )}  # fmt: skip


def test_methods_that_replace_another_librarys_are_found():
    source = (PACKAGE / "host" / "slot.py").read_text(encoding="utf-8")
    slot = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    assert replaced("host/slot.py", slot) == {"_apply", "_load_from_state_dict"}


def test_the_table_lists_the_private_names_that_are_used(table):
    sources = {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")}
    listed = [use for row in table for use in product(row.names, row.files)]
    uses = private_uses(sources)
    assert sorted(uses - set(listed)) == [], "used, but not in docs/private_names.md: find a public name, or add a row"
    assert sorted(set(listed) - uses) == [], "in docs/private_names.md, but no longer used: remove it there"
    assert sorted(use for use in set(listed) if listed.count(use) > 1) == []


def test_every_row_gives_a_reason(table):
    assert [row.names for row in table if len(row.why) < 20 or not row.tests] == []


def test_the_named_tests_exist_and_are_quick(canary):
    where = canary.find_tests(ROOT / "tests")
    for test in set().union(*canary.tests_by_library().values()):
        assert len(where[test]) == 1, f"{test} is in {where[test] or 'no file'}"
        text = (ROOT / where[test][0]).read_text(encoding="utf-8")
        slow = re.search(rf"^@pytest\.mark\.slow\n(@.*\n)*def {test}\(", text, re.MULTILINE)
        assert not slow, f"{test} is slow, and make canary leaves out what is"


# -- the ranges of pyproject.toml -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranges() -> dict[str, Requirement]:
    """What pyproject.toml asks for, extras included, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {canonicalize_name(line.name): line for line in map(Requirement, lines)}


def test_the_known_versions_are_in_the_ranges(ranges):
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    known = {canonicalize_name(name): pin for name, pin in pins}
    assert len(known.keys() & ranges.keys()) > 15
    outside = [
        f"{name} {known[name]} is not in {line}"
        for name, line in ranges.items()
        if name in known and known[name] not in line.specifier
    ]
    assert outside == []


def test_the_ranges_hold_no_transformers_that_refuses_every_peft_in_them(ranges):
    """`model.add_adapter` of transformers 5.24.0 asks for PEFT 0.22.0, which does not exist."""
    assert ("5.24.0" in ranges["transformers"].specifier) == ("0.22.0" in ranges["peft"].specifier)


def test_transformers_takes_the_installed_peft():
    from transformers.integrations.peft import MIN_PEFT_VERSION

    assert Version(version("peft")) >= Version(MIN_PEFT_VERSION), f"transformers {version('transformers')}"
