"""The checklist of CONTRIBUTING, followed to the letter: a method added to a copy of this tree, and its tests run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = """
    "rows": Row(Rows(), (24, 40), {"d"}, lambda m, n: m, rows, lora_exact=False, keeps_x=True, grows=False),
"""
REFERENCE = """
def rows(p: Params, W: Tensor) -> Tensor:
    return torch.stack([d * w for d, w in zip(p["d"], W.to(p["d"].dtype), strict=True)])


@dataclass
class Row:"""


@pytest.mark.slow
def test_a_method_is_added_as_contributing_says(tmp_path):
    for name in ("src", "tests", "docs", "checks", "examples", "recipes", "benchmarks", "peft_suite"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "report.html")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    methods, contract = tmp_path / "src/inlay/methods", tmp_path / "tests/methods/contract.py"
    (methods / "rows.py").write_text(code[1])
    lines = (methods / "__init__.py").read_text()
    last = "# isort: on"
    assert last in lines
    (methods / "__init__.py").write_text(lines.replace(last, f"from inlay.methods.rows import Rows as Rows\n{last}", 1))
    text = (
        contract.read_text()
        .replace("\n@dataclass\nclass Row:", REFERENCE, 1)
        .replace("CONTRACT = {\n", f"CONTRACT = {{{ROW}", 1)
    )
    rates = tmp_path / "src/inlay/recipe/rates.py"
    rates.write_text(rates.read_text().replace("RATES = {\n", 'RATES = {\n    "rows": UNKNOWN,\n', 1))
    contract.write_text(
        text.replace("from inlay.methods.snell", "from inlay.methods.rows import Rows\nfrom inlay.methods.snell")
    )

    def run(*words: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout[-6000:]} {done.stderr[-2000:]}"
        return done.stdout

    run("checks/docs_tables.py")
    tests = ("tests/methods", "tests/numerics/test_ops.py", "tests/host", "tests/conversion", "tests/cli/test_cli.py",
             "tests/inspection", "tests/planning", "tests/training/test_tasks.py")  # fmt: skip
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "rows and not two_active")
    assert int(re.search(r"(\d+) passed", said)[1]) > 40
    chosen = "method or tables or names or rates or flags"
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/structure", "-k", chosen)
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests")
