"""What comes before the first step: imports, each verb's first output, and decomposing all linear layers.

    python benchmarks/startup.py [--only verbs] [--repeats 3] [--layers 32] [--methods pissa,milora,dota] [--r 16]

The table of verbs (startup_verbs.md) has the CPU seconds of a process, on one thread, until its first line on stdout,
beside those of importing what Inlay stands on. Model and adapter are the built-in ones.

The table of starts (startup.md) is of a model of Llama-2-7B's shapes, one weight in memory per core, against PEFT's.
Weights are a power-law head on noise; the layers after the first have scaled copies, made when they are read. Ours
runs over all layers as `get_peft_model` does: side by side on the cores, then once more from the cache. PEFT's ways
are run in the same process on one weight of each shape and multiplied by how many there are: "pissa" is a full SVD,
"pissa_niter_16" torch.svd_lowrank with 16 rounds. Energy: Σσ² of the r triplets found, over that of the full SVD's,
for 4096 × 4096.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, report
from torch import Tensor

from inlay.host.compute_starts import Job, run_jobs
from inlay.methods import find

SHAPES = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}  # of one decoder layer


IMPORTS = {
    "import torch": "torch",
    "import transformers, peft": "transformers, peft",
    "from trl import SFTTrainer": "trl.trainer.sft_trainer",
    "import inlay": "inlay",
}


def verbs(adapter: str, out: str) -> dict[str, list[str]]:
    """Return a command of each verb that prints a line, with an adapter's folder and one to write into."""
    new = ["--output", out, "--overwrite"]
    return {
        "--version": [],
        "methods": [],
        "env": [],
        "schema": [],
        "plan": ["--method", "lora"],
        "inspect": [adapter],
        "train --dry-run": ["--method", "lora"],
        "train": ["--method", "lora", "--steps", "1", *new],
        "eval": [adapter, "--task", "perplexity", "--data", f"{adapter}/README.md", "--limit", "1", "--output", out],
        "generate": [adapter, "--prompt", "hello", "--tokens", "1"],
        "export": [adapter, f"{out}-lora", "--overwrite"],
        "merge": [adapter, f"{out}-merged", "--overwrite"],
    }


def seconds_to_output(command: list[str]) -> float:
    """Return the CPU seconds that a process has taken when its first line comes; it is ended then.

    Raises:
        SystemExit: none comes.
    """
    settings = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=settings) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        process.kill()
        if not first:
            raise SystemExit(f"{command}: {process.stderr.read().decode()[-2000:]}")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_outputs(out: Path, repeats: int) -> None:
    """Measure imports and verbs, and write their table."""
    from peft import get_peft_model

    from inlay.host.config import InlayConfig
    from inlay.models.builtin import load_builtin_model

    config = InlayConfig(method="lora", args={"r": 16}, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(load_builtin_model(), config).save_pretrained(f"{folder}/adapter")
        commands = {name: [sys.executable, "-c", f"import {what}; print(1)"] for name, what in IMPORTS.items()}
        for verb, more in verbs(f"{folder}/adapter", f"{folder}/out").items():
            commands[f"inlay {verb}"] = [sys.executable, "-m", "inlay", *verb.split(), *more]
        rows = []
        for name, command in commands.items():
            rows.append([f"`{name}`", f"{statistics.median(seconds_to_output(command) for _ in range(repeats)):.1f}"])
            print(rows[-1], flush=True)
    about = (
        f"CPU seconds until the first line, median of {repeats}. {machine()}. "
        f"`python benchmarks/startup.py --only verbs --repeats {repeats}`"
    )
    report(out, "startup_verbs", about, ["process", "s"], rows)


def weight(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(n, 64, generator=generator) for n in shape)
    head = torch.arange(1, 65) ** -0.7 * 8 / shape[1]
    return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).addmm_(U * head, V.T)


def ours(name: str, args: dict, layers: int, weights: list[Tensor]) -> float:
    """Seconds for the whole model. A layer's weights are those of the first one, scaled: other numbers, as hard."""
    method = find(name)(**args)
    began = time.perf_counter()
    run_jobs(
        Job(method, tuple(W.shape), lambda W=W, layer=layer: W * (1 + layer / 100), lambda p: None)
        for layer in range(layers)
        for W in weights
    )
    return time.perf_counter() - began


def theirs(r: int, layers: int) -> tuple[float, float, float, float]:
    """Seconds of PEFT's two ways for all layers, and what energy the second and ours find of a 4096 × 4096 weight."""
    full = fast = found = own = 0.0
    for shape, count in SHAPES.items():
        W = weight(shape, 0)
        began = time.perf_counter()
        _, S, _ = torch.linalg.svd(W, full_matrices=False)
        full += count * layers * (time.perf_counter() - began)
        began = time.perf_counter()
        _, s, _ = torch.svd_lowrank(W, r, niter=16)
        fast += count * layers * (time.perf_counter() - began)
        if shape == (4096, 4096):
            best = S[:r].square().sum()
            p = find("pissa")(r=r).start(W)
            found, own = float(s.square().sum() / best), float((p["B"] @ p["A"]).square().sum() / best)
    return full, fast, found, own


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--only", choices=("verbs", "starts"), help="one of the two tables")
    options.add_argument("--repeats", type=int, default=3, help="of each process of the table of verbs")
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--methods", default="pissa,milora,dota")
    options.add_argument("--r", type=int, default=16)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    if asked.only != "starts":
        first_outputs(asked.out, asked.repeats)
    if asked.only != "verbs":
        starts(asked)


def starts(asked: argparse.Namespace) -> None:
    """Measure decompositions, and write their table."""
    full, fast, found, own = theirs(asked.r, asked.layers)
    rows: list[list[str]] = [
        ["PEFT pissa (full SVD)", f"{full:,.0f}", "", "1"],
        ["PEFT pissa_niter_16", f"{fast:,.0f}", "", f"{found:.4f}"],
    ]
    counted = [shape for shape, count in SHAPES.items() for _ in range(count)]
    weights = [weight(shape, seed) for seed, shape in enumerate(counted)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["INLAY_CACHE"] = cache
        for name in asked.methods.split(","):
            args = {} if name == "dota" else {"r": asked.r}
            first, again = (ours(name, args, asked.layers, weights) for _ in range(2))
            rows.append([name, f"{first:,.0f}", f"{again:,.0f}", f"{own:.4f}" if name == "pissa" else ""])
            print(rows[-1], flush=True)
    about = (
        f"Seconds to cut the {7 * asked.layers} linear layers of {asked.layers} decoder layers of Llama-2-7B's shapes, "
        f"r = {asked.r} (DoTA: bond 16), fp32. PEFT's are from one weight of each shape. {machine()}. "
        "`python benchmarks/startup.py`"
    )
    header = ["start", "s", "again, from the cache, s", "energy found, of the best"]
    report(asked.out, "startup", about, header, rows)


if __name__ == "__main__":
    main()
