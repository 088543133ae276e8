"""Two thousand steps with checkpoints: does memory grow, do files stay open, does the merged model leave the adapter?

    python checks/soak.py [--steps 2000]

A random two-layer model learns by `inlay train` in a process of its own, which is watched from outside. Its kept
checkpoints are then compared, adapter against merged weights. Exit status 1 where, after the first quarter, memory
grows by more than 1 MiB per 1,000 steps, where files are left open, or where the logits differ by more than a
thousandth of what the adapter does to them. Under 500 steps memory and files are not judged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from inlay.models import builtin
from inlay.models.adapters import Adapter
from inlay.training import checkpoints

JUDGED = 500  # from so many steps on a slope is more than noise
METHODS = {"lamda": {"r": 8}, "dota": {"bond": 4}, "bone": {"r": 8}}


def tiny(folder: Path) -> str:
    """A random two-layer Llama with the built-in tokenizer."""
    tokenizer = builtin.load_builtin_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def watched(command: list[str], metrics: Path) -> list[tuple[int, float, int]]:
    """Run a command; (step, MiB in memory, open files) every half second while it trains."""
    seen = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        it = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.5)
            try:
                steps = metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0
                row = steps, it.memory_info().rss / 2**20, it.num_fds()
            except psutil.Error:  # it has ended
                break
            seen += [row] if steps else []
    if process.returncode:
        sys.exit(f"the run ended with status {process.returncode}: {' '.join(command)}")
    return seen


@torch.no_grad()
def drift(model: str, checkpoint: Path) -> tuple[float, float]:
    """The largest difference of logits between an adapter and its merged model, and between it and the base."""
    ids = torch.arange(64)[None] * 7 + 5
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    plain = base(input_ids=ids).logits
    adapted = Adapter.open(checkpoint).attach(base).eval()
    there = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()(input_ids=ids).logits
    return (merged - there).abs().max().item(), (there - plain).abs().max().item()


def soak(method: str, steps: int, folder: Path, model: str, data: Path) -> list[str]:
    """One method: prints what was measured, gives back what is out of bounds."""
    run = folder / method
    command = [sys.executable, "-m", "inlay", "train", "--model", model, "--data", str(data), "--output", str(run)]
    command += ["--method", method, *(f"--{k}={v}" for k, v in METHODS[method].items()), "--steps", str(steps)]
    command += "--batch-size 2 --eval-size 4 --samples 0 --max-length 64 --dtype float32 --learning-rate 3e-3".split()
    command += ["--save-every", str(max(1, steps // 40)), "--trainer", "{save_total_limit: 40}"]
    rows = watched(command, run / "metrics.jsonl")
    kept = sorted(checkpoints.checkpoint_steps(run / checkpoints.FOLDER))
    some = [kept[len(kept) * i // 4 - 1] for i in (1, 2, 3, 4)]
    drifts = {step: drift(model, checkpoints.path_of(run / checkpoints.FOLDER, step)) for step in some}
    print(f"{method}: {steps} steps, {len(kept)} checkpoints")
    bad = growth(method, rows, steps) if steps >= JUDGED else []
    text = ", ".join(f"step {step} {error:.1e} of {effect:.2f}" for step, (error, effect) in drifts.items())
    print(f"  adapter against merged, largest logit difference: {text}", flush=True)
    return bad + [f"{method}: step {s} drifts" for s, (error, effect) in drifts.items() if error > 1e-3 * effect]


def growth(method: str, rows: list[tuple[int, float, int]], steps: int) -> list[str]:
    """Print how memory and open files went after the first quarter; gives back what is out of bounds."""
    seen = np.array([row for row in rows if steps / 4 <= row[0] < steps])  # after the last one the report is drawn
    slope = np.polyfit(seen[:, 0], seen[:, 1], 1)[0] * 1000
    files = np.median(seen[-len(seen) // 4 :, 2]) - np.median(seen[: len(seen) // 4 + 1, 2])  # one is open now and then
    print(f"  {len(seen)} samples from step {int(seen[0, 0])} on")
    print(f"  memory {seen[0, 1]:.1f} to {seen[-1, 1]:.1f} MiB, slope {slope:+.3f} MiB per 1,000 steps")
    print(f"  open files at most {int(seen[:, 2].max())}, median {files:+.0f} from the first to the last quarter")
    bad = [f"{method}: memory grows"] if slope > 1 else []
    return bad + ([f"{method}: files stay open"] if files > 0 else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = tiny(folder / "tiny"), folder / "data.jsonl"
        rows = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(200)]
        data.write_text("\n".join(map(json.dumps, rows)))
        bad = [line for method in asked.methods for line in soak(method, asked.steps, folder, model, data)]
    sys.exit("\n".join(bad) or 0)


if __name__ == "__main__":
    main()
