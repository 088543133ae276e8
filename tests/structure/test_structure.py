"""Who may import which library, and how long a method may be. `test_layers.py` says who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import inlay

PACKAGE = Path(inlay.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
METHOD_FILES = [name for name in FILES if name.startswith("methods/") and name != "methods/__init__.py"]
CORE = [name for name in FILES if name == "method.py" or name.startswith(("numerics/", "methods/"))]
BELOW_PEFT = ("cli/", "files/", "messages.py", "__init__.py", "__main__.py", "_version.py")
BELOW_THE_VERBS = (*BELOW_PEFT, "host/", "models/")
PLOTTING = {"matplotlib", "plotly", "seaborn", "altair", "bokeh"}


def imported(source: str) -> set[str]:
    """Full names of every imported module, inside functions as well; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def roots(name: str) -> set[str]:
    return {module.split(".")[0] for module in imported(FILES[name].read_text())}


def test_the_reader_of_imports_sees_them_all():
    source = "import a.b, c\nfrom d.e import f\ndef g():\n    import h\n    from i import j"
    assert imported(source) == {"a.b", "c", "d.e", "d.e.f", "h", "i", "i.j"}


def test_the_files_are_found():
    assert {"method.py", "numerics/linalg.py", "numerics/ops/low_rank.py", "host/tuner.py"} <= set(FILES)
    assert len(METHOD_FILES) >= len(inlay.methods.METHODS)


@pytest.mark.parametrize("name", CORE)
def test_the_mathematics_imports_torch_and_itself_only(name):
    allowed = {"torch", "triton", "inlay", *sys.stdlib_module_names}
    assert roots(name) <= allowed
    own = {module for module in imported(FILES[name].read_text()) if module.startswith("inlay.")}
    if name == "methods/__init__.py":  # the list of them, which has those of other packages too
        own -= {"inlay.outside"}
    assert all(module.startswith(("inlay.method", "inlay.methods", "inlay.numerics")) for module in own), own


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(BELOW_PEFT)])
def test_what_stands_beside_the_host_does_not_import_peft(name):
    assert "peft" not in roots(name)


def test_no_file_loads_scipys_statistics_before_they_are_needed():
    """They take half a second."""
    at_top = [
        f"{name}: {ast.unparse(node)}"
        for name, path in FILES.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "scipy" in ast.unparse(node)
    ]
    assert at_top == []


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(BELOW_THE_VERBS)])
def test_what_every_verb_loads_imports_no_plotting_and_no_trl(name):
    quiet = {"datasets"} if name == "messages.py" else set()  # whose bars it turns off, in a function
    assert not roots(name) & ({"trl", "datasets"} | PLOTTING) - quiet


def test_no_folder_is_a_heap():
    folders = {}
    for name in FILES:
        if not name.startswith("methods/"):
            folders[name.rpartition("/")[0]] = folders.get(name.rpartition("/")[0], 0) + 1
    assert max(folders.values()) <= 25, folders


def test_no_room_holds_more_than_its_share():
    rooms = {}
    for name, path in FILES.items():
        rooms[name.split("/")[0]] = rooms.get(name.split("/")[0], 0) + len(path.read_text().splitlines())
    assert max(rooms.values()) <= 0.15 * sum(rooms.values()), rooms


def test_methods_do_not_inherit_from_each_other():
    for method in inlay.methods.METHODS:
        assert not set(method.__mro__[1:]) & set(inlay.methods.METHODS)


def test_importing_inlay_is_light_and_registers_the_type():
    heavy = {"trl", "datasets", "triton", "optuna", "PyNomad", "tensorboard", *PLOTTING}
    code = f"""import inlay, peft, sys
print(sorted({heavy!r} & set(sys.modules)))
print(sorted(name for name in sys.modules if name.startswith(("inlay.conversion", "inlay.inspection"))))
print(peft.PeftType('INLAY').value, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['INLAY'])"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "[]", "INLAY <class 'inlay.host.config.InlayConfig'>"]


def test_every_public_name_loads():
    for name in inlay.__all__:
        assert getattr(inlay, name) is not None
    assert set(inlay.__all__) <= set(dir(inlay))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        inlay.nothing  # noqa: B018


@pytest.mark.parametrize("name", METHOD_FILES)
def test_a_method_file_is_short(name):
    assert len(FILES[name].read_text().splitlines()) < 80


def test_method_files_are_sixty_lines_on_average():
    lengths = [len(FILES[name].read_text().splitlines()) for name in METHOD_FILES]
    assert sum(lengths) / len(lengths) <= 60


def test_the_table_of_flags_is_that_of_the_fields():
    """The command line reads it in place of the recipe and the methods, which would import torch."""
    from inlay.cli.flags import FILE
    from inlay.cli.recipe_reference import flag_table

    assert FILE.read_text(encoding="utf-8") == flag_table(), "python -m inlay.cli.recipe_reference writes it anew"
