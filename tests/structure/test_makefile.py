"""Every target of the Makefile in a small form, so that none of them can rot unseen."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay import methods
from inlay.models import builtin

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
PHONY = re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)[1].split()  # type: ignore[index]
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name != "common.py")
# Of each target the test that runs it small, here or elsewhere; a reason where there is none.
TARGETS = {
    "demo": "test_readme.py::test_the_demo_for_real",
    "test": "these tests",
    "test-all": "these tests with those that are slow",
    "test-gpu": "test_the_tests_for_a_gpu_are_there",
    "lint": "test_lint_is_clean",
    "docs-tables": "test_readme.py::test_the_tables_are_what_the_package_tells",
    "docs": "test_the_site_builds_without_a_warning",
    "bench": "test_a_benchmark_says_what_it_takes",
    "bench-gpu": "test_bench_for_a_gpu_has_its_scripts",
    "serve-check": "test_serve_check_without_a_server",
    "last-mile": "test_the_last_mile",
    "clients": "test_three_clients",
    "peft-suite": "test_some_of_the_suite_of_peft",
    "torture": "test_one_kill",
    "soak": "test_twenty_steps_of_soak",
    "fuzz": "test_a_hundred_files",
    "canary": "test_canary_finds_its_tests",
    "wheel": "test_wheel_is_built_twice",
    "sbom": "test_sbom_lists_what_is_installed",
    "audit": "test_audit_has_its_flags",
    "clean": "test_clean_removes_what_git_ignores",
}


def recipe(target: str) -> str:
    """The command lines of a target."""
    return re.search(rf"^{target}:.*\n((?:\t.*\n|#.*\n)*)", MAKEFILE, re.MULTILINE)[1]  # type: ignore[index]


def run(*command: str | Path, **env: str) -> str:
    """What a command prints; it has to end well."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def load(name: str, monkeypatch):
    """A script of checks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "checks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_every_target_has_its_small_form():
    assert list(TARGETS) == PHONY
    here = {name for name in globals() if name.startswith("test_")}
    elsewhere = (Path(__file__).parent / "test_readme.py").read_text()
    for test in TARGETS.values():
        if test.startswith("test_"):
            file, _, name = test.rpartition("::")
            assert f"def {name}(" in elsewhere if file else name in here


def test_every_script_that_a_target_runs_is_there():
    named = re.findall(r"(?:benchmarks|checks)/\w+\.py", MAKEFILE)
    assert [path for path in named if not (ROOT / path).is_file()] == []
    checks = {path.name for path in (ROOT / "checks").glob("*.py")}
    helped = {"server.py", "unchanged_cases.py", "docs_pictures.py", "docs_site.py"}  # which others and mkdocs run
    by_hand = {"stream.py", "unchanged.py", "notebook.py", "install.py"}  # by hand, before and after a change
    assert checks - helped - by_hand == {path.partition("/")[2] for path in named if path.startswith("checks/")}


def test_bench_for_a_gpu_has_its_scripts():
    """Where there is no GPU: its scripts are there, and layer.py and step.py know the flags they are given."""
    lines = recipe("bench-gpu")
    flags = {name: (ROOT / "benchmarks" / name).read_text() for name in re.findall(r"benchmarks/(\w+\.py)", lines)}
    assert {"layer.py", "step.py", "triton_kernels.py"} == flags.keys()
    for script, text in flags.items():
        given = re.search(rf"{re.escape(script)}(.*?)(?:\n\t\$|\Z)", lines, re.DOTALL)[1]  # type: ignore[index]
        assert all(flag.replace("--no-", "--") in text for flag in re.findall(r"--[\w-]+", given)), script


def test_bench_runs_every_benchmark_or_says_why_not():
    told = set(re.findall(r"(\w+\.py)", recipe("bench")))
    assert told == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_says_what_it_takes(script):
    assert "usage: " in run(sys.executable, f"benchmarks/{script}", "--help")


@pytest.mark.slow
def test_a_benchmark_measures_and_writes_its_table(tmp_path):
    run(sys.executable, "benchmarks/dota_bf16.py", "--size", "64", "--tokens", "8", "--out", tmp_path)
    run(sys.executable, "benchmarks/saved.py", "--size", "64", "--tokens", "8", "--out", tmp_path)
    for name in ("dota_bf16", "saved"):
        assert "| dota" in (tmp_path / f"{name}.md").read_text().lower()


@pytest.mark.slow
def test_the_tests_for_a_gpu_are_there():
    words = re.sub(
        r"\$\(addprefix (\S+),([^)]*)\)", lambda m: " ".join(m[1] + w for w in m[2].split()), recipe("test-gpu")
    )
    files, chosen = re.findall(r"tests/\S+\.py", words), re.search(r'-k "(.*?)"', words)[1]  # type: ignore[index]
    found = run(sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert len(files) == 6
    assert found.count("::") > 500


@pytest.mark.slow
def test_lint_is_clean():
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


@pytest.mark.slow
def test_serve_check_without_a_server(tmp_path, monkeypatch, capsys):
    """In llama.cpp's place transformers reads the GGUF files: equal but for rounding."""
    serve = load("serve", monkeypatch)

    def answer(_, model, lora, ids):
        read = builtin.load_gguf(model).eval()
        assert lora is None
        made = {"text": serve.greedy(read, ids), "tokens": [list(range(1000))] * serve.TOKENS}
        return made | {"logs": serve.log_probabilities(read, ids, made).tolist()}

    monkeypatch.setattr(serve, "serve", answer)
    assert serve.main("no python", ["bat_col"], tmp_path / "serve.md") == 0
    assert "6 rows, 0 out of bounds" in capsys.readouterr().out
    assert (tmp_path / "serve.md").read_text().count("24 of 24") >= 2
    row = serve.Row("fp32", "bone, merged", error=0.1, effect=1.0, same=24)
    assert not row.good(floor=1.0)  # a tenth of what the adapter does


