"""Weight errors of folded bases against plain NF4, weight by weight on the built-in model, and what folding costs.

    python benchmarks/fold.py [--blocks 8] [--out benchmarks/results]

Errors are ‖W' − W‖ / ‖W‖ of every linear layer, in the mean and for the worst weight (folded over plain). Memory is
that of the process (anonymous pages: mapped files can be dropped), sampled while a random Llama of LLaMA-2-7B's layer
shapes is folded, above what it was before.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.host.config import InlayConfig
from inlay.messages import quiet
from inlay.models import builtin

CASES = (
    ("pissa", {"r": 16}, 1),
    ("pissa", {"r": 16}, 5),
    ("pissa", {"r": 64}, 1),
    ("dota", {"bond": 16}, 1),
    ("dota", {"bond": 16}, 5),
    ("dota", {"bond": 64}, 1),
    ("lamda", {"r": 32}, 1),
    ("milora", {"r": 16}, 1),
    ("bone", {"r": 16}, 1),
)


class Anonymous(threading.Thread):
    """The most anonymous memory of this process while it runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self.over = self.now(), 0, threading.Event()

    def now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, self.now() - self.before)


def errors(out: Path) -> list[str]:
    """A row for each case, and every weight's errors as CSV."""
    rows, columns = [], {}
    for method, args, rounds in CASES:
        config = InlayConfig(method=method, args=args, target_modules="all-linear")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            made = inlay.fold("builtin", Path(folder) / "fold", config, rounds=rounds).errors
        seconds = time.perf_counter() - began
        name = f"{method} {' '.join(f'{k}={v}' for k, v in args.items())}" + (f", {rounds} rounds" * (rounds > 1))
        columns["plain NF4"] = {e.module: e.plain for e in made}
        columns[name] = {e.module: e.folded for e in made}
        plain, folded = (sum(getattr(e, kind) for e in made) / len(made) for kind in ("plain", "folded"))
        worst = max(e.folded / e.plain for e in made)
        rows.append(f"| {name} | {plain:.5f} | {folded:.5f} | {folded / plain:.3f} | {worst:.3f} | {seconds:.0f} |")
        print(rows[-1], flush=True)
    with (out / "fold.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["module", *columns])
        for module in columns["plain NF4"]:
            table.writerow([module, *(f"{column[module]:.5f}" for column in columns.values())])
    return rows


def memory(blocks: int) -> str:
    """What folding a large model holds, in words."""
    tokenizer = builtin.load_builtin_tokenizer()
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
        vocab_size=len(tokenizer), dtype=torch.bfloat16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "llama"
        with torch.random.fork_rng():
            torch.set_default_dtype(torch.bfloat16)
            LlamaForCausalLM(config).save_pretrained(there)
            torch.set_default_dtype(torch.float32)
        tokenizer.save_pretrained(there)
        watch, began = Anonymous(), time.perf_counter()
        watch.start()
        asked = InlayConfig(method="pissa", args={"r": 16}, target_modules="all-linear")
        made = inlay.fold(str(there), Path(folder) / "fold", asked)
        seconds = time.perf_counter() - began
        watch.over.set()
        full, packed = (sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (there, made.base))
    gib = 1 << 30
    return (
        f"A random Llama of LLaMA-2-7B's layer shapes with {blocks} blocks ({full / gib:.2f} GiB in bf16, "
        f"{packed / gib:.2f} GiB folded, its largest weight {4096 * 11008 * 4 / gib:.2f} GiB in fp32): at most "
        f"{watch.most / gib:.2f} GiB in use while it is folded with pissa r=16, {seconds:.0f} s."
    )


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    quiet()
    rows, used = errors(options.out), memory(options.blocks)
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    lines = [
        "# Folded bases", "",
        "The 210 linear weights of SmolLM2-135M, NF4 in blocks of 64 with double quantisation. Every weight is in "
        f"[fold.csv](fold.csv). `python benchmarks/fold.py`, {machine}", "",
        "| method | plain NF4, mean | folded, mean | ratio | worst weight | seconds |", "|---|---|---|---|---|---|",
        *rows, "", used,
    ]  # fmt: skip
    (options.out / "fold.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
