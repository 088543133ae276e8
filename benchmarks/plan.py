"""The peak memory of training steps, as `inlay plan` says it and as it is.

    python benchmarks/plan.py [--cases TEXT] [--name plan] [--out benchmarks/results]

With --cases those alone are measured whose text has TEXT; --name is the name of the table's file.

Each measurement is a process of its own: the trainer of `inlay train` takes two steps on batches that have some
padding, and the second is measured. The head sees labelled positions alone: all tokens, or the last ones of each row.
On a GPU the peak is torch's own; on a CPU it is that of torch's allocations as its profiler records them, on top of the
model and the moments, and beside it stands by how much the process grew from before the model was loaded (VmHWM),
libraries' memory and all. The larger model is random and
Llama-shaped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import tempfile
import warnings
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, TrainerCallback

from inlay.data.render import IGNORED
from inlay.host.config import InlayConfig
from inlay.models import builtin
from inlay.models.base import BaseModel
from inlay.models.loading import DTYPES
from inlay.models.quantized import quantization_config
from inlay.planning.planner import PlannedRun
from inlay.recipe.recipe import Recipe
from inlay.training.arguments import training_arguments
from inlay.training.trainers.trainer import Trainer

LARGER = LlamaConfig(
    hidden_size=1536, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4,
    vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: str
    method: str  # ours, or "PEFT LoRA", or "full"
    dtype: str = "float32"
    quantize: str = "none"
    checkpointing: bool = False
    batch: int = 2
    length: int = 256
    experts: bool = False
    labelled: float = 1.0  # share of the tokens of a batch


CASES = [
    *(Case("builtin", m) for m in ("bone", "PEFT LoRA", "full")),
    *(Case("builtin", m, checkpointing=True) for m in ("bone", "full")),
    Case("builtin", "bone", quantize="nf4"),
    *(Case("builtin", m, dtype="bfloat16") for m in ("lora", "PEFT LoRA")),
    Case("builtin", "PEFT LoRA", dtype="bfloat16", quantize="nf4"),
    *(Case("builtin", m) for m in ("lamda", "dota", "pissa", "bat", "bat_col")),
    Case("builtin", "bone", batch=1, length=512),
    Case("builtin", "pissa", batch=8),  # so many tokens that W + B A is made
    Case("larger", "full", checkpointing=True),
    Case("larger", "bone", dtype="bfloat16", quantize="nf4", checkpointing=True),
    Case("larger", "PEFT LoRA", dtype="bfloat16"),
    Case("larger", "dota"),
    *(Case("builtin", m, batch=8, labelled=0.25) for m in ("lora", "bone")),
    Case("builtin", "lora", dtype="bfloat16", batch=8, labelled=0.125),
    Case("larger", "lora", batch=4, labelled=0.5),
]


def config(case: Case) -> Any:
    if case.method == "full":
        return None
    where = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if case.method == "PEFT LoRA":
        return LoraConfig(r=16, **where)
    size = {"bond" if case.method == "dota" else "r": 16}
    return InlayConfig(method=case.method, args=size, experts=case.experts, **where)


def predicted(case: Case, folder: str) -> float:
    """Bytes at the peak."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[case.dtype]
    run = PlannedRun(BaseModel(folder), config(case), dtype, case.quantize, bool(case.checkpointing), device)
    return run.step(case.batch, case.length, case.labelled).peak


class Watch(TrainerCallback):
    """Measures the second step."""

    def __init__(self) -> None:
        self.peak = 0
        self.profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_) -> None:
        if state.global_step != 1:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        self.peak = alive(model, optimizer)
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
        self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_) -> None:
        if state.global_step != 2:
            return
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.peak += max(accumulate(size for _, size in memory))


def alive(model: Any, optimizer: Any) -> int:
    """Bytes between two steps: the model, what its quantised weights have beside them, the moments."""
    from inlay.planning.step_simulator import held_bytes

    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*held_bytes(model), *moments]}
    return sum(storages.values())


