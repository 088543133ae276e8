"""A whole training step, forward, loss, backward and AdamW, against the frozen limit and PEFT's methods.

    python benchmarks/step.py [--cases builtin:256:fp32,llama:512:bf16,...] [--methods lora,bone,...] [--repeats 5]
                              [--compile] [--out ...]

A case is a model : tokens : precision, with `:checkpointed` where activations are computed twice. builtin: SmolLM2;
llama: four layers of Llama-3.2-1B's shapes over a vocabulary of 32,000, llama8b: all of Llama-3-8B's, random weights.
bf16 is a bf16 base under fp32 adapters, nf4 a 4-bit one that computes in bf16. The frozen limit is the model without
adapters, forward and backward through its activations. r (or DoTA's bond) is 16 on all linear layers. Candidates take
turns (on a GPU, of three steps in a row); figures are medians of ratios to the frozen limit of the same round. AdamW is
the fused one, transformers' default. Peak: bytes held at once during a step beyond the weights, the optimiser's state
included.

--compile adds a table of torch.compile (inductor): each model compiled, over the same model as it is.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from common import DEVICE, machine, peak, spread, table, wait, write_csv
from peft import LoraConfig, MissConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.host import compute_starts
from inlay.host.config import InlayConfig
from inlay.method import Method, Params
from inlay.models.base import BaseModel

warnings.simplefilter("ignore")
CASES = ("builtin:256:fp32", "llama:512:fp32", "llama:512:bf16", "llama:512:nf4", "llama:512:bf16:checkpointed")
BURST = 3 if DEVICE == "cuda" else 1
OURS = ("lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "bat_col")
COMPILED = ("frozen", "PEFT LoRA", "lora", "lamda", "bone", "bat", "dota")


def candidates() -> dict[str, Callable[[], Any] | None]:
    everywhere = {"target_modules": "all-linear"}
    return {
        "frozen": None,
        "full fine-tuning": None,
        "PEFT LoRA": lambda: LoraConfig(r=16, **everywhere),
        "PEFT DoRA": lambda: LoraConfig(r=16, use_dora=True, **everywhere),
        "PEFT MiSS": lambda: MissConfig(r=16, **everywhere),
        "PEFT Bat": lambda: MissConfig(r=16, init_weights="bat", **everywhere),
        **{name: lambda name=name: ours(name) for name in OURS},
    }


def drawn(method: Method, W: Tensor, stats: Params | None = None) -> Params:
    """A start that costs nothing: numbers of the right shapes."""
    shapes = method.start(torch.empty(W.shape, device="meta"))
    return {k: 0.01 * torch.randn(v.shape, device=W.device) for k, v in shapes.items()}


def ours(name: str) -> InlayConfig:
    size = {"bond" if name == "dota" else "r": 16}
    return InlayConfig(method=name, args=size, init_weights=False, target_modules="all-linear")


def base(name: str, precision: str, layers: int = 4) -> nn.Module:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if name == "builtin":
        return BaseModel("builtin").load(dtype)
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=32_000)
    if name == "llama8b":
        shape |= {"hidden_size": 4096, "intermediate_size": 14336}
        config = LlamaConfig(**shape, num_hidden_layers=32, vocab_size=128_256)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return narrow(model) if precision == "nf4" else model


def narrow(model: Any) -> nn.Module:
    """Its linear layers in 4 bits."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            new = bnb.nn.Linear4bit(
                *layer.weight.shape[::-1], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            model.set_submodule(path, new.to(DEVICE))
    model.is_loaded_in_4bit = True
    return model


class Step:
    """One candidate's training step on the same tokens."""

    def __init__(
        self, name: str, config: Callable[[], Any] | None, frozen: Any, ids: Tensor, again: bool, embedded: bool = False
    ) -> None:
        shared = {} if name == "full fine-tuning" else {id(p): p for p in frozen.parameters()}
        model = copy.deepcopy(frozen, shared).to(DEVICE).train()
        model.requires_grad_(name == "full fine-tuning")
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if name == "frozen" and not embedded:
            model.get_input_embeddings().register_forward_hook(lambda *about: about[-1].requires_grad_())
        self.model: Any = model if config is None else get_peft_model(model, config())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.count = sum(p.numel() for p in trained)
        self.optimiser = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None
        self.ids, self.feed = ids, {"input_ids": ids}
        if embedded:  # outside of what is compiled: a graph cannot ask for the gradient of its own intermediate
            E = frozen.get_input_embeddings()(ids).detach().requires_grad_(name == "frozen")
            self.feed = {"inputs_embeds": E}

    def __call__(self, burst: int = BURST) -> float:
        """Seconds of a step, the mean of a few in a row."""
        wait()
        begin = time.perf_counter()
        for _ in range(burst):
            self.model(**self.feed, labels=self.ids).loss.backward()
            if self.optimiser:
                self.optimiser.step()
                self.optimiser.zero_grad()
        wait()
        return (time.perf_counter() - begin) / burst


