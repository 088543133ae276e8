"""Facts that one paper, or the library that published its code, states."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, MissConfig, PeanutConfig, RandLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

from inlay.host.config import InlayConfig
from inlay.host.schedule import step
from inlay.inspection.ranks import inspection
from inlay.method import Method
from inlay.methods.bat import Bat
from inlay.methods.bat_col import BatCol
from inlay.methods.bone import Bone
from inlay.methods.deep_lora import DeepLoRA
from inlay.methods.dota import DoTA
from inlay.methods.lamda import LaMDA
from inlay.methods.loldu import LoLDU
from inlay.methods.lora import LoRA
from inlay.methods.milora import MiLoRA
from inlay.methods.mora import MoRA
from inlay.methods.mora_rope import MoRARope
from inlay.methods.olora import OLoRA
from inlay.methods.peanut import PEANuT
from inlay.methods.pissa import PiSSA
from inlay.methods.randlora import RandLoRA
from inlay.methods.snell import SNELL
from inlay.methods.svfit import SVFit
from inlay.models.base import BaseModel
from inlay.numerics import linalg
from inlay.numerics.ops import Dropout

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def one_layer(out: int, inp: int, config) -> nn.Module:
    """The adapted form of a linear layer that is the same for every config."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(inp, out))
    return get_peft_model(net, config)


