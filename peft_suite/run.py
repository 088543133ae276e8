"""Run PEFT's own tests on our configs: `python -m peft_suite.run [files] [-k ...]`, or `make peft-suite` for all.

`PEFT_SUITE_METHODS="snell lorta"` takes these methods alone.

The tests are those of the PEFT that is installed, from its source distribution on the package index; the models they
ask a hub for are made here. Everything lies in `.cache/peft-suite`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from peft_suite.models import write

ROOT = Path(__file__).parent.parent
sys.path.insert(1, str(ROOT / "tests"))  # for `sizes`

from peft_suite.cases import LISTS, WRITTEN_OUT  # noqa: E402

CACHE = ROOT / ".cache" / "peft-suite"
MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")


def fetch(name: str) -> Path:
    """The unpacked source distribution `name` (as "peft-0.21.2") and what it holds."""
    if not (CACHE / name).exists():
        wanted = name.replace("-", "==")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", "-d", CACHE, wanted], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return CACHE / name


def prepare(sources: Path) -> Path:
    """A folder in which the tests can run. The distribution has them without their package and settings."""
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(sources / "tests", work / "tests")
    (work / "tests" / "__init__.py").touch()
    (work / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n")  # imported by name by every test module
    (work / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {m}\n" for m in MARKERS))
    return work


def main(arguments: list[str]) -> None:
    work = prepare(fetch(f"peft-{version('peft')}"))
    write(CACHE / "hub")
    files = [a for a in arguments if a.endswith(".py")] or [*LISTS, *WRITTEN_OUT]
    options = [a for a in arguments if a not in files]
    offline = {"HF_HUB_CACHE": str(CACHE / "hub"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    pytest = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", "-p", "peft_suite.plugin"]
    command = [*pytest, *options, *(f"tests/{f}" for f in files)]
    os.chdir(work)
    os.execve(command[0], command, {**os.environ, **offline, "PYTHONPATH": path})  # Ctrl-C still prints the table


if __name__ == "__main__":
    main(sys.argv[1:])
