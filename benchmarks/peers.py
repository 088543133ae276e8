"""Whole runs of Inlay beside trl with PEFT's adapters and LLaMA-Factory: CPU time, memory, held-out loss.

    INLAY_DATA=... python benchmarks/peers.py [--llama-factory PYTHON] [--old SOURCE] [--sets E2E,...] [--ways ...]

Each cell is one process, from its start to its end: the built-in model (SmolLM2-135M, fp32) takes one epoch of six
steps with rank 16 on all linear layers, is evaluated on 8 held-out rows before and after, and writes a checkpoint and
its adapter. Inlay reads, renders and tokenises the data itself and writes its report; the others are given the same
tokens and labels ready made. OMP_NUM_THREADS is 1. CPU time is the process's own, user and system, of the whole process
and of its training, evaluations and saving alone, without imports, loading and Inlay's report; peak is its largest
resident set. The loss is over the held-out answer tokens, from the adapter that was saved, by the same code for all.

"By length" is `group_by_length: auto`. The chats are five turns of E2E each. `--old SOURCE` is the `src` of Inlay at
5c35904, before chats were learned in one sequence and the head saw labelled positions alone; one epoch of the same
chats is five times the sequences there. `--llama-factory PYTHON` is the interpreter of an environment with
LLaMA-Factory. A finished cell is kept in peers.json and not run again; the table and the plot are of all that are
there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from time import process_time
from typing import Any

STEPS, HELD, RANK, RATE = 6, 8, 16, 5e-4
ROWS = 800  # of a set, whose lengths are told
BATCHES = {"E2E": 8, "GSM8K": 4, "ARC-Easy": 8, "5-turn chats": 4}  # rows of a step
TARGETS = {"E2E": 0.65, "GSM8K": 0.62, "ARC-Easy": 0.68}  # Inlay over trl with PEFT's LoRA
LEARNING = "learning.json"  # in a cell's folder: the CPU seconds of training, evaluations and saving
TRL, OLD, GROUPED = "trl, PEFT LoRA", "Inlay 5c35904, LoRA", "Inlay, LoRA, by length"
MAKES_DATA = """
import datasets, json, sys
rows = json.load(open(sys.argv[1]))
datasets.DatasetDict({name: datasets.Dataset.from_list(rows[name]) for name in rows}).save_to_disk(sys.argv[2])
"""


def e2e(data: Path, held: bool) -> list[dict]:
    name = "testset_w_refs.csv" if held else "devset.csv"
    with (data / "e2e" / name).open(encoding="utf-8", newline="") as file:
        return [{"prompt": row["mr"], "completion": row["ref"]} for row in csv.DictReader(file)]


def gsm8k(data: Path, held: bool) -> list[dict]:
    lines = (data / "gsm8k" / ("test.jsonl" if held else "train.jsonl")).read_text(encoding="utf-8").splitlines()
    return [{"prompt": row["question"], "completion": row["answer"]} for row in map(json.loads, lines)]


def arc_easy(data: Path, held: bool) -> list[dict]:
    file = data / "commonsense/arc_easy" / ("test.json" if held else "train.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]


def chats(data: Path, held: bool) -> list[dict]:
    turns = e2e(data, held)
    random.Random(1).shuffle(turns)
    pairs = [[said("user", turn["prompt"]), said("assistant", turn["completion"])] for turn in turns]
    return [{"messages": list(chain(*pairs[i : i + 5]))} for i in range(0, len(pairs) - 4, 5)]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SETS: dict[str, Callable[[Path, bool], list[dict]]] = {
    "E2E": e2e, "GSM8K": gsm8k, "ARC-Easy": arc_easy, "5-turn chats": chats,
}  # fmt: skip


def prepare(name: str, data: Path, folder: Path) -> dict[str, list[dict]]:
    """Write a set's examples as records and as tokens, and return the tokens."""
    from inlay.data.formats import convert_records
    from inlay.data.render import render, sequences
    from inlay.models.builtin import load_builtin_tokenizer

    tokenizer, tokens = load_builtin_tokenizer(), {}
    for part, count in (("train", STEPS * BATCHES[name]), ("validation", HELD)):
        rows = random.Random(0).sample(SETS[name](data, part == "validation"), count)
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        shown = [render(one, tokenizer, 512) for row in convert_records(rows) for one in sequences(row, tokenizer)]
        tokens[part] = [
            {"input_ids": one.ids, "attention_mask": [1] * len(one.ids), "labels": one.labels} for one in shown
        ]
    (folder / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    return tokens


def lengths_of(name: str, data: Path) -> list[str]:
    """Return a row of the table of tokens: what a set's rows and batches are like, and what groups by length spare."""
    import torch

    from inlay.data.formats import convert_records
    from inlay.data.render import IGNORED, render, sequences
    from inlay.models.builtin import load_builtin_tokenizer
    from inlay.training.trainers.length_groups import padded_tokens, tokens_spared

    tokenizer, rows = load_builtin_tokenizer(), SETS[name](data, False)
    rows = random.Random(0).sample(rows, min(ROWS, len(rows)))
    shown = [render(one, tokenizer, 512) for row in convert_records(rows) for one in sequences(row, tokenizer)]
    lengths = [len(one.ids) for one in shown]
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    labelled = sum(label != IGNORED for one in shown for label in one.labels) / sum(lengths)
    real, spared = sum(lengths) / padded_tokens(lengths, order, 8), tokens_spared(lengths, 8, 8, 0)
    return [name, f"{sum(lengths) / len(lengths):.0f}", f"{labelled:.2f}", f"{real:.2f}", f"{spared:.2f}"]


def train_with_trl(folder: Path, model: str, method: str, batch: int) -> None:
    """Train as a script of trl's does: this is what a cell of trl's runs."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, MissConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    where = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": RANK}
    configs = {
        "LoRA": lambda: LoraConfig(lora_alpha=RANK, **where),
        "DoRA": lambda: LoraConfig(lora_alpha=RANK, use_dora=True, **where),
        "MiSS": lambda: MissConfig(**where),
    }
    rows = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch, learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=1,
            gradient_checkpointing=False, bf16=False, use_cpu=True, eval_strategy="no", eval_on_start=True,
            save_steps=STEPS, logging_steps=1, max_length=512, report_to="none", disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows["train"]),
        eval_dataset=Dataset.from_list(rows["validation"]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=configs[method](),
    )  # fmt: skip
    begun = process_time()
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(folder / "out" / "adapter"))
    write_learning(folder, process_time() - begun)


def train_with_inlay(folder: Path, arguments: list[str]) -> None:
    """Run `inlay train` in this process, and note the CPU time of training, evaluations and saving."""
    import inlay.training.train as stages
    from inlay.cli.entry import main as inlay

    spent: list[float] = []

    def timed(function: Callable[..., Any], *given: Any) -> Any:
        begun = process_time()
        result = function(*given)
        spent.append(process_time() - begun)
        return result

    for name in ("fit_steps", "write_trained", "measure"):
        setattr(stages, name, partial(timed, getattr(stages, name)))
    sys.argv = ["inlay", "train", *arguments]
    try:
        inlay()
    finally:
        write_learning(folder, sum(spent))


def write_learning(folder: Path, seconds: float) -> None:
    (folder / LEARNING).write_text(json.dumps(seconds), encoding="utf-8")


def inlay_command(
    folder: Path, model: str, batch: int, method: str, groups: str | None = None, old: bool = False
) -> list[str]:
    """Return the command of a run of Inlay's; the learning rate is the one that all have."""
    flags = {
        "model": model,
        "data": folder / "train.jsonl", "eval-data": folder / "validation.jsonl", "eval-size": HELD, "method": method,
        "r": RANK, "learning-rate": RATE, "epochs": 1, "batch-size": batch, "warmup": 1, "samples": 0,
        "save-every": 10**6, "dtype": "float32", "output": folder / "out",
    }  # fmt: skip
    flags |= {"group-by-length": groups} if groups else {}
    start = ["-m", "inlay", "train"] if old else [str(Path(__file__).resolve()), "--inlay", str(folder), "--"]
    return [sys.executable, *start, *(f"--{key}={value}" for key, value in flags.items())]


def llama_factory_command(python: str, folder: Path, model: str, batch: int) -> list[str]:
    """Write LLaMA-Factory's data and configuration, and return the command of its run."""
    subprocess.run([python, "-c", MAKES_DATA, folder / "tokens.json", folder / "tokens"], check=True)
    config = {
        "model_name_or_path": model, "stage": "sft", "do_train": True, "do_eval": True, "finetuning_type": "lora",
        "lora_rank": RANK, "lora_alpha": RANK, "lora_target": "all", "template": "default", "cutoff_len": 512,
        "tokenized_path": str(folder / "tokens"), "output_dir": str(folder / "out" / "adapter"), "max_steps": STEPS,
        "dataset": "tokens", "eval_dataset": "tokens",
        "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "learning_rate": RATE,
        "lr_scheduler_type": "cosine", "warmup_steps": 1, "eval_on_start": True, "logging_steps": 1,
        "save_steps": STEPS, "report_to": "none", "use_cpu": True, "disable_gradient_checkpointing": True,
        "overwrite_output_dir": True, "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False,
    }  # fmt: skip
    (folder / "factory.json").write_text(json.dumps(config), encoding="utf-8")
    return [python, "-m", "llamafactory.cli", "train", str(folder / "factory.json")]


def ways(asked: argparse.Namespace) -> dict[str, Callable[[Path, str, int], list[str]]]:
    """Return how a set can be learned: a name, and what gives the command, of a folder, a model and a batch size."""
    own = [sys.executable, str(Path(__file__).resolve())]
    found: dict[str, Callable[[Path, str, int], list[str]]] = {
        "Inlay, LoRA": partial(inlay_command, method="lora"),
        GROUPED: partial(inlay_command, method="lora", groups="auto"),
    }
    for method in ("LoRA", "MiSS", "DoRA"):
        found[f"trl, PEFT {method}"] = lambda folder, model, batch, method=method: [
            *own, "--trl", str(folder), "--model", model, "--method", method, "--batch", str(batch),
        ]  # fmt: skip
    if asked.llama_factory:
        found["LLaMA-Factory, LoRA"] = partial(llama_factory_command, asked.llama_factory)
    if asked.old:
        found[OLD] = partial(inlay_command, method="lora", old=True)
    return found


def measured(command: list[str], source: str | None, log: Path) -> dict[str, float]:
    """Run a process, and return its CPU seconds and its largest resident set in bytes."""
    paths = [source, os.environ.get("PYTHONPATH")]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=settings)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return {"seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024}


def held_out_loss(folder: Path, rows: list[dict]) -> float:
    """Return the mean loss over the answer tokens of the held-out rows, with the adapter in a run's folder."""
    import torch
    from peft import PeftModel

    from inlay.models.builtin import load_builtin_model
    from inlay.training.tasks.instruction import label_losses

    model = PeftModel.from_pretrained(load_builtin_model(), str(folder / "out" / "adapter")).eval()
    with torch.no_grad():
        losses = [label_losses(model, {key: torch.tensor([row[key]]) for key in row})[1] for row in rows]
    return torch.cat(losses).mean().item()


def read_cells(kept: Path) -> dict[str, dict[str, Any]]:
    return json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}


