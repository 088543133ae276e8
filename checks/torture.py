"""Commands that are killed at random moments end as those that are left alone: the same metrics, the same bits.

    python checks/torture.py 200                  # a random two-layer model, every configuration below in turn
    python checks/torture.py 200 --minutes 20     # no new kill after so long; the count is printed
    python checks/torture.py 3 --model builtin --only lamda
    python checks/torture.py 30 --only merge gguf export fold

Each configuration runs once undisturbed. Then it is started again, killed (SIGKILL) after a random time, gone on with
(a run by `--resume`, a comparison or a search by the same command), killed again, until it ends; and so on until as
many kills are counted as asked for. Of what takes no checkpoints there is nothing at its output after a kill, or all of
it; of what `--overwrite` replaces the old or the new. What has several processes is killed in one of them. Exit
status 1 if anything ends otherwise, or is stuck: computes twenty times as long as undisturbed, or not at all for two
minutes, or leaves processes that do not end. The moments are drawn in computing time, so that a busy machine changes
nothing of them.
Processes are forked from one that has imported the libraries and computed nothing, to save their start-up.
"""

from __future__ import annotations

import argparse
import collections
import csv
import ctypes
import importlib
import itertools
import json
import math
import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 (imported here, it need not be in each process)
import psutil
import transformers
import yaml

import inlay
from inlay.cli import main as inlay_main
from inlay.models import builtin

TRAIN = (
    "train --model {model} --data {data} --output {out} --steps {steps} --save-every 2 --dtype float32 "
    "--max-length 64 --eval-size 2 --samples 0 --batch-size 4 "
)
RUNS = {  # flags of inlay train
    "lamda": "--method lamda --r 4 --eta 0.6 --dropout 0.1 --accumulation 2 --batch-size 2 --weight-decay 0.1",
    "pissa": "--method pissa --r 4 --packing --max-length 96 --batch-size 1 --eval-every 2 --keep-best",
    "dota": "--method dota --bond 4 --dropout 0.1 --scheduler linear --trainer {{logging_steps:\\ 3}}",
    "bone": "--method bone --r 4 --gradient-checkpointing --bias inlay_only --optimizer adafactor",
    "milora": "--method milora --r 4 --eval-every 1 --early-stopping 2 --learning-rate 0.3 --dropout 0.2",
    "lora": "--method lora --r 4 --modules-to-save lm_head --samples 1",
    "nf4": "--method pissa --r 4 --quantize nf4 --fold-rounds 2",
    "lamda++": "--method lamda --r 4 --eta 0.5 --allocate energy",
    "eva": "--method eva --r 4 --allocate variance --calibration 2",
    "bat": "--method bat --r 4 --group-by-length true --warmup 2",
    "xgblora": "--method xgblora --dropout 0.1",
    "spiel": "--method spiel --weight-decay 0.1",
    "lorta": "--method lorta --r 4 --scheduler constant",
    "snell": "--method snell --r 4",
    "dora": "--method peft:dora --args {{r:\\ 4}}",
    "full": "--method full",
    "mezo": "--method lora --r 4 --step mezo",
    "workers": "--method bone --r 4 --trainer {{dataloader_num_workers:\\ 2}}",
    "stream": "--method lora --r 4 --streaming",
    "mixture": "--method bone --r 4 --data [{data},{{path:\\ {data},weight:\\ 2}}]",
    "text": "--method lora --r 4 --task language_modelling --data {text}",
    "dpo": "--method lora --r 4 --task preference --data {pairs}",
    "labels": "--method pissa --r 4 --task classification --data {labels}",
    "overwrite": "--method lora --r 4 --overwrite",
    "two": "--method lora --r 4 --dropout 0.1 --num-processes 2",
    "two lamda": "--method lamda --r 4 --eta 0.6 --num-processes 2 --weight-decay 0.1",
}  # fmt: skip
JOBS = {  # what takes no checkpoints
    "merge": "merge {adapter} {out} --no-probe",
    "gguf": "merge {adapter} {out} --to gguf --no-probe",
    "export": "export {adapter} {out} --to lora",
    "fold": "fold {model} {out} --method pissa --r 4",
    "remerge": "merge {adapter} {out} --no-probe --overwrite",
}
SEARCHES = {  # the same command goes on
    "compare": "compare {compare} --output {out}",
    "tune": "tune {tune} --output {out}",
}
CASES = {**RUNS, **JOBS, **SEARCHES}
MANY = {*SEARCHES, "two", "two lamda"}  # which compute in processes of their own
SHORT = {"eval_size": 2, "dtype": "float32", "max_length": 64, "batch_size": 4, "samples": 0}
METHODS = [{"method": "lora", "learning_rates": [1e-3, 1e-2]}]
SPACE = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "args.r": {"choices": [2, 4]}}
PART = ".part"
MEASURED = re.compile("seconds|memory|time")  # what no two runs have in common
WAITED = 120  # seconds without any computing
DRAWN = 6  # most kills of one run
PR_SET_CHILD_SUBREAPER = 36


