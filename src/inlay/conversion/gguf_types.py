"""The types that a GGUF file's matrices may have, and who makes them: the package gguf, or llama.cpp's own tool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import torch

from inlay.messages import did_you_mean, one_line

Kind = gguf.GGMLQuantizationType
PLAIN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # and the dtype that is merged in
PACKED = {  # by gguf, from fp32
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Kind.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Kind.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Kind.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
BY_LLAMA_CPP = """q6_k q5_k_m q5_k_s q4_k_m q4_k_s q3_k_l q3_k_m q3_k_s q2_k iq4_nl iq4_xs iq3_m iq3_s""".split()
TOOL = "llama-quantize"
ENDS = ("token_embd.weight", "output.weight")  # which lose most: never below 8 bits, as llama.cpp has them


def check_gguf_type(name: str | None, dtype: str) -> None:
    """Raise a ValueError unless a file of this type can be made here.

    Args:
        name: of the type; None: that of the dtype.
        dtype: that is merged in: auto, or a type's own.

    Raises:
        ValueError: no such type, two dtypes, or llama.cpp's tool is not on the PATH.
    """
    if name is None:
        return
    if name not in (*PLAIN, *PACKED, *BY_LLAMA_CPP):
        raise ValueError(f"gguf_type={name!r}: {did_you_mean(name, [*PLAIN, *PACKED, *BY_LLAMA_CPP])}")
    if dtype not in ("auto", PLAIN.get(name, "float32")):
        raise ValueError(f"gguf_type={name!r} is made of {PLAIN.get(name, 'float32')}; leave out dtype={dtype!r}")
    if name in BY_LLAMA_CPP and shutil.which(TOOL) is None:
        here = ", ".join([*PACKED, *PLAIN])
        raise ValueError(f"{name} is made by llama.cpp's {TOOL}, which is not on the PATH; without it: {here}")


def packed(numbers: np.ndarray, name: str, kind: str) -> tuple[np.ndarray, Kind]:
    """Return a matrix in a type of `PACKED`, and that type.

    What has no whole blocks of 32 in a row stays fp16; embeddings and head are not packed below 8 bits.
    """
    if numbers.shape[-1] % 32:
        return gguf.quants.quantize(numbers, Kind.F16), Kind.F16
    chosen = Kind.Q8_0 if name in ENDS else PACKED[kind][0]
    return gguf.quants.quantize(numbers, chosen), chosen


def lost_share(numbers: np.ndarray, made: np.ndarray, kind: Kind) -> float:
    """Return ‖W' − W‖ / ‖W‖ of a packed matrix."""
    now = torch.from_numpy(np.array(gguf.quants.dequantize(made, kind)))
    then = torch.from_numpy(numbers)
    return float((now - then).norm() / then.norm().clamp_min(torch.finfo().tiny))


def quantize_file(path: Path, kind: str) -> None:
    """Put the file `path` into a type that llama.cpp's own tool makes.

    Raises:
        ValueError: the tool fails.
    """
    full = path.with_name("full.gguf")
    path.rename(full)
    done = subprocess.run([TOOL, str(full), str(path), kind.upper()], capture_output=True, text=True, errors="replace")
    full.unlink()
    if done.returncode or not path.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ValueError(f"{TOOL} ended with status {done.returncode}, and said: {one_line(said)[:300]}")