def measure(case: str, repeats: int, methods: Sequence[str]) -> list[dict]:
    name, tokens, precision, *more = case.split(":")
    frozen = base(name, precision).to(DEVICE)
    ids = torch.randint(100, 30_000, (1, int(tokens)), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # PEFT's Bat is 23 times the frozen layer on a GPU (layer.md); MiLoRA's step is PiSSA's.
    impossible = {"full fine-tuning", "PEFT Bat", "milora"} if name == "llama8b" else set()
    impossible |= {"full fine-tuning"} if precision == "nf4" else set()
    impossible |= {"PEFT MiSS", "PEFT Bat"} if precision == "nf4" else set()
    wanted = {n: config for n, config in candidates().items() if n not in impossible and n in ("frozen", *methods)}
    steps = {n: Step(n, config, frozen, ids, bool(more)) for n, config in wanted.items()}
    times: dict[str, list[float]] = {n: [] for n in steps}
    print(f"{case}: {len(steps)} models are ready", flush=True)
    for i in range(repeats + 1):
        for n, step in list(steps.items()):
            try:
                seconds = step()
            except torch.OutOfMemoryError:
                del steps[n], step
                print(f"{case}: {n} runs out of memory", flush=True)
                torch.cuda.empty_cache()
                continue
            times[n] += [seconds] if i else []  # the first round warms up
    rows = []
    for n, step in steps.items():
        middle, low, high = spread([a / b for a, b in zip(times[n], times["frozen"], strict=True)])
        held = (
            0
            if step.optimiser is None
            else sum(
                t.nbytes for state in step.optimiser.state.values() for t in state.values() if isinstance(t, Tensor)
            )
        )
        row = {"model": name, "tokens": tokens, "precision": " ".join([precision, *more]), "method": n}
        row |= {"trained": step.count, "step": f"{middle:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}"}
        row |= {"tokens_per_s": f"{int(tokens) / spread(times[n])[0]:.0f}"}
        rows.append(row | {"peak_MiB": f"{(peak(lambda step=step: step(1)) + held) / 2**20:.0f}"})
    return rows


def compiled(repeats: int) -> list[dict]:
    frozen = base("llama", "fp32", layers=2)
    ids = torch.randint(100, 30_000, (1, 512), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    pairs = {}
    for name in COMPILED:
        eager, fast = (Step(name, candidates()[name], frozen, ids, False, True) for _ in range(2))
        torch._dynamo.reset()
        began = time.perf_counter()
        fast.model = torch.compile(fast.model, fullgraph=True)
        fast()
        pairs[name] = eager, fast, time.perf_counter() - began
        eager()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for _ in range(repeats):
        for name, (eager, fast, _) in pairs.items():
            times[name].append((eager(), fast()))
    rows = []
    for name, (_, _, seconds) in pairs.items():
        ratio = spread([fast / eager for eager, fast in times[name]])[0]
        limit = spread([fast / base for (_, fast), (_, base) in zip(times[name], times["frozen"], strict=True)])[0]
        rows.append(
            {
                "method": name,
                "over eager": f"{ratio:.3f}",
                "over compiled frozen": f"{limit:.3f}",
                "s": f"{seconds:.0f}",
            }
        )
    return rows


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--cases", default=",".join(CASES))
    options.add_argument("--methods", default=",".join(candidates()), help="beside the frozen model")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    compute_starts.start_of = drawn
    rows: list[dict] = []
    text = [
        f"A training step over that of the frozen model (median, quartiles), and its peak memory beyond the weights. "
        f"{machine()}. `python benchmarks/step.py`"
    ]
    for case in asked.cases.split(",") if asked.cases else ():
        new = measure(case, asked.repeats, asked.methods.split(","))
        rows += new
        text += ["", f"{new[0]['model']}, {new[0]['tokens']} tokens, {new[0]['precision']}", ""]
        body = [
            [
                r["method"],
                f"{r['trained']:,}",
                f"{r['step']} ({r['low']} to {r['high']})",
                f"{int(r['tokens_per_s']):,}",
                r["peak_MiB"],
            ]
            for r in new
        ]
        text += table(["method", "numbers trained", "step", "tokens/s", "peak, MiB"], body)
        print("\n".join(text[-len(body) - 4 :]), flush=True)
    if rows:
        write_csv(asked.out / "step.csv", rows)
    if asked.compile:
        new = compiled(asked.repeats)
        text += ["", "torch.compile, no graph breaks: llama with two layers, 512 tokens, fp32", ""]
        header = ["method", "compiled over eager", "compiled over the compiled frozen model", "first step, s"]
        text += table(header, [list(row.values()) for row in new])
        print("\n".join(text[-len(new) - 2 :]), flush=True)
    (asked.out / "step.md").write_text("\n".join([*text, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
