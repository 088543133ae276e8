"""`inlay fold`, `inlay export`, `inlay import` and `inlay merge`."""

from __future__ import annotations

import argparse

from inlay.cli.parser import SCALE, WHAT_AND_WHERE, Parser, add_fields, add_learned
from inlay.messages import Terminal, gib, show_text


def fold_command(options: argparse.Namespace) -> None:
    """Cut a method's piece out of a model, quantise the rest to 4 bits, and write out/base and out/adapter.

    example:  inlay fold meta-llama/Llama-3.2-1B folded/ --method dota --bond 32
    """
    import statistics

    from rich.table import Table
    from tqdm import tqdm

    from inlay.conversion.fold import fold
    from inlay.messages import quiet
    from inlay.recipe.reading import from_flag, load_recipe

    quiet()
    rest = ("verb", "run", "model", "out", "overwrite", "rounds")
    flags = {k: from_flag(k, v) for k, v in vars(options).items() if k not in rest and isinstance(v, str)}
    flags |= {k: v for k, v in vars(options).items() if k not in rest and isinstance(v, bool)}
    recipe = load_recipe(None, {**flags, "model": options.model})
    with tqdm(desc="folding", unit="weight", disable=None) as bar:
        folded = fold(
            recipe.model, options.out, recipe.config(), rounds=options.rounds, revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code, overwrite=options.overwrite, done=lambda _: bar.update(),
        )  # fmt: skip
    table = Table("weights", "plain NF4", "folded", title="mean ‖W' − W‖ / ‖W‖", title_justify="left")
    groups: dict[str, list] = {}
    for error in folded.errors:
        groups.setdefault(error.module.rpartition(".")[2], []).append(error)
    for kind, errors in (*groups.items(), ("all", folded.errors)):
        table.add_row(kind, *(f"{statistics.mean(getattr(e, k) for e in errors):.4f}" for k in ("plain", "folded")))
    Terminal().print(table)
    size = sum(file.stat().st_size for file in folded.base.iterdir())
    show_text(f"{folded.base} ({gib(size)}), {folded.adapter}; each weight's error: {folded.folder / 'errors.csv'}")


def fold_arguments(verb: Parser) -> None:
    """Add the arguments of `inlay fold`."""
    verb.add_argument("model", help="hub id, folder or builtin")
    verb.add_argument("out", help="folder of the new base and adapter")
    verb.add_argument("--rounds", type=int, default=1, help="quantise, decompose again what that lost, ... (default 1)")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier fold")
    add_fields(verb, WHAT_AND_WHERE)
    add_learned(verb)