def measure(case: Case, folder: str) -> dict[str, int]:
    """Bytes: the peak of the second step, and how much the process grew."""
    before, dtype = resident("VmRSS"), DTYPES[case.dtype]
    quantization = None if case.quantize == "none" else quantization_config(case.quantize, dtype)
    base = BaseModel(folder).load(dtype, quantization)
    # No two of a length, so that each batch is padded.
    rows = [[7] * (case.length - i) for i in range(2 * case.batch)]
    learned = round(case.labelled * case.length)
    labels = [[IGNORED] * (len(row) - learned) + row[-learned:] for row in rows]
    recipe = Recipe(
        batch_size=case.batch, gradient_checkpointing=bool(case.checkpointing), max_length=case.length, save_every=0
    )
    watch = Watch()
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            base,
            args=training_arguments(recipe, Path(out), case.batch, 2, dtype),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": labels}),
            processing_class=builtin.load_builtin_tokenizer(),
            peft_config=config(case),
            callbacks=[watch],
        )
        trainer.train()
    return {"peak": watch.peak, "grown": resident("VmHWM") - before}


def resident(what: str) -> int:
    """Bytes of this process, now ("VmRSS") or at most so far ("VmHWM"); 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


def table(rows: list[dict[str, Any]]) -> str:
    names = (
        "model, method, base, checkpointing, batch × length, labelled, planned (GiB), measured (GiB), ratio, process"
    )
    lines = [f"| {names.replace(', ', ' | ')} |", "|---" * 10 + "|"]
    for row in rows:
        base = row["dtype"] if row["quantize"] == "none" else f"{row['quantize']}, {row['dtype']}"
        cells = [row["model"], row["method"], base, "yes" if row["checkpointing"] else "no"]
        cells += [f"{row['batch']} × {row['length']}", f"{row['labelled']:.3g}"]
        cells += [f"{row[k] / 2**30:.3f}" for k in ("planned", "peak")]
        cells += [f"{row['planned'] / row['peak']:.3f}", f"{row['grown'] / 2**30:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], cases: list[Case], name: str, flags: str, out: Path) -> None:
    """The table so far, which says so if it ends early."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    ratios = sorted(row["planned"] / row["peak"] for row in rows)
    some = "" if len(rows) == len(cases) else f" The first {len(rows)} of {len(cases)} cases; the rest was not run."
    text = (
        f"Peak memory of a training step, r = 16 (DoTA: bond 16) on all linear layers: planned from the configuration, "
        f"and measured ({device}, torch {torch.__version__}; larger: a random Llama of 8 layers, 1536 wide). Ratios "
        f"from {ratios[0]:.3f} to {ratios[-1]:.3f}.{some} The last column is what the whole process grew by, GiB. "
        f"`python benchmarks/plan.py{flags}`\n\n{table(rows)}\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")


def larger(folder: Path) -> None:
    """Random weights in the folder."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LARGER).save_pretrained(folder)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options.add_argument("--cases", default="", help="only those whose text has this")
    options.add_argument("--name", default="plan", help="of the table's file")
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        cases = [case for case in CASES if asked.cases in str(case)]
        if any(case.model == "larger" for case in cases):
            larger(Path(temporary) / "larger")
        # A fork has the libraries already; CUDA does not survive one.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        for case in cases:
            folder = "builtin" if case.model == "builtin" else str(Path(temporary) / "larger")
            with context.Pool(1, maxtasksperchild=1) as pool:
                measured = pool.apply(measure, (case, folder))
                planned = pool.apply(predicted, (case, folder))
            rows.append({**asdict(case), "planned": planned, **measured})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            flags = f" --cases {asked.cases} --name {asked.name}" if asked.cases else ""
            write(rows, cases, asked.name, flags, asked.out)


if __name__ == "__main__":
    main()