class DifferentError(Exception):
    """A command ended otherwise than it does undisturbed."""


class StuckError(DifferentError):
    """A command, or a process that it left, did not end."""


def fork(work: Callable[[], object], log: Path) -> int:
    """Do something in a process of its own, and return its id."""
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
    return pid


def computed(pid: int, many: bool = False) -> float:
    """For how many seconds a process, and with `many` those that it began, have computed."""
    spent = 0.0
    for process in (one := psutil.Process(pid), *(one.children(recursive=True) if many else ())):
        with suppress(psutil.Error):  # it has ended just now
            times = process.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
    return spent


def ended(pid: int, log: Path, seconds: float = math.inf, most: float = math.inf, many: bool = False) -> float | None:
    """The seconds that a process computed, if it ended before it had so many; None otherwise.

    Raises:
        DifferentError: it did not end well.
        StuckError: it computed more than `most`, or waited for two minutes. It is killed.
    """
    spent, since = 0.0, time.monotonic()
    while True:
        if (done := os.waitpid(pid, os.WNOHANG)) != (0, 0):
            if code := os.waitstatus_to_exitcode(done[1]):
                raise DifferentError(f"ended with status {code}:\n{log.read_text()[-2000:]}")
            return spent
        before, spent = spent, computed(pid, many)
        if spent > seconds:
            return None
        since = time.monotonic() if spent > before else since
        if spent > most or time.monotonic() - since > WAITED:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise StuckError(f"computed {spent:.0f} s, and does not end")
        time.sleep(0.1 if many else 0.005)  # to look at several takes longer


def kill(pid: int, draw: random.Random, many: bool) -> None:
    """Kill a process, or one of those that it began; then it ends by itself."""
    if many and (begun := psutil.Process(pid).children()) and draw.random() < 0.5:
        draw.choice(begun).kill()
    else:
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 10 * WAITED
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            raise StuckError("does not end when one of its processes is killed")
        time.sleep(0.002)


def bury(seconds: float) -> None:
    """Wait until no process is left of those that killed ones had begun, which are ours now."""
    end = time.monotonic() + seconds
    while left := psutil.Process().children(recursive=True):
        while psutil.Process().children() and os.waitpid(-1, os.WNOHANG)[0]:
            pass
        if time.monotonic() > end:
            for process in left:
                process.kill()
            raise StuckError(f"leaves {len(left)} processes that do not end")
        time.sleep(0.05)


def without_measured(value: object) -> object:
    """What a command found, without how long it took."""
    if isinstance(value, dict):
        return {k: without_measured(v) for k, v in value.items() if not MEASURED.search(k)}
    return [without_measured(v) for v in value] if isinstance(value, list) else value


def found_in(path: Path) -> object:
    """What a file of results says. A search counts the attempts that failed among its rows."""
    if path.suffix == ".csv":
        rows = csv.DictReader(path.read_text().splitlines())
        return [without_measured(row) for row in rows if row.get("state") != "fail"]
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [without_measured(json.loads(line)) for line in lines]
    return path.read_bytes()


def outcome(out: Path, whole: bool) -> dict[str, object]:
    """What must not depend on being killed: all of a folder, or its results; and what is left over beside it."""
    results = re.compile(r"(metrics\.jsonl|results?\.(json|csv)|best\.yaml|.*\.safetensors|adapter_config\.json)$")
    kept = {
        path.relative_to(out).as_posix(): path
        for path in sorted(out.rglob("*"))
        if path.is_file() and "checkpoints" not in path.parts
    }
    if whole:
        found = {name: path.read_bytes() for name, path in kept.items() if path.suffix != ".md"}
    else:
        found = {name: found_in(path) for name, path in kept.items() if results.match(path.name)}
    return {**found, "left over": sorted(path.name for path in (*out.rglob(".*"), *out.parent.glob(".*")))}


