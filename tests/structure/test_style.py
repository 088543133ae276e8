"""Whatever makes a reader guess may only become rarer: attributes by name, untyped values, hidden statements."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import inlay

PACKAGE = Path(inlay.__file__).parent
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
BOUNDS = {  # lower one where the count has fallen; never raise one
    "hasattr or getattr": 66,
    "Any in an annotation": 560,
    "a statement `f(x) if c else None`": 0,
    "a loop over `xs if c else ()`": 1,
    "an assignment of three or more values": 1,
}
NO_VERB = "A About All An As At By For How In Its One Some The These This Two What When Where Whether Which".split()
PROTOCOLS: dict[str, str] = {}  # public names that stand in two rooms, each with its reason


def annotations(node: ast.AST) -> Iterator[ast.expr]:
    """The annotations that a node has itself."""
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield node.annotation
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
        yield node.returns


def is_empty(node: ast.expr) -> bool:
    return isinstance(node, ast.Tuple | ast.List) and not node.elts


def guesses(tree: ast.AST) -> Counter[str]:
    """How often a tree does each of `BOUNDS`."""
    count: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            count["hasattr or getattr"] += 1
        for hint in annotations(node):
            count["Any in an annotation"] += sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(hint))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp):
            count["a statement `f(x) if c else None`"] += 1
        if isinstance(node, ast.For) and isinstance(node.iter, ast.IfExp) and is_empty(node.iter.orelse):
            count["a loop over `xs if c else ()`"] += 1
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2:
            count["an assignment of three or more values"] += isinstance(node.targets[0], ast.Tuple)
    return count


def test_guesses_are_counted():
    source = """
def f(a: dict[str, Any], b: int) -> Any:
    x, y, z = 1, 2, getattr(a, "b")
    pair, both = 1, 2
    print(a) if b else None
    for c in a if b else ():
        value = hasattr(a, "c") if b else None
    for c in [a] if b else a:
        pass
"""
    assert guesses(ast.parse(source)) == dict(zip(BOUNDS, (2, 2, 1, 1, 1), strict=True))


def test_guesses_only_become_fewer():
    count = sum(map(guesses, TREES.values()), Counter())
    assert all(count[what] <= bound for what, bound in BOUNDS.items()), dict(count)


def test_a_public_name_stands_in_one_room():
    rooms = defaultdict(set)
    for file, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                rooms[node.name].add(file.split("/")[0])
    twice = {name: sorted(where) for name, where in rooms.items() if len(where) > 1}
    assert twice.keys() == PROTOCOLS.keys(), twice


def test_a_docstring_begins_with_a_verb():
    """Ruff's D401 knows the moods of verbs, not sentences that have none. Titles of modules are left out."""
    titles = [
        f"{file}:{node.lineno} {text.splitlines()[0]}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node))
        if text.split()[0] in NO_VERB or text.split()[0].endswith("'s")
    ]
    assert not titles, titles
