"""Facts of the papers after the first four and their relatives, and PEFT's forms of them."""

import pytest
import torch
from peft import HiraConfig, LoraConfig, PsoftConfig
from test_papers import compare, distance, fill, one_layer, ours, tensors

from inlay.methods.hira import HiRA
from inlay.methods.lora_xs import LoRAXS
from inlay.methods.mica import MiCA
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