def remove(out: Path) -> None:
    """Remove a folder with what a killed process left beside it."""
    for path in (out, *out.parent.glob(f".{out.name}.*")):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def import_all() -> None:
    """Import every module of the package, and with it what it imports."""
    for module in pkgutil.walk_packages(inlay.__path__, "inlay."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # of a package that is not installed
                importlib.import_module(module.name)


def tiny(folder: Path) -> None:
    """A random two-layer Llama with the first 1,024 words of the built-in tokenizer: its head is small."""
    builtin.load_builtin_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text())
    vocab = about["model"]["vocab"] = {word: i for word, i in about["model"]["vocab"].items() if i < 1024}
    merges = about["model"]["merges"]
    about["model"]["merges"] = [pair for pair in merges if all(word in vocab for word in (*pair, "".join(pair)))]
    file.write_text(json.dumps(about))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def moment(out: Path, last: int) -> str:
    """Where a run was when it died."""
    if not (out / "metrics.jsonl").exists():
        return "before the run folder"
    if (out / "checkpoints" / PART).exists():
        return "writing a checkpoint"
    found = sorted(int(p.name.split("-")[1]) for p in (out / "checkpoints").glob("checkpoint-*"))
    if not found:
        return "before the first checkpoint"
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return "training" if steps[-1]["step"] < last or "loss" in steps[-1] else "after training"


@dataclass
class Undisturbed:
    """What a command came to, in how many seconds of computing.

    Attributes:
        found: its outcome.
        seconds: until its end.
        appeared: until its output was there.
        trained: until its adapter was there; most of the time is in the report that follows.
    """

    found: dict[str, object]
    seconds: float
    appeared: float
    trained: float

    def moment(self, draw: random.Random, earlier: int) -> float:
        """Draw when to kill it: while it trains, and at last after that, where most of the time goes."""
        if self.trained and earlier < DRAWN - 2:
            return draw.uniform(self.appeared / 2, self.trained)
        return draw.uniform(self.trained or self.appeared / 2, 0.95 * self.seconds)


