"""What ways to take a step cost, and save: one layer, and a whole run.

    python benchmarks/steps.py [--size 2048] [--tokens 2048] [--runs 0] [--out benchmarks/results]

One layer is LoRA (r = 32) on a frozen square weight, forward and backward, on one thread: CPU seconds (the median of 3,
interleaved; they count no waiting) and what is kept for the backward pass of the layer's input. `rows` is what
Flat-LoRA spends once per step on the rows of the merged weight. Runs are of `inlay train` on the built-in model with
LoRA (r = 16), three steps of 8 examples, each in a process of its own for its peak memory; `--runs 0`: none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine
from peft import get_peft_model
from saved import saved
from torch import nn

from inlay.host.config import InlayConfig
from inlay.host.flat_lora import flat_noise
from inlay.methods.lora import LoRA

RUNS: dict[str, dict] = {
    "backward": {},
    "step: mezo": {"step": "mezo", "learning_rate": 1e-4},
    "flat_noise: 0.05": {"flat_noise": 0.05},
    "saver: velora": {"saver": "velora"},
    "saver: wta_crs": {"saver": "wta_crs"},
}


def layer(size: int, tokens: int) -> list[str]:
    """Rows of the table of one layer."""
    torch.manual_seed(0)
    x = torch.randn(tokens, size, requires_grad=True)
    base = nn.Linear(size, size, bias=False)
    models = {}
    for name, saver, sigma in (
        ("lora", "none", 0.0),
        ("flat_noise", "none", 0.05),
        ("velora", "velora", 0.0),
        ("wta_crs", "wta_crs", 0.0),
    ):
        net = nn.Sequential(nn.Linear(size, size, bias=False))
        net[0].load_state_dict(base.state_dict())
        models[name] = get_peft_model(net, InlayConfig(method=LoRA(r=32), target_modules=["0"], saver=saver)).train()
        flat_noise(models[name], 1.0, sigma)
    seconds: dict[str, list[float]] = {name: [] for name in (*models, "rows")}
    for _ in range(4):
        for name, model in models.items():
            began = time.process_time()
            model(x).sum().backward()
            seconds[name].append(time.process_time() - began)
        began = time.process_time()
        flat_noise(models["flat_noise"], 1.0, 0.05)
        seconds["rows"].append(time.process_time() - began)
    made = []
    for name, values in seconds.items():
        kept = "| | "
        if name in models:
            own = [*models[name].parameters(), *models[name].buffers()]
            of_x, more = saved(models[name], x, own)
            kept = f"| {of_x / 2**20:.2f} | {more / 2**20:.2f} "
        made.append(f"| {name} | {statistics.median(values[1:]):.3f} {kept}|")
    return made


def run(name: str) -> str:
    """A row of the table of runs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", json.dumps(RUNS[name]), "--out", folder]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    print(row := f"| {name} | {out} |", file=sys.stderr, flush=True)
    return row


def one(more: dict, folder: Path) -> str:
    """A run of three steps: CPU seconds per step, and the peak of the process."""
    from rich.console import Console

    from inlay.messages import quiet
    from inlay.recipe.recipe import Recipe
    from inlay.training.progress import peak_memory
    from inlay.training.train import train
    from inlay.training.trainers.trainer import Trainer

    quiet()
    began: list[float] = []
    start = Trainer.go_on

    def go_on(self, found) -> None:
        began.append(time.process_time())
        start(self, found)
        began.append(time.process_time())
        began.append(peak_memory())

    Trainer.go_on = go_on  # type: ignore[method-assign]
    same = {"method": "lora", "args": {"r": 16}, "steps": 3, "batch_size": 8, "max_length": 128, "eval_size": 1}
    fixed = {"samples": 0, "save_every": 0, "output": str(folder / "run")}
    train(Recipe(**{**same, **fixed, **more}), Console(quiet=True))
    return f"{(began[1] - began[0]) / 3:.1f} | {began[2] / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=int, default=len(RUNS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one is not None:
        print(one(json.loads(options.one), options.out))
        return
    size, tokens = options.size, options.tokens
    lines = [f"`python benchmarks/steps.py{'' if options.runs else ' --runs 0'}`, on {machine()}", ""]
    lines += [f"One {size} × {size} layer, LoRA r = 32, {tokens:,} tokens, fp32, forward and backward:", ""]
    lines += ["| | CPU s | x kept, MiB | beyond x, MiB |", "|---|---|---|---|", *layer(size, tokens), ""]
    if options.runs:
        lines += ["`inlay train` on the built-in model, LoRA r = 16, 8 examples of at most 128 tokens a step:", ""]
        lines += ["| | CPU s a step | peak, GiB |", "|---|---|---|", *map(run, list(RUNS)[: options.runs])]
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "steps.md").write_text(text)


if __name__ == "__main__":
    main()
