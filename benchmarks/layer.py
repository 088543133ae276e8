"""One adapted layer: time of forward and backward, and what it keeps, against the frozen layer and PEFT's methods.

    python benchmarks/layer.py [--shapes 2048x2048,4096x4096] [--tokens 512,2048] [--ranks 16]
                               [--dtypes float32,bfloat16] [--repeats 9] [--out benchmarks/results]

All candidates take turns in every round, so that a busy machine slows them alike; a figure is the median of the ratios
to the frozen layer of the same round, with the quartiles beside it. The adapter is fp32, as PEFT and we have it by
default; values are random, so nothing is decomposed. The frozen layer's backward pass is through x alone: the limit.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, MissConfig, get_peft_model
from torch import Tensor, nn

from inlay import InlayConfig
from inlay.methods import METHODS

warnings.simplefilter("ignore")
COLUMNS = "out,in,tokens,r,dtype,layer,forward,forward_low,forward_high,step,step_low,step_high,kept_MiB".split(",")


def candidates(r: int) -> dict[str, Callable[[], object] | None]:
    """Configurations by name; None: the frozen layer."""
    lora = {"r": r, "target_modules": ["0"]}
    theirs = {
        "PEFT LoRA": lambda: LoraConfig(**lora),
        "PEFT LoRA, dropout": lambda: LoraConfig(**lora, lora_dropout=0.05),
        "PEFT DoRA": lambda: LoraConfig(**lora, use_dora=True),
        "PEFT MiSS": lambda: MissConfig(r=r, target_modules=["0"]),
        "PEFT Bat": lambda: MissConfig(r=r, target_modules=["0"], init_weights="bat"),
    }
    ours = {
        m.name: lambda m=m: InlayConfig(
            method=m.name, args={"bond" if m.name == "dota" else "r": r}, target_modules=["0"], init_weights=True
        )
        for m in METHODS
    }
    return {"frozen": None, **theirs, **ours}


def build(config: Callable[[], object] | None, out: int, inp: int, dtype: torch.dtype, device: str) -> nn.Module:
    with torch.device("meta"):
        layer = nn.Linear(inp, out, bias=False, dtype=dtype)
    layer = layer.to_empty(device=device).requires_grad_(False)
    nn.init.normal_(layer.weight, std=inp**-0.5)
    net = nn.Sequential(layer)
    if config is None:
        return net
    asked = config()
    if not isinstance(asked, InlayConfig):
        return get_peft_model(net, asked)  # type: ignore[arg-type]
    model = get_peft_model(nn.Sequential(nn.Linear(inp, out, bias=False, device="meta", dtype=dtype)), asked)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            t.normal_(std=inp**-0.5)
    return model


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes for the backward pass beside parameters, buffers and x itself, which the layer before keeps as well."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for t in found.values())


def timed(model: nn.Module, x: Tensor, g: Tensor) -> tuple[float, float]:
    """Seconds of the forward pass, and of both."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    x.grad = None
    wait()
    begin = time.perf_counter()
    y = model(x)
    wait()
    half = time.perf_counter() - begin
    y.backward(g)
    wait()
    return half, time.perf_counter() - begin


def spread(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def measure(out: int, inp: int, tokens: int, r: int, dtype: torch.dtype, repeats: int, device: str) -> list[dict]:
    models = {name: build(config, out, inp, dtype, device) for name, config in candidates(r).items()}
    x = torch.randn(1, tokens, inp, dtype=dtype, device=device, requires_grad=True)
    g = torch.randn(1, tokens, out, dtype=dtype, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for i in range(repeats + 1):
        for name, model in models.items():
            pair = timed(model, x, g)
            times[name] += [pair] if i else []  # the first round warms up
    rows = []
    for name, model in models.items():
        pairs = list(zip(times[name], times["frozen"], strict=True))
        forward, step = (spread([mine[k] / base[k] for mine, base in pairs]) for k in (0, 1))
        values = [out, inp, tokens, r, str(dtype).removeprefix("torch."), name]
        numbers = [f"{v:.3f}" for v in (*forward, *step)]
        rows.append(dict(zip(COLUMNS, [*values, *numbers, f"{kept(model, x) / 2**20:.2f}"], strict=True)))
    return rows


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--shapes", default="2048x2048,4096x4096")
    options.add_argument("--tokens", default="512,2048")
    options.add_argument("--ranks", default="16")
    options.add_argument("--dtypes", default="float32,bfloat16")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, text = [], []
    for shape in asked.shapes.split(","):
        out, inp = map(int, shape.split("x"))
        for dtype in asked.dtypes.split(","):
            for tokens in map(int, asked.tokens.split(",")):
                for r in map(int, asked.ranks.split(",")):
                    new = measure(out, inp, tokens, r, getattr(torch, dtype), asked.repeats, device)
                    rows += new
                    text += [f"\n{out} × {inp}, {tokens} tokens, r = {r}, {dtype}\n"]
                    text += ["| layer | forward | forward and backward | kept beyond x, MiB |", "|---|---|---|---|"]
                    for row in new:
                        times = (f"{row[k]} ({row[f'{k}_low']} to {row[f'{k}_high']})" for k in ("forward", "step"))
                        text += [f"| {row['layer']} | {' | '.join(times)} | {row['kept_MiB']} |"]
                    print("\n".join(text[-len(new) - 3 :]), flush=True)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    about = (
        "Time of one adapted layer over that of the frozen one (median, quartiles), and what it keeps for its backward "
        f"pass beside x; adapters in fp32. {torch.cuda.get_device_name() if device == 'cuda' else cpu}, torch "
        f"{torch.__version__}. `python benchmarks/layer.py`"
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "layer.md").write_text("\n".join([about, *text, ""]), encoding="utf-8")
    with (asked.out / "layer.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
