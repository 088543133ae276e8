"""`inlay env` and `inlay schema`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from inlay.messages import show_text

PACKAGES = """torch transformers peft trl accelerate datasets safetensors tokenizers bitsandbytes triton optuna ray
deepspeed gguf lm-eval""".split()
VARIABLES = """INLAY_CACHE INLAY_DEBUG INLAY_TRITON HF_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES OMP_NUM_THREADS
WORLD_SIZE""".split()  # none of them holds a secret


# Numbers that Inlay and its libraries read, most of them while they are imported.
WHOLE = """RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_PORT OMPI_COMM_WORLD_SIZE PMI_SIZE MV2_COMM_WORLD_SIZE
HF_HUB_ETAG_TIMEOUT HF_HUB_DOWNLOAD_TIMEOUT INLAY_LAUNCHER""".split()


def check_variables(trains: bool) -> None:
    """Raise a ValueError, before anything slow, where a variable of the environment would end a command later.

    An empty one counts as not set. Where the command `trains`, what a launcher says has to be whole.
    """
    os.environ.pop("MPLBACKEND", None)  # plots go to files, and matplotlib cannot be imported with a wrong name
    for name in WHOLE:
        value = os.environ.get(name)
        if value is not None and not value.strip():
            del os.environ[name]
        elif value is not None and not re.fullmatch(r"\s*-?[0-9]{1,9}\s*", value):
            raise ValueError(f"{name}={value!r:.60} in the environment is not a whole number; unset {name}")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"\s*[0-9]{1,9}(\s*,\s*[0-9]{1,9})*\s*", threads or "1"):
        raise ValueError(f"OMP_NUM_THREADS={threads!r:.60} in the environment is not a number of threads, as 4")
    if (triton := os.environ.get("INLAY_TRITON", "")) not in ("", "0", "1"):
        raise ValueError(f"INLAY_TRITON={triton!r:.60} in the environment is not one of 0 (off) and 1 (on)")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if not trains:
        return
    started = f"inlay train --num-processes {size} starts all of them, and unset WORLD_SIZE trains in one"
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not os.environ.get(name):
            raise ValueError(f"WORLD_SIZE={size} in the environment is of {size} processes, of which no {name} is "
                             f"set; {started}")  # fmt: skip
    for name in ("RANK", "LOCAL_RANK"):
        if int(os.environ.get(name, 0)) >= max(1, size):
            raise ValueError(f"{name}={os.environ[name]} in the environment is not below WORLD_SIZE={size}; "
                             f"unset {name}, or let a launcher set both")  # fmt: skip


def check_text(arguments: Sequence[str]) -> None:
    """Raise a ValueError for an argument that is no text: libraries that write files would end the command later."""
    for text in arguments:
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(
                f"{text!r:.100} is not UTF-8, or was read as {sys.getfilesystemencoding()}; rename the file, or "
                "export LC_ALL=C.UTF-8 where its name is right"
            )


def env_command(options: argparse.Namespace) -> None:
    """Print what a bug report needs: versions, device, memory, cache folder and the variables that Inlay obeys.

    example: inlay env
    """
    facts = machine_facts()
    if options.json:
        show_text(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        for row in value.items() if isinstance(value, dict) else [(name, value)]:
            show_text(f"{row[0]:<24}{row[1]}")


def env_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the flags of `env`."""
    verb.add_argument("--json", action="store_true", help="print JSON")


def machine_facts() -> dict[str, object]:
    """Return versions, device, memory in GiB, the cache folder with its size in GiB, and environment variables."""
    import torch

    from inlay.files.cache import cache_folder
    from inlay.models.sizes import free_memory

    files = [path for path in cache_folder().rglob("*") if path.is_file()] if cache_folder().is_dir() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "inlay": installed_version("inlay"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": ", ".join(gpus) or f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "free memory (GiB)": round(free_memory() / 2**30, 2),
        "cache": str(cache_folder()),
        "cache size (GiB)": round(sum(path.stat().st_size for path in files) / 2**30, 2),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def installed_version(package: str) -> str:
    """Return a package's version, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def schema_command(options: argparse.Namespace) -> None:
    """Print the JSON Schema of a recipe, by which an editor completes and checks a YAML file.

    Keep it beside the file, and begin the file with the line
    # yaml-language-server: $schema=recipe.schema.json

    example: inlay schema > recipe.schema.json
    """
    from inlay.cli.json_schema import json_schema

    show_text(json.dumps(json_schema(options.kind), indent=1, ensure_ascii=False))


def schema_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `schema`."""
    verb.add_argument("kind", nargs="?", default="recipe", help="recipe (default), compare or tune")
