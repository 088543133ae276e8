"""How a step is taken: rates by role, gradients without a backward pass, noise on the weights, inputs kept in part."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import inlay
from inlay import InlayConfig, methods, ops
from inlay.method import Diagonal, LowRank
from inlay.workbench import train
from inlay.workbench.recipe import Recipe
from inlay.zeroth import ZerothOrder, nearly_square

SILENT = Console(quiet=True)
ROLES = {
    "lora": "in out", "pissa": "in out", "milora": "in out", "olora": "in out", "peanut": "in out", "snell": "in out",
    "deep_lora": "core in out", "lamda": "core out", "bone": "out", "svfit": "magnitude", "loldu": "magnitude",
    "randlora": "magnitude", "dota": "core", "mora": "core", "mora_rope": "core", "bat": "core", "bat_col": "core",
}  # fmt: skip


def adapt(model, method, **more):
    return get_peft_model(model, InlayConfig(method=method, target_modules="all-linear", task_type="CAUSAL_LM", **more))


def made(tiny, records, out, **more) -> Recipe:
    values = {"steps": 6, "batch_size": 4, "eval_size": 4, "samples": 0, "dtype": "float32", "save_every": 2, **more}
    return Recipe(model=tiny, data=records, output=str(out), **{"method": "lora", **values})


def outcome(run: Path) -> tuple[list[dict], bytes]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]
    return curve, (run / "adapter" / "adapter_model.safetensors").read_bytes()


# LoRA+


@pytest.mark.parametrize("cls", methods.METHODS, ids=lambda cls: cls.name)
def test_every_trained_symbol_has_the_part_its_equation_gives_it(cls):
    """An outer factor sets the columns of ΔW, an inner one its rows: halving all of a kind halves ΔW, or neither does."""
    method = cls()
    p = method.start(torch.randn(64, 64))
    parts = {method.role(k) for k in p if k not in method.frozen}
    assert parts <= {"in", "out", "core", "magnitude"}
    assert parts == set(ROLES.get(cls.name, " ".join(parts)).split())
    if issubclass(cls, LowRank) and "out" in parts and not issubclass(cls, Diagonal):
        p = {k: torch.randn_like(v) for k, v in p.items()}
        W = torch.randn(64, 64)
        q = {k: v * 3 if method.role(k) == "out" else v for k, v in p.items()}
        (B, A), (B3, A3) = method.factors(p, W), method.factors(q, W)
        torch.testing.assert_close((B3, A3), (3 * B, A))


def test_outer_factors_learn_faster(llama):
    model = adapt(llama, methods.LoRA(r=4))
    slow, fast = inlay.parameter_groups(model, lr=1e-3, lr_ratio=16)
    assert (slow["lr"], fast["lr"]) == (1e-3, 16e-3)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].split(".")[-3] for p in slow["params"]} == {"inlay_A"}
    assert {names[p].split(".")[-3] for p in fast["params"]} == {"inlay_B"}
    assert len(slow["params"]) == len(fast["params"]) == 14
    torch.optim.AdamW([slow, fast])


@pytest.mark.parametrize("method", [methods.Bone(r=4), methods.LaMDA(r=4), methods.DoTA(bond=2)], ids=lambda m: m.name)
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_where_there_is_no_pair_a_ratio_is_refused(method, llama):
    with pytest.raises(ValueError, match="trains no such pair"):
        inlay.parameter_groups(adapt(llama, method), lr=1e-3, lr_ratio=16)


def test_a_run_with_a_ratio_moves_b_further(tiny, records, tmp_path):
    size = {}
    for ratio in (1.0, 8.0):
        result = train.train(made(tiny, records, tmp_path / str(ratio), lr_ratio=ratio, steps=3), SILENT)
        from safetensors.torch import load_file

        tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
        size[ratio] = [sum(v.norm() for k, v in tensors.items() if f"inlay_{s}." in k) for s in "AB"]
    assert size[8.0][1] > 6 * size[1.0][1]
    assert abs(size[8.0][0] / size[1.0][0] - 1) < 0.01
    assert result.history[1]["learning_rate"] == pytest.approx(0.0, abs=5e-4)  # the rate that is logged is A's


# Gradients from losses


def quadratic(parameters, slopes):
    return lambda: sum((p * g).sum() + p.square().sum() / 2 for p, g in zip(parameters, slopes, strict=True))


def test_mezo_gives_the_gradient_in_the_mean():
    own = [torch.randn(6, 8), torch.randn(5)]
    parameters, slopes = [nn.Parameter(p.clone()) for p in own], [torch.randn(6, 8), torch.randn(5)]
    loss = quadratic(parameters, slopes)
    value = ZerothOrder(queries=4000).estimate(loss, parameters, 3)
    for p, start, g in zip(parameters, own, slopes, strict=True):
        assert torch.equal(p, start)
        assert (p.grad - (start + g)).norm() < 0.2 * (start + g).norm()
    assert value == pytest.approx(loss().item(), rel=1e-3)


def test_subzero_gives_its_projection_in_the_mean():
    p, g = nn.Parameter(torch.randn(48, 4)), torch.randn(48, 4)  # 12 × 16 when it is nearly square
    estimator = ZerothOrder(queries=3000, rank=3)
    estimator.estimate(quadratic([p], [g]), [p], 0)
    ((U, V),) = estimator.bases([p], 0)
    assert (U.shape, V.shape) == ((12, 3), (16, 3))
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    projected = 192 / 9 * U @ U.T @ (p.detach() + g).view(12, 16) @ V @ V.T
    assert (p.grad.view(12, 16) - projected).norm() < 0.1 * projected.norm()
    rounds = torch.stack([next(ZerothOrder(rank=3, renew=1).directions([p], step, 0)) for step in range(400)])
    assert rounds.square().mean().item() == pytest.approx(1.0, abs=0.1)  # as long as MeZO's


def test_subspaces_are_renewed_and_directions_come_from_the_seed_alone():
    def draw(step, query=0, **more):
        return next(ZerothOrder(rank=2, renew=5, **more).directions([torch.zeros(8, 8)], step, query))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert not torch.equal(draw(3), draw(3, 1))
    assert not torch.equal(draw(3), draw(3, seed=1))
    space = [torch.linalg.matrix_rank(torch.cat([draw(a), draw(b)], 1)) for a, b in ((0, 4), (4, 5))]
    assert space == [2, 4]


def test_what_is_narrower_than_the_rank_gets_gaussian_directions():
    assert [nearly_square(n) for n in (64, 192, 13, 1)] == [8, 12, 1, 1]
    estimator = ZerothOrder(rank=8)
    assert estimator.bases([torch.zeros(13), torch.zeros(8, 8), torch.zeros(4, 64)], 0)[:2] == [None, None]
    assert estimator.bases([torch.zeros(13), torch.zeros(8, 8), torch.zeros(4, 64)], 0)[2] is not None


def test_both_sides_drop_the_same_and_a_failure_restores():
    p, seen = nn.Parameter(torch.ones(64)), []

    def loss():
        seen.append(torch.rand(3))
        if len(seen) == 3:
            raise RuntimeError
        return p.sum()

    state = torch.get_rng_state()
    estimator = ZerothOrder()
    estimator.estimate(loss, [p], 0)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError):
        estimator.estimate(loss, [p], 1)
    assert torch.equal(p, torch.ones(64))


def test_nothing_is_kept_for_a_backward_pass(llama):
    model = adapt(llama, methods.PiSSA(r=4)).train()
    ids, kept = torch.arange(40)[None], []

    def loss():
        return model(input_ids=ids, labels=ids).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ZerothOrder().estimate(loss, trained, 0)
        assert kept == []
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        loss()
        assert kept  # as it is with a backward pass


@pytest.mark.parametrize("step", ["mezo", "subzero"])
def test_a_run_without_a_backward_pass_learns(step, tiny, records, tmp_path):
    """The tiny model's loss falls, in 120 steps on the 32 numbers of two layers' rank-1 update."""
    more = {"step": step, "steps": 60, "learning_rate": 0.5, "scheduler": "constant", "warmup": 0, "save_every": 0}
    small = {"method": "svfit", "args": {"r": 16}, "target_modules": ["down_proj", "o_proj"], "max_grad_norm": 0.5}
    asked = {"step_args": {"queries": 2, **({"rank": 2} if step == "subzero" else {})}}
    result = train.train(made(tiny, records, tmp_path / "run", **more, **small, **asked), SILENT)
    assert result.after < result.before - 0.05, (result.before, result.after)


# Optimisers by name
