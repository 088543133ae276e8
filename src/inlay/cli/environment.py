"""`inlay env` and `inlay schema`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from inlay.messages import show_text

PACKAGES = """torch transformers peft trl accelerate datasets safetensors tokenizers bitsandbytes triton optuna ray
deepspeed gguf lm-eval""".split()
VARIABLES = """INLAY_CACHE INLAY_DEBUG INLAY_TRITON HF_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES OMP_NUM_THREADS
WORLD_SIZE""".split()  # none of them holds a secret


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