def export_command(options: argparse.Namespace) -> None:
    """Write an adapter as a plain LoRA: a PEFT folder (vLLM serves it), or GGUF for llama.cpp and Ollama.

    example:  inlay export runs/builtin-bone lora/ --to lora
    """
    from inlay.conversion.export_lora import export_lora
    from inlay.messages import quiet

    quiet()
    adapters = {options.adapter: options.scale}
    for path, weight in map(path_and_weight, options.add):
        adapters[path] = adapters.get(path, 0.0) + weight
    done = export_lora(
        adapters, options.out, to=options.to, rank=options.rank, energy=options.energy, model=options.model,
        dtype=options.dtype, pad=not options.no_pad, overwrite=options.overwrite,
        revision=options.revision, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    worst = max(done.errors.values())
    if worst > 1e-5:
        for module, error in done.errors.items():
            show_text(f"{module}: relative error {error:.2e}")
    lost = max(done.rounding.values())
    rounded = f"; rounding to {options.dtype} lost up to {lost:.1e} of a change" if lost else ""
    exact = "exact" if worst < 1e-5 else f"largest relative error {worst:.2e}"
    show_text(f"{done.folder}: rank {done.rank}, {exact}{rounded}")


def export_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay export`."""
    verb.add_argument("adapter", help="run folder or adapter folder")
    verb.add_argument("out", help="folder of the LoRA")
    verb.add_argument("--to", default="lora", choices=("lora", "vllm", "gguf"), help="lora (default): for PEFT and "
                      "vLLM; vllm: for vLLM where experts are adapted")  # fmt: skip
    verb.add_argument("--rank", type=int, help="at most so many ranks (DoTA, Bat: needed, or --energy)")
    verb.add_argument("--energy", type=float, help="as many ranks as keep this share of the change, 0 to 1")
    verb.add_argument("--scale", "--weight", type=float, default=1.0, help=SCALE)
    verb.add_argument("--add", action="append", default=[], metavar="ADAPTER=WEIGHT", help="and so much of another one")
    verb.add_argument("--no-pad", action="store_true", help="do not fill up to a rank that vLLM serves")
    verb.add_argument("--model", help="base model (default: the one the adapter names)")
    verb.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    verb.add_argument("--revision", help="revision of a hub model (default: the one it was trained on)")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")


def import_command(options: argparse.Namespace) -> None:
    """Convert a LoRA, MiSS or Bone adapter of PEFT to an Inlay adapter with the same outputs.

    example:  inlay import lora/ imported/
    """
    from inlay.conversion.import_adapter import import_adapter
    from inlay.messages import quiet

    quiet()
    given = {k: v for k, v in vars(options).items() if k not in ("verb", "run")}
    done = import_adapter(**given)
    for note in done.notes:
        show_text(f"note: {note}")
    show_text(f"{done.folder}: {done.method} on {done.weights} weights")


def import_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay import`."""
    verb.add_argument("adapter", help="folder of a PEFT adapter")
    verb.add_argument("out", help="folder of the Inlay adapter")
    verb.add_argument("--model", help="base model (default: the one the adapter names)")
    verb.add_argument("--initial", help="the same adapter as saved before training (PiSSA and its relatives)")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier import")


def path_and_weight(text: str) -> tuple[str, float]:
    """Return an adapter and its weight, from ADAPTER=WEIGHT."""
    path, _, weight = text.rpartition("=")
    try:
        return path or text, float(weight)
    except ValueError:
        raise ValueError(f"--add {text}: write it as ADAPTER=WEIGHT, as in runs/other=0.5") from None


def merge_command(options: argparse.Namespace) -> None:
    """Merge an adapter into its base: the checkpoint loads in transformers, vLLM or llama.cpp without Inlay.

    example:  inlay merge runs/builtin-bone merged/
    """
    from inlay.conversion.merge import merge
    from inlay.evaluation.run_settings import chat_settings
    from inlay.messages import quiet

    quiet()
    system = chat_settings(options.adapter).system if options.to == "gguf" else None
    done = merge(
        options.adapter, options.out, options.model, options.dtype, options.overwrite,
        to=options.to, gguf_type=options.gguf_type, system=system, shard=options.shard, probe=not options.no_probe,
        scale=options.scale,
        revision=options.revision, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    mean, most = sum(done.lost.values()) / max(1, len(done.lost)), max(done.lost.values(), default=0.0)
    show_text(f"{done.folder}: rounding lost {mean:.1e} of the change of a weight, at most {most:.1e}")
    if mean > 0.1:
        show_text("note: this dtype is too coarse for so small a change; use --dtype float32, or serve the adapter")
    if done.packed:
        off = sum(done.packed.values()) / len(done.packed)
        show_text(
            f"{options.gguf_type}: a matrix is off by {off:.2%} on average, at most {max(done.packed.values()):.2%}"
        )
    if done.logit_error is not None:
        show_text(f"largest logit difference to the adapter on a probe batch {done.logit_error:.2e}")


def merge_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `inlay merge`."""
    verb.add_argument("adapter", help="run folder or adapter folder")
    verb.add_argument("out", help="folder of the new checkpoint")
    verb.add_argument("--model", help="base model (default: the one the adapter names)")
    verb.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    verb.add_argument(
        "--to", default="safetensors", choices=("safetensors", "gguf"), help="gguf: for llama.cpp, Ollama"
    )
    verb.add_argument("--gguf-type", metavar="TYPE", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, or one of "
                      "llama.cpp's llama-quantize, as q4_k_m (default: that of --dtype)")  # fmt: skip
    verb.add_argument("--scale", type=float, default=1.0, help=SCALE)
    verb.add_argument("--shard", default="4GB", help="at most so large a file, as 500MB (default 4GB)")
    verb.add_argument("--no-probe", action="store_true", help="do not compare its logits with the adapter's")
    verb.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    verb.add_argument("--revision", help="revision of a hub model (default: the one it was trained on)")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")
