"""One adapted layer: time of forward and backward, and memory, against the frozen layer and PEFT's methods.

    python benchmarks/layer.py [--cases 4096x4096:2048:16:bf16,...] [--repeats 5] [--out benchmarks/results]

A case is out x in : tokens : r : precision. By default one thing at a time departs from 4096 × 4096, 2,048 tokens,
r = 16: the shape and the precision together, the tokens, the rank. Precisions: fp32; bf16 (a bf16 base under fp32
adapters, what PEFT and we give by default); bf16-all (the adapters too); nf4 (bitsandbytes, computing in bf16; PEFT
refuses PiSSA there, and has no MiSS and no Bat).

All candidates take turns in every round, so that a busy machine slows them alike; a figure is the median of the ratios
to the frozen layer of the same round, with the quartiles beside it. On a GPU a turn is 20 passes in a row. The frozen
layer's backward pass is through x alone: the limit. Kept: bytes held for the backward pass beside parameters and x,
which the layer before keeps as well. Peak: the most bytes held at once in a forward and a backward pass beyond what was
there before.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from common import DEVICE, machine, peak, spread, table, wait, write_csv
from peft import LoraConfig, MissConfig, get_peft_model
from torch import Tensor, nn

from inlay.host.config import InlayConfig

warnings.simplefilter("ignore")
SHAPES, CENTRE = ("576x1536", "2048x2048", "4096x4096", "4096x11008"), "4096x4096"
PRECISIONS = ("fp32", "bf16", "bf16-all", "nf4")
CASES = [
    *(f"{shape}:2048:16:{precision}" for precision in PRECISIONS for shape in SHAPES),
    *(f"{CENTRE}:{tokens}:16:{precision}" for precision in ("fp32", "bf16") for tokens in (512, 8192)),
    *(f"{CENTRE}:2048:{r}:{precision}" for precision in ("fp32", "bf16") for r in (8, 64)),
]
BURST = 20 if DEVICE == "cuda" else 1
OURS = ("lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "bat_col")
Config = Callable[[], Any]


def candidates(r: int) -> dict[str, Config | None]:
    """Configurations by name; None: the frozen layer."""
    lora = {"r": r, "target_modules": ["0"]}

    def ours(name: str, **args: Any) -> Config:
        size = {"bond" if name == "dota" else "r": r}
        return lambda: InlayConfig(method=name, args={**size, **args}, target_modules=["0"], init_weights=False)

    return {
        "frozen": None,
        "PEFT LoRA": lambda: LoraConfig(**lora),
        "PEFT LoRA, dropout": lambda: LoraConfig(**lora, lora_dropout=0.05),
        "PEFT PiSSA": lambda: LoraConfig(**lora, init_lora_weights="pissa_niter_4"),
        "PEFT DoRA": lambda: LoraConfig(**lora, use_dora=True),
        "PEFT MiSS": lambda: MissConfig(r=r, target_modules=["0"]),
        "PEFT Bat": lambda: MissConfig(r=r, target_modules=["0"], init_weights="bat"),
        **{name: ours(name) for name in OURS},
        "lora, dropout": ours("lora", dropout=0.05),
        **({"dota without Triton": ours("dota")} if DEVICE == "cuda" else {}),
    }


def build(config: Config | None, W: Tensor, precision: str) -> nn.Module:
    """The layer, adapted, with every trained tensor away from zero."""
    out, inp = W.shape
    if precision == "nf4":
        layer: nn.Module = bnb.nn.Linear4bit(inp, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(W.clone().cpu(), requires_grad=False, quant_type="nf4")
    else:
        layer = nn.Linear(inp, out, bias=False, device="meta")
        layer.weight = nn.Parameter(W.to(torch.float32 if precision == "fp32" else torch.bfloat16))
    net: nn.Module = nn.Sequential(layer.to(DEVICE)).requires_grad_(False)
    if config is not None:
        whole = net
        if precision == "bf16-all":  # PEFT's randomised SVD does not take bf16
            whole = net.float()
        net = get_peft_model(whole, config())  # type: ignore[arg-type]
        net = net.bfloat16() if precision == "bf16-all" else net
        with torch.no_grad():
            for p in net.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p), alpha=0.01)
    return net


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


def timed(model: nn.Module, x: Tensor, g: Tensor, burst: int = BURST) -> tuple[float, float]:
    """Seconds of the forward pass, and of both: the mean of a burst, which a GPU's queue makes one piece of work."""
    x.grad = None
    model.zero_grad()
    wait()
    begin = time.perf_counter()
    for _ in range(burst if DEVICE == "cuda" else 0):
        model(x)
    wait()
    half = (time.perf_counter() - begin) / burst
    begin = time.perf_counter()
    for _ in range(burst):
        y = model(x)
        if DEVICE == "cpu":
            half = time.perf_counter() - begin
        y.backward(g)
    wait()
    return half, (time.perf_counter() - begin) / burst


def graphed(model: nn.Module, x: Tensor, g: Tensor) -> Callable[[], None] | None:
    """Both passes as one CUDA graph, the GPU's work alone; None without one, or where they cannot be captured."""
    if DEVICE == "cpu":
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(x).backward(g)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            model(x).backward(g)
    except RuntimeError:
        return None
    return graph.replay


def replayed(replay: Callable[[], None]) -> float:
    """Seconds of a pass through the graph."""
    wait()
    begin = time.perf_counter()
    for _ in range(BURST):
        replay()
    wait()
    return (time.perf_counter() - begin) / BURST


