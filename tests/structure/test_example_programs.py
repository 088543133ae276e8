"""Every program of examples/ runs, with a small model and two steps; the notebook too."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

from inlay.experiments.compare.spec import load_comparison

EXAMPLES = Path(__file__).parents[2] / "examples"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["01_loop", *(pytest.param(name, marks=SLOW) for name in ("02_trainer", "03_sft_4bit", "04_dpo", "08_moe"))]
)
def test_an_example_runs(name, tiny, tmp_path, monkeypatch):
    if "4bit" in name:
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name] if name == "08_moe" else [name, tiny, "2"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    saved = tmp_path / "runs" / name
    assert PeftConfig.from_pretrained(saved).peft_type == "INLAY"
    assert (saved / "adapter_model.safetensors").exists()


def test_the_loop_is_thirty_lines_of_torch():
    lines = (EXAMPLES / "01_loop.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 32


def test_the_comparison_is_valid():
    assert [entry.recipe.method for entry in load_comparison(str(EXAMPLES / "05_compare.yaml")).entries] == [
        "lora",
        "bone",
        "milora",
    ]


@pytest.mark.slow
def test_the_notebook_tells_the_truth(tiny, painted, tmp_path, monkeypatch):
    """It runs from start to end; what it has stored has its outputs, and says that the start is exact."""
    notebook = json.loads((EXAMPLES / "story.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert "largest difference of the logits: 0.0\n" in "".join(cells[2]["outputs"][0]["text"])
    monkeypatch.chdir(tmp_path)
    run = runpy.run_path(str(EXAMPLES.parent / "checks" / "notebook.py"))["run"]
    small = {"str(model_dir()), 40": f"{tiny!r}, 2", "axvspan(0, 16": "axvspan(0, 4"}
    with painted():
        scope = run(notebook, small)
    assert len(scope["losses"]) == 2
