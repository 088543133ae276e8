"""The template of a method outside the package, used as its README says."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inlay import methods, outside
from inlay.cli import flags, main

ROOT = Path(__file__).parents[2]
OWN = ROOT / "examples" / "06_own_method"
TWIN = ["--batch-size", "4", "--samples", "0", "--eval-size", "4", "--overwrite"]


def commands() -> list[list[str]]:
    told = "\n".join(re.findall(r"```bash\n(.*?)```", (OWN / "README.md").read_text(), re.DOTALL))
    return [shlex.split(line) for line in told.splitlines() if line]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The folder as a user's own, after which nothing of the method is left."""
    folder = tmp_path / "own_method"
    shutil.copytree(OWN, folder, ignore=shutil.ignore_patterns("__pycache__", "runs", "build", "*.egg-info"))
    monkeypatch.chdir(folder)
    for place, name in ((methods, "_added"), (methods, "_imports"), (flags, "_learned")):
        monkeypatch.setattr(place, name, {})
    outside.installed_methods.cache_clear()
    yield folder
    sys.modules.pop("inlay_fourierft", None)
    outside.installed_methods.cache_clear()


def shortened(words: list[str], model: str, data: str) -> list[str]:
    """A command of the README on a small model."""
    words = ["2" if before == "--steps" else word for before, word in zip(["", *words], words, strict=False)]
    extra = {"train": ["--model", model, "--data", data, *TWIN], "methods": ["--model", model]}
    extra |= {"generate": ["--tokens", "2"]}
    recipe = ["--steps", "2"] if words[:2] == ["train", "recipe.yaml"] else []
    return [*words, *extra.get(words[0], []), *recipe]


def test_the_template_keeps_the_contract_and_trains(copied, tiny, records, monkeypatch):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(copied)  # as pytest has it there
        for name, test in runpy.run_path(str(copied / "tests" / "test_fourierft.py")).items():
            if name.startswith("test_"):
                test()
        del sys.modules["inlay_fourierft"]
    main(shortened(["train", "recipe.yaml"], tiny, records))
    about = json.loads((copied / "runs" / "fourierft" / "adapter" / "adapter_config.json").read_text())
    assert about["args"] == {"n": 500, "alpha": 300.0, "places": 777}
    assert about["defined_in"]["module"] == "inlay_fourierft"


@pytest.mark.slow
def test_the_template_works_as_its_page_says(copied, tiny, records, capsys):
    """Up to its installation."""
    ours = commands()
    ours = ours[: ours.index(["pip", "install", "."])]
    assert ours.pop(0) == ["python", "-m", "pytest", "tests"]
    for words in ours:
        assert words[0] == "inlay"
        main(shortened(words[1:], tiny, records))
    assert [words[1] for words in ours] == ["methods", "methods", "train", "train", "generate", "merge"]
    about = json.loads((copied / "runs" / "flags" / "adapter" / "adapter_config.json").read_text())
    assert about["args"] == {"n": 500, "alpha": 300.0, "places": 777}
    assert (copied / "merged" / "model.safetensors").exists()
    assert "fourierft is from module inlay_fourierft" in capsys.readouterr().out


def test_the_template_is_short():
    assert len((OWN / "inlay_fourierft.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_the_template_is_installed_as_its_page_says(copied, tiny, records, tmp_path):
    target = tmp_path / "site"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    path = os.pathsep.join([str(target), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run(*pip, str(copied))
    ours = commands()
    for words in ours[ours.index(["pip", "install", "."]) + 1 :]:
        told = run("-m", "inlay", *shortened(words[1:], tiny, records))
        assert words[1] != "methods" or "fourierft is from inlay-fourierft, module inlay_fourierft" in told
    about = json.loads((tmp_path / "runs" / "installed" / "adapter" / "adapter_config.json").read_text())
    assert about["defined_in"] == {"module": "inlay_fourierft", "distribution": "inlay-fourierft"}
    run("-m", "inlay", "generate", "runs/installed", "--prompt", "x", "--tokens", "2")
