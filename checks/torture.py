"""Runs that are killed at random moments end as those that are left alone: the same metrics, the same adapter's bits.

    python checks/torture.py 200                  # a random two-layer model, every recipe below in turn
    python checks/torture.py 3 --model builtin    # SmolLM2-135M
    python checks/torture.py 30 --recipes merge gguf export fold

Each recipe runs once undisturbed. Then it is started again, killed (SIGKILL) after a random time, gone on with by
`--resume`, killed again, until it ends; and so on until as many kills are counted as asked for. What is not a training
is started again instead, and after a kill there is nothing at its output, or all of it. Exit status 1 if anything
differs. Processes are forked from one that has imported the libraries and computed nothing, to save their
start-up.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import datasets  # noqa: F401 (imported here, they need not be in each process)
import transformers
import trl  # noqa: F401

from inlay.cli import main as inlay_main
from inlay.models import builtin

RECIPES = {
    "lamda": "--method lamda --r 4 --eta 0.6 --dropout 0.1 --accumulation 2 --batch-size 2 --weight-decay 0.1",
    "pissa": "--method pissa --r 4 --packing --max-length 96 --batch-size 1 --eval-every 2 --keep-best",
    "dota": "--method dota --bond 4 --dropout 0.1 --scheduler linear --trainer {logging_steps:\\ 3}",
    "bone": "--method bone --r 4 --gradient-checkpointing --bias inlay_only --optimizer adafactor",
    "milora": "--method milora --r 4 --eval-every 1 --early-stopping 2 --learning-rate 0.3 --dropout 0.2",
    "lora": "--method lora --r 4 --modules-to-save lm_head --samples 1",
    "nf4": "--method pissa --r 4 --quantize nf4 --fold-rounds 2",
}  # fmt: skip
JOBS = {  # what is not a training, out of an adapter
    "merge": "merge {adapter} {out} --no-probe",
    "gguf": "merge {adapter} {out} --to gguf --no-probe",
    "export": "export {adapter} {out} --to lora",
    "fold": "fold {model} {out} --method pissa --r 4",
}
PART = ".part"


def in_process(work, log: Path, after: float | None = None) -> bool:
    """Do something in a process of its own; whether it was killed, `after` so many seconds, before it ended."""
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            work()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + (after if after is not None else 3600)
    while time.monotonic() < end:
        if (done := os.waitpid(pid, os.WNOHANG)) != (0, 0):
            if code := os.waitstatus_to_exitcode(done[1]):
                sys.exit(f"the run ended with status {code}:\n{log.read_text()}")
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def tiny(folder: Path) -> None:
    """A random two-layer Llama with the built-in tokenizer."""
    tokenizer = builtin.load_builtin_tokenizer()
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def outcome(run: Path) -> dict[str, object]:
    """What must not depend on being killed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]
    files = ("adapter_model.safetensors", "adapter_config.json")
    left = sorted(path.name for path in (*run.rglob(".*"), *run.parent.glob(".*")))
    return {
        "metrics": curve,
        "what is left over": left,
        **{name: (run / "adapter" / name).read_bytes() for name in files},
    }


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, but for what says when it was made."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".md"
    }


def interrupted(words: list[str], out: Path, log: Path, draw: random.Random, expected: dict, seconds: float) -> int:
    """Start a job until it ends, killing it at random; how often it was killed. Exits where anything is half there."""
    kills = 0
    while in_process(lambda: inlay_main(words), log, draw.uniform(0, seconds) if kills < 3 else None):
        kills += 1
        if out.exists() and files(out) != expected:
            sys.exit(f"{' '.join(words)}: half of it is there after a kill")
    left = [path.name for path in out.parent.glob(f".{out.name}*")]
    if files(out) != expected or left:
        sys.exit(f"{' '.join(words)}, killed {kills} times: not what it is undisturbed; left over: {left}")
    shutil.rmtree(out)
    return kills


def moment(run: Path, last: int) -> str:
    """Where a run was when it died."""
    if not (run / "recipe.yaml").exists():
        return "before the run folder"
    if (run / "checkpoints" / PART).exists():
        return "writing a checkpoint"
    found = sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("checkpoint-*"))
    if not found:
        return "before the first checkpoint"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return "training" if steps[-1]["step"] < last or "loss" in steps[-1] else "after training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--model", default="tiny", help="tiny (default) or any that inlay train takes")
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES, *JOBS], choices=[*RECIPES, *JOBS])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--more", default="", help="flags for inlay train")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    kills: collections.Counter[str] = collections.Counter()
    draw, trials = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TMPDIR"] = tempfile.tempdir = name
        run, log, data = folder / "run", folder / "log", folder / "data.jsonl"
        rows = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(20)]
        data.write_text("\n".join(map(json.dumps, rows)))
        model = asked.model
        if model == "tiny":
            in_process(lambda: tiny(folder / "tiny"), log)
            model = str(folder / "tiny")
        references: dict[str, tuple[dict, float]] = {}
        places = {"model": model, "adapter": folder / "adapter", "out": folder / "out"}
        while kills.total() < asked.kills:
            recipe = asked.recipes[trials % len(asked.recipes)]
            common = (
                f"--model {model} --data {data} --output {run} --steps {asked.steps} --save-every 2 --dtype float32"
            )
            common += " --dtype float32 --max-length 64 --eval-size 2 --samples 0 --batch-size 4"
            if recipe in JOBS:
                words = JOBS[recipe].format(**places).split()
                if recipe not in references:
                    if not places["adapter"].exists():
                        made = ["train", *split(common), "--steps", "1", "--output", str(places["adapter"])]
                        in_process(lambda made=made: inlay_main(made), log)
                    began = time.monotonic()
                    in_process(lambda words=words: inlay_main(words), log)
                    references[recipe] = files(places["out"]), time.monotonic() - began
                    shutil.rmtree(places["out"])
                here = interrupted(words, places["out"], log, draw, *references[recipe])
                kills[f"in {recipe}"] += here
                trials += 1
                print(f"{recipe}: killed {here} times, ends the same", flush=True)
                continue
            flags = split(f"{common} {RECIPES[recipe]} {asked.more}")
            if recipe not in references:
                began = time.monotonic()
                in_process(lambda flags=flags: inlay_main(["train", *flags]), log)
                references[recipe] = outcome(run), time.monotonic() - began
                shutil.rmtree(run)
            expected, seconds = references[recipe]
            running, here = True, 0
            while running:
                after = draw.uniform(0, seconds) if kills.total() < asked.kills else None
                go_on = ["--resume", str(run)] if (run / "recipe.yaml").exists() else flags
                running = in_process(lambda go_on=go_on: inlay_main(["train", *go_on]), log, after)
                if running:
                    kills[moment(run, asked.steps)] += 1
                    here += 1
            found = outcome(run)
            for part in expected:
                if found[part] != expected[part]:
                    shutil.copytree(run, Path("torture-failed"), dirs_exist_ok=True)
                    sys.exit(f"{recipe}, killed {here} times: {part} differs (the run is in torture-failed/)")
            trials += 1
            print(f"{recipe}: killed {here} times, ends the same", flush=True)
            shutil.rmtree(run)
    print(f"{kills.total()} kills in {trials} runs, 0 ended differently; when: {dict(kills.most_common())}")


def split(flags: str) -> list[str]:
    """Words, with `\\ ` for a space within one."""
    return [word.replace("\0", " ") for word in flags.replace("\\ ", "\0").split()]


if __name__ == "__main__":
    main()