def measure(case: str, repeats: int) -> list[dict]:
    shape, tokens, r, precision = case.split(":")
    out, inp = map(int, shape.split("x"))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    W = (torch.randn(out, inp) * inp**-0.5).to(DEVICE)
    x = torch.randn(1, int(tokens), inp, dtype=dtype, device=DEVICE, requires_grad=True)
    g = torch.randn(1, int(tokens), out, dtype=dtype, device=DEVICE)
    missing = ("PEFT PiSSA", "PEFT MiSS", "PEFT Bat") if precision == "nf4" else ()
    chosen = {name: config for name, config in candidates(int(r)).items() if name not in missing}
    models = {name: build(config, W, precision) for name, config in chosen.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for i in range(repeats + 1):
        for name, model in models.items():
            os.environ["INLAY_TRITON"] = str(int("without" not in name))
            pair = timed(model, x, g)
            times[name] += [pair] if i else []  # the first round warms up
    graphs = {name: graphed(model, x, g) for name, model in models.items() if "dropout" not in name}
    alone: dict[str, list[float]] = {name: [] for name, graph in graphs.items() if graph}
    for _ in range(repeats):
        for name in alone:
            alone[name].append(replayed(graphs[name]))  # type: ignore[arg-type]
    rows = []
    for name, model in models.items():
        pairs = list(zip(times[name], times["frozen"], strict=True))
        row: dict[str, Any] = {"out": out, "in": inp, "tokens": tokens, "r": r, "precision": precision, "layer": name}
        for k, what in enumerate(("forward", "step")):
            middle, low, high = spread([mine[k] / limit[k] for mine, limit in pairs])
            row |= {what: f"{middle:.3f}", f"{what}_low": f"{low:.3f}", f"{what}_high": f"{high:.3f}"}
        row["ms"] = f"{1e3 * spread([step for _, step in times[name]])[0]:.2f}"
        ratios = [a / b for a, b in zip(alone.get(name, []), alone.get("frozen", []), strict=False)]
        row["graph"] = f"{spread(ratios)[0]:.3f}" if ratios else ""
        x.grad = None
        model.zero_grad()
        row["kept_MiB"] = f"{kept(model, x) / 2**20:.2f}"
        row["peak_MiB"] = f"{peak(lambda model=model: timed(model, x, g, 1)) / 2**20:.1f}"
        rows.append(row)
    return rows


def lines(rows: list[dict]) -> list[str]:
    one = rows[0]
    head = f"\n{one['out']} × {one['in']}, {one['tokens']} tokens, r = {one['r']}, {one['precision']}\n"
    body = [
        [
            row["layer"],
            *(f"{row[k]} ({row[f'{k}_low']} to {row[f'{k}_high']})" for k in ("forward", "step")),
            row["ms"],
            *([row["graph"]] if DEVICE == "cuda" else []),
            row["kept_MiB"],
            row["peak_MiB"],
        ]
        for row in rows
    ]
    graph = ["as a CUDA graph"] if DEVICE == "cuda" else []
    return [head, *table(["layer", "forward", "forward and backward", "ms", *graph, "kept, MiB", "peak, MiB"], body)]


def plot(rows: list[dict], path: Path) -> None:
    """Cost over the frozen layer against rank, tokens and size of the layer, around the centre."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out, inp = CENTRE.split("x")
    panels = (
        ("r", "rank r", lambda r: r["tokens"] == "2048" and str(r["out"]) == out and str(r["in"]) == inp),
        ("tokens", "tokens", lambda r: r["r"] == "16" and str(r["out"]) == out and str(r["in"]) == inp),
        ("size", "numbers in W", lambda r: r["r"] == "16" and r["tokens"] == "2048"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), sharey="row", layout="constrained")
    for line, precision in zip(axes, ("fp32", "bf16"), strict=True):
        for axis, (key, label, fits) in zip(line, panels, strict=True):
            for i, name in enumerate(n for n in candidates(1) if n != "frozen"):
                mine = [r for r in rows if r["layer"] == name and r["precision"] == precision and fits(r)]
                sizes = [int(r["out"]) * int(r["in"]) if key == "size" else int(r[key]) for r in mine]
                points = sorted(zip(sizes, (float(r["step"]) for r in mine), strict=True))
                style = {"linestyle": "--" if name.startswith("PEFT") else "-", "color": plt.cm.tab20(i % 20)}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style) if points else None
            axis.set(xscale="log", yscale="log", xlabel=label)
            places = sorted({int(x) for drawn in axis.get_lines() for x in drawn.get_xdata()})
            axis.set_xticks(places, [f"{x / 1e6:.1f}M" if x > 1e5 else str(x) for x in places])
            axis.set_xticks([], minor=True)
            axis.axhline(1, color="0.6", linewidth=1)
            axis.grid(alpha=0.3, which="both")
        line[0].set_ylabel(f"forward and backward, frozen layer = 1\n{precision}")
        for axis in line:
            ticks = [1, 1.1, 1.25, 1.5, 2, 3, 5, 10]
            axis.set_yticks(ticks, [str(t) for t in ticks], minor=False)
            axis.set_yticks([], minor=True)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--cases", default=",".join(CASES))
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    rows: list[dict] = []
    text: list[str] = []
    for case in asked.cases.split(","):
        new = measure(case, asked.repeats)
        rows += new
        text += lines(new)
        print("\n".join(lines(new)), flush=True)
    about = (
        "Time of one adapted layer over that of the frozen one (median, quartiles), what it keeps for its backward "
        f"pass beside x, and its peak over both passes. {machine()}. `python benchmarks/layer.py"
        + ("`" if asked.cases == ",".join(CASES) else f" --cases {asked.cases}`")
    )
    write_csv(asked.out / "layer.csv", rows)
    plot(rows, asked.out / "layer.png")
    (asked.out / "layer.md").write_text(
        "\n".join([about, "\n![cost against rank, tokens, size](layer.png)", *text, ""])
    )


if __name__ == "__main__":
    main()
