"""Install built files into fresh environments and take the first steps there: python checks/install.py dist/FILE ...

Each wheel or source distribution goes into a new environment of every Python from 3.11 on that is on the PATH, with
the versions of constraints.txt. There `inlay` prints its version and its methods, and trains a random model for a step.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import inlay
from inlay import InlayConfig, methods
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
config = InlayConfig(method=methods.PiSSA(r=4), target_modules="all-linear")
model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), config)
x = torch.arange(8)[None]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
before = model(input_ids=x, labels=x).loss
before.backward()
optimizer.step()
after = model(input_ids=x, labels=x)
assert after.loss < before
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter")
assert torch.equal(again(input_ids=x).logits, after.logits)
print("inlay", inlay.__version__, "python", sys.version.split()[0], "torch", torch.__version__, "ok")
"""


def run(*command: str | Path, folder: Path) -> str:
    """Return what a command prints; it has to end well."""
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def check(python: str, file: Path) -> None:
    """Install `file` for `python` into a fresh environment, and take the first steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(python, "-m", "venv", folder / "env", folder=folder)
        inside = folder / "env" / "bin" / "python"
        pip = (inside, "-m", "pip", "--disable-pip-version-check", "-q", "install")
        run(*pip, "-c", ROOT / "constraints.txt", file, folder=folder)
        run(folder / "env" / "bin" / "inlay", "--version", folder=folder)
        said = run(inside, "-c", STEPS, folder=folder)
        assert "lamda" in run(folder / "env" / "bin" / "inlay", "methods", folder=folder)
        print(f"{file.name}: {said.strip().splitlines()[-1]}")


def pythons() -> list[str]:
    """Return every Python from 3.11 on that is on the PATH and starts, or the one that runs this."""
    found = [path for minor in (11, 12, 13, 14) if (path := shutil.which(f"python3.{minor}"))]
    starts = [path for path in found if subprocess.run([path, "--version"], capture_output=True).returncode == 0]
    return starts or [sys.executable]


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for python in pythons():
            check(python, Path(path).resolve())
