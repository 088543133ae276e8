"""How a step is taken: rates by role, gradients without a backward pass, noise on the weights, inputs kept in part."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from contract import BY_NAME
from peft import get_peft_model
from rich.console import Console
from sizes import SIZES
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import inlay
from inlay import methods
from inlay.host.batched_queries import spread_queries
from inlay.host.config import InlayConfig
from inlay.host.lora_plus import raised
from inlay.method import LowRank
from inlay.methods.bat import Bat
from inlay.methods.bone import Bone
from inlay.methods.dota import DoTA
from inlay.methods.lamda import LaMDA
from inlay.methods.lora import LoRA
from inlay.methods.lorta import LoRTA
from inlay.methods.pissa import PiSSA
from inlay.methods.svfit import SVFit
from inlay.numerics import ops
from inlay.numerics.ops import shared
from inlay.numerics.subspace_descent import SubspaceDescent
from inlay.numerics.zeroth_order import ZerothOrder, nearly_square
from inlay.recipe.optimizers import check_shapes, own_optimizer
from inlay.recipe.recipe import Recipe
from inlay.training.progress import RunProgress
from inlay.training.train import train, unfinished

SILENT = Console(quiet=True)


def adapt(model, method, **more):
    return get_peft_model(model, InlayConfig(method=method, target_modules="all-linear", task_type="CAUSAL_LM", **more))


def made(tiny, records, out, **more) -> Recipe:
    values = {"steps": 6, "batch_size": 4, "eval_size": 4, "samples": 0, "dtype": "float32", "save_every": 2, **more}
    return Recipe(model=tiny, data=records, output=str(out), **{"method": "lora", **values})


def outcome(run: Path) -> tuple[list[dict], bytes]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]
    (weights,) = run.glob("*/*model.safetensors")
    return curve, weights.read_bytes()


# LoRA+


@pytest.mark.parametrize("cls", [m for m in methods.METHODS if not m.needs], ids=lambda cls: cls.name)
def test_every_trained_symbol_has_the_part_its_equation_gives_it(cls):
    """In ΔW = B A the outer factors make B and no A."""
    method = cls(**SIZES[cls.name])
    W = torch.randn(256, 256)
    p = method.start(W)
    parts = {method.role(k) for k in p if k not in method.frozen}
    assert parts <= {"in", "out", "core", "magnitude"}
    assert parts == set((BY_NAME[cls.name].parts or " ".join(parts)).split())
    if issubclass(cls, LowRank) and "out" in parts:
        of = [
            {k: v * s if method.role(k) == "out" and k not in method.frozen else v for k, v in p.items()}
            for s in (0, 1, 3)
        ]
        (B0, _), (B, A), (B3, A3) = (method.factors(q, W) for q in of)
        torch.testing.assert_close((B3 - B0, A3), (3 * (B - B0), A))


def test_outer_factors_learn_faster(llama):
    model = adapt(llama, LoRA(r=4))
    slow, fast = inlay.parameter_groups(model, lr=1e-3, lr_ratio=16)
    assert (slow["lr"], fast["lr"]) == (1e-3, 16e-3)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].split(".")[-3] for p in slow["params"]} == {"inlay_A"}
    assert {names[p].split(".")[-3] for p in fast["params"]} == {"inlay_B"}
    assert len(slow["params"]) == len(fast["params"]) == 14
    torch.optim.AdamW([slow, fast])


@pytest.mark.parametrize("method", [Bone(r=4), LaMDA(r=4), DoTA(bond=2)], ids=lambda m: m.name)
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_where_there_is_no_pair_a_ratio_is_refused(method, llama):
    with pytest.raises(ValueError, match="trains no such pair"):
        inlay.parameter_groups(adapt(llama, method), lr=1e-3, lr_ratio=16)


def test_cores_have_a_rate_of_their_own(llama):
    model = adapt(llama, LaMDA(r=4))
    outer, core = inlay.parameter_groups(model, lr=1e-3, core_ratio=30)
    assert (outer["lr"], core["lr"]) == (1e-3, pytest.approx(3e-2))
    names = {p: name.split(".")[-3] for name, p in model.named_parameters()}
    assert {names[p] for p in core["params"]} == {"inlay_S"}
    assert {names[p] for p in outer["params"]} == {f"inlay_B_{i}" for i in range(1, 5)}
    assert len(outer["params"]) == 4 * len(core["params"]) == 4 * 14


@pytest.mark.parametrize("method", [Bone(r=4), LoRA(r=4)], ids=lambda m: m.name)
def test_where_all_or_none_are_cores_their_ratio_is_refused(method, llama):
    with pytest.raises(ValueError, match="core_ratio=30 is between a core and an outer factor, and this model"):
        inlay.parameter_groups(adapt(llama, method), lr=1e-3, core_ratio=30)


def test_the_trainer_keeps_its_groups_and_splits_their_rates(llama):
    model = adapt(llama, PiSSA(r=4))
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW([{"params": trained[:5], "weight_decay": 0.1}, {"params": trained[5:]}], lr=1e-3)
    adam.param_groups[:] = raised(adam.param_groups, model, {"out": 4.0})
    assert [(g["weight_decay"], g["lr"]) for g in adam.param_groups] == [
        (0.1, 1e-3), (0.1, 4e-3), (0.01, 1e-3), (0.01, 4e-3)
    ]  # fmt: skip
    assert sum(len(g["params"]) for g in adam.param_groups) == len(trained)
    before = {p: p.detach().clone() for p in trained}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    adam.step()
    moved = [max((p - before[p]).abs().max().item() for p in g["params"]) for g in adam.param_groups]
    assert moved[1] / moved[0] == pytest.approx(4, rel=0.1)  # AdamW's first step is as long as its rate


# Gradients from losses


def quadratic(parameters, slopes):
    return lambda: sum((p * g).sum() + p.square().sum() / 2 for p, g in zip(parameters, slopes, strict=True))


def test_mezo_gives_the_gradient_in_the_mean():
    own = [torch.randn(6, 8), torch.randn(5)]
    parameters, slopes = [nn.Parameter(p.clone()) for p in own], [torch.randn(6, 8), torch.randn(5)]
    loss = quadratic(parameters, slopes)
    value = ZerothOrder(queries=1500).estimate(loss, parameters, 3)
    for p, start, g in zip(parameters, own, slopes, strict=True):
        assert torch.equal(p, start)
        assert (p.grad - (start + g)).norm() < 0.3 * (start + g).norm()
    assert value == pytest.approx(loss().item(), rel=1e-3)


def test_subzero_gives_its_projection_in_the_mean():
    p, g = nn.Parameter(torch.randn(48, 4)), torch.randn(48, 4)  # 12 × 16 when it is nearly square
    estimator = ZerothOrder(queries=800, rank=3)
    estimator.estimate(quadratic([p], [g]), [p], 0)
    ((U, V),) = estimator.bases([p], 0)
    assert (U.shape, V.shape) == ((12, 3), (16, 3))
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    projected = 192 / 9 * U @ U.T @ (p.detach() + g).view(12, 16) @ V @ V.T
    assert (p.grad.view(12, 16) - projected).norm() < 0.2 * projected.norm()
    rounds = torch.stack([next(ZerothOrder(rank=3, renew=1).directions([p], step, 0)) for step in range(100)])
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
    model = adapt(llama, PiSSA(r=4)).train()
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


@pytest.mark.parametrize("rank", [None, 2])
def test_the_loss_falls_without_a_backward_pass(rank, llama):
    model, ids = adapt(llama, SVFit(r=16)).train(), torch.arange(48).view(2, 24)
    trained = [p for p in model.parameters() if p.requires_grad]
    sgd, estimator = torch.optim.SGD(trained, lr=1.0), ZerothOrder(queries=4, rank=rank)
    losses = []
    for step in range(40):
        losses.append(estimator.estimate(lambda: model(input_ids=ids, labels=ids).loss, trained, step).item())
        sgd.step()
        sgd.zero_grad()
    assert sum(losses[-5:]) / 5 < losses[0] - 0.05, losses


@pytest.mark.parametrize(
    "method",
    [PiSSA(r=4), Bat(r=8), LoRTA(r=4), DoTA(bond=2), SVFit(r=4)],
    ids=lambda m: m.name,
)
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
def test_queries_in_one_pass_give_what_they_give_one_by_one(method, llama):
    model, ids = adapt(llama, method).double().train(), torch.arange(48).view(2, 24)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    trained, grads, products = [p for p in model.parameters() if p.requires_grad], [], []
    with torch.no_grad():
        for p in trained:
            p.add_(0.02 * torch.randn_like(p))
    inlay.flat_noise(model, 0.5, sigma=0.1, seed=3)
    own = [p.detach().clone() for p in trained]
    base = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    for together in (None, partial(spread_queries, model)):
        calls = []
        hook = base.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        value = ZerothOrder(queries=3, rank=2).estimate(
            lambda: model(input_ids=ids, attention_mask=mask, labels=ids).loss, trained, 5, together
        )
        hook.remove()
        assert all(torch.equal(p, start) for p, start in zip(trained, own, strict=True))
        grads.append([value, *(p.grad for p in trained)])
        products.append(len(calls))
        model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-8)
    assert products == [6, 6 if method.name == "bat" else 1]  # Bat asks its base of an x of its own
    assert model(input_ids=ids).logits.shape == (2, 24, 128)  # and all is as it was


def test_what_one_pass_cannot_do_is_refused(llama_original, gpt2):
    def ask(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        with spread_queries(model, ZerothOrder(), trained, [p.detach().clone() for p in trained], 0):
            pass

    with pytest.raises(ValueError, match="set dropout to 0"):
        ask(adapt(copy.deepcopy(llama_original), LoRA(r=4, dropout=0.1)))
    with pytest.raises(ValueError, match="set dropout to 0"):
        ask(adapt(gpt2, LoRA(r=4)))  # whose own is 0.1
    with pytest.raises(ValueError, match="also trains something else"):
        ask(adapt(copy.deepcopy(llama_original), LoRA(r=4), modules_to_save=["lm_head"]))


# Optimisers by name


def test_muon_and_scion_take_what_they_can(llama):
    model = adapt(llama, PiSSA(r=4))
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in ("muon", "scion"):
        cls, args = own_optimizer(name, 1e-3, {"momentum": 0.5})
        assert cls([{"params": trained, "weight_decay": 0.0}], **args).param_groups[0]["momentum"] == 0.5
        check_shapes(name, model)
    assert args["constraint"] is False
    with pytest.raises(ValueError, match="constraint shrinks"):
        own_optimizer("scion", 1e-3, {"constraint": True})


def test_shapes_an_optimizer_would_misread_are_refused(llama, gpt2):
    blocks, values = adapt(llama, Bat(r=8)), adapt(gpt2, SVFit(r=8))
    for name, model in (("muon", blocks), ("scion", blocks), ("muon", values)):
        with pytest.raises(ValueError, match=f"{name} is for .*matrices, and .* has shape"):
            check_shapes(name, model)
    check_shapes("scion", values)


def test_unconstrained_scion_moves_by_its_rate_and_shrinks_nothing():
    p = nn.Parameter(torch.randn(16, 4))
    start, (cls, args) = p.detach().clone(), own_optimizer("scion", 0.01, {})
    scion = cls([{"params": [p], "weight_decay": 0.0}], **args)
    p.grad = torch.randn(16, 4)
    scion.step()
    sizes = torch.linalg.svdvals(start - p.detach()) / (0.01 * 2)  # √(16 / 4)
    assert ((sizes > 0.6) & (sizes < 1.3)).all(), sizes


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_subspace_descent_is_its_equations(shape):
    """With torch's AdamW for both, and autograd for the slope of the projection."""
    start, k, lr, alpha, decay, penalty = torch.randn(shape, dtype=torch.float64), 3, 0.01, 5.0, 0.1, 0.2
    slopes = [torch.randn(shape, dtype=torch.float64) for _ in range(6)]
    p = nn.Parameter(start.clone())
    mine = SubspaceDescent([p], lr, weight_decay=decay, rank=k, alpha=alpha, penalty=penalty)
    for slope in slopes:
        p.grad = slope.clone()
        mine.step()
    turn = (lambda t: t.T) if shape[0] > shape[1] else (lambda t: t)
    W, P = turn(start), mine_first(turn(slopes[0]), k)
    low = nn.Parameter(torch.zeros(k, W.shape[1], dtype=torch.float64))
    adams = [torch.optim.Adam([low], 1.0), torch.optim.AdamW([P], alpha * lr, weight_decay=decay)]
    for step, G in enumerate(map(turn, slopes)):
        before, low.grad = low.detach().clone(), P.detach().T @ G
        adams[0].step()
        W = W + lr * (P.detach() @ (low.detach() - before) - decay * W)
        g = G / G.norm()
        loss = (P @ P.T @ g - g).square().sum() + penalty * (P.T @ P - torch.eye(k)).square().sum()
        (P.grad,) = torch.autograd.grad(loss, P)
        if step:  # it begins where the loss is least
            adams[1].step()
    torch.testing.assert_close(turn(p.detach()), W, rtol=1e-4, atol=1e-5)  # the first SVD is in fp32
    torch.testing.assert_close(mine.state[p]["P"], P.detach(), rtol=1e-4, atol=1e-5)
    assert {tuple(v.shape) for v in mine.state[p].values()} == {(), (12, k), (k, 20)}


