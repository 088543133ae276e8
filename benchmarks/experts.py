"""One layer of experts: time and peak memory of both passes, against the frozen layer and PEFT's LoRA on parameters.

    python benchmarks/experts.py [--experts 64] [--active 8] [--width 2048] [--inner 1024] [--tokens 128] [--r 16]

Mixtral's experts in transformers' grouped form, with random weights and a random routing. Candidates take turns in
every round; a time is the median over the rounds of what a candidate took beyond the frozen layer. A peak is the most
bytes held at once in both passes beyond what was there before, and less that of the frozen layer beside it. PEFT's is
LoRA with `target_parameters`; each candidate's share of it is given. On a CPU, seconds are those of the processor,
which other work on the machine does not lengthen. What is measured is kept in experts.jsonl, a line for each dtype, and
a run goes on from there; `--dtypes float32` measures one of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, machine, peak, report, wait
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from inlay.host.config import InlayConfig

warnings.simplefilter("ignore")
PEFT = "PEFT LoRA"
OURS = ("lora", "pissa", "bat")
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time


class Layer(nn.Module):
    """Experts between nothing, as both libraries adapt them."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=options.width, intermediate_size=options.inner, num_local_experts=options.experts
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.experts = MixtralExperts(config)
        self.experts.to_empty(device=DEVICE).to(dtype).requires_grad_(False)
        for p in self.experts.parameters():
            p.data = torch.empty_like(p).uniform_(-0.02, 0.02)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, chosen, weights)


def build(name: str, options: argparse.Namespace, dtype: torch.dtype, base: Layer) -> nn.Module:
    """The layer with an adapter that is away from its start. All share the memory of one base."""
    layer = Layer.__new__(Layer)
    nn.Module.__init__(layer)
    with torch.device("meta"):
        layer.experts = MixtralExperts(base.experts.config)
    for key, p in base.experts.named_parameters():
        setattr(layer.experts, key, nn.Parameter(p.data, requires_grad=False))
    if name == "frozen":
        return layer
    if name == PEFT:
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        config: Any = LoraConfig(r=options.r, target_modules=[], target_parameters=targets)
    else:
        config = InlayConfig(method=name, args={"r": options.r}, target_modules=[], experts=True, init_weights=False)
    model: nn.Module = get_peft_model(layer, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.01)
    return model


def measured(options: argparse.Namespace, dtype: torch.dtype) -> list[list[str]]:
    torch.manual_seed(0)
    base = Layer(options, dtype)
    x = torch.randn(options.tokens, options.width, device=DEVICE, dtype=dtype).requires_grad_()
    chosen = torch.rand(options.tokens, options.experts, device=DEVICE).topk(options.active).indices
    weights = torch.full(chosen.shape, 1 / options.active, device=DEVICE, dtype=dtype)
    names = ["frozen", PEFT, *options.methods.split(",")]
    models = {name: build(name, options, dtype, base) for name in names}

    def both(name: str) -> None:
        x.grad = None
        models[name].zero_grad()
        models[name](x, chosen, weights).square().sum().backward()
        wait()

    peaks = {}
    for name in names:
        both(name)
        models[name].zero_grad(set_to_none=True)
        peaks[name] = peak(lambda name=name: both(name))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            began = CLOCK()
            both(name)
            seconds[name].append(CLOCK() - began)
    over = {n: statistics.median(a - b for a, b in zip(seconds[n], seconds["frozen"], strict=True)) for n in names}
    more = {n: peaks[n] - peaks["frozen"] for n in names}
    rows = []
    for name in names:
        cells = [str(dtype).removeprefix("torch."), name, f"{statistics.median(seconds[name]):.3f}"]
        cells += [f"{over[name]:.3f}", f"{over[name] / over[PEFT]:.2f}"]
        cells += [f"{peaks[name] / 2**20:.0f}", f"{more[name] / 2**20:.0f}", f"{more[name] / more[PEFT]:.3f}"]
        rows.append(cells)
        print(" | ".join(cells), flush=True)
    return rows


def measured_once(options: argparse.Namespace, name: str, file: Path) -> list[list[str]]:
    """The rows of a dtype, from `file` if they were measured there with these options."""
    sizes = {k: v for k, v in vars(options).items() if k not in ("out", "dtypes")} | {"dtype": name}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for piece in map(json.loads, lines):
        if piece["sizes"] == sizes:
            return piece["rows"]
    rows = measured(options, getattr(torch, name))
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"sizes": sizes, "rows": rows}) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("experts", 64), ("active", 8), ("width", 2048), ("inner", 1024), ("tokens", 128), ("r", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(OURS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "experts.jsonl"
    rows = [row for name in options.dtypes.split(",") for row in measured_once(options, name, file)]
    about = (
        f"One layer of {options.experts} experts, {options.active} active, {options.width} wide, {options.inner} "
        f"inside, {options.tokens} tokens, r = {options.r} ({machine()}): {CLOCK.__name__} seconds of a forward and "
        "a backward pass and peak MiB, and what each is beyond the frozen layer. `python benchmarks/experts.py "
        f"--width {options.width} --inner {options.inner} --tokens {options.tokens} --methods {options.methods}`"
    )
    header = ["dtype", "", "seconds", "over frozen", "of PEFT's", "peak", "over frozen", "of PEFT's"]
    report(options.out, "experts", about, header, rows)


if __name__ == "__main__":
    main()