class Torture:
    """Kill commands in a folder.

    Attributes:
        kills: how often, by the moment.
        killed: the same, by the configuration.
    """

    def __init__(self, folder: Path, model: str, steps: int, more: str, seed: int, ends: float) -> None:
        self.folder, self.steps, self.more, self.ends = folder, steps, more, ends
        self.out, self.log, self.draw = folder / "out", folder / "log", random.Random(seed)
        self.kills: collections.Counter[str] = collections.Counter()
        self.killed: collections.Counter[str] = collections.Counter()
        self.known: dict[str, Undisturbed] = {}
        if model == "tiny":
            ended(fork(lambda: tiny(folder / "tiny"), self.log), self.log)
            model = str(folder / "tiny")
        numbers = range(20)
        files = {
            "data": [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in numbers],
            "pairs": [{"prompt": f"Count {i}", "chosen": f"{i}!", "rejected": f"no {i}"} for i in numbers],
            "labels": [{"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in numbers],
            "text": [{"text": f"Of {i} apples one is eaten, {i - 1} are left. " * 3} for i in numbers],
        }
        self.places = {"model": model, "out": str(self.out), "steps": str(steps), "adapter": str(folder / "adapter")}
        for name, rows in files.items():
            self.places[name] = str(folder / f"{name}.jsonl")
            Path(self.places[name]).write_text("\n".join(map(json.dumps, rows)))
        asked = {**SHORT, "model": model, "data": self.places["data"], "steps": 2}
        selection = {"selection": 2}
        for name, block in {
            "compare": {**selection, "methods": METHODS, "seeds": [0]},
            "tune": {**selection, "space": SPACE, "trials": 2, "pruner": "none", "rescore": {"top": 1}},
        }.items():
            self.places[name] = str(folder / f"{name}.yaml")
            Path(self.places[name]).write_text(
                yaml.safe_dump({**asked, **({"method": "lora"} if name == "tune" else {}), name: block})
            )

    def words(self, name: str) -> list[str]:
        """The words of a configuration's command, where `\\ ` is a space within one."""
        text = f"{TRAIN} {RUNS[name]} {self.more}" if name in RUNS else CASES[name]
        return [w.replace("\0", " ") for w in text.replace("\\ ", "\0").format(**self.places).split()]

    def do(self, words: list[str], most: float = math.inf, many: bool = False) -> None:
        """Do a command, of several processes if `many`, to its end, in at most so many seconds of computing."""
        ended(fork(lambda: inlay_main(words), self.log), self.log, most=most, many=many)

    def set_up(self, name: str) -> None:
        """Put in place what a command is to replace, or to read."""
        remove(self.out)
        if name in JOBS or name == "overwrite":
            if not (adapter := self.folder / "adapter").exists():
                self.do([*self.words("bone"), "--steps", "2", "--output", str(adapter)])
            if "overwrite" in CASES[name]:
                shutil.copytree(adapter, self.out) if name in RUNS else self.do(self.words("merge"))
                (self.out / "README.md").write_text("old")

    def undisturbed(self, name: str) -> Undisturbed:
        """Do a command to its end, once."""
        if name not in self.known:
            self.set_up(name)
            pid, spent, seen = fork(lambda: inlay_main(self.words(name)), self.log), 0.0, {}
            while (found := ended(pid, self.log, spent, many=name in MANY)) is None:
                spent = computed(pid, name in MANY)
                for file in ("metrics.jsonl", "adapter", "model"):
                    if (self.out / file).exists():
                        seen.setdefault(file, spent)
            seen = {} if name in JOBS or "--overwrite" in CASES[name] else seen
            appeared, trained = seen.get("metrics.jsonl", 0.0), seen.get("adapter", seen.get("model", 0.0))
            self.known[name] = Undisturbed(outcome(self.out, name in JOBS), found, appeared, trained)
        return self.known[name]

    def check_killed(self, name: str, old: dict[str, object]) -> None:
        """Raise where neither the old nor the new is there after a kill."""
        replaces = "--overwrite" in CASES[name]
        if name in JOBS and self.out.exists():
            found = {k: v for k, v in outcome(self.out, True).items() if k != "left over"}
            whole = [{k: v for k, v in one.items() if k != "left over"} for one in (self.known[name].found, old)]
            if found not in whole:
                raise DifferentError("half of it is there after a kill")
        aside = [self.out, *self.out.parent.glob(f".{self.out.name}.*.old")]
        if replaces and not any(list(path.rglob("*.safetensors")) for path in aside):
            raise DifferentError("neither what it replaces nor something new is there after a kill")

    def go_on(self, name: str, old: str) -> list[str]:
        """What goes on with a command that was killed."""
        recipe = self.out / "recipe.yaml"
        if name not in RUNS or not recipe.exists() or recipe.read_text() == old:
            return self.words(name)
        return ["train", "--resume", str(self.out), *(["--num-processes", "2"] if name.startswith("two") else [])]

    def trial(self, name: str, most: int) -> int:
        """Kill a command, at most so often, until it ends, and compare; gives how often it was killed."""
        known, many, here = self.undisturbed(name), name in MANY, 0
        count = 0
        self.set_up(name)
        old = outcome(self.out, True) if name in JOBS and self.out.exists() else {}
        recipe = self.out / "recipe.yaml"
        old_recipe = recipe.read_text() if recipe.exists() else ""
        while True:
            words = self.go_on(name, old_recipe)
            if count == most or here == DRAWN or time.monotonic() > self.ends:
                self.do(words, 60 + 20 * known.seconds, many)
                break
            pid = fork(lambda words=words: inlay_main(words), self.log)
            if ended(pid, self.log, known.moment(self.draw, here), many=many) is not None:
                break
            kill(pid, self.draw, name.startswith("two"))
            when = moment(self.out, self.steps) if name in RUNS else f"in {name}"
            self.kills[when] += 1
            self.killed[name] += 1
            here = here + 1 if when != "after training" else max(here + 1, DRAWN - 1)
            count += 1
            self.check_killed(name, old)
            if name in JOBS and self.out.exists() and not old:  # killed when all was in its place; nothing follows
                for path in self.out.parent.glob(f".{self.out.name}.*"):
                    path.unlink()
                break
        bury(10 * WAITED)
        found = outcome(self.out, name in JOBS)
        if found != known.found:
            parts = [part for part in {**found, **known.found} if found.get(part) != known.found.get(part)]
            raise DifferentError(f"{', '.join(parts[:5])}: not as it is undisturbed")
        return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--model", default="tiny", help="tiny (default) or any that inlay train takes")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no new kill is begun")
    parser.add_argument("--more", default="", help="flags for inlay train")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    if sys.platform == "linux":  # processes that killed ones had begun become ours
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    import_all()
    ends, wrong, trials = time.monotonic() + 60 * asked.minutes, collections.Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["TMPDIR"] = tempfile.tempdir = name
        torture = Torture(Path(name), asked.model, asked.steps, asked.more, asked.seed, ends)
        for case in itertools.cycle(asked.only):
            left = asked.kills - torture.kills.total()
            if left <= 0 or time.monotonic() > ends or wrong.total() >= 10:
                break
            began = time.monotonic()
            try:
                here = torture.trial(case, left)
                print(f"{case}: killed {here} times, ends the same ({time.monotonic() - began:.0f} s)", flush=True)
            except DifferentError as error:
                kind = "stuck" if isinstance(error, StuckError) else "ended differently"
                wrong[kind] += 1
                kept = Path(f"torture-failed-{wrong.total()}")
                if torture.out.exists():
                    shutil.copytree(torture.out, kept, dirs_exist_ok=True)
                print(f"{case}, {kind}: {error} (what is there is in {kept}/)", flush=True)
            trials += 1
    print(
        f"{torture.kills.total()} kills in {trials} runs of {len(torture.killed)} configurations, "
        f"{wrong['ended differently']} ended differently, {wrong['stuck']} stuck; "
        f"by configuration: {dict(torture.killed.most_common())}; when: {dict(torture.kills.most_common())}"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