def mine_first(G, k) -> nn.Parameter:
    U = torch.linalg.svd(G)[0][:, :k]
    return nn.Parameter(U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign())


def test_a_projection_follows_the_gradients():
    """They move to another subspace, and a penalty holds P orthonormal."""
    p, (old, new) = nn.Parameter(torch.zeros(16, 40)), (torch.linalg.qr(torch.randn(16, 2)).Q for _ in range(2))
    made = SubspaceDescent([p], lr=2e-3, rank=2)

    def held(space) -> float:
        return (made.state[p]["P"].T @ space).square().sum().item() / 2

    for step in range(400):
        p.grad = (old if step < 5 else new) @ torch.randn(2, 40)
        made.step()
        if step == 4:
            assert held(old) > 0.95
    assert held(new) > 0.9
    P = made.state[p]["P"]
    torch.testing.assert_close(P.T @ P, torch.eye(2), atol=0.1, rtol=0)


@pytest.mark.parametrize("method", ["lora", "pissa", "lamda"])
def test_noise_is_as_large_where_fsdp2_shards_the_weights(method, tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        found = []
        for sharded in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
            config = InlayConfig(method=method, args={"r": 4}, target_modules=["0"])
            model = get_peft_model(net, config).train()
            model = fully_shard(model, mesh=init_device_mesh("cpu", (1,))) if sharded else model
            inlay.flat_noise(model, 0.5, sigma=0.1, seed=1)
            found.append(model(torch.ones(2, 16)))
        torch.testing.assert_close(*found)
    finally:
        torch.distributed.destroy_process_group()


def test_subspace_descent_goes_on_in_bf16_as_if_it_had_not_been_saved():
    """torch casts a state to its parameter's dtype when it is loaded, and bf16 has no 257 to count to."""
    slopes = torch.randn(300, 8, 12).bfloat16()
    whole, saved = (nn.Parameter(torch.zeros(8, 12).bfloat16()) for _ in range(2))
    one, other = (SubspaceDescent([p], lr=1e-2, rank=2) for p in (whole, saved))
    for i, slope in enumerate(slopes):
        if i == 290:
            state = copy.deepcopy(other.state_dict())
            other = SubspaceDescent([saved], lr=1e-2, rank=2)
            other.load_state_dict(state)
        for p, optimizer in ((whole, one), (saved, other)):
            p.grad = slope.clone()
            optimizer.step()
    assert torch.equal(whole, saved)
    assert all(torch.equal(value, other.state[saved][name]) for name, value in one.state[whole].items())


def test_subspace_descent_waits_for_a_gradient_and_is_adamw_where_a_matrix_is_narrow():
    wide, narrow = (nn.Parameter(torch.randn(s)) for s in ((8, 8), (8, 3)))
    twin = nn.Parameter(narrow.detach().clone())
    mine = SubspaceDescent([wide, narrow], lr=0.01, weight_decay=0.1, rank=3)
    theirs, start = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1), wide.detach().clone()
    for step in range(3):
        wide.grad, narrow.grad = torch.zeros(8, 8), torch.randn(8, 3)
        twin.grad = narrow.grad.clone()
        mine.step(), theirs.step()
        assert torch.equal(wide, start), step
    torch.testing.assert_close(narrow, twin)
    wide.grad = torch.randn(8, 8)
    mine.step()
    assert not torch.equal(wide, start)
    for wrong in ({"rank": 0}, {"alpha": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SubspaceDescent([wide], **wrong)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optimizer": "adamx"}, "did you mean"),
        ({"optimizer": "galore_adamw"}, "for method full"),
        ({"step": "mezo", "method": "full"}, "for adapters"),
        ({"step": "mezo", "step_args": {"rank": 4}}, "no 'rank'; it has epsilon, queries, batched"),
        ({"step_args": {"epsilon": 1e-3}}, "step backward has no 'epsilon'"),
        ({"step": "subzero", "step_args": {"rank": "x"}}, "is not a whole number"),
        ({"step": "mezo", "step_args": {"epsilon": 0}}, "epsilon=0.0 is not above 0"),
        ({"step": "mezo", "gradient_checkpointing": True}, "no backward pass"),
        ({"step": "mezo", "step_args": {"batched": True}, "packing": True}, "without packing"),
        ({"step": "mezo", "saver": "velora", "method": "lora"}, "no backward pass"),
        ({"lr_ratio": 0}, "not above 0"),
        ({"lr_ratio": 4, "method": "full"}, "not for method full"),
        ({"core_ratio": -1}, "core_ratio: -1.0 is not above 0"),
        ({"core_ratio": 4, "method": "peft:dora"}, "not for method peft:dora"),
        ({"saver": "wta_crs", "method": "peft:dora"}, "not for method peft:dora"),
        ({"flat_noise": -1}, "below 0"),
    ],
)
def test_what_cannot_be_is_refused(values, says):
    with pytest.raises(ValueError, match=says) as error:
        Recipe(**values)
    assert "\n" not in str(error.value)