def ours(method: Method) -> InlayConfig:
    return InlayConfig(method=method, target_modules=["0"])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a one-layer model by the symbol in their name."""
    return {n.split("0.")[1].split(".")[0]: p for n, p in model.named_parameters() if p.requires_grad}


def fill(model: nn.Module, **values: Tensor) -> None:
    with torch.no_grad():
        for name, p in tensors(model).items():
            p.copy_(values[name])


def compare(a: nn.Module, b: nn.Module, inp: int) -> None:
    """Same output, same gradients."""
    x = torch.randn(2, 5, inp)
    outputs = [model(x) for model in (a, b)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for y in outputs:
        y.square().sum().backward()
    for p, q in zip(tensors(a).values(), tensors(b).values(), strict=True):
        assert q.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def low_rank(method: Method, W: Tensor) -> tuple[Tensor, Tensor]:
    start = method.start(W)
    return start["B"].double(), start["A"].double()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# Bone and Bat


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24), (24, 44)])
def test_bone_is_pefts_miss(out, inp):
    D = torch.randn(8, out)
    mine = one_layer(out, inp, ours(Bone(r=8)))
    theirs = one_layer(out, inp, MissConfig(r=8, init_weights=True, target_modules=["0"]))
    fill(mine, inlay_D=D)
    fill(theirs, miss_block=D)
    compare(mine, theirs, inp)


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
def test_bat_col_is_pefts_bat(out, inp):
    B = 0.3 * torch.randn(out // 8, 8, 8)
    mine = one_layer(out, inp, ours(BatCol(r=8)))
    theirs = one_layer(out, inp, MissConfig(r=8, init_weights="bat", target_modules=["0"]))
    fill(mine, inlay_B=B)
    fill(theirs, miss_block=B)
    compare(mine, theirs, inp)


def test_bat_row_is_not_pefts_bat():
    """The two orientations are different families, even where the shapes agree."""
    B, W = torch.randn(3, 8, 8), torch.randn(24, 24)
    row, col = (m(r=8).delta({"B": B}, W) for m in (Bat, BatCol))
    assert distance(row, col) > 0.1


def test_the_free_term_of_bat_col_is_a_bone():
    r, B = 8, torch.randn(3, 8, 8)
    D = torch.empty(r, 24)
    for c in range(r):
        for a in range(3):
            for p in range(r):
                D[c, a * r + p] = B[a, p, c]
    W = torch.zeros(24, 40)  # without a weight only the free term is left
    torch.testing.assert_close(BatCol(r=r).delta({"B": B}, W), Bone(r=r).delta({"D": D}, W))


def test_the_fast_form_of_bat_never_asks_for_the_weight():
    class Closed:
        weight = property(lambda self: pytest.fail("the weight was read"))

        def __call__(self, x):
            return F.linear(x, W)

    W, x = torch.randn(24, 40, dtype=torch.float64), torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 8, 8, dtype=torch.float64, requires_grad=True)
    fast = Bat(r=8, scale=0.5).apply({"B": B}, None, x, Closed())
    dense = F.linear(x, W + 0.5 * Bat(r=8).delta({"B": B}, W))
    torch.testing.assert_close(fast, dense, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, [x, B], g), torch.autograd.grad(dense, [x, B], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_step_of_bone_is_the_root_of_in_over_r():
    """A D of norm 1 is a ΔW of norm √(n/r), and one SGD step goes n/r times as far as through an orthonormal A."""
    r, out, inp = 8, 24, 64
    bone, D = Bone(r=r), torch.randn(8, 24)
    W, G = torch.randn(out, inp), torch.randn(out, inp)
    assert bone.delta({"D": D}, W).norm() == pytest.approx(math.sqrt(inp / r) * D.norm())
    D = torch.zeros(r, out, requires_grad=True)
    (bone.delta({"D": D}, W) * G).sum().backward()
    bone_step = bone.delta({"D": -D.grad}, W)
    A = torch.eye(r).repeat(1, inp // r) / math.sqrt(inp / r)  # the same rows, orthonormal
    B = torch.zeros(out, r, requires_grad=True)
    (LoRA(r=r).delta({"B": B, "A": A}, W) * G).sum().backward()
    torch.testing.assert_close(bone_step, inp / r * (-B.grad @ A))


# LoRA


@pytest.mark.parametrize("alpha", [4, 8, 20.0])
def test_lora_is_pefts_lora(alpha):
    A, B = torch.randn(8, 40), torch.randn(24, 8)
    mine = one_layer(24, 40, ours(LoRA(r=8, alpha=alpha)))
    theirs = one_layer(24, 40, LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"]))
    fill(mine, inlay_A=A, inlay_B=B)
    fill(theirs, lora_A=A, lora_B=B)
    compare(mine, theirs, 40)


def test_lora_starts_as_pefts_lora():
    mine = one_layer(24, 400, ours(LoRA(r=8)))
    theirs = one_layer(24, 400, LoraConfig(r=8, target_modules=["0"]))
    for a, b in zip(tensors(mine).values(), tensors(theirs).values(), strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.05)
        assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.05)
    assert tensors(mine)["inlay_A"].std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)


# PiSSA and MiLoRA


@pytest.mark.parametrize("scale", [None, 0.25, 4.0])
@pytest.mark.parametrize(("out", "inp"), [(48, 80), (80, 48), (64, 64)])
def test_pissa_starts_from_the_best_approximation(out, inp, scale):
    W = torch.randn(out, inp)
    method = PiSSA(r=8, scale=scale)
    B, A = low_rank(method, W)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert distance(method.s * B @ A, U[:, :8] * S[:8] @ Vh[:8]) < 1e-5
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-4, atol=1e-4)  # √Σ on either side
    torch.testing.assert_close(torch.linalg.svdvals(method.s * B.T @ B), S[:8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.25, 4.0])
@pytest.mark.parametrize(("out", "inp"), [(48, 80), (80, 48), (64, 64)])
def test_milora_starts_from_the_last_triplets(out, inp, scale):
    W = torch.randn(out, inp)
    method = MiLoRA(r=8, scale=scale)
    B, A = low_rank(method, W)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert distance(method.s * B @ A, U[:, -8:] * S[-8:] @ Vh[-8:]) < 1e-3
    torch.testing.assert_close(torch.linalg.svdvals(method.s * B.T @ B), S[-8:], rtol=1e-3, atol=1e-4)
    assert (U[:, :-8].T @ torch.linalg.qr(B)[0]).abs().max() < 1e-3
    assert (Vh[:-8] @ torch.linalg.qr(A.T)[0]).abs().max() < 1e-3


@pytest.mark.parametrize("side", ["middle", "random"])
def test_the_ablations_of_milora_take_other_triplets(side):
    W = torch.randn(48, 80)
    B, A = low_rank(MiLoRA(r=8, side=side), W)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    part = U.T @ B @ A @ Vh.T
    chosen = part.diagonal() > 0.5 * S
    assert chosen.sum() == 8
    torch.testing.assert_close(part, torch.diag(S * chosen), rtol=1e-3, atol=1e-3)
    if side == "middle":
        assert chosen.nonzero().flatten().tolist() == list(range(20, 28))
    else:
        assert chosen.nonzero().flatten().tolist() not in ([*range(8)], [*range(20, 28)], [*range(40, 48)])


@pytest.mark.parametrize("method", [PiSSA(r=8), MiLoRA(r=8)], ids=lambda m: m.name)
def test_the_first_gradient_is_not_zero_on_either_side(method):
    model = one_layer(48, 80, ours(method))
    model(torch.randn(5, 80)).square().sum().backward()
    assert {k: bool(p.grad.norm() > 1e-3) for k, p in tensors(model).items()} == {"inlay_A": True, "inlay_B": True}


def test_milora_moves_less_at_the_start_than_pissa():
    """Its factors carry √σ of the smallest triplets, so the same learning rate does less."""
    norms = []
    for method in (MiLoRA(r=8), PiSSA(r=8)):
        model, x = one_layer(64, 64, ours(method)), torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        model(x).square().sum().backward()
        norms.append(sum(p.grad.square().sum() for p in tensors(model).values()).sqrt().item())
    assert norms[0] < 0.5 * norms[1]


def test_milora_of_a_bf16_weight_starts_exactly():
    """A residual in bf16 would lose the minor part of a weight; nothing is subtracted here."""
    net = nn.Sequential(nn.Linear(128, 128)).to(torch.bfloat16)
    x = torch.randn(9, 128, dtype=torch.bfloat16)
    before = net(x)
    assert (get_peft_model(net, ours(MiLoRA(r=16)))(x) - before).abs().max() == 0


# LaMDA


@pytest.mark.parametrize("init", ["svd", "svd_core"])
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize(("out", "inp"), [(48, 80), (80, 48), (64, 64)])
def test_lamda_starts_between_the_first_singular_vectors(out, inp, scale, init):
    W = torch.randn(out, inp)
    method = LaMDA(r=10, stages=4, scale=scale, init=init)
    p = {k: v.double() for k, v in method.start(W).items()}
    B, S, A = torch.cat([p[f"B_{i}"] for i in (1, 2, 3, 4)], 1), p["S"], p["A"]
    assert [p[f"B_{i}"].shape[1] for i in (1, 2, 3, 4)] == [3, 3, 2, 2]
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    eye, values = torch.eye(10, dtype=torch.float64), torch.diag(sigma[:10]) / method.s
    outside, inside = (values, eye) if init == "svd" else (eye, values)
    torch.testing.assert_close(B.T @ B, outside, rtol=0, atol=1e-4)
    torch.testing.assert_close(A @ A.T, outside, rtol=0, atol=1e-4)
    torch.testing.assert_close(S, inside, rtol=1e-5, atol=1e-5)
    assert distance(method.s * B @ S @ A, U[:, :10] * sigma[:10] @ Vh[:10]) < 1e-5


def first_gradients(method: Method) -> dict[str, float]:
    model = one_layer(48, 80, ours(method))
    model(torch.randn(5, 80)).square().sum().backward()
    return {k.removeprefix("inlay_"): p.grad.norm().item() for k, p in tensors(model).items()}


def test_what_moves_first_in_lamda():
    svd, zero, kaiming = (first_gradients(LaMDA(r=8, stages=2, init=k)) for k in ("svd", "svd_zero", "kaiming"))
    assert min(svd.values()) > 1e-3
    assert zero["S"] > 1e-3
    assert zero["B_1"] == zero["B_2"] == 0  # B moves only after S has
    assert kaiming["S"] == 0
    assert min(kaiming["B_1"], kaiming["B_2"]) > 1e-3


def test_the_published_start_of_lamda():
    p = LaMDA(r=64, init="kaiming").start(torch.randn(96, 400))
    assert LaMDA(r=64, init="kaiming").s == 16 / 64
    assert LaMDA(r=64, init="kaiming", scale=2.0).s == 2.0
    for k, inp in (("A", 400), ("S", 64)):  # nn.Linear's default: uniform within ±1/√in
        assert p[k].abs().max().item() == pytest.approx(1 / math.sqrt(inp), rel=0.05)
        assert p[k].std().item() == pytest.approx(1 / math.sqrt(3 * inp), rel=0.05)
    assert all(p[f"B_{i}"].abs().max() == 0 for i in range(1, 9))


def test_dropout_of_lamda_is_on_the_rank_side():
    """Before the frozen A it would keep a copy of x for the backward pass."""
    layer = LaMDA(r=8)
    W = torch.randn(24, 40)
    p = layer.start(W)

    class Base:
        weight = W

        def __call__(self, x):
            return F.linear(x, W)

    x, p0 = torch.randn(500, 40), layer.start(W)
    p["S"] = 2 * p["S"]
    change = layer.apply(p, p0, x, Base(), Dropout(0.25)) - x @ W.T
    B, A = layer.pair(p, p0, 40)
    mask = (change @ torch.linalg.pinv(B.T)) / (x @ A.T)
    assert 0.2 < (mask.abs() < 0.5).double().mean() < 0.3
    torch.testing.assert_close(mask, torch.where(mask.abs() < 0.5, 0, 4 / 3), rtol=0.01, atol=0.01)


def test_the_count_behind_lamdas_17_7():
    """DeBERTa-v3-base, the six linears of twelve layers: LoRA's r = 8 against what LaMDA's r = 32 ends with."""
    targets = ["query_proj", "key_proj", "value_proj", "dense"]
    counts = {}
    for method in (LoRA(r=8), LaMDA(r=32)):
        with torch.device("meta"):
            net = DebertaV2Model(
                DebertaV2Config(
                    vocab_size=128100,
                    hidden_size=768,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    intermediate_size=3072,
                )
            )
        model = get_peft_model(net, InlayConfig(method=method, target_modules=targets))
        counts[method.name] = step(model, 0.0), step(model, 1.0)
    assert counts == {"lora": (1_327_104, 1_327_104), "lamda": (73_728 + 12 * 32 * (5 * 768 + 3072), 73_728)}
    assert 1_327_104 / 73_728 == 18.0  # the paper says 17.7


# OLoRA


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
def test_olora_is_pefts_olora(out, inp):
    """The same factors (PEFT cuts them from the whole QR), and the same layer when they have moved."""
    mine = one_layer(out, inp, ours(OLoRA(r=8, scale=2.0)))
    theirs = one_layer(out, inp, LoraConfig(r=8, lora_alpha=16, init_lora_weights="olora", target_modules=["0"]))
    for a, b in zip(tensors(mine).values(), tensors(theirs).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    moved = {k: p.detach() + 0.1 * torch.randn_like(p) for k, p in tensors(mine).items()}
    fill(mine, **moved)
    fill(theirs, lora_A=moved["inlay_A"], lora_B=moved["inlay_B"])
    compare(mine, theirs, inp)


@pytest.mark.parametrize(("out", "inp"), [(48, 80), (80, 48), (64, 64)])
def test_olora_starts_from_the_thin_qr(out, inp):
    W = torch.randn(out, inp)
    B, A = low_rank(OLoRA(r=8), W)
    Q, R = torch.linalg.qr(W.double())
    torch.testing.assert_close(B, Q[:, :8], rtol=0, atol=1e-5)
    torch.testing.assert_close(A, R[:8], rtol=0, atol=1e-4)
    torch.testing.assert_close((B @ A)[:, :8], W.double()[:, :8], rtol=0, atol=1e-5)  # it holds W's first columns whole


def test_olora_holds_less_of_the_weight_than_pissa():
    """On singular values 1/k its residual is the larger; a QR without pivots cannot choose."""
    U, V = (torch.linalg.qr(torch.randn(96, 96)).Q for _ in range(2))
    W = U / torch.arange(1, 97) @ V
    rest = {}
    for method in (OLoRA(r=16), PiSSA(r=16)):
        B, A = low_rank(method, W)
        rest[method.name] = distance(B @ A, W.double())
    assert 1.2 * rest["pissa"] < rest["olora"] < 1


# SVFit


def test_svfit_starts_from_the_best_approximation_and_moves_singular_values():
    W = torch.randn(48, 80)
    method, U, S, Vh = SVFit(r=8), *torch.linalg.svd(W.double(), full_matrices=False)
    p = {k: v.double() for k, v in method.start(W).items()}
    torch.testing.assert_close(p["sigma"], S[:8], rtol=1e-5, atol=1e-5)
    assert distance(method.delta(p, W), U[:, :8] * S[:8] @ Vh[:8]) < 1e-5
    p0, p["sigma"] = dict(p), p["sigma"] * torch.linspace(1.1, 1.9, 8)
    new = torch.linalg.svdvals(W.double() + method.offset(p, p0, W))
    torch.testing.assert_close(new, torch.cat([p["sigma"], S[8:]]).sort(descending=True).values, rtol=1e-5, atol=1e-5)


def test_the_count_behind_svfits_sixteen_times():
    """RoBERTa-base, query and value: LoRA's r = 8 against all 768 singular values."""
    counts = {}
    for method in (LoRA(r=8), SVFit(r=768)):
        with torch.device("meta"):
            net = RobertaModel(RobertaConfig())
        counts[method.name] = step(
            get_peft_model(net, InlayConfig(method=method, target_modules=["query", "value"])), 0.0
        )
    assert counts == {"lora": 294_912, "svfit": 18_432}
    assert counts["lora"] == 16 * counts["svfit"]


