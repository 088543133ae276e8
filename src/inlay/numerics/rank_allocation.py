"""Allocate ranks per layer from spectra, under a budget, without training: LaMDA++ (`allocate`), WeLore, EVA.

    E_l(r) = Σ_{i<=r} σ_i² / Σ_i σ_i²,   the share of layer l's energy in its first r triplets

Azizi, Kundu, Pedram 2024, "LaMDA", arXiv 2406.12832, allocate ranks by a normalised energy score of the pretrained
weights; formula, set of ranks and budget are open there, and [ours]: ranks come from {r/4, r/2, r, 3r/2, 2r}; each type
of module (q_proj, ...) spends what its modules would train at r, because types differ far more than layers do; every
layer starts at its smallest rank, and again and again the layer with the largest score is raised to its next one, until
nothing fits. E_l is taken at the layer's present rank:

    flat    (1 − E_l) / Δparameters   what a layer still lacks, per parameter that the next rank costs; it evens out,
                                      and layers that differ by less than a step keep one rank
    peaked  E_l / Δparameters         what it has already: the most peaked layers go to 2r, one after the other

These are pure functions of numbers that know no method and no model, so they serve every method whose size is an r.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["flat", "peaked"]
DIRECTIONS = ("flat", "peaked")
Cost = Callable[[str, int], int]  # parameters that a module trains at a rank; a ValueError if it cannot have it


class Rung(NamedTuple):
    """Describe one rank that a layer may have: what it costs, and the share of the energy that it covers."""

    rank: int
    cost: int
    energy: float


def energy(S: Tensor, r: int) -> float:
    """Return E(r) of the singular values S (k,), in descending order: in [0, 1], and 1 for a weight of zeros."""
    squares = S.double().square()
    total = squares.sum()
    return min(1.0, (squares[:r].sum() / total).item()) if total > 0 else 1.0


def module_type(name: str) -> str:
    """Return the type of a weight: the last component of its module's name; of an expert, "experts.down_proj"."""
    *words, last = [part for part in name.split(".") if not part.isdigit()] or [name]
    return ".".join([*words[-1:], last]) if name.rpartition(".")[2].isdigit() else last