def test_a_run_refuses_a_ratio_where_there_is_no_pair(tiny, records, tmp_path):
    with pytest.raises(ValueError, match="trains no such pair"):
        train(made(tiny, records, tmp_path / "run", method="bone", lr_ratio=4), SILENT)
    assert not (tmp_path / "run").exists()


# Flat-LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [PiSSA(r=4), Bat(r=8), SVFit(r=4)], ids=lambda m: m.name)
def test_noise_is_that_of_the_merged_weight_forward_and_backward(method, dtype):
    net = nn.Sequential(nn.Linear(32, 24)).to(dtype)
    model = get_peft_model(net, InlayConfig(method=method, target_modules=["0"])).train()
    layer = model.base_model.model[0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
    x = torch.randn(4, 5, 32, dtype=dtype, requires_grad=True)
    plain = model(x)
    inlay.flat_noise(model, 0.5, sigma=0.2, seed=3)  # σ_t = σ / 2
    merged = layer.base_layer.weight.float() + layer.change("default", layer.base_layer.weight)
    sigma, seed = layer.noise
    torch.testing.assert_close(sigma, 0.1 / math.sqrt(32) * merged.norm(dim=1))
    E = torch.cat([rows for _, rows in ops.gaussian_rows(sigma.to(dtype), 32, seed)])
    y = model(x)
    torch.testing.assert_close(y, plain + x @ E.T)
    (slope,) = torch.autograd.grad(y.float().square().sum() / 2, x, retain_graph=True)
    (other,) = torch.autograd.grad(plain, x, y.detach())
    torch.testing.assert_close(slope, other + y.detach() @ E, atol=0.05 if dtype == torch.bfloat16 else 1e-4, rtol=0.02)
    assert torch.equal(model.eval()(x), plain)
    with model.train().disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    inlay.flat_noise(model, 0.0)
    assert torch.equal(model.train()(x), plain)


def test_noise_has_its_size_and_differs_by_layer_and_step(llama):
    model = adapt(llama, LoRA(r=4))
    layers = [m for m in model.modules() if hasattr(m, "noise")]
    seeds = set()
    for t in (0.25, 1.0):
        inlay.flat_noise(model, t, sigma=0.05, seed=1)
        seeds |= {layer.noise[1] for layer in layers}
    assert len(seeds) == 2 * len(layers)
    E = torch.cat([rows for _, rows in ops.gaussian_rows(torch.full((200,), 0.5), 300, 7)])
    assert E.std().item() == pytest.approx(0.5, rel=0.02)
    for t, sigma in ((2.0, 0.05), (0.5, -1)):
        with pytest.raises(ValueError, match=r"not the fraction|below 0"):
            inlay.flat_noise(model, t, sigma)


def test_strips_of_noise_are_those_of_one_piece(monkeypatch):
    sigma, x = torch.rand(24), torch.randn(3, 5, 40)
    whole = ops.weight_noise(x, sigma, 5)
    E = torch.cat([rows for _, rows in ops.gaussian_rows(sigma, 40, 5)])
    monkeypatch.setattr(shared, "SCRATCH", 320)  # 8 rows
    assert len(list(ops.gaussian_rows(sigma, 40, 5))) == 3
    torch.testing.assert_close(torch.cat([rows for _, rows in ops.gaussian_rows(sigma, 40, 5)]), E)
    torch.testing.assert_close(ops.weight_noise(x, sigma, 5), whole)


# Inputs kept in part


def product(saver, x, W, slope):
    torch.manual_seed(1)
    B, A = torch.randn(24, 4, requires_grad=True), torch.randn(4, 48, requires_grad=True)
    x = x.clone().requires_grad_()
    linear = None if W is None else (W, None)
    y = ops.low_rank(x, linear, lambda B, A: (B, A), True, ops.Dropout(0.0, saver), B, A)
    torch.manual_seed(2)
    y.backward(slope)
    return y.detach(), x.grad, B.grad, A.grad


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("saver", ops.SAVERS)
def test_a_saver_changes_the_gradient_of_a_alone(saver, joined):
    x, slope = torch.randn(3, 20, 48), torch.randn(3, 20, 24)
    W = torch.randn(24, 48) if joined else None
    exact, made_ = product("none", x, W, slope), product(saver, x, W, slope)
    assert all(torch.equal(a, b) for a, b in zip(exact[:3], made_[:3], strict=True))
    assert made_[3].shape == exact[3].shape
    assert not torch.allclose(made_[3], exact[3])


def test_the_mean_of_wta_crs_is_the_gradient():
    x = torch.randn(40, 48) * torch.rand(40, 1).exp()
    x[7] *= 10  # a winner
    g, total, winners = torch.randn(40, 4), torch.zeros(4, 48), []
    for _ in range(1500):
        rows, chosen, weight = ops.WTACRS.keep(x)
        total += ops.WTACRS.product(g, rows, chosen, weight)
        winners = chosen[weight == 1].tolist()
    assert len(rows) == 12
    assert winners == [7]  # and not once more
    assert (total / 1500 - g.T @ x).norm() < 0.1 * (g.T @ x).norm()


def test_wta_crs_takes_tokens_that_are_all_zero_or_all_there_is():
    for x in (torch.zeros(10, 8), torch.randn(1, 8), torch.cat([torch.randn(1, 8), torch.zeros(9, 8)])):
        rows, chosen, weight = ops.WTACRS.keep(x)
        assert weight.isfinite().all()
        torch.testing.assert_close(ops.WTACRS.product(torch.ones(len(x), 2), rows, chosen, weight)[0], x.sum(0))


def test_velora_is_its_formula():
    x, g = torch.randn(20, 96), torch.randn(20, 4)
    parts = [x[:, 3 * i : 3 * i + 3] for i in range(32)]
    mean = torch.stack(parts).mean((0, 1))
    v = mean / mean.norm()
    dense = torch.cat([torch.outer(part @ v, v) for part in parts], 1)
    c, own = ops.Velora.keep(x)
    assert (c.shape, own.shape) == ((20, 32), (3,))
    torch.testing.assert_close(ops.Velora.product(g, c, own), g.T @ dense)


def test_velora_loses_most_of_the_direction_where_parts_have_nothing_in_common():
    x, g = torch.randn(200, 1024), torch.randn(200, 8)
    estimate = ops.Velora.product(g, *ops.Velora.keep(x))
    cosine = torch.cosine_similarity(estimate.flatten(), (g.T @ x).flatten(), 0)
    assert cosine.item() == pytest.approx(math.sqrt(32 / 1024), abs=0.05)


@pytest.mark.parametrize(("saver", "share"), [("none", 1.0), ("velora", 0.032), ("wta_crs", 0.31)])
def test_a_saver_keeps_less(saver, share):
    net = nn.Sequential(nn.Linear(1024, 64))
    model = get_peft_model(net, InlayConfig(method=LoRA(r=2), target_modules=["0"], saver=saver)).train()
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}
    x = torch.randn(500, 1024)
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model(x)
    rest = sum(t.nbytes for pointer, t in kept.items() if pointer not in own) - 500 * 2 * 4  # x Aᵀ
    assert share / 1.2 < rest / x.nbytes < share * 1.1
    assert all(not torch.equal(p.grad, torch.zeros_like(p)) for p in trained_after_a_step(model, x))


