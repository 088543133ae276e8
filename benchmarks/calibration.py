"""What calibration holds: the peak of memory of the pass that data-driven starts need, by the number of layers.

    python benchmarks/calibration.py [--width 512] [--layers 2,8] [--out benchmarks/results]

A random Llama in fp32, two batches of 16 tokens, so that gradients and not activations are what there is to see. Each
case is a process of its own (of Linux); what is told is how far the peak of its resident memory rises above what the
loaded model and one pass without gradients have taken. "all gradients" is the backward pass of full fine-tuning: what
calibration would need if it kept them.

Memory that is freed is given back at once here (mallopt). By itself glibc keeps blocks below a threshold that it raises
up to 32 MiB, with holes between them: gradients as small as these then pile up to as much as all of them (128 MiB for
lq_lora and 146 for smt at 8 layers), though not one is kept. Those of a 7B model's layers are above the threshold.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
from pathlib import Path

import torch
from common import machine
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.host.calibrate import gather_statistics, without_adapters
from inlay.host.config import InlayConfig

CASES = {"all gradients": {}, "eva": {"r": 8}, "lora_ga": {"r": 8}, "lq_lora": {"r": 8}, "smt": {"r": 64}}


def one(case: str, width: int, layers: int) -> tuple[int, int, int, int]:
    """In bytes: how far the peak rises, what the statistics are, the largest weight's gradient, and all weights'."""
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=256,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(16)[None]
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        model(input_ids=ids)
    batch = {"input_ids": ids, "labels": ids}
    kept = 0
    if case == "all gradients":
        model.requires_grad_(False)
        for W in weights:
            W.requires_grad_()
        before = fresh_peak()
        model(**batch).loss.backward()
    else:
        model = get_peft_model(model, InlayConfig(method=case, args=CASES[case], target_modules="all-linear"))
        methods = {f"{n}.base_layer": m.cuts["default"].method for n, m in model.named_modules() if hasattr(m, "cuts")}
        before = fresh_peak()
        with without_adapters([m for m in model.modules() if hasattr(m, "cuts")]):
            found = gather_statistics(model, methods, [batch, batch])
        kept = sum({id(t): t.nbytes for stats in found.stats.values() for t in stats.values()}.values())
    return peak() - before, kept, max(W.nbytes for W in weights), sum(W.nbytes for W in weights)


def fresh_peak() -> int:
    """Begin anew to look for the peak of this process; gives back what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The peak of this process's resident memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", default="2,8")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"`python benchmarks/calibration.py`, on {machine()}", ""]
    lines += ["| | layers | peak above the model, MiB | statistics, MiB | largest gradient, MiB | all, MiB |"]
    lines += ["|---|---|---|---|---|---|"]
    for case in CASES:
        for layers in options.layers.split(","):
            with multiprocessing.get_context("fork").Pool(1) as pool:
                found = pool.apply(one, (case, options.width, int(layers)))
            rise, kept, largest, whole = (size / 2**20 for size in found)
            lines.append(f"| {case} | {layers} | {rise:.0f} | {kept:.1f} | {largest:.1f} | {whole:.0f} |")
            print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "calibration.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
