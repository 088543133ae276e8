"""Damaged and hostile files: what reads a user's files gives a ValueError or reads them, and nothing else happens.

    python checks/fuzz.py [100000] [--seed 0] [--only recipe data]        (make fuzz: 100,000)

Files of every kind that Inlay reads are damaged at random: cut short, bits flipped, pieces moved, doubled and swapped
between files, and filled with what breaks parsers (NUL bytes, deep nesting, numbers beyond all types, lines of 100 kB,
aliases that multiply, pickles, names that leave the folder). In the configurations of adapters values are replaced: by
huge numbers, and names of modules to import. Some data files unpack to a thousand times their size. A case is unhandled
if anything but a ValueError comes out, if what is read is not what was written, where that can be told, if it takes
longer than 20 seconds or asks for over 4 GiB, or if something runs or is written outside its folder. At the end the
process may not have held over 2 GiB. A case can be redone by its seed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import io
import json
import math
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerState

from inlay.conversion.gguf_model import write_model
from inlay.conversion.merge_weights import New
from inlay.conversion.peft_folder import read_peft_folder
from inlay.data.formats import convert_records
from inlay.data.readers import read_records
from inlay.data.render import encode_example, prompt_ids
from inlay.experiments.compare.spec import load_comparison
from inlay.files import cache
from inlay.host.config import InlayConfig
from inlay.messages import quiet
from inlay.methods import METHODS
from inlay.models import builtin
from inlay.models.adapters import Adapter
from inlay.models.base import BaseModel
from inlay.recipe.reading import load_recipe
from inlay.training import checkpoints, mixture
from inlay.training.live_page import Follower
from inlay.training.progress import RunProgress
from inlay.training.run_tokenizer import read_template
from inlay.training.trainers.trainer import state_of

SECONDS, MEMORY, ALLOCATED = 20, 2 << 30, 4 << 30
SHARED = Path("/dev/shm")  # files in memory: on a disk, making and removing the folders takes longer than reading them
RAN = f"inlay-payload-ran-{os.getpid()}"
MODULE = "inlay_payload"  # which shows that it was imported
IDS = torch.arange(8)[None]
RECIPE = b"""model: builtin
data: builtin
method: lamda
args: {r: 8, eta: 0.3}
learning_rate: 5e-4
steps: 10
patterns: {k_proj: {r: 4}}
trainer: {adam_beta2: 0.99}
"""


MIXTURE = b"""model: builtin
data:
- a.jsonl
- {path: b.csv, weight: 2, system: "Be short."}
- {path: c.json, weight: 0.5, columns: {prompt: question, answer: answer}}
eval_size: 1
"""
CHATML = b"""{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
INSTRUCT = b"""{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}
{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2
== 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' +
m['content'].strip() + ' [/INST]' }}{% else %}{% generation %}{{ m['content'] | tojson }}{% endgeneration %}{% endif %}
{% endfor %}"""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


class Payload:
    """A pickle that shows that it ran."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(tempfile.gettempdir(), RAN),))


NASTY = [
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\t",
        b"\n" * 500,
        b"x" * 100_000,
        b"\xff" * 8,
        b"\0" * 8,
        b"\xff" * 7 + b"\x7f",
    ),
    *(
        b"[" * 5000,
        b"{" * 5000,
        b'{"a":' * 3000,
        b"- " * 5000,
        b"9" * 5000,
        b"1e999",
        b"-1",
        b"NaN",
        b"null",
        b"true",
        b"0x",
    ),
    *(b'"', b"'", b"\\u0000", b": ", b"- ", b"---\n", b"...", b"%", b"<<: ", b"=", b"1_000", b"2001-01-01", b"1:30:00"),
    *(b"../../../tmp/x", b"/etc/passwd", b"!!python/object/apply:os.system [touch x]", b"&a [*a]", b"*a"),
    b"\n".join(b"%c: &%c [" % (n, n) + b",".join([b"*%c" % (n - 1)] * 9) + b"]" for n in range(98, 110)).replace(
        b"*a", b"x"
    ),
    *(b"<<: [*a, *a]", b"{<<: {a: 1}}", b"a: &a {x: 1}\n"),
    b"\n".join(b"%c: &%c {<<: [" % (n, n) + b",".join([b"*%c" % (n - 1)] * 9) + b"]}" for n in range(98, 110)),
    *(pickle.dumps(Payload()), b"PK\x03\x04", b"PAR1", b"GGUF", "\u00e9\u2028".encode() * 20),
]


VALUES: list[Any] = [
    *(
        10**9,
        1e9,
        2**63,
        10**400,
        -1,
        0,
        0.5,
        -1e300,
        True,
        None,
        "",
        "x",
        "all-linear",
        "\0",
        "\ud800",
        "[",
        "a" * 10_000,
    ),
    *(MODULE, f"{MODULE}:run", f"{MODULE}.core", [MODULE], {MODULE: MODULE}, {"trust_remote_code": True}),
    *([], {}, [[]], [1, 2], {"a": 1}, {".*": 10**9}, {".*": {"r": 10**9}}, {"emb": [10**9]}, [-1], [10**9], [None]),
]


@dataclass(frozen=True)
class Target:
    """A reader, the files that it reads, by name, how one of them is changed, and its share of the cases."""

    read: Callable[[Path], object]
    files: dict[str, bytes]
    change: Callable[[bytes, list[bytes], random.Random], bytes] | None = None
    share: float = 1.0


def edited(names: list[str], kinds: dict[str, list[str]]) -> Callable[[bytes, list[bytes], random.Random], bytes]:
    """What changes one to three values of an adapter's configuration, of the keys `names` or those it has already.

    Args:
        names: the keys that its classes know.
        kinds: of keys that say what kind of adapter it is, the values that are known.
    """

    def change(good: bytes, others: list[bytes], draw: random.Random) -> bytes:
        try:
            values = json.loads(good)
        except ValueError:  # the file of the tensors
            return damaged(good, others, draw)
        for _ in range(draw.randint(1, 3)):
            inner = values.get("args")
            where = inner if isinstance(inner, dict) and inner and draw.random() < 0.5 else values
            key = draw.choice([*names, *where, *kinds])
            where[key] = draw.choice(kinds.get(key, VALUES))
        return json.dumps(values).encode()

    return change


def bombs() -> dict[str, bytes]:
    """Small files that hold gigabytes once they are unpacked."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 30_000, pyarrow.int32()), ["x" * 65_536])
    zeros = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int8()), 40_000_000)
    held = {
        "dictionary": pyarrow.table({"text": text}),
        "list": pyarrow.table({"text": pyarrow.ListArray.from_arrays([0, len(zeros)], zeros)}),
        "rows": pyarrow.table({"text": zeros}),
    }
    made = {}
    for name, table in held.items():
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, compression="zstd", data_page_size=1 << 16)
        made[f"{name}.parquet"] = file.getvalue()
        if name == "dictionary":
            with pyarrow.ipc.new_file(arrow := io.BytesIO(), table.schema) as stream:
                stream.write_table(table)
            made["dictionary.arrow"] = arrow.getvalue()
    line, blank = gzip.compress(b"x" * (1 << 20)), gzip.compress(b"\n" * (1 << 20))
    return made | {
        "line.jsonl.gz": gzip.compress(b'{"text": "') + line * 1500 + gzip.compress(b'"}'),
        "blank.csv.gz": blank * 1500,
    }


