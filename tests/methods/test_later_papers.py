"""Facts of the papers after the first four and their relatives, and PEFT's forms of them."""

import pytest
import torch
from peft import HiraConfig, LoraConfig, PsoftConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from test_papers import compare, distance, fill, one_layer, ours, tensors
from torch import Tensor, nn

import inlay
from inlay.method import Method
from inlay.methods.corda import CorDA
from inlay.methods.hira import HiRA
from inlay.methods.kasa import KaSA
from inlay.methods.lora_null import LoRANull
from inlay.methods.lora_one import LoRAOne
from inlay.methods.lora_xs import LoRAXS
from inlay.methods.mica import MiCA
from inlay.methods.milora import MiLoRA
from inlay.methods.oplora import OPLoRA
from inlay.methods.psoft import PSOFT


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
def test_hira_is_pefts_hira(out, inp):
    A, B = torch.randn(8, inp), torch.randn(out, 8)
    mine, theirs = one_layer(out, inp, ours(HiRA(r=8))), one_layer(out, inp, HiraConfig(r=8, target_modules=["0"]))
    fill(mine, inlay_A=A, inlay_B=B)
    fill(theirs, hira_A=A, hira_B=B)
    compare(mine, theirs, inp)


def test_hira_leaves_what_is_zero_and_has_a_high_rank():
    W = torch.randn(24, 40).double()
    W[W.abs() < 0.3] = 0
    p = {"A": torch.randn(2, 40).double(), "B": torch.randn(24, 2).double()}
    D = HiRA(r=2).delta(p, W)
    assert not D[W == 0].any()
    assert torch.linalg.matrix_rank(D) == 24


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
def test_mica_is_pefts_mica(out, inp):
    """The same subspace; in the same basis of it, the same outputs and gradients of the same single factor."""
    theirs = one_layer(out, inp, LoraConfig(init_lora_weights="mica", r=8, lora_alpha=8, target_modules=["0"]))
    mine = one_layer(out, inp, ours(MiCA(r=8)))
    B, C = (layer.base_model.model[0].get_submodule(path).weight for layer, path in (
        (mine, "inlay_B.default"), (theirs, "lora_B.default")))  # fmt: skip
    torch.testing.assert_close(B @ B.T, C @ C.T, rtol=1e-3, atol=1e-4)
    assert list(tensors(mine)) == ["inlay_A"]
    assert list(tensors(theirs)) == ["lora_A"]
    with torch.no_grad():
        B.copy_(C)
    A = torch.randn(8, inp)
    fill(mine, inlay_A=A)
    fill(theirs, lora_A=A)
    compare(mine, theirs, inp)


def test_mica_stays_in_the_minor_left_subspace():
    W = torch.randn(48, 80)
    p = MiCA(r=8).start(W)
    U = torch.linalg.svd(W.double()).U
    D = MiCA(r=8).delta({**p, "A": torch.randn(8, 80)}, W).double()
    assert (U[:, :40].T @ D).norm() < 1e-3 * D.norm()
    torch.testing.assert_close(p["B"].T @ p["B"], torch.eye(8), rtol=0, atol=1e-5)


def test_lora_xs_holds_the_best_rank_r_approximation_and_trains_r_squared_numbers():
    W = torch.randn(48, 80)
    method = LoRAXS(r=8)
    p = method.start(W)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = U[:, :8] * S[:8] @ Vh[:8]
    assert distance(method.delta({**p, "R": torch.eye(8)}, W).double(), best) < 1e-3
    for out, inp in ((48, 80), (4096, 11008)):
        shapes = method.start(torch.empty(out, inp, device="meta"))
        assert sum(v.numel() for k, v in shapes.items() if k not in method.frozen) == 64


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
def test_psoft_is_pefts_psoft(out, inp):
    """The signs of its singular vectors are another's, which a turn of q, a and b would undo: so it gets ours."""
    theirs = one_layer(out, inp, PsoftConfig(r=6, psoft_alpha=6, target_modules=["0"]))
    mine = one_layer(out, inp, ours(PSOFT(r=6)))
    layer = theirs.base_model.model[0]
    _, p, _ = mine.base_model.model[0].theta("default")
    A, B = layer._get_psoft_ab_cache_buffers("default")
    torch.testing.assert_close(p["B"] @ p["A"], B @ A, rtol=1e-3, atol=1e-3)
    layer._set_psoft_ab_cache_buffers("default", p["A"], p["B"])
    q, a, b = 0.3 * torch.randn(15), torch.rand(6) + 0.5, torch.rand(6) + 0.5
    fill(mine, inlay_q=q, inlay_a=a, inlay_b=b)
    with torch.no_grad():
        for name, value in (("weight", q), ("vector_a", a), ("vector_b", b)):
            getattr(layer.psoft_R["default"], name).copy_(value)
    x = torch.randn(5, inp)
    ys = [model(x) for model in (mine, theirs)]
    torch.testing.assert_close(ys[0], ys[1], rtol=1e-4, atol=1e-5)
    for y in ys:
        y.square().sum().backward()
    grads = {name: getattr(layer.psoft_R["default"], theirs).grad for name, theirs in (
        ("inlay_q", "weight"), ("inlay_a", "vector_a"), ("inlay_b", "vector_b"))}  # fmt: skip
    for name, grad in grads.items():
        torch.testing.assert_close(tensors(mine)[name].grad, grad, rtol=1e-3, atol=1e-3)


