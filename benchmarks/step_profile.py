"""Where the time of a real training step goes, with the head at all positions and at labelled ones alone.

    INLAY_DATA=... python benchmarks/step_profile.py [--rounds 3] [--method lora] [--out benchmarks/results]

SmolLM2-135M in fp32 learns E2E (8 rows a batch) and GSM8K (4 rows) as `inlay train` does, r = 16 on all linear layers,
one thread, CPU time. Each part is a difference of two measurements on the same batches, all taking turns:

- frozen layers: the backbone without its adapter, forward and backward through its activations
- adapter: the backbone with it, less that
- head and loss: the trainer's loss with its backward pass, less the backbone with its adapter
- optimiser: clipping and AdamW
- the rest: the same steps in the trainer's own loop (batches, callbacks, logs, checks), less all of the above
- in parts: the whole step as `inlay train` takes it, each batch in parts of rows of similar length

"All positions" is trl's head as it runs where Triton does not; shares are of a whole step with it. Peak: bytes held at
once in a forward and backward pass. "A pass costs" is what it takes beside its tokens, in tokens, from passes over 32
and over 256 of them: a part has to spare more.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import machine, peak, report
from rich.console import Console
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from inlay.data.render import IGNORED
from inlay.messages import gib, quiet
from inlay.models.base import BaseModel
from inlay.recipe.recipe import Recipe
from inlay.training.base_model import load_training_model
from inlay.training.fit import build_trainer
from inlay.training.prepared import Prepared
from inlay.training.tasks import TASKS
from inlay.training.trainers.batch_parts import parts_of

SILENT = Console(quiet=True)
DATA = {"E2E": ("e2e/devset.csv", 8), "GSM8K": ("gsm8k/train.jsonl", 4)}  # and the rows of a batch
ROWS = 200  # of each file
WAYS = ("all positions", "labelled alone")


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Clock(TrainerCallback):
    """The CPU time from the first step's beginning to the last one's end."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.process_time() - self.start


def trainer_of(data: Path, batch: int, way: str, method: str, rounds: int, folder: Path) -> Any:
    """The trainer of a run; with trl's own head, or with ours."""
    recipe = Recipe(
        data=str(data), eval_data=str(data), eval_size=1, method=method, args={"r": 16}, dtype="float32",
        steps=rounds, batch_size=batch, save_every=0, learning_rate=1e-4, warmup=0,
    )  # fmt: skip
    task, tokenizer = TASKS[recipe.task], BaseModel(recipe.model).tokenizer()
    rows = task.examples(recipe, tokenizer, SILENT)
    set_seed(0)
    prepared = Prepared(recipe, recipe.base_model, torch.float32, folder, tokenizer, rows, SILENT)
    base = load_training_model(prepared)
    as_trl = patch("inlay.training.trainers.trainer.score_labelled_positions", lambda causal: None)
    with as_trl if way == WAYS[0] else nullcontext():
        return build_trainer(prepared, base)