def test_the_suite_of_peft_has_every_method(monkeypatch):
    """A new method is among its cases without an edit there, in sizes that fit."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("PEFT_SUITE_METHODS", raising=False)
    from peft_suite.cases import LISTS, custom

    for method in methods.METHODS:
        assert len(custom(method.name)) >= 5
        for file, lists in LISTS.items():
            for cases in lists.values():
                assert re.search(rf"['.]{method.name}(InlayConfig|[ '])", repr(cases)), file


@pytest.mark.slow
def test_some_of_the_suite_of_peft():
    pytest.importorskip("attrs")
    code = "from peft_suite.run import fetch, version; fetch('peft-' + version('peft'))"
    fetched = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    if fetched.returncode:
        pytest.skip("the sources of PEFT cannot be fetched: no package index")
    some = ["test_custom_models.py", "-k", "test_safe_merge or test_merge_layers"]
    said = run(sys.executable, "-m", "peft_suite.run", *some, PEFT_SUITE_METHODS="snell eva")
    assert int(re.search(r"^total +(\d+)", said, re.MULTILINE)[1]) > 20  # type: ignore[index]


@pytest.mark.slow
def test_one_kill():
    said = run(sys.executable, "checks/torture.py", "1", "--only", "pissa", "--steps", "4")
    assert re.search(r"^1 kills in \d+ runs of 1 configurations, 0 ended differently, 0 stuck", said, re.MULTILINE)


@pytest.mark.slow
def test_twenty_steps_of_soak():
    said = run(sys.executable, "checks/soak.py", "--steps", "20", "--methods", "bone")
    assert "bone: 20 steps, 20 checkpoints" in said
    assert said.count(" of ") == 4  # adapter against merged, at four steps


@pytest.mark.slow
def test_three_clients():
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    assert "| failed | 0 |" in run(sys.executable, "checks/clients.py", "--clients", "3", "--seconds", "3")


@pytest.mark.slow
def test_the_last_mile():
    pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")
    pytest.importorskip("openai", reason="openai is not installed")
    said = run(sys.executable, "checks/last_mile.py", "--steps", "1", "--tokens", "4")
    assert "the 3 answers that should be equal are" in said


@pytest.mark.slow
def test_a_hundred_files():
    said = run(sys.executable, "checks/fuzz.py", "100")
    assert "100 inputs, 0 unhandled" in said


def test_canary_finds_its_tests(monkeypatch):
    canary = load("canary", monkeypatch)
    rows = canary.rows(canary.TABLE.read_text())
    assert len(rows) > 20
    assert all(row.names and row.files and row.tests for row in rows)
    there = canary.find_tests(ROOT / "tests")
    assert {test for tests in canary.tests_by_library().values() for test in tests} - set(there) == set()
    assert [canary.pinned(library) for library in canary.tests_by_library() if library != "Python"]


@pytest.fixture(scope="module")
def tools() -> Path:
    """The environment of the tools that make, list and audit wheels."""
    if subprocess.run(["make", ".venv-tools/.installed"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("the tools cannot be installed: no package index")
    return ROOT / ".venv-tools" / "bin"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if subprocess.run(["make", ".venv-docs/.installed"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("mkdocs cannot be installed: no package index")
    words = re.search(r"/mkdocs (.*)", recipe("docs"))[1].split()  # type: ignore[index]
    run(ROOT / ".venv-docs" / "bin" / "mkdocs", *words, "--site-dir", tmp_path, NO_MKDOCS_2_WARNING="1")
    for name in ("InlayConfig", "merge", "inspect_adapter", "scaled"):
        assert f'id="inlay.{name}"' in (tmp_path / "api" / "index.html").read_text()
    assert 'id="inlay.methods.bone.Bone"' in (tmp_path / "api_methods" / "index.html").read_text()


@pytest.mark.slow
def test_wheel_is_built_twice(tools):
    assert re.search(r"dist/inlay-\S+\.whl: two builds are equal", run(tools / "python", "checks/wheel.py"))


@pytest.mark.slow
def test_sbom_lists_what_is_installed(tools, tmp_path):
    words = re.search(r"cyclonedx-py (.*?) -o", recipe("sbom"))[1].split()  # type: ignore[index]
    run(tools / "cyclonedx-py", *words, "-o", tmp_path / "sbom.json", sys.prefix)
    listed = {part["name"]: part["version"] for part in json.loads((tmp_path / "sbom.json").read_text())["components"]}
    assert listed["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.slow
def test_audit_has_its_flags(tools):
    known = run(tools / "pip-audit", "--help")
    assert [flag for flag in re.findall(r"--[\w-]+", recipe("audit")) if flag not in known] == []


def test_clean_removes_what_git_ignores():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    said = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("rm -rf ")]
    for path in line.split()[2:]:
        ignored = subprocess.run(["git", "check-ignore", "-q", path.replace("*", "inlay") + "/x"], cwd=ROOT)
        whole = subprocess.run(["git", "check-ignore", "-q", path.replace("*", "inlay")], cwd=ROOT)
        assert 0 in (ignored.returncode, whole.returncode), path
