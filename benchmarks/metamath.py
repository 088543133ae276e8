"""Our methods in Hugging Face's comparison on MetaMathQA (Llama-3.2-3B, on a GPU), with their runner and our config:

    python benchmarks/metamath.py PATH/peft bone lamda --r 64 --learning-rate 1e-4

PATH/peft is a checkout of PEFT's repository. Their runner reads experiments/<peft type>/<name>/adapter_config.json, and
beside it training_params.json for what differs from its defaults; both are written here, and it is started in a
process that knows the type. Results go where it puts them. It has no callbacks: LaMDA trains without its schedule.
Not run by us: it needs a GPU and a hub.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from inlay.host.config import InlayConfig

RUN = """import inlay, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")"""


def experiment(folder: Path, method: str, size: int, rate: float, modules: str | list[str]) -> Path:
    """An experiment of their form for one method; gives back its folder."""
    args = {"bond" if method == "dota" else "r": size}
    config = InlayConfig(method=method, args=args, target_modules=modules, task_type="CAUSAL_LM")
    made = folder / "experiments" / "inlay" / f"llama-3.2-3B-{method}-{size}-lr_{rate:g}"
    config.save_pretrained(str(made))
    params = {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.1}}
    (made / "training_params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    return made


def main() -> None:
    """Write the experiments and run them, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="a checkout of PEFT's repository")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--r", type=int, default=32, help="rank, block or bond (default 32)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default 1e-4, as theirs")
    parser.add_argument("--modules", default="q_proj,v_proj", help="names with commas, or all-linear (default q and v)")
    parser.add_argument("--write-only", action="store_true", help="do not start their runner")
    options = parser.parse_args()
    folder = options.peft / "method_comparison" / "MetaMathQA"
    if not folder.is_dir():
        parser.error(f"{options.peft} is no checkout of PEFT's repository: it has no method_comparison/MetaMathQA")
    modules = options.modules if options.modules == "all-linear" else options.modules.split(",")
    for method in options.methods:
        made = experiment(folder, method, options.r, options.learning_rate, modules)
        print(made)
        if not options.write_only:
            command = [sys.executable, "-c", RUN, "run.py", "-v", str(made.relative_to(folder))]
            subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    main()