def test_psoft_keeps_angles_and_refuses_a_scale():
    W, method = torch.randn(48, 80).double(), PSOFT(r=8)
    p = {k: v.double() for k, v in method.start(W.float()).items()}
    p["q"] = torch.randn(28).double()
    low = p["B"] @ p["A"]
    turned = low + method.delta(p, W)
    assert distance(turned, low) > 0.5
    torch.testing.assert_close(turned @ turned.T, p["B"] @ p["B"].T, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="psoft: scale=2 would undo its equation; leave scale out"):
        PSOFT(r=8, scale=2)


def test_oplora_preserves_the_principal_triplets():
    W = torch.randn(48, 80).double()
    method = OPLoRA(r=8, k=12)
    p = {k: v.double() for k, v in method.start(W.float()).items()}
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    moved = W + method.delta({**p, "B": torch.randn(48, 8).double()}, W)
    assert distance(moved, W) > 0.1
    torch.testing.assert_close(moved @ Vh[:12].T, U[:, :12] * S[:12], rtol=0, atol=1e-4)
    torch.testing.assert_close(U[:, :12].T @ moved, S[:12, None] * Vh[:12], rtol=0, atol=1e-4)
    assert method.start(W.float())["U"].shape == (48, 12)
    assert OPLoRA(r=8).start(W.float())["U"].shape == (48, 8)
    with pytest.raises(ValueError, match=r"oplora: k=44 leaves less than r=8 .* choose k and r with k \+ r <= 48"):
        OPLoRA(r=8, k=44).start(W.float())


def watched(method: Method, *seen: Tensor) -> dict[str, Tensor]:
    stats: dict[str, Tensor] = {}
    for one in seen:
        stats = method.observe(stats, one)
    return stats


def product(model: nn.Module, B: str, A: str) -> Tensor:
    found = {n.split("0.")[1].split(".")[0]: p.detach() for n, p in model.named_parameters()}
    return found[B] @ found[A]


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_as_pefts_corda(mode, out, inp):
    """Each batch is one sample, as PEFT's script gives them: the shares of W that both start from are the same."""
    batches = [torch.randn(1, 64, inp) * torch.linspace(1, 0.5, inp) for _ in range(3)]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(inp, out))
    config = LoraConfig(
        init_lora_weights="corda", r=8, lora_alpha=8, target_modules=["0"], corda_config=CordaConfig(corda_method=mode)
    )
    preprocess_corda(net, config, run_model=lambda: [net(x) for x in batches])
    theirs, mine = get_peft_model(net, config), one_layer(out, inp, ours(CorDA(r=8, mode=mode)))
    inlay.calibrate(mine, [{"x": x} for x in batches], loss=lambda model, batch: model(batch["x"]).mean())
    share, expected = product(mine, "inlay_B", "inlay_A"), product(theirs, "lora_B", "lora_A")
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-6)
    x = torch.randn(5, inp)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "end"), [("ipm", slice(8)), ("kpm", slice(-8, None))])
def test_cordas_share_of_the_weight_is_a_projection_onto_what_the_inputs_see(mode, end):
    """B₀ A₀ = U Uᵀ W, U the left singular vectors of W C at one end."""
    W, X = torch.randn(24, 40), torch.randn(200, 40) * (1 + torch.arange(40)) ** -1.0
    method = CorDA(r=8, mode=mode, scale=0.5)
    C = (X.double().T @ X.double()) / X.max().double() ** 2
    C = C + 0.01 * C.diagonal().mean() * torch.eye(40)
    U = torch.linalg.svd(W.double() @ C).U[:, :24][:, end]
    p = method.start(W, watched(method, X))
    assert distance(0.5 * p["B"].double() @ p["A"].double(), U @ U.T @ W.double()) < 1e-3


