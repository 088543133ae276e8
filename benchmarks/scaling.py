"""Past one GPU, on paper: memory and traffic of each process for 8B, 70B and 405B models on 1 to 64 GPUs.

    python benchmarks/scaling.py [--models 8B,70B,405B] [--gpus 1,8,64] [--out benchmarks/results]

Memory comes from `inlay plan`'s step on the meta device (bf16 base, r or bond 16 on all linear layers, 1 × 4,096 tokens
a GPU, checkpointing). DDP: all of it on every GPU, and the gradients once more in the reducer's buckets. FSDP2, with a
group for each decoder layer and one for the rest: a share of the base, of what is trained, its gradients and moments;
whole are frozen factors and θ₀ (buffers), activations, the rest's weights, and two layers' weights at a time. Traffic
is what a process sends in a step over a ring: DDP 2 (N − 1)/N of the gradients; FSDP2 (N − 1)/N of the layers' weights
twice, of the rest's once, and of the gradients.

What FSDP2 and DDP really gather, reduce and hold is counted for a small model on a process group that only pretends to
have other members, and set beside the same formulas.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from common import table
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.host.config import InlayConfig
from inlay.models.base import BaseModel
from inlay.models.sizes import layers_of
from inlay.planning.planner import PlannedRun

warnings.simplefilter("ignore")
SHAPES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128)}
METHODS = ("lora", "pissa", "lamda", "dota", "bone", "bat", "bat_col")
ROOM = 80e9  # bytes of a GPU
GIB = 2**30


def llama(hidden: int, between: int, layers: int, heads: int, words: int = 128_256) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=between, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=min(8, heads), vocab_size=words, max_position_embeddings=8192,
    )  # fmt: skip


def adapter(name: str) -> InlayConfig:
    size = {"bond" if name == "dota" else "r": 16}
    return InlayConfig(method=name, args=size, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Parts:
    """Bytes of a model: its layers' and its other weights, what is trained in them, buffers. Affine in its depth."""

    layers: float
    rest: float
    trained: float
    buffers: float
    depth: int

    @staticmethod
    def of(model: nn.Module) -> Parts:
        inside = {id(p) for p in layers_of(model).parameters()}
        frozen = [p for p in model.parameters() if not p.requires_grad]
        return Parts(
            sum(p.nbytes for p in frozen if id(p) in inside),
            sum(p.nbytes for p in frozen if id(p) not in inside),
            sum(p.nbytes for p in model.parameters() if p.requires_grad),
            sum(b.nbytes for b in model.buffers()),
            len(layers_of(model)),
        )

    def towards(self, other: Parts, share: float) -> Parts:
        mine, theirs = (vars(p).values() for p in (self, other))
        return Parts(*(a + share * (b - a) for a, b in zip(mine, theirs, strict=True)))  # type: ignore[arg-type]

    def ddp(self, gpus: int) -> dict[str, float]:
        """Bytes that a process holds of weights, gradients and moments; that it reduces; that it sends."""
        ring, gradients = (gpus - 1) / gpus, self.trained
        state = self.layers + self.rest + self.buffers + 4 * gradients + (gradients if gpus > 1 else 0)
        return {"state": state, "gathered": 0, "reduced": gradients, "sent": 2 * ring * gradients}

    def fsdp(self, gpus: int) -> dict[str, float]:
        """As `ddp`, and that it gathers."""
        ring, inside = (gpus - 1) / gpus, self.layers + self.trained
        gathered = 2 * inside + self.rest
        state = (self.layers + self.rest + 4 * self.trained) / gpus + self.buffers + self.rest + 2 * inside / self.depth
        return {
            "state": state, "gathered": gathered, "reduced": self.trained, "sent": ring * (gathered + self.trained)
        }  # fmt: skip


def planned(shape: tuple[int, int, int, int], name: str, folder: str) -> tuple[Parts, float]:
    """The parts of the whole model, and bytes of activations at the peak."""
    Path(folder, "config.json").write_text(
        json.dumps(llama(*shape).to_dict() | {"architectures": ["LlamaForCausalLM"]})
    )
    run = PlannedRun(BaseModel(folder), adapter(name), torch.bfloat16, checkpointing=True)
    parts = [Parts.of(model) for model in run.parts]
    step = run.step(1, 4096)
    return parts[0].towards(parts[-1], run.share), step.peak - step.frozen - step.trained - step.optimizer


