"""The allocator, a pure function: its budget, its order, and what it refuses."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.numerics.rank_allocation import allocate, by_threshold, by_variance, energy, module_type, rank_set

DIRECTIONS = ("flat", "peaked")


def linear(name: str, rank: int) -> int:
    """What LoRA would cost on a 24 × 40 weight."""
    return 64 * rank


def lamda(name: str, rank: int) -> int:
    return rank * rank + 24 * rank


def blocks(name: str, rank: int) -> int:
    """Blocks that must divide 24."""
    if 24 % rank:
        raise ValueError(f"r={rank} does not divide 24")
    return 24 * rank


spectrum = st.lists(st.floats(0, 1e3, width=32), min_size=8, max_size=40).map(
    lambda values: torch.tensor(sorted(values, reverse=True))
)
model = st.dictionaries(
    st.builds(lambda layer, kind: f"layers.{layer}.{kind}", st.integers(0, 9), st.sampled_from(["q", "k", "up"])),
    spectrum, min_size=1, max_size=12,
)  # fmt: skip
ranks, directions, costs = st.integers(1, 8), st.sampled_from(DIRECTIONS), st.sampled_from([linear, lamda])


def decaying(power: float, size: int = 64) -> torch.Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64) ** -power


@given(model, ranks, costs, directions)
def test_no_type_spends_more_than_it_would_at_r(spectra, r, cost, direction):
    chosen = allocate(spectra, r, cost, direction)
    assert list(chosen) == list(spectra)
    spent, budget = Counter(), Counter()
    for name, rank in chosen.items():
        spent[module_type(name)] += cost(name, rank)
        budget[module_type(name)] += cost(name, r)
        assert rank in rank_set(r)
        assert 1 <= rank <= len(spectra[name])
    assert all(spent[kind] <= budget[kind] for kind in budget)


@given(model, ranks, costs, directions)
def test_nothing_more_would_fit(spectra, r, cost, direction):
    chosen = allocate(spectra, r, cost, direction)
    for name, rank in chosen.items():
        of_kind = [other for other in chosen if module_type(other) == module_type(name)]
        left = sum(cost(other, r) - cost(other, chosen[other]) for other in of_kind)
        higher = [other for other in rank_set(r) if rank < other <= len(spectra[name])]
        assert not higher or cost(name, higher[0]) - cost(name, rank) > left


@given(model, ranks, costs, directions)
def test_the_same_spectra_give_the_same_ranks(spectra, r, cost, direction):
    copies = {name: S.clone() for name, S in spectra.items()}
    assert allocate(spectra, r, cost, direction) == allocate(copies, r, cost, direction)
    scaled = {name: 2 * S for name, S in spectra.items()}
    assert allocate(spectra, r, cost, direction) == allocate(scaled, r, cost, direction)


@given(st.permutations(range(6)), ranks, directions)
def test_the_order_of_modules_does_not_matter_without_ties(order, r, direction):
    spectra = {f"layers.{i}.q": decaying(0.1 + 0.13 * i) for i in range(6)}
    shuffled = {f"layers.{i}.q": spectra[f"layers.{i}.q"] for i in order}
    assert allocate(shuffled, r, linear, direction) == allocate(spectra, r, linear, direction)


@given(st.lists(st.integers(0, 300), min_size=2, max_size=8, unique=True), ranks, costs)
def test_flatter_spectra_get_at_least_as_much_and_the_other_way_round(powers, r, cost):
    """A power law with a smaller exponent has less energy in every first r: it is flatter."""
    flat_first = sorted(powers)
    spectra = {f"layers.{p}.q": decaying(p / 100) for p in powers}
    flat = allocate(spectra, r, cost, "flat")
    peaked = allocate(spectra, r, cost, "peaked")
    for a, b in itertools.pairwise(flat_first):
        assert flat[f"layers.{a}.q"] >= flat[f"layers.{b}.q"]
        assert peaked[f"layers.{a}.q"] <= peaked[f"layers.{b}.q"]


def test_the_ranks_of_a_small_case_by_hand():
    """r = 4, LoRA: all start at 1, which leaves 9 ranks of 12; steps cost 1 (to 2), then 2 each (to 4, 6, 8)."""
    spectra = {"flat.q": decaying(0.0), "middle.q": decaying(0.5), "steep.q": decaying(3.0)}
    # (1 − E)/cost at 1, 2, 4, 6: flat .98 .48 .47 .45, middle .79 .34 .28, steep .02
    assert allocate(spectra, 4, linear, "flat") == {"flat.q": 8, "middle.q": 2, "steep.q": 2}
    # E/cost: flat .02, middle .21 .16, steep .98 .50 .50 .50
    assert allocate(spectra, 4, linear, "peaked") == {"flat.q": 2, "middle.q": 2, "steep.q": 8}


def test_equal_layers_are_raised_in_their_order():
    spectra = {f"{i}.q": decaying(1.0) for i in range(3)}
    assert allocate(spectra, 5, linear) == {"0.q": 5, "1.q": 5, "2.q": 5}
    assert allocate(spectra, 8, lamda) == dict.fromkeys(spectra, 8)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cost", [linear, lamda])
def test_one_layer_alone_gets_r(cost, direction):
    assert allocate({"lm_head": decaying(1.0)}, 8, cost, direction) == {"lm_head": 8}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rank_one_stays_one(direction):
    assert rank_set(1) == [1, 2]
    spectra = {f"{i}.q": decaying(0.3 * i) for i in range(4)}
    assert set(allocate(spectra, 1, linear, direction).values()) == {1}


def test_the_set_of_ranks():
    assert rank_set(16) == [4, 8, 16, 24, 32]
    assert rank_set(2) == [1, 2, 3, 4]
    assert rank_set(3) == [1, 3, 4, 6]


def test_ranks_that_a_method_refuses_are_left_out():
    spectra = {f"{i}.q": decaying(0.2 * i) for i in range(8)}
    chosen = allocate(spectra, 8, blocks)
    assert set(chosen.values()) <= {2, 4, 8, 12}  # 16 does not divide 24
    with pytest.raises(ValueError, match="r=5 does not divide 24"):
        allocate(spectra, 5, blocks)


def test_a_weight_narrower_than_the_smallest_rank_gets_its_own():
    assert allocate({"score": torch.ones(2)}, 16, linear) == {"score": 2}


def test_types_do_not_share_a_budget():
    q = {f"{i}.q": decaying(0.2 * i) for i in range(4)}
    k = {f"{i}.k": decaying(1 + 0.2 * i) for i in range(4)}
    assert allocate({**q, **k}, 8, linear) == {**allocate(q, 8, linear), **allocate(k, 8, linear)}
    together = allocate({**q, **k}, 8, linear, kind=lambda name: "all")
    assert sum(together[n] for n in k) < sum(together[n] for n in q)


def test_a_method_that_shrinks_with_its_rank_is_refused():
    with pytest.raises(ValueError, match="a smaller r trains more parameters here"):
        allocate({"a.q": decaying(1), "b.q": decaying(2)}, 4, lambda name, rank: 100 // rank)


def test_energy():
    assert energy(torch.tensor([2.0, 1.0, 1.0]), 1) == pytest.approx(4 / 6)
    assert energy(torch.tensor([2.0, 1.0]), 9) == 1.0
    assert energy(torch.zeros(4), 1) == 1.0
    assert energy(torch.full((3,), 1e30), 1) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 0}, "r=0 is not a rank to allocate around; choose a whole number from 1 up"),
        ({"r": 2.0}, "r=2.0"),
        ({"direction": "steep"}, "direction='steep' is not one of flat, peaked"),
        ({"spectra": {}}, "at least one module"),
        ({"spectra": {"a.q": torch.zeros(0)}}, "a.q have the shape"),
        ({"spectra": {"a.q": torch.ones(2, 2)}}, "one dimension"),
        ({"spectra": {"a.q": torch.tensor([1.0, float("nan")])}}, "NaN or Inf"),
        ({"spectra": {"a.q": torch.tensor([float("inf"), 1.0])}}, "NaN or Inf"),
        ({"spectra": {"a.q": torch.tensor([1.0, -1.0])}}, "not non-negative and descending"),
        ({"spectra": {"a.q": torch.tensor([1.0, 2.0])}}, "sort them, largest first"),
    ],
)
def test_what_cannot_be_used_is_said(change, says):
    with pytest.raises(ValueError, match=says):
        allocate(**{"spectra": {"a.q": torch.ones(4)}, "r": 2, "cost": linear, **change})


@settings(max_examples=30, deadline=None)
@given(spectra=model, r=ranks, cost=costs)
def test_welores_ranks_come_of_one_threshold_within_the_budget(spectra, r, cost):
    found = by_threshold(spectra, r, cost)
    assert sum(cost(n, rank) for n, rank in found.items()) <= sum(cost(n, r) for n in spectra)
    shares = {}
    for name, S in spectra.items():
        low, spread = S[-1].double(), (S[0] - S[-1]).double()
        shares[name] = (S.double() - low) / spread if spread else torch.ones(len(S))
    if all(share[1] < 1 for share in shares.values()):  # no ties for the largest
        taken = min(share[found[name] - 1].item() for name, share in shares.items())
        left = [share[found[name]].item() for name, share in shares.items() if found[name] < len(share)]
        assert all(taken >= value - 1e-9 for value in left)


def test_welores_ranks_by_hand():
    spectra = {"flat": torch.tensor([4.0, 3.5, 3.0, 0.0]), "peaked": torch.tensor([9.0, 1.0, 0.5, 0.0])}
    assert by_threshold(spectra, 2, linear) == {"flat": 3, "peaked": 1}
    assert by_threshold(spectra, 4, linear) == {"flat": 4, "peaked": 4}


def test_evas_ranks_are_the_largest_shares_of_all():
    ratios = {"a": torch.tensor([0.5, 0.2, 0.1, 0.05]), "b": torch.tensor([0.3, 0.01, 0.0, 0.0])}
    assert by_variance(ratios, 2, linear) == {"a": 3, "b": 1}
    assert by_variance(ratios, 1, linear) == {"a": 1, "b": 1}
    assert by_variance({"a": torch.full((6,), 0.1)}, 5, blocks) == {"a": 4}  # 5 does not divide 24