def test_lora_null_starts_where_the_inputs_do_not_go():
    basis = torch.linalg.qr(torch.randn(40, 40)).Q
    X = torch.randn(300, 30) @ basis[:, :30].T  # ten directions are never used
    W = torch.randn(24, 40)
    N = torch.linalg.svd(X.double(), full_matrices=True).Vh[-10:].T
    for variant in ("v1", "v2"):
        method = LoRANull(r=10, variant=variant, scale=0.5)
        p = method.start(W, watched(method, X[:100], X[100:200], X[200:]))
        assert distance(0.5 * p["B"].double() @ p["A"].double(), W.double() @ N @ N.T) < 1e-4
        assert (p["A"] @ X.T).norm() < 1e-4 * p["A"].norm() * X.norm()
        torch.testing.assert_close(p["B"].T @ p["B"], p["A"] @ p["A"].T, rtol=1e-3, atol=1e-3)
    assert method.frozen == {"A"}
    assert LoRANull().frozen == frozenset()
    moved = method.delta({**p, "B": torch.randn(24, 10)}, W)  # where A rests, those inputs never see a change
    assert (moved @ X.T).norm() < 1e-4 * moved.norm() * X.norm()


def test_lora_one_starts_one_step_of_full_fine_tuning_away():
    P, W = torch.randn(24, 12), torch.randn(24, 40)
    G = [P @ torch.randn(12, 40) for _ in range(3)]  # of no higher rank than what is carried from batch to batch
    method = LoRAOne(r=4, gamma=2.0)
    p = method.start(W, watched(method, *G))
    U, S, Vh = torch.linalg.svd(torch.stack(G).double().mean(0), full_matrices=False)
    step = -(U[:, :4] * S[:4] / S[0]) @ Vh[:4] / 2
    assert distance(method.delta(p, W).double(), step) < 1e-3
    assert method.s == 16 / 2
    assert LoRAOne().gamma == 128
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), ours(LoRAOne(r=4)))
    batch, loss = {"x": torch.randn(16, 8)}, lambda model, batch: model(batch["x"]).square().mean()
    with model.disable_adapter():
        before = loss(model, batch)
    inlay.calibrate(model, [batch], loss=loss)
    assert loss(model, batch) < before
    with model.disable_adapter():
        assert loss(model, batch) == before


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
def test_kasa_starts_from_the_weight_without_its_smallest_triplets(out, inp):
    W = torch.randn(out, inp)
    p, method = KaSA(r=8).start(W), KaSA(r=8)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = U[:, :16] * S[:16] @ Vh[:16]
    assert distance(W.double() + method.s * method.delta(p, W).double(), best) < 1e-5
    assert (method.s, KaSA().beta, KaSA().gamma) == (2, 1e-4, 1e-3)
    assert set(p) - method.frozen == {"A", "B", "sigma"}


def test_a_middle_of_milora_may_be_moved():
    W = torch.randn(24, 40)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for skip in (0, 5, 16):
        p = MiLoRA(r=8, side="middle", skip=skip).start(W)
        part = slice(skip, skip + 8)
        assert distance(p["B"].double() @ p["A"].double(), U[:, part] * S[part] @ Vh[part]) < 1e-4
    with pytest.raises(ValueError, match=r"milora: skip=17 leaves less than r=8 .* choose skip <= 16"):
        MiLoRA(r=8, side="middle", skip=17).start(W)
    with pytest.raises(ValueError, match="milora: skip=3 is for side=middle, not minor"):
        MiLoRA(skip=3)


def test_miloras_random_side_is_of_each_module_and_of_the_runs_seed():
    def singular_values(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
        net[1].load_state_dict(net[0].state_dict())
        torch.manual_seed(seed)
        config = inlay.InlayConfig(method=MiLoRA(r=4, side="random"), target_modules=["0", "1"])
        model = get_peft_model(net, config).base_model.model
        return [torch.linalg.svdvals(layer.theta("default")[1]["A"]) for layer in model]

    one, other = singular_values(1), singular_values(2)
    assert not torch.allclose(one[0], one[1])
    assert not torch.allclose(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one, singular_values(1), strict=True))