def damaged(good: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A file with one to four things wrong."""
    found = bytearray(good)
    for _ in range(draw.choice((1, 1, 2, 4))):
        size, kind = len(found), draw.randrange(8)
        a, b = sorted(draw.randrange(size + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 8, 64, 4096)))
        if kind == 0:
            del found[a:]
        elif kind == 1 and size:
            found[draw.randrange(size)] ^= 1 << draw.randrange(8)
        elif kind == 2:
            found[a:b] = draw.choice(NASTY)
        elif kind == 3:
            found[a:a] = draw.choice(NASTY)
        elif kind == 4:
            found[a:a] = found[a:b]
        elif kind == 5:
            del found[a:b]
        elif kind == 6:
            other = draw.choice(others)
            found[a:b] = other[draw.randrange(len(other) + 1) :][:256]
        elif draw.random() < 0.05:
            found = bytearray(draw.choice(NASTY))
        else:  # a word for a word
            words = bytes(found).split(b" ")
            words[draw.randrange(len(words))] = draw.choice(NASTY)
            found = bytearray(b" ".join(words))
    return bytes(found)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Nowhere(io.StringIO):
    """A file that keeps nothing of what is written."""

    def write(self, text: str) -> int:
        return len(text)


def targets(scratch: Path) -> dict[str, Target]:
    """Every reader with good files of its own."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(4)]
    text = "\n".join(json.dumps(row) for row in rows)
    table = "mr,ref\n" + "\n".join(f'"name[{i}], food[x]",The {i} is a place.' for i in range(4))
    made_rows = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(made_rows, scratch / "rows.parquet")
    with pyarrow.ipc.new_stream(str(scratch / "rows.arrow"), made_rows.schema) as stream:
        stream.write_table(made_rows)
    example = Path(__file__).parents[1] / "recipes" / "compare_e2e_small.yaml"
    base, config = tiny(), {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    base.save_pretrained(scratch / "base")
    name = str(scratch / "base")
    known = torch.empty(0)
    for folder, made in (
        ("adapter", InlayConfig(method="pissa", args={"r": 2}, **config)),
        ("lora", LoraConfig(r=2, **config)),
    ):
        made.base_model_name_or_path = name
        model = get_peft_model(tiny(), made)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(0.1)
        model.save_pretrained(str(scratch / folder))
        known = model(input_ids=IDS).logits if folder == "adapter" else known
    point = scratch / "run" / "checkpoints"
    point.mkdir(parents=True)
    (scratch / "run" / checkpoints.METRICS).write_text('{"step": 1, "eval_loss": 2.0}\n')
    with checkpoints.staged_checkpoint(point, 1, False, {"recipe": {}, "identity": {}, "versions": {}}) as part:
        checkpoints.path_of(part, 1).mkdir()
        TrainerState(global_step=1).save_to_json(str(checkpoints.path_of(part, 1) / "trainer_state.json"))
    sealed = checkpoints.digests(checkpoints.path_of(point, 1))
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE).save_pretrained(scratch / "model")
    base.save_pretrained(scratch / "model")
    save_file(
        {"a": torch.ones(4, 4)},
        scratch / "one.safetensors",
        {"fingerprints": json.dumps({"a": cache.fingerprint(torch.ones(4, 4))})},
    )
    vocabulary = {"model": {"vocab": {chr(97 + i): i for i in range(26)}, "merges": []}, "added_tokens": []}
    (scratch / "tokenizer.json").write_text(json.dumps(vocabulary))
    tensors = [New("", name, p.detach(), 0) for name, p in base.named_parameters()]
    write_model(scratch / "m.gguf", base.config, scratch, "gpt-2", tensors)
    quiet = Console(file=Nowhere())
    (scratch / "modules").mkdir()
    payload = f"import pathlib, tempfile\npathlib.Path(tempfile.gettempdir(), {RAN!r}).touch()\ncore = run = None\n"
    (scratch / "modules" / f"{MODULE}.py").write_text(payload)
    sys.path.insert(0, str(scratch / "modules"))
    known_words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
    keys = {f.name for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() for f in fields(kind)}
    of_peft = edited(sorted(keys), {"peft_type": sorted(PEFT_TYPE_TO_CONFIG_MAPPING)})
    own = sorted({f.name for method in METHODS for f in fields(method)} | {f.name for f in fields(InlayConfig)})
    of_inlay = edited(own, {"method": [method.name for method in METHODS]})

    def records(path: Path) -> object:
        return convert_records(read_records(str(next(path.iterdir()))))

    def adapter(path: Path) -> object:
        found = Adapter.open(path, "tiny").attach(tiny())
        assert torch.equal(found(input_ids=IDS).logits, known), "it was read as something else"
        return found

    def unsealed(path: Path) -> object:
        with suppress(ValueError, OSError):
            config = path / "adapter_config.json"
            values = json.loads(config.read_text())
            config.write_text(json.dumps({**values, "seals": None, "hyperparameters": None}))
        return Adapter.open(path, "tiny").attach(tiny())

    def adapter_of_peft(path: Path) -> object:
        found = Adapter.open(path, "tiny")
        with suppress(ValueError):
            read_peft_folder(found)
        return found.attach(tiny())

    def mixed(path: Path) -> object:
        with contextlib.chdir(path):
            return mixture.train_and_heldout(
                load_recipe("r.yaml", {}), lambda rows, rules: convert_records(rows, rules=rules), quiet
            )

    def template(path: Path) -> object:
        known_words.chat_template = read_template(str(path / "t.jinja"), known_words)
        turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user")]
        example = {"prompt": turns, "completion": [{"role": "assistant", "content": "b"}]}
        return encode_example(example, known_words), prompt_ids(turns, known_words)

    def page(path: Path) -> object:
        good = path / "runs" / "good"
        good.mkdir()
        (good / "recipe.yaml").write_bytes(RECIPE)
        (good / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        follower = Follower(path / "runs", path / "events")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                follower.look()
            shown = {run.metrics.parent.name for run in follower.known.values() if run.read}
            assert shown >= {"good"}, "one run hides another"
        except ValueError as error:
            raise AssertionError("a run ends the page") from error
        finally:
            for run in follower.known.values():
                run.writer.close()
        return shown

    def stored(path: Path) -> object:
        weights = BaseModel(str(path)).weights()
        return [weights.read(name) for name in weights.names()]

    def checkpoint(path: Path) -> object:
        found = checkpoints.newest(path, quiet)
        assert found is None or found.run == {"recipe": {}, "identity": {}, "versions": {}}
        return found

    def resealed(path: Path) -> object:
        manifest = checkpoints.path_of(path, 1) / checkpoints.MANIFEST
        with suppress(ValueError, RecursionError):
            about = json.loads(manifest.read_text())
            if isinstance(about, dict):
                about |= {"files": checkpoints.digests(manifest.parent)} if about.get("files") == sealed else {}
                about["seal"] = checkpoints.seal.of_values({k: v for k, v in about.items() if k != "seal"})
                manifest.write_text(json.dumps(about))
        found = checkpoints.newest(path, quiet)
        return found and (state_of(found), RunProgress(path, quiet).restore(found.path))

    def model(path: Path) -> object:
        found, words = BaseModel(str(path)).load(torch.float32), BaseModel(str(path)).tokenizer()
        return found, prompt_ids([{"role": "user", "content": "a b"}], words)

    def cached(path: Path) -> object:
        os.environ["INLAY_CACHE"] = str(path)
        found = cache.load("starts", "one")
        assert found is None or torch.equal(found["a"], torch.ones(4, 4))
        return found

    return {
        "recipe": Target(lambda p: load_recipe(str(p / "r.yaml"), {}), {"r.yaml": RECIPE}),
        "comparison": Target(lambda p: load_comparison(str(p / "c.yaml")), {"c.yaml": example.read_bytes()}),
        **{
            f"data {name}": Target(records, {f"d.{name}": content})
            for name, content in {
                "jsonl": text.encode(), "json": json.dumps(rows).encode(), "csv": table.encode(),
                "tsv": table.replace('"', "").replace(",", "\t").encode(), "txt": text.replace("\n", "\n\n").encode(),
                "parquet": (scratch / "rows.parquet").read_bytes(), "arrow": (scratch / "rows.arrow").read_bytes(),
                "jsonl.gz": gzip.compress(text.encode()),
                "quoted.tsv": table.replace('",', '"\t').replace("mr,", "mr\t").encode(),
            }.items()
        },
        **{
            f"unpacked {name}": Target(records, {f"d.{name}": content}, share=0.02)
            for name, content in bombs().items()
        },
        "mixture": Target(
            mixed,
            {
                "r.yaml": MIXTURE, "a.jsonl": text.encode(), "b.csv": table.encode(),
                "c.json": json.dumps([{"question": f"{i}?", "answer": f"{i}."} for i in range(9)]).encode(),
            },
        ),
        "template": Target(template, {"t.jinja": CHATML}),
        "template of instructions": Target(template, {"t.jinja": INSTRUCT}),
        "page of runs": Target(
            page,
            {
                "runs/bad/metrics.jsonl": b'{"step": 1, "loss": 2.0, "seconds": 0.5}\n{"step": 2, "eval_loss": 1.0}\n',
                "runs/bad/recipe.yaml": RECIPE,
            },
        ),
        "configuration of PEFT": Target(adapter_of_peft, contents(scratch / "lora"), of_peft),
        "configuration without seals": Target(unsealed, contents(scratch / "adapter"), of_inlay),
        "checkpoint": Target(checkpoint, contents(point)),
        "resealed": Target(resealed, contents(point)),
        "model": Target(model, contents(scratch / "model")),
        "adapter": Target(adapter, contents(scratch / "adapter")),
        "adapter of PEFT": Target(lambda p: read_peft_folder(Adapter.open(p, "tiny")), contents(scratch / "lora")),
        "weights": Target(stored, contents(scratch / "base")),
        "gguf": Target(lambda p: builtin.load_gguf(p / "m.gguf"), {"m.gguf": (scratch / "m.gguf").read_bytes()}),
        "cache": Target(cached, {"starts/one.safetensors": (scratch / "one.safetensors").read_bytes()}),
    }  # fmt: skip


def attempt(target: Target, seed: str, folder: Path) -> str:
    """What became of one case: "read", "refused", or what went wrong."""
    draw = random.Random(seed)
    name = draw.choice(sorted(target.files))
    others = [content for content in target.files.values() if content] + NASTY
    for path, content in target.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        change = target.change or damaged
        (folder / path).write_bytes(change(content, others, draw) if path == name else content)
    signal.alarm(SECONDS)
    try:
        target.read(folder)
        return "read"
    except ValueError as error:
        return "refused" if str(error) else "a ValueError that says nothing"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {traceback.format_exc(limit=-1)[-300:]}"
    finally:
        signal.alarm(0)


def run(count: int, seed: int, only: list[str], scratch: Path) -> int:
    """Print a line for each reader; gives the number of unhandled cases."""
    made = {name: target for name, target in targets(scratch).items() if any(o in name for o in only)}
    shares = sum(target.share for target in made.values())
    unhandled, outside = 0, Path(tempfile.gettempdir(), RAN)
    outside.unlink(missing_ok=True)
    for name, target in made.items():
        began, ends, faults = time.process_time(), collections.Counter(), {}
        around = set(scratch.iterdir())
        for i in range(math.ceil(count * target.share / shares)):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                end = attempt(target, f"{seed} {name} {i}", Path(folder))
            ends[end if end in ("read", "refused") else "unhandled"] += 1
            faults.setdefault(end, i) if end not in ("read", "refused") else None
            if outside.exists() or set(scratch.iterdir()) != around:
                outside.unlink(missing_ok=True)
                faults.setdefault("something was run or written outside", i)
                ends["unhandled"] += 1
        unhandled += ends["unhandled"]
        seconds = time.process_time() - began
        told = ", ".join(f"{ends[end]} {end}" for end in ("refused", "read", "unhandled"))
        print(
            f"{name}: {sum(ends.values())} inputs, {told} ({seconds:.0f} CPU-seconds)",
            flush=True,
        )
        for fault, i in list(faults.items())[:5]:
            print(f"  case {i}: {fault}", flush=True)
    return unhandled


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("count", type=int, nargs="?", default=100_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", nargs="+", default=[""], help="readers with one of these in their name")
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    quiet()

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (ALLOCATED, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with tempfile.TemporaryDirectory(dir=SHARED if os.access(SHARED, os.W_OK) else None) as folder:
        unhandled = run(asked.count, asked.seed, asked.only, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = f"peak memory {peak / 2**30:.2f} GiB, {time.process_time() / 60:.1f} CPU-minutes"
    print(f"{asked.count} inputs, {unhandled} unhandled; {used}")
    sys.exit(bool(unhandled or peak > MEMORY))


if __name__ == "__main__":
    main()
