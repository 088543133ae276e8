"""Run a notebook's cells and store what they print and draw in it: python checks/notebook.py examples/story.ipynb.

It needs no Jupyter: the cells run in one scope, and a figure that is shown is stored as a PNG.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def png(figure: Any) -> dict[str, Any]:
    """Return a figure as an output of a cell, and close it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<a figure>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def run(notebook: dict[str, Any], replaced: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the cells in order, with other text in place of what is `replaced` in them, and return the scope."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        printed = io.StringIO()
        code = "".join(cell["source"]).replace("plt.show()", "")
        for old, new in (replaced or {}).items():
            code = code.replace(old, new)
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"cell {count}", "exec"), scope)
        text = printed.getvalue()
        outputs = [{"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}] if text else []
        cell |= {"execution_count": count, "outputs": outputs + [png(plt.figure(n)) for n in plt.get_fignums()]}
    return scope


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        run(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