# LoLDU


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24), (32, 32)])
def test_loldu_takes_the_first_pivots(out, inp):
    W = torch.randn(out, inp)
    P, L, U = torch.linalg.lu(W.double())
    for r in (5, min(out, inp)):
        p = {k: v.double() for k, v in LoLDU(r=r).start(W).items()}
        torch.testing.assert_close(p["B"], (P @ L)[:, :r], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p["z"], U.diagonal()[:r], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p["A"], U[:r] / U.diagonal()[:r, None], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(p["B"] * p["z"] @ p["A"], W.double(), rtol=1e-4, atol=1e-4)  # all pivots: W itself


def test_what_loldu_leaves_is_no_residual():
    """The paper speaks of a residual; it is larger than the weight."""
    W = torch.randn(256, 256)
    p = LoLDU(r=16).start(W)
    assert (W - p["B"] * p["z"] @ p["A"]).norm() > W.norm()


def test_loldu_of_a_weight_whose_first_columns_depend_on_each_other():
    W = torch.randn(24, 40)
    W[:, 2], W[:, 5] = 0, W[:, 1] - W[:, 3]
    p = LoLDU(r=8).start(W)
    assert all(v.isfinite().all() and v.abs().max() < 1e3 for v in p.values())
    assert p["z"].abs()[[2, 5]].max() < 1e-5


# MoRA


def test_mora_has_loras_numbers_and_a_higher_rank():
    """4096 × 4096: 256 × 256 for LoRA's r = 8."""
    W = torch.empty(4096, 4096, device="meta")
    for method in (MoRA(r=8), MoRARope(r=8)):
        M = method.start(W)["M"]
        assert M.shape == (256, 256)
        assert M.numel() == 8 * (4096 + 4096)


def test_the_rotations_of_mora_tell_equal_blocks_apart():
    """With M = I the output is the input, each block turned: the first by 0, lengths kept, no two alike."""
    block = torch.randn(10, dtype=torch.float64)
    D = MoRARope(r=2).delta({"M": torch.eye(10, dtype=torch.float64)}, torch.empty(40, 40))
    y = (D @ block.repeat(4)).view(4, 10)
    torch.testing.assert_close(y[0], block)
    pairs = y.view(4, 2, 5)
    torch.testing.assert_close(pairs.norm(dim=1), pairs[:1].norm(dim=1).expand(4, 5))
    assert torch.pdist(y).min() > 0.1
    same = MoRA(r=2).delta({"M": torch.eye(10, dtype=torch.float64)}, torch.empty(40, 40)) @ block.repeat(4)
    assert torch.pdist(same.view(4, 10)).max() < 1e-12


# RandLoRA


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24), (24, 24)])
def test_randlora_at_pefts_scale_is_pefts_randlora(out, inp):
    """PEFT pairs column i of its flat B with row i of the mixture in the order (rank, basis); and 20 is its scale."""
    r, N, short, long = 5, 5, 24, max(out, inp)
    mine = one_layer(out, inp, ours(RandLoRA(r=r, scale=10 * math.sqrt(N))))
    theirs = one_layer(out, inp, RandLoraConfig(r=r, randlora_alpha=20 * r, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    B = linalg.uniform_noise(long, N * r, 0, torch.float32, torch.device("cpu")).view(long, N, r)
    A = linalg.uniform_noise(r, short, 1, torch.float32, torch.device("cpu"))
    layer.randlora_A["default"] = A[:, None]
    layer.randlora_B["default"] = B.transpose(1, 2).reshape(long, N, r)
    lam, gamma = torch.randn(N, r), torch.randn(N, short)
    fill(mine, inlay_lambda=lam, inlay_gamma=gamma)
    fill(theirs, randlora_lambda=lam.T, randlora_gamma=gamma)
    x = torch.randn(2, 5, inp)
    y, wanted = mine(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    for z in (y, wanted):
        z.square().mean().backward()
    a, b = tensors(mine), tensors(theirs)
    torch.testing.assert_close(a["inlay_lambda"].grad, b["randlora_lambda"].grad.T, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(a["inlay_gamma"].grad, b["randlora_gamma"].grad, rtol=1e-3, atol=1e-2)


def test_randlora_starts_as_pefts_and_has_full_rank():
    W = torch.empty(40, 24)
    p = RandLoRA(r=5).start(W)
    assert (p["lambda"] == 0).all()
    assert (p["gamma"] == 1 / 24).all()
    ranks = []
    for k in ("lambda", "gamma"):  # A is one for all j: while the γ_j are alike, so are the rows of the sum
        p[k].normal_()
        ranks.append(torch.linalg.matrix_rank(RandLoRA(r=5).delta(p, W)).item())
    assert ranks == [5, 24]


def test_randlora_trains_less_as_its_rank_grows():
    W = torch.empty(4096, 4096, device="meta")
    counts = [sum(v.numel() for v in RandLoRA(r=r).start(W).values()) for r in (16, 32, 64)]
    assert counts == [256 * 4112, 128 * 4128, 64 * 4160]


def test_the_bases_of_randlora_follow_from_the_seed():
    """splitmix64 in whole numbers of any size, a few entries; and what one asks of random numbers."""
    cpu, words, mask = torch.device("cpu"), [], 2**64 - 1
    for i in range(1, 7):
        z = (i + (3 << 40)) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        words.append((z ^ z >> 31) >> 40)
    wanted = [(2 * w - 0xFFFFFF) / 2**24 * math.sqrt(3) for w in words]
    assert linalg.uniform_noise(2, 3, 3, torch.float64, cpu).flatten().tolist() == pytest.approx(wanted, rel=1e-6)
    X = linalg.uniform_noise(400, 500, 7, torch.float32, cpu)
    assert X is linalg.uniform_noise(400, 500, 7, torch.float32, cpu)
    assert X.mean().abs() < 0.01
    assert X.std().item() == pytest.approx(1, abs=0.01)
    assert X.abs().max().item() == pytest.approx(math.sqrt(3), rel=1e-3)
    assert (X.T @ X / 400 - torch.eye(500)).abs().max() < 0.3  # columns do not know of each other
    other = linalg.uniform_noise(400, 500, 8, torch.float32, cpu)
    assert (X * other).mean().abs() < 0.01
    assert torch.equal(linalg.uniform_noise(4, 500, 7, torch.bfloat16, cpu), X[:4].bfloat16())


# PEANuT


@pytest.mark.parametrize(("out", "inp"), [(24, 40), (40, 24)])
def test_peanut_is_pefts_peanut(out, inp):
    A, B = torch.randn(out, 8), torch.randn(8, out)
    mine = one_layer(out, inp, ours(PEANuT(r=8, scale=0.5)))
    theirs = one_layer(out, inp, PeanutConfig(r=8, depth=0, scaling=0.5, target_modules=["0"]))
    fill(mine, inlay_A=A, inlay_B=B)
    fill(theirs, peanut_A=A.T, peanut_B=B.T)
    x = torch.randn(2, 5, inp)
    y, wanted = mine(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    for z in (y, wanted):
        z.square().mean().backward()
    for k in "AB":
        torch.testing.assert_close(
            tensors(mine)[f"inlay_{k}"].grad, tensors(theirs)[f"peanut_{k}"].grad.T, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("name", ["peanut", "mora", "mora_rope", "randlora"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_half_precision_bases_are_not_kept_in_fp32(name, dropout):
    """Nothing of W's size is kept for the backward pass but W and the shared bases."""
    net = nn.Sequential(nn.Linear(256, 128)).to(torch.bfloat16)
    model = get_peft_model(net, InlayConfig(method=name, args={"r": 8, "dropout": dropout}, target_modules=["0"]))
    kept, known = [], {model.base_model.model[0].base_layer.weight.untyped_storage().data_ptr()}
    x = torch.randn(16, 256, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(x)
    known |= {t.untyped_storage().data_ptr() for t in linalg._NOISE.values()}
    large = [t.shape for t in kept if t.numel() >= 128 * 256 and t.untyped_storage().data_ptr() not in known]
    assert large == []


# Deep LoRA


def test_deep_lora_starts_orthogonal_and_small():
    W = torch.empty(24, 40)
    p = DeepLoRA(r=8).start(W)
    eye = 1e-6 * torch.eye(8)
    for gram in (p["W1"] @ p["W1"].T, p["W2"] @ p["W2"].T, p["W3"].T @ p["W3"]):
        torch.testing.assert_close(gram, eye, rtol=0, atol=1e-11)
    S = torch.linalg.svdvals(DeepLoRA(r=8).delta(p, W))
    torch.testing.assert_close(S[:8], torch.full((8,), 1e-9), rtol=1e-3, atol=0)


def test_deep_lora_finds_a_rank_that_is_below_r():
    """Gradient descent towards a matrix of rank 2, from r = 8: the other six singular values stay where they began."""
    U, V = (torch.linalg.qr(torch.randn(n, 2)).Q for n in (24, 40))
    W, target = torch.empty(24, 40), U * torch.tensor([1.0, 0.5]) @ V.T
    method = DeepLoRA(r=8, epsilon=0.03)
    p = {k: v.requires_grad_() for k, v in method.start(W).items()}
    for _ in range(1000):
        loss = (method.delta(p, W) - target).square().sum()
        for v, g in zip(p.values(), torch.autograd.grad(loss, list(p.values())), strict=True):
            v.data -= 0.1 * g
    assert torch.linalg.svdvals(method.delta(p, W))[:8].tolist() == pytest.approx([1, 0.5] + [0.03**3] * 6, rel=0.5)


# SNELL


def test_snell_is_sparse_and_its_kernel_has_full_rank():
    W = torch.empty(48, 80)
    p = SNELL(r=4).start(W)
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        D = SNELL(r=4, sparsity=sparsity).delta(p, W)
        assert (D != 0).sum() == max(1, 48 * 80 - int(sparsity * 48 * 80))
    K = SNELL(r=4, sparsity=0.0).delta(p, W)
    assert torch.linalg.matrix_rank(K.double()) == 48
    alive = SNELL(r=4).delta(p, W)
    assert alive[alive != 0].abs().min() >= K[alive == 0].abs().max()
    assert torch.equal(alive[alive != 0], K[alive != 0])


@pytest.mark.slow
def test_snell_selects_among_more_numbers_than_torch_quantile_takes():
    W = torch.empty(4096, 4097)
    D = SNELL(r=2).delta(SNELL(r=2).start(W), W)
    assert (D != 0).sum() == W.numel() - int(0.9 * W.numel())


# Real weights


@pytest.fixture(scope="module", params=["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"])
def spectrum(request, real_model):
    """A real weight and its float64 SVD."""
    W = real_model.get_submodule(f"model.layers.15.{request.param}").weight.detach()
    return W, *torch.linalg.svd(W.double(), full_matrices=False)


@pytest.mark.parametrize("r", [16, 64])
def test_pissa_on_a_real_weight(spectrum, r):
    W, U, S, Vh = spectrum
    B, A = low_rank(PiSSA(r=r), W)
    rest = (W.double() - B @ A).norm()
    assert rest <= S[r:].norm() * (1 + 1e-3)
    assert distance(B @ A, U[:, :r] * S[:r] @ Vh[:r]) < 0.05
    assert (U[:, 2 * r :].T @ torch.linalg.qr(B)[0]).norm() < 0.02 * math.sqrt(r)


@pytest.mark.parametrize("r", [16, 64])
def test_milora_on_a_real_weight(spectrum, r):
    W, U, S, _ = spectrum
    B, A = low_rank(MiLoRA(r=r), W)
    assert (B @ A).norm() == pytest.approx(S[-r:].norm().item(), rel=1e-2)
    top = U[:, : max(len(S) // 2, len(S) - 4 * r)]
    assert (top.T @ torch.linalg.qr(B)[0]).abs().max() < 1e-2
    # Where the spectrum has no gap single triplets mix, but what is left must be the rest of the weight.
    assert torch.linalg.svdvals(W.double() - B @ A)[: len(S) - r] == pytest.approx(S[:-r], rel=1e-2, abs=1e-4)


# LLaMA-2-7B, counted without its 27 GB


def llama_7b() -> LlamaForCausalLM:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        (BatCol(r=64), 87_031_808),
        (Bat(r=64), 72_876_032),
        (Bone(r=64), 87_031_808),
        (LoRA(r=64), 159_907_840),
        (PiSSA(r=128), 319_815_680),
        (MiLoRA(r=32), 79_953_920),
        (OLoRA(r=64), 159_907_840),
        (SVFit(r=1024), 224 * 1024),
        (LoLDU(r=1024), 224 * 1024),
        (MoRA(r=8), 32 * (4 * 256**2 + 3 * 348**2)),
        (RandLoRA(r=32), 224 * 128 * (32 + 4096)),
        (PEANuT(r=32), 32 * 2 * 32 * (5 * 4096 + 2 * 11008)),
        (DeepLoRA(r=64), 159_907_840 + 224 * 64 * 64),
        (LaMDA(r=64), 224 * 64 * 64 + 87_031_808),
        (DoTA(bond=4), 925_696),
        (DoTA(bond=8), 3_645_440),
        (DoTA(bond=16), 14_467_072),
        (DoTA(bond=32), 49_922_048),
        (DoTA(cores=3, bond=4), 2_039_808),
        (DoTA(cores=3, bond=8), 7_241_728),
        (DoTA(cores=3, bond=16), 27_131_904),
        (DoTA(cores=3, bond=32), 104_857_600),
    ],
    ids=lambda v: v.name if isinstance(v, Method) else "",
)
def test_parameters_on_llama_7b(method, numbers):
    """Its 32 layers are alike: counted in two."""
    model = get_peft_model(llama_7b(), InlayConfig(method=method, target_modules=LINEARS))
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for n, b in model.named_buffers() if "inlay" in n)
    assert 16 * model.get_nb_trainable_parameters()[0] == numbers


# LaMDA++


def test_types_differ_more_than_layers_in_the_built_in_model():
    """The (lower) medians over all layers of E(32), and why each type of module spends a budget of its own."""
    config = InlayConfig(method="lora", args={"r": 8}, target_modules=["k_proj", "q_proj", "up_proj"])
    found = inspection(BaseModel("builtin"), config, "flat")
    medians = {k: statistics.median_low(w.energy(32) for w in of.values()) for k, of in found.kinds.items()}
    assert medians == pytest.approx({"k_proj": 0.495, "q_proj": 0.375, "up_proj": 0.158}, abs=1e-3)
