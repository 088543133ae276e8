"""Starting, saving, loading and merging an adapter of the built-in model, against PEFT's.

    python benchmarks/adapters.py [--repeats 5] [--out benchmarks/results]

r (or DoTA's bond) is 16 on all 210 linear layers, fp32. Candidates take turns; seconds are medians. Start is
`get_peft_model` without the cache of starts; load is `PeftModel.from_pretrained` on a base that is there; merge is
`merge_and_unload`. Reload: the largest difference of logits between the saved model and the loaded one.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, report
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model

from inlay.host.config import InlayConfig
from inlay.methods import METHODS
from inlay.models import builtin
from inlay.models.base import BaseModel

warnings.simplefilter("ignore")


def candidates() -> dict[str, Callable[[], Any]]:
    everywhere = {"target_modules": "all-linear"}
    return {
        "PEFT LoRA": lambda: LoraConfig(r=16, **everywhere),
        "PEFT PiSSA, niter 16": lambda: LoraConfig(r=16, init_lora_weights="pissa_niter_16", **everywhere),
        "PEFT MiSS": lambda: MissConfig(r=16, **everywhere),
        **{
            m.name: lambda m=m: InlayConfig(method=m.name, args={"bond" if m.name == "dota" else "r": 16}, **everywhere)
            for m in METHODS
        },
    }


def once(config: Callable[[], Any], base: Any, ids: torch.Tensor) -> dict[str, float]:
    times, began = {}, time.perf_counter()

    def lap(what: str) -> None:
        nonlocal began
        times[what] = time.perf_counter() - began
        began = time.perf_counter()

    def fresh() -> Any:
        return copy.deepcopy(base)

    model = fresh()
    began = time.perf_counter()
    model = get_peft_model(model, config())
    lap("start")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=1e-3)
        before, again = model(ids).logits, fresh()
        began = time.perf_counter()
        model.save_pretrained(folder)
        lap("save")
        loaded = PeftModel.from_pretrained(again, folder)
        lap("load")
        times["reload"] = float((loaded(ids).logits - before).abs().max())
        times["MB"] = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6
        began = time.perf_counter()
        loaded.merge_and_unload()
        lap("merge")
    return times


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    base = BaseModel("builtin").load(torch.float32)
    folder, ids = builtin.model_dir(), torch.arange(100, 130)[None]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in candidates()}
    for _ in range(asked.repeats):
        for name, config in candidates().items():
            with tempfile.TemporaryDirectory() as cache:
                (Path(cache) / folder.name).symlink_to(folder)
                os.environ["INLAY_CACHE"] = cache
                found[name].append(once(config, base, ids))
    rows = []
    for name, laps in found.items():
        middle = {what: statistics.median(lap[what] for lap in laps) for what in laps[0]}
        seconds = [f"{middle[what]:.2f}" for what in ("start", "save", "load", "merge")]
        off = max(lap["reload"] for lap in laps)
        rows.append([name, *seconds, f"{middle['MB']:.1f}", f"{off:.1e}"])
    about = (
        f"Seconds to start, save, load and merge an adapter on SmolLM2-135M, its size, and how far the logits are off "
        f"after reloading. {machine()}. `python benchmarks/adapters.py`"
    )
    header = ["adapter", "start", "save", "load", "merge", "MB", "logits after reload"]
    report(asked.out, "adapters", about, header, rows)


if __name__ == "__main__":
    main()