def pair(ddp: float, fsdp: float) -> str:
    return f"{ddp:.3g}, {fsdp:.3g}"


class Traffic(TorchDispatchMode):
    """Counts the bytes that collectives put together and reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, sizes = str(func), [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if "_allgather_base_" in name or "all_gather_into_tensor" in name:
            self.gathered += max(sizes)
        elif "_reduce_scatter_base_" in name or "reduce_scatter_tensor" in name:
            self.reduced += max(sizes)
        return func(*args, **(kwargs or {}))

    def reduce(self, bucket):  # torch takes no annotations that are strings
        """DDP's own collective, which a pretended group cannot answer."""
        self.reduced += bucket.buffer().nbytes
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


def counted(name: str, gpus: int) -> list[list[str]]:
    """What DDP and FSDP2 do with a small model, over what is said of it here."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama(256, 512, 6, 4, words=1024)).bfloat16()
    whole, ids = get_peft_model(base, adapter(name)), torch.randint(0, 1024, (1, 32))
    parts, rows = Parts.of(whole), []
    for kind in ("DDP", "FSDP2"):
        model, traffic = cast(Any, copy.deepcopy(whole)), Traffic()
        if kind == "DDP":
            model = DistributedDataParallel(model)
            model.register_comm_hook(traffic, Traffic.reduce)
        else:
            for layer in layers_of(model):
                fully_shard(layer)
            fully_shard(model)
        said = parts.ddp(gpus) if kind == "DDP" else parts.fsdp(gpus)
        with traffic:
            model(input_ids=ids, labels=ids).loss.backward()
        held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
        share = parts.layers + parts.rest + parts.trained
        share = share / gpus if kind == "FSDP2" else share
        ratio = lambda found, known: "none" if not found and not known else f"{known / found:.3f}"  # noqa: E731
        rows.append([
            name, kind, ratio(traffic.gathered, said["gathered"]), ratio(traffic.reduced, said["reduced"]),
            ratio(held, share),
        ])  # fmt: skip
    return rows


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--models", default=",".join(SHAPES))
    options.add_argument("--gpus", default="1,8,64")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = options.parse_args()
    gpus = [int(n) for n in asked.gpus.split(",")]
    text = [
        "Of each process, GiB: DDP, FSDP2. bf16 base, r (bond) 16 on all linear layers, 1 × 4,096 tokens a GPU, "
        "checkpointing; GPUs: the fewest of 80 GB that FSDP2 fits. `python benchmarks/scaling.py`",
    ]
    for model in filter(None, asked.models.split(",")):
        rows = []
        for name in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                parts, activations = planned(SHAPES[model], name, folder)
            both = [(parts.ddp(n), parts.fsdp(n)) for n in gpus]
            fits = (n for n in (1, 2, 4, 8, 16, 32, 64, 128) if parts.fsdp(n)["state"] + activations <= ROOM)
            held = [pair(*((kind["state"] + activations) / GIB for kind in kinds)) for kinds in both]
            sent = [pair(*(kind["sent"] / GIB for kind in kinds)) for kinds in both]
            rows.append([name, *held, *(one for n, one in zip(gpus, sent, strict=True) if n > 1), next(fits, "more")])
            print(model, rows[-1], flush=True)
        header = ["method", *(f"memory, {n} GPU{'s' * (n > 1)}" for n in gpus)]
        header += [*(f"sent a step, {n} GPUs" for n in gpus if n > 1), "GPUs"]
        text += ["", f"Llama-3.1-{model}", "", *table(header, rows)]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    checked = [row for name in METHODS for row in counted(name, 8)]
    dist.destroy_process_group()
    text += [
        "",
        "The same formulas over what torch does with a small model, 8 processes of which one is real: 1 is right.",
        "",
        *table(["method", "", "gathered", "reduced", "parameters held"], checked),
        "",
    ]
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "scaling.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text[-len(checked) - 4 :]))


if __name__ == "__main__":
    main()