def parts_of_step(trainers: dict[str, Any], batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """CPU seconds of each thing that is measured, on one batch."""
    model = trainers[WAYS[1]].model
    backbone, inputs = model.get_base_model().base_model, {k: v for k, v in batch.items() if k != "labels"}
    embedded = backbone.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()

    def layers() -> None:
        backbone(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state.sum().backward()

    def loss(way: str) -> None:
        count = (batch["labels"][:, 1:] != IGNORED).sum()
        trainers[way].compute_loss(trainers[way].model, dict(batch), num_items_in_batch=count).backward()

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()

    model.train()
    layers()  # so that no part pays for memory that is taken the first time
    with model.disable_adapter():
        found = {"frozen": cpu_seconds(layers)}
    found["adapted"] = cpu_seconds(layers)
    for way, trainer in trainers.items():
        trainer.model.train()
        trainer.model.zero_grad()
        found[way] = cpu_seconds(lambda way=way: loss(way))
    trained, optimiser = [p for p in model.parameters() if p.requires_grad], trainers[WAYS[1]].create_optimizer()
    optimise()  # makes its state
    found["optimiser"] = cpu_seconds(optimise)
    return found


def profiled(name: str, rounds: int, method: str, folder: Path) -> tuple[list[list[str]], str]:
    """The rows of a data set in the table, and what its batches are like."""
    source, size = DATA[name]
    lines = (Path(os.environ["INLAY_DATA"]) / source).read_text(encoding="utf-8").splitlines()[: ROWS + 1]
    data = folder / Path(source).name
    data.write_text("\n".join(lines), encoding="utf-8")
    trainers = {way: trainer_of(data, size, way, method, rounds, folder) for way in WAYS}
    batches = list(islice(trainers[WAYS[0]].get_train_dataloader(), rounds))
    found = [parts_of_step(trainers, batch) for batch in batches]
    mean = {part: sum(one[part] for one in found) / rounds for part in found[0]}
    columns = [column(trainers[way], batches, mean, way) for way in WAYS]
    whole = columns[0]["whole step"]
    rows = []
    for part, before in columns[0].items():
        after = columns[1][part]
        show, of = (
            (gib, columns[0]["peak of a pass"])
            if part.startswith("peak")
            else (lambda seconds: f"{seconds:.2f}", whole)
        )
        rows.append([name, part, show(before), show(after), f"{before / of:.0%}", f"{after / of:.0%}"])
    cost = pass_cost(trainers[WAYS[1]].model)
    return rows, f"{name}: {rounds} batches of {size} rows, {described(batches)}. A pass costs {cost:.0f} tokens."


def pass_cost(model: Any) -> float:
    """The tokens whose time a pass takes beside its tokens."""

    def seconds(tokens: int) -> float:
        ids = torch.arange(tokens)[None]
        return min(cpu_seconds(lambda: model(input_ids=ids, labels=ids).loss.backward()) for _ in range(3))

    few, many = seconds(32), seconds(256)
    return few / ((many - few) / (256 - 32)) - 32


def column(trainer: Any, batches: list[dict[str, torch.Tensor]], mean: dict[str, float], way: str) -> dict[str, float]:
    """Each part of a step the one way, with the whole of it and its peak."""
    parts = parts_of(batches[0]) if way == WAYS[1] else [batches[0]]  # trl takes batches whole

    def held(batch: dict[str, torch.Tensor]) -> float:
        most = peak(lambda: trainer.compute_loss(trainer.model, dict(batch)).backward())
        trainer.model.zero_grad()
        return most

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock := Clock())
    with patch("inlay.training.trainers.batch_parts.PASS", math.inf):
        trainer.train()
    whole = in_parts = clock.seconds / len(batches)
    if way == WAYS[1]:
        trainer.train()
        in_parts = clock.seconds / len(batches)
    return {
        "frozen layers": mean["frozen"],
        "adapter": mean["adapted"] - mean["frozen"],
        "head and loss": mean[way] - mean["adapted"],
        "optimiser": mean["optimiser"],
        "the rest": whole - mean[way] - mean["optimiser"],
        "whole step": whole,
        "whole step, in parts": in_parts,
        "peak of a pass": held(batches[0]),
        "peak of a pass, in parts": max(map(held, parts)),
    }


def described(batches: list[dict[str, torch.Tensor]]) -> str:
    """How many tokens batches have, and which shares are real and learned from."""
    padded = sum(batch["labels"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    learned = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    return (
        f"{padded // len(batches)} tokens each, {real / padded:.2f} of them real, {learned / padded:.2f} learned from"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    rows, about = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in DATA:
            more, batches = profiled(name, asked.rounds, asked.method, Path(folder))
            rows += more
            about.append(batches)
    title = f"# Where the time of a step goes: `python benchmarks/step_profile.py`, {machine()}"
    text = "\n\n".join([title, f"{(__doc__ or '').partition('[--')[2].partition(chr(10) * 2)[2]}".strip(), *about])
    header = ["data", "part", *WAYS, *(f"{way}, share" for way in WAYS)]
    report(asked.out, "step_profile", text, header, rows)


if __name__ == "__main__":
    main()