def trained_after_a_step(model, x):
    torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "inlay_B" in n))
    model(x).sum().backward()
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("method", "says"),
    [(Bone(r=4), "keeps no x"), (DoTA(bond=2), "keeps no x"), (LoRA(r=4, dropout=0.1), "to 0")],
    ids=["bone", "dota", "dropout"],
)
def test_a_saver_where_there_is_nothing_to_save_is_refused(method, says, llama):
    with pytest.raises(ValueError, match=says):
        adapt(llama, method, saver="wta_crs")
    assert not any("inlay" in name for name, _ in llama.named_modules())
    with pytest.raises(ValueError, match="is not one of none, velora, wta_crs"):
        InlayConfig(saver="lossy")


# Runs


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(
            {
                "step": "subzero",
                "step_args": {"rank": 4, "renew": 2},
                "dropout": 0.1,
                "accumulation": 2,
                "learning_rate": 0.01,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"step": "mezo", "step_args": {"queries": 2, "batched": True}, "accumulation": 2}, marks=pytest.mark.slow
        ),
        {"flat_noise": 0.1, "saver": "wta_crs", "optimizer": "muon", "lr_ratio": 4.0},
        pytest.param({"step": "mezo", "optimizer": "adamw_torch", "method": "peft:dora"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "scion", "saver": "velora"}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "subspace_descent", "optimizer_args": {"rank": 4}, "method": "mora", "args": {"r": 4}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimizer": "subspace_descent", "optimizer_args": {"rank": 4}, "method": "full"}, marks=pytest.mark.slow
        ),
    ],
    ids=["subzero", "batched", "flat", "mezo", "scion", "subspace", "subspace full"],
)
def test_a_stopped_run_ends_as_one_left_alone(more, tiny, records, tmp_path, monkeypatch):
    values = {"steps": 4, "batch_size": 1, "eval_size": 1, "save_every": 1, **more}
    whole = train(made(tiny, records, tmp_path / "whole", **values), SILENT)
    if more.get("step") == "subzero":
        assert whole.history[1]["grad_norm"] > 1.0  # which is not clipped

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(made(tiny, records, tmp_path / "cut", **values), SILENT)
    train(unfinished(tmp_path / "cut", {}), SILENT, resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_galore_trains_the_model_itself_and_goes_on(tiny, records, tmp_path, monkeypatch):
    pytest.importorskip("galore_torch")
    values = {"steps": 3, "batch_size": 1, "eval_size": 1, "save_every": 1, "method": "full"}
    values |= {"optimizer": "galore_adamw", "optimizer_args": {"rank": 4, "update_proj_gap": 2}}
    whole = train(made(tiny, records, tmp_path / "whole", **values), SILENT)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(made(tiny, records, tmp_path / "cut", **values), SILENT)
    again = train(unfinished(tmp_path / "cut", {}), SILENT, resume=True)
    assert again.after == whole.after


@pytest.mark.parametrize(("saver", "sigma"), [("velora", 0.0), ("wta_crs", 0.0), ("none", 0.1)])
def test_gradient_checkpointing_changes_nothing(saver, sigma, llama):
    model = adapt(llama, PiSSA(r=4), saver=saver).train()
    inlay.flat_noise(model, 0.5, sigma)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=torch.arange(24)[None], labels=torch.arange(24)[None]).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(found[0], found[1])
