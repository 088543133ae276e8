"""How long an adapter of a 7B model takes to become a plain LoRA; no weights of a base are there or needed.

    python benchmarks/export.py [--layers 32] [--out benchmarks/results]

The shapes are Llama-2-7B's: 32 layers, width 4,096, MLP 11,008, all seven linear layers, 224 weights, random values.
PEFT's own conversion, of the same kind of adapter to LoRA, takes the dense ΔW and its SVD: one weight of each shape
(3 shapes) is timed in the same run, and its time for all is their sum by count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig

import inlay
from inlay.method import LowRank
from inlay.methods import METHODS
from inlay.models.base import BaseModel

SHAPES = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}  # (out, in) -> how many in a layer
RANK = 16


def adapter(method: type, base: Path, folder: Path) -> None:
    """An adapter with random values, saved without its base."""
    config = inlay.InlayConfig(method=method.name, args={"r": RANK}, target_modules="all-linear", task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    model = get_peft_model(BaseModel(str(base)).meta(torch.float32), config)
    empty = get_peft_model_state_dict(model, save_embedding_layers=False)
    values = {k: 0.02 * torch.randn(v.shape) for k, v in empty.items()}
    folder.mkdir()
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.seals = None
    config.save_pretrained(str(folder))


def dense_svd(layers: int) -> float:
    """Seconds of a full SVD of the dense ΔW of every weight, from one of each shape."""
    total = 0.0
    for (out, inp), count in SHAPES.items():
        D = torch.randn(out, RANK) @ torch.randn(RANK, inp)
        begin = time.perf_counter()
        torch.linalg.svd(D, full_matrices=False)
        total += count * (time.perf_counter() - begin)
    return total * layers


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    lines = ["| method | to LoRA, s | LoRA's rank |", "|---|---|---|"]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        LlamaConfig(num_hidden_layers=asked.layers).save_pretrained(folder / "base")
        for method in METHODS:
            if not issubclass(method, LowRank) and method.name != "bone":
                continue
            adapter(method, folder / "base", folder / method.name)
            begin = time.perf_counter()
            made = inlay.export_lora(folder / method.name, folder / "out", dtype="bfloat16", overwrite=True)
            seconds = time.perf_counter() - begin
            lines.append(f"| {method.name}, r = {RANK} | {seconds:.1f} | {made.rank} |")
            print(lines[-1], flush=True)
    seconds = dense_svd(asked.layers)
    lines.append(f"| full SVD of each dense ΔW, as PEFT converts (from one weight of each shape) | {seconds:,.0f} | |")
    about = (
        f"An adapter of a 7B-shaped model ({7 * asked.layers} weights) becomes a plain LoRA; "
        f"{torch.get_num_threads()} CPU threads. `python benchmarks/export.py`"
    )
    text = "\n".join([about, "", *lines, ""])
    (asked.out / "export.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
