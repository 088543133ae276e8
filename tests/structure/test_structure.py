"""Who may import whom, and how long a method may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import inlay

PACKAGE = Path(inlay.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
METHOD_FILES = [name for name in FILES if name.startswith("methods/") and name != "methods/__init__.py"]
CORE = [
    "method.py",
    "ops.py",
    "kernels.py",
    "linalg.py",
    "trains.py",
    "allocate.py",
    "subspace.py",
    "zeroth.py",
    *(name for name in FILES if name.startswith("methods/")),
]
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
    assert {"method.py", "ops.py", "linalg.py", "host/peft.py", "host/layer.py"} <= set(FILES)
    assert len(METHOD_FILES) >= len(inlay.methods.METHODS)


@pytest.mark.parametrize("name", CORE)
def test_the_mathematics_imports_torch_and_itself_only(name):
    allowed = {"torch", "triton", "inlay", *sys.stdlib_module_names}
    assert roots(name) <= allowed
    own = {module for module in imported(FILES[name].read_text()) if module.startswith("inlay.")}
    rooms = ("inlay.method", "inlay.methods", "inlay.ops", "inlay.linalg", "inlay.trains", "inlay.kernels")
    assert all(module.startswith(rooms) for module in own), own


@pytest.mark.parametrize("name", FILES)
def test_only_the_host_and_the_workbench_import_peft(name):
    if not name.startswith(("host/", "workbench/")):
        assert "peft" not in roots(name)


@pytest.mark.parametrize("name", FILES)
def test_only_the_workbench_imports_trl_datasets_and_plotting(name):
    if not name.startswith("workbench/"):
        assert not roots(name) & ({"trl", "datasets"} | PLOTTING)


@pytest.mark.parametrize("name", FILES)
def test_the_host_knows_nothing_of_the_workbench(name):
    if name.startswith("host/") or name in CORE:
        own = imported(FILES[name].read_text())
        assert not any(module.startswith(("inlay.workbench", "inlay.cli", "inlay.export")) for module in own)


def test_methods_do_not_inherit_from_each_other():
    for method in inlay.methods.METHODS:
        assert not set(method.__mro__[1:]) & set(inlay.methods.METHODS)


def test_importing_inlay_is_light_and_registers_the_type():
    heavy = {"trl", "datasets", "triton", "optuna", "PyNomad", "tensorboard", *PLOTTING}
    code = f"""import inlay, peft, sys
print(sorted({heavy!r} & set(sys.modules)))
print(peft.PeftType('INLAY').value, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['INLAY'])"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "INLAY <class 'inlay.host.config.InlayConfig'>"]


@pytest.mark.parametrize("name", METHOD_FILES)
def test_a_method_file_is_short(name):
    assert len(FILES[name].read_text().splitlines()) < 80


def test_method_files_are_sixty_lines_on_average():
    lengths = [len(FILES[name].read_text().splitlines()) for name in METHOD_FILES]
    assert sum(lengths) / len(lengths) <= 60