FIGURES = ("seconds", "learning", "peak")


def table_of(cells: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the table: each set, and how each way learned it."""
    rows = []
    for name in SETS:
        mine = {way: cells[f"{name} | {way}"] for way in sorted(order(cells, name))}
        of = mine.get(TRL)
        for way, cell in mine.items():
            whole, learning, peak = (
                f"{cell[key] / of[key]:.2f}" if of and key in cell and key in of else "" for key in FIGURES
            )
            alone = f"{cell['learning']:.0f}" if "learning" in cell else ""
            used = f"{cell['peak'] / 2**30:.2f}"
            values = [f"{cell['seconds']:.0f}", whole, alone, learning, used, peak, f"{cell['loss']:.3f}"]
            rows.append([name, way, *values])
    return rows


def order(cells: dict[str, dict[str, Any]], name: str) -> list[str]:
    return [key.partition(" | ")[2] for key in cells if key.startswith(f"{name} | ")]


def plot(cells: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw CPU time and peak of each way over trl's with PEFT's LoRA, set by set."""
    from matplotlib.figure import Figure

    names = [name for name in SETS if f"{name} | {TRL}" in cells]
    every = list(dict.fromkeys(way for name in names for way in order(cells, name)))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2), (("seconds", "CPU time of a run"), ("peak", "peak memory of a run")), strict=True
    ):
        for i, way in enumerate(every):
            of = [(j, cells[f"{n} | {way}"][key] / cells[f"{n} | {TRL}"][key]) for j, n in enumerate(names)
                  if f"{n} | {way}" in cells]  # fmt: skip
            places = [j + (i - len(every) / 2 + 0.5) * 0.8 / len(every) for j, _ in of]
            axes.bar(places, [value for _, value in of], 0.8 / len(every), label=way)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(names)), names)
        axes.set_title(f"{title}, over {TRL}", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def write(cells: dict[str, dict[str, Any]], tokens: list[list[str]], out: Path) -> None:
    """Write the tables and the plot of the cells that are there."""
    from common import report, table

    machines = sorted({cell["machine"] for cell in cells.values()})
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    reached = [
        f"{name} {cells[f'{name} | Inlay, LoRA']['learning'] / cells[f'{name} | {TRL}']['learning']:.2f} ({aim})"
        for name, aim in TARGETS.items()
        if all("learning" in cells.get(f"{name} | {way}", {}) for way in ("Inlay, LoRA", TRL))
    ]
    new, old = (f"5-turn chats | {way}" for way in ("Inlay, LoRA", OLD))
    if new in cells and old in cells:
        reached.append(f"{new} over 5c35904 {cells[new]['seconds'] / cells[old]['seconds']:.2f} (0.4)")
    text = [f"# Whole runs beside other libraries: `python benchmarks/peers.py`, {'; '.join(machines)}", about.strip()]
    text.append(
        "CPU time of training, evaluations and saving, Inlay's LoRA over trl's with PEFT's (and the aim): "
        f"{', '.join(reached)}. One run a cell."
    )
    names = ["data", "tokens a row", "labelled", "real in random batches of 8", "spared by length"]
    text.append("\n".join(table(names, tokens)))
    text.append("![CPU time and memory over trl's](peers.png)")
    over = "over trl's LoRA"
    header = ["data", "run", "CPU, s", over, "without imports and report, s", over, "peak, GiB", over, "held-out loss"]
    report(out, "peers", "\n\n".join(text), header, table_of(cells))
    plot(cells, out / "peers.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS), help="only these; '' writes the tables of what is there")
    parser.add_argument("--ways", help="only these, separated by semicolons, again where they are there already")
    parser.add_argument("--llama-factory", help="the Python of an environment that has it")
    parser.add_argument("--old", help="the src of Inlay at 5c35904, for the chats")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)  # the folder of a cell: train it, and no more
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--inlay", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inlay:
        train_with_inlay(asked.inlay, asked.flags)
        return
    if asked.trl:
        train_with_trl(asked.trl, asked.model, asked.method, asked.batch)
        return
    from common import machine

    from inlay.messages import quiet
    from inlay.models.builtin import model_dir

    quiet()
    data, kept = Path(os.environ["INLAY_DATA"]), asked.out / "peers.json"
    asked.out.mkdir(parents=True, exist_ok=True)
    cells = read_cells(kept)
    chosen = {way: make for way, make in ways(asked).items() if not asked.ways or way in asked.ways.split(";")}
    for name in filter(None, asked.sets.split(",")):
        for way, command in chosen.items():
            key = f"{name} | {way}"
            if (key in cells and not asked.ways) or (way == OLD and name != "5-turn chats"):
                continue
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                rows = prepare(name, data, folder)
                source = asked.old if way == OLD else None
                cell = measured(command(folder, str(model_dir()), BATCHES[name]), source, folder / "log.txt")
                if (folder / LEARNING).exists():
                    cell["learning"] = json.loads((folder / LEARNING).read_text(encoding="utf-8"))
                cell |= {"loss": held_out_loss(folder, rows["validation"]), "machine": machine()}
            print(key, cell, flush=True)
            cells = {**read_cells(kept), key: cell}  # another process may have added some
            kept.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    write(cells, [lengths_of(name, data) for name in SETS], asked.out)


if __name__ == "__main__":
    main()