def rank_set(r: int) -> list[int]:
    """Return {r/4, r/2, r, 3r/2, 2r}, rounded down, at least 1, ascending and distinct.

    Raises:
        ValueError: r is not a whole number from 1 up.
    """
    if type(r) is not int or r < 1:
        raise ValueError(f"r={r!r} is not a rank to allocate around; choose a whole number from 1 up")
    return sorted({max(1, r * quarters // 4) for quarters in (1, 2, 4, 6, 8)})


def allocate(
    spectra: Mapping[str, Tensor],
    r: int,
    cost: Cost,
    direction: Direction = "flat",
    kind: Callable[[str], str] = module_type,
) -> dict[str, int]:
    """Return a rank for every module; those of one kind together cost at most what they would with r everywhere.

    The same arguments give the same ranks; between equal scores the earlier module is raised first.

    Args:
        spectra: the singular values (k,) of each module's weight, descending, k = min(out, in).
        r: the rank that sets the budget.
        cost: the parameters that a module trains at a rank. Ranks for which it raises a ValueError (Bat's blocks must
            divide a weight's sides) are left out, and so are those above k.
        direction: "flat" gives more to the flatter spectra, "peaked" to the more peaked ones.
        kind: returns the group of a module; each group shares a budget.

    Raises:
        ValueError: r, direction or a spectrum cannot be used, a module cannot have the rank r, or costs fall with it.
    """
    ranks = rank_set(r)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is not one of {', '.join(DIRECTIONS)}")
    if not spectra:
        raise ValueError("there are no spectra to allocate ranks by; give at least one module's singular values")
    for name, S in spectra.items():
        _check_spectrum(name, S)
    groups: dict[str, list[str]] = {}
    for name in spectra:
        groups.setdefault(kind(name), []).append(name)
    chosen: dict[str, int] = {}
    for names in groups.values():
        budget = sum(cost(name, r) for name in names)
        ladders = [_ladder(name, spectra[name], ranks, cost) for name in names]
        steps = _climb(ladders, budget, direction)
        chosen |= {name: ladder[step].rank for name, ladder, step in zip(names, ladders, steps, strict=True)}
    return {name: chosen[name] for name in spectra}


def by_threshold(spectra: Mapping[str, Tensor], r: int, cost: Cost) -> dict[str, int]:
    """Return WeLore's ranks: one threshold κ for all, r_l = #{i: (σ_i − σ_min) / (σ_max − σ_min) >= κ}, under a budget.

    Jaiswal et al. 2024, "From GaLore to WeLore", arXiv 2407.11239. The smallest κ is taken whose modules together train
    at most what they would with r everywhere; a rank that a module cannot have is lowered to the next it can [ours].

    Args:
        spectra: as in `allocate`.
        r: the rank that sets the budget.
        cost: as in `allocate`, but all modules share one budget.

    Raises:
        ValueError: a spectrum cannot be used, or a module cannot have the rank r.
    """
    if not spectra:
        raise ValueError("there are no spectra to allocate ranks by; give at least one module's singular values")
    for name, S in spectra.items():
        _check_spectrum(name, S)
    shares = {name: _share(S.double()) for name, S in spectra.items()}
    budget = sum(cost(name, r) for name in spectra)

    def at(kappa: float) -> dict[str, int]:
        return {name: _allowed(name, max(1, int((share >= kappa).sum())), cost) for name, share in shares.items()}

    low, high = -1e-9, 1.0  # κ <= 0 gives the full ranks, κ = 1 counts the largest values alone
    if sum(cost(name, rank) for name, rank in at(low).items()) <= budget:
        return at(low)
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(cost(name, rank) for name, rank in at(middle).items()) <= budget
        low, high = (low, middle) if fits else (middle, high)
    chosen = at(high)
    if sum(cost(name, rank) for name, rank in chosen.items()) > budget:  # many values tie for the largest
        return {name: min(rank, r) for name, rank in chosen.items()}
    return chosen


def by_variance(ratios: Mapping[str, Tensor], r: int, cost: Cost) -> dict[str, int]:
    """Return EVA's ranks: of all modules' explained variance ratios pooled, the largest, r per module on average.

    Paischer et al. 2024, arXiv 2410.07170. The budget counts ranks, not parameters. A module keeps at least rank 1
    [ours]; one that cannot have its rank gets the next lower one it can [ours].

    Args:
        ratios: by module the shares (k,) of its inputs' variance that its vectors explain, descending. k is the largest
            rank that it can get: ρ r, by the paper.
        r: the mean rank.
        cost: as in `allocate`; only used to find which ranks a module can have.
    """
    rest = sorted(((-ratio, name) for name, S in ratios.items() for ratio in S.tolist()[1:]), key=lambda pair: pair[0])
    chosen = dict.fromkeys(ratios, 1)
    for _, name in rest[: (r - 1) * len(ratios)]:
        chosen[name] += 1
    return {name: _allowed(name, rank, cost) for name, rank in chosen.items()}


def _share(S: Tensor) -> Tensor:
    """Return (σ − σ_min) / (σ_max − σ_min); 1 where all are equal."""
    spread = S[0] - S[-1]
    return (S - S[-1]) / spread if spread > 0 else S.new_ones(S.shape)


def _allowed(name: str, most: int, cost: Cost) -> int:
    """Return the largest rank up to `most` that a module can have."""
    for rank in range(most, 0, -1):
        try:
            cost(name, rank)
        except ValueError:
            continue
        return rank
    raise ValueError(f"{name} can have none of the ranks 1 to {most}; choose another r, or leave the module out")


def _check_spectrum(name: str, S: Tensor) -> None:
    fault = None
    if S.ndim != 1 or not len(S):
        fault = f"have the shape {tuple(S.shape)}; give one dimension, min(out, in) long"
    elif not S.isfinite().all():
        fault = "hold NaN or Inf; repair the weight or leave the module out"
    elif (S < 0).any() or (S[1:] > S[:-1]).any():
        fault = "are not non-negative and descending; sort them, largest first"
    if fault:
        raise ValueError(f"the singular values of {name} {fault}")


def _ladder(name: str, S: Tensor, ranks: list[int], cost: Cost) -> list[Rung]:
    """Return the ranks that a module may have, ascending, each costing more than the one before."""
    rungs: list[Rung] = []
    for rank in [rank for rank in ranks if rank <= len(S)] or [len(S)]:
        try:
            price = cost(name, rank)
        except ValueError:
            continue
        if not rungs or price > rungs[-1].cost:
            rungs.append(Rung(rank, price, energy(S, rank)))
    if not rungs:
        raise ValueError(f"{name} can have none of the ranks {ranks}; choose another r, or leave the module out")
    return rungs


def _climb(ladders: list[list[Rung]], budget: int, direction: Direction) -> list[int]:
    """Return the rung of every ladder, as indices, when nothing more fits the budget."""
    steps = [0] * len(ladders)
    left = budget - sum(ladder[0].cost for ladder in ladders)
    if left < 0:
        raise ValueError("a smaller r trains more parameters here, so no ranks can be allocated under a budget")
    heap = [(_urgency(ladder, 0, direction), i) for i, ladder in enumerate(ladders) if len(ladder) > 1]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        now, then = ladders[i][steps[i] : steps[i] + 2]
        if then.cost - now.cost > left:
            continue  # for good: the rest of the budget only shrinks
        left -= then.cost - now.cost
        steps[i] += 1
        if steps[i] + 1 < len(ladders[i]):
            heapq.heappush(heap, (_urgency(ladders[i], steps[i], direction), i))
    return steps


def _urgency(ladder: list[Rung], step: int, direction: Direction) -> float:
    """Return minus the score of a ladder's next step: the smallest comes first, of equal ones the earliest module's."""
    now, then = ladder[step : step + 2]
    return -(1 - now.energy if direction == "flat" else now.energy) / (then.cost - now.cost)


def allocate_blocks(scores: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """Return how many of the `count` largest scores of all weights together each weight has (SMT, arXiv 2405.15525).

    Args:
        scores: of every block, by weight; of any shapes.
        count: the budget of the whole model, in blocks.

    Raises:
        ValueError: there are fewer blocks than `count`.
    """
    sizes = [score.numel() for score in scores.values()]
    if not 0 < count <= sum(sizes):
        raise ValueError(f"a budget of {count} blocks is not one of 1 to {sum(sizes)}, which the weights have")
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    flat = torch.cat([score.flatten().float().cpu() for score in scores.values()])
    counts = torch.bincount(owners[flat.topk(count).indices], minlength=len(sizes))
    return dict(zip(scores, counts.tolist(), strict=True))
