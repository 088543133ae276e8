"""The contract: one table with a row per method, and tests that run over every row."""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import inlay
from inlay import methods
from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, START, InlayLinear
from inlay.method import Diagonal, LowRank, Method, Params
from inlay.methods.bat import Bat
from inlay.methods.bat_col import BatCol
from inlay.methods.bone import Bone
from inlay.methods.deep_lora import DeepLoRA
from inlay.methods.dota import DoTA
from inlay.methods.eva import EVA
from inlay.methods.lamda import LaMDA
from inlay.methods.loldu import LoLDU
from inlay.methods.lora import LoRA
from inlay.methods.lora_ga import LoRAGA
from inlay.methods.lorta import LoRTA
from inlay.methods.lq_lora import LQLoRA
from inlay.methods.milora import MiLoRA
from inlay.methods.mora import MoRA
from inlay.methods.mora_rope import MoRARope
from inlay.methods.olora import OLoRA
from inlay.methods.peanut import PEANuT
from inlay.methods.pissa import PiSSA
from inlay.methods.randlora import RandLoRA
from inlay.methods.smt import SMT
from inlay.methods.snell import SNELL
from inlay.methods.spiel import SpIEL
from inlay.methods.svfit import SVFit
from inlay.methods.xgblora import XGBLoRA
from inlay.numerics import linalg
from inlay.numerics.ops import shared


def low_rank(p: Params, W: Tensor) -> Tensor:
    return torch.einsum("or,ri->oi", p["B"], p["A"])


def diagonal(p: Params, W: Tensor) -> Tensor:
    (z,) = p.keys() - {"A", "B"}
    return sum(p[z][k] * torch.outer(p["B"][:, k], p["A"][k]) for k in range(len(p[z])))


def lamda(p: Params, W: Tensor) -> Tensor:
    B = torch.cat([p[k] for k in sorted(p) if k.startswith("B_")], dim=1)
    return torch.einsum("ok,kr,ri->oi", B, p["S"], p["A"])


def bone(p: Params, W: Tensor) -> Tensor:
    D, (out, inp) = p["D"], W.shape
    columns = [D[c % len(D)] for c in range(inp)]
    assert columns[0].shape == (out,)
    return torch.stack(columns, dim=1)


def bat(p: Params, W: Tensor) -> Tensor:
    B, r = p["B"].to(W.dtype), p["B"].shape[-1]
    return torch.cat([torch.cat([w @ B[b] + B[b] for b, w in enumerate(row.split(r, 1))], 1) for row in W.split(r)])


def bat_col(p: Params, W: Tensor) -> Tensor:
    B, r = p["B"].to(W.dtype), p["B"].shape[-1]
    return torch.cat([torch.cat([w @ B[a] + B[a] for w in row.split(r, 1)], 1) for a, row in enumerate(W.split(r))])


def mpo(p: Params, W: Tensor) -> Tensor:
    """MPO[o_1..o_N, i_1..i_N] = Σ over the bonds of Π_k T_k[d_{k-1}, o_k, i_k, d_k], with one letter to an index."""
    cores = [p[f"T{k + 1}"] for k in range(len(p))]
    letter = [iter("abcdefgh"), iter("ijklmnop"), iter("qrstuvwx")]
    bonds, rows, columns = ([next(it) for _ in range(len(cores) + 1)] for it in letter)
    terms = [bonds[k] + rows[k] + columns[k] + bonds[k + 1] for k in range(len(cores))]
    out = bonds[0] + "".join(rows[:-1]) + "".join(columns[:-1]) + bonds[-1]
    return torch.einsum(f"{','.join(terms)}->{out}", *cores).reshape(W.shape)


def mora(p: Params, W: Tensor) -> Tensor:
    """Column by column of the filled-up input, c' ≡ c mod in."""
    M, (out, inp) = p["M"], W.shape
    k, columns = len(M), [0] * inp
    for c in range(-(-inp // k) * k):
        columns[c % inp] = columns[c % inp] + torch.stack([M[o % k, c % k] for o in range(out)])
    return torch.stack(columns, 1)


def mora_rope(p: Params, W: Tensor) -> Tensor:
    M, (out, inp) = p["M"], W.shape
    k, rows, h = len(M), [], len(M) // 2
    for j in range(-(-inp // k)):
        R, block = torch.zeros_like(M), torch.zeros(k, inp, dtype=M.dtype)
        for i in range(h):
            angle = j * 10000 ** (-2 * i / k)
            R[i, i] = R[i + h, i + h] = math.cos(angle)
            R[i, i + h], R[i + h, i] = -math.sin(angle), math.sin(angle)
        place = torch.zeros(k, inp, dtype=M.dtype)
        for q in range(k):
            place[q, (j * k + q) % inp] = 1
        rows.append(block + M @ R @ place)
    return torch.cat(rows)[[o % (k * len(rows)) for o in range(out)]]


def randlora(p: Params, W: Tensor) -> Tensor:
    lam, gamma = p["lambda"], p["gamma"]
    (N, r), kind = lam.shape, (W.dtype, W.device)
    B, A = linalg.uniform_noise(max(W.shape), N * r, 0, *kind), linalg.uniform_noise(r, min(W.shape), 1, *kind)
    terms = [B[:, j * r : (j + 1) * r] @ torch.diag(lam[j]) @ A @ torch.diag(gamma[j]) for j in range(N)]
    D = 2 / math.sqrt(N) * sum(terms)
    return D if D.shape == W.shape else D.T


def peanut(p: Params, W: Tensor) -> Tensor:
    return ((W.to(p["A"].dtype).T @ p["A"]).clamp(min=0) @ p["B"]).T


def deep(p: Params, W: Tensor) -> Tensor:
    return torch.einsum("oa,ab,bi->oi", p["W3"], p["W2"], p["W1"])


def snell(p: Params, W: Tensor) -> Tensor:
    """With the default sparsity, .9."""
    distance = [(p["B"][h][:, None] - p["A"][h][None]).square().sum(-1).sqrt() for h in (0, 1)]
    K = 0.1 * (distance[0] - distance[1])
    alive = K.abs().flatten().argsort()[int(0.9 * K.numel()) :]
    return torch.zeros_like(K).flatten().index_copy(0, alive, K.flatten()[alive]).view_as(K)


def lorta(p: Params, W: Tensor) -> Tensor:
    """Of one weight on its own: a layer, a matrix and a head."""
    return torch.einsum("or,ir,r,r,r->oi", p["B"], p["A"], p["C_L"][0], p["C_M"][0], p["C_H"][0])


def boosted(p: Params, W: Tensor) -> Tensor:
    return p["B"] @ p["A"] + sum(torch.outer(b, a) for b, a in zip(p["B_past"].T, p["A_past"], strict=True))


def spiel(p: Params, W: Tensor) -> Tensor:
    D = [p["phi"].new_zeros(()) for _ in range(W.numel())]
    for position, value in zip(p["eta"].tolist(), p["phi"], strict=True):
        D[position] = D[position] + value
    return torch.stack(D).view(W.shape)


def smt(p: Params, W: Tensor) -> Tensor:
    D, r = torch.zeros_like(W, dtype=p["D"].dtype), p["D"].shape[1]
    for b, i, j in zip(p["D"], p["rows"].tolist(), p["cols"].tolist(), strict=True):
        D = D + F.pad(b, (j * r, W.shape[1] - (j + 1) * r, i * r, W.shape[0] - (i + 1) * r))
    return D


@dataclass
class Row:
    """What a method promises. `numbers` counts what it trains on an (m × n) weight; `delta` is ΔW(θ) written down
    from the paper's equation, without the library."""

    method: Method
    shape: tuple[int, int]
    trained: set[str]
    numbers: Callable[[int, int], int]
    delta: Callable[[Params, Tensor], Tensor]
    seeded: bool = False  # the start is drawn at random
    lora_exact: bool = True  # ΔW(θ) − ΔW(θ₀) is a product of thin factors
    rank: int | None = None  # that of ΔW, where it is not the method's r
    notes: frozenset[str] = frozenset()  # frozen symbols in which a pass notes what it has seen


LAMDA = {"S", "B_1", "B_2", "B_3", "B_4"}

# fmt: off
CONTRACT = {
    "lora": Row(LoRA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank, seeded=True),
    "pissa": Row(PiSSA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "milora": Row(MiLoRA(r=8), (40, 24), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "milora middle": Row(MiLoRA(r=8, side="middle"), (24, 24), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "milora random": Row(MiLoRA(r=8, side="random"), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "olora": Row(OLoRA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "svfit": Row(SVFit(r=8), (40, 24), {"sigma"}, lambda m, n: 8, diagonal),
    "loldu": Row(LoLDU(r=8), (24, 40), {"z"}, lambda m, n: 8, diagonal),
    "lamda": Row(LaMDA(r=8, stages=4), (24, 40), LAMDA, lambda m, n: 64 + 8 * m, lamda),
    "lamda svd_zero": Row(
        LaMDA(r=8, stages=4, init="svd_zero"), (40, 24), LAMDA, lambda m, n: 64 + 8 * m, lamda
    ),
    "lamda kaiming": Row(
        LaMDA(r=7, stages=4, init="kaiming"), (24, 40), LAMDA, lambda m, n: 49 + 7 * m, lamda, seeded=True
    ),
    "bone": Row(Bone(r=8), (24, 40), {"D"}, lambda m, n: 8 * m, bone),
    "bone short": Row(Bone(r=7), (24, 40), {"D"}, lambda m, n: 7 * m, bone),
    "bat": Row(Bat(r=8), (24, 40), {"B"}, lambda m, n: 8 * n, bat, lora_exact=False),
    "bat_col": Row(BatCol(r=8), (24, 40), {"B"}, lambda m, n: 8 * m, bat_col, lora_exact=False),
    # 24 = 2 · 4 · 3 and 40 = 2 · 5 · 4; 24 = 4 · 6 and 40 = 5 · 8
    "dota": Row(
        DoTA(bond=2, cores=3), (24, 40), {"T1", "T2", "T3"},
        lambda m, n: 2 * (2 * 2) + 2 * (4 * 5) * 2 + (3 * 4) * 2, mpo, lora_exact=False,
    ),
    "dota random": Row(
        DoTA(bond=4, cores=2, init="random"), (24, 40), {"T1", "T2"},
        lambda m, n: (4 * 5) * 4 + 4 * (6 * 8), mpo, seeded=True, lora_exact=False,
    ),
    "dota odd": Row(
        DoTA(bond=3, cores=3, shapes=[[1, 7, 3], [13, 1, 2]]), (21, 26), {"T1", "T2", "T3"},
        lambda m, n: 13 * 3 + 3 * 7 * 3 + 3 * 6, mpo, lora_exact=False,
    ),
    # √((24 + 40) 2) = 11.3 and √((16 + 48) 4) = 16; even: 10, and √((50 + 26) 2) = 12.3
    "mora": Row(MoRA(r=2), (24, 40), {"M"}, lambda m, n: 11**2, mora, rank=11),
    "mora even": Row(MoRA(r=4), (16, 48), {"M"}, lambda m, n: 16**2, mora, rank=16),
    "mora_rope": Row(MoRARope(r=2), (24, 40), {"M"}, lambda m, n: 10**2, mora_rope, lora_exact=False),
    "mora_rope tiled": Row(MoRARope(r=2), (50, 26), {"M"}, lambda m, n: 12**2, mora_rope, lora_exact=False),
    "randlora": Row(
        RandLoRA(r=5), (24, 40), {"lambda", "gamma"}, lambda m, n: 5 * (5 + m), randlora, lora_exact=False
    ),
    "randlora tall": Row(
        RandLoRA(r=8), (40, 24), {"lambda", "gamma"}, lambda m, n: 3 * (8 + n), randlora, lora_exact=False
    ),
    "peanut": Row(PEANuT(r=8), (24, 40), {"A", "B"}, lambda m, n: 16 * m, peanut, seeded=True),
    "deep_lora": Row(
        DeepLoRA(r=8), (24, 40), {"W1", "W2", "W3"}, lambda m, n: 8 * (m + n + 8), deep, seeded=True
    ),
    "snell": Row(
        SNELL(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), snell, seeded=True, lora_exact=False
    ),
    "lorta": Row(
        LoRTA(r=8), (24, 40), {"A", "B", "C_L", "C_M", "C_H"}, lambda m, n: 8 * (m + n + 3), lorta, seeded=True
    ),
    "xgblora": Row(
        XGBLoRA(r=2, rounds=3), (24, 40), {"A", "B"}, lambda m, n: 2 * (m + n), boosted, seeded=True
    ),
    "spiel": Row(
        SpIEL(r=4), (24, 40), {"phi"}, lambda m, n: 4 * (m + n), spiel, seeded=True, lora_exact=False,
        notes=frozenset({"candidates", "g"}),
    ),
    # 24 × 40 in blocks of 8: 15, of which one reads fewer columns than there are, and the default, 8 (24 + 40) / 64
    "smt": Row(SMT(r=8), (24, 40), {"D"}, lambda m, n: 8 * 64, smt, lora_exact=False),
    "smt few": Row(SMT(r=8, blocks=4), (24, 40), {"D"}, lambda m, n: 4 * 64, smt, lora_exact=False),
    "eva": Row(EVA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lora_ga": Row(LoRAGA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lq_lora": Row(LQLoRA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lq_lora none": Row(
        LQLoRA(r=8, weights="none"), (40, 24), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank
    ),
}
# fmt: on
BY_NAME = {row.method.name: row for row in reversed(CONTRACT.values())}
pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large
every_row = pytest.mark.parametrize("row", CONTRACT.values(), ids=CONTRACT)
every_method = pytest.mark.parametrize("row", BY_NAME.values(), ids=BY_NAME)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Under:
    """A base as a method sees it: any weight, any bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Net(nn.Module):
    """One layer of the row's shape between a nonlinearity and a head that is never adapted."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(shape[1], shape[0]), nn.Linear(shape[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))


def seen(method: Method, W: Tensor) -> Params | None:
    """Statistics of three batches of data, where a method starts from data."""
    out, inp = W.shape
    generator, stats = torch.Generator().manual_seed(1), {}
    for _ in range(3 if method.needs else 0):
        rows = inp if method.needs == "activations" else out
        stats = method.observe(stats, torch.randn(rows, inp, generator=generator))
    return stats or None


def begin(method: Method, W: Tensor) -> Params:
    return method.start(W, None if W.is_meta else seen(method, W))


def ready(model: PeftModel, method: Method, name: str = "default") -> PeftModel:
    """Calibrate an adapter that starts from data."""
    if method.needs:
        ids = isinstance(model.get_base_model(), LlamaForCausalLM)
        first = next(m for m in model.modules() if isinstance(m, InlayLinear))
        x = torch.arange(48).view(2, 24) if ids else torch.randn(30, first.in_features, dtype=dtype_of(model))
        batches = [{"x": x}] * 2
        inlay.calibrate(model, batches, adapter_name=name, loss=lambda m, b: output(m(b["x"])).float().square().mean())
    return model


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for n, p in model.named_parameters() if "head" in n)


def output(y) -> Tensor:
    return getattr(y, "logits", y)


def adapt(model: nn.Module, method: Method, target_modules=("layer",), name="default", **config) -> PeftModel:
    config = InlayConfig(method=method, target_modules=list(target_modules), **config)
    return ready(get_peft_model(model, config, name), method, name)


def wander(model: nn.Module, size: float = 0.1) -> None:
    """Move every trainable number away from its start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p, dtype=torch.float32), alpha=size)


def train(model: nn.Module, *inputs, steps: int = 3, lr: float = 1e-2, optimizer=torch.optim.AdamW) -> list[float]:
    adam = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        out = model(*inputs)
        loss = getattr(out, "logits", out).float().square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def theta(row: Row, W: Tensor, scale: float | None = None) -> tuple[Method, Params, Params]:
    """The method, random parameters away from the start, and the start, in W's dtype."""
    method = row.method if scale is None else dataclasses.replace(row.method, scale=scale)
    p0 = {k: cast(v, W.dtype) for k, v in begin(method, W.float()).items()}
    p = {k: v if k in method.frozen else v + 0.3 * torch.randn_like(v) for k, v in p0.items()}
    return method, p, p0


def cast(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype) if v.is_floating_point() else v


def given(method: Method, p0: Params) -> Params | None:
    """θ₀ as the host passes it on."""
    return None if method.zero_init else p0


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def layers_of(model: nn.Module) -> list[InlayLinear]:
    return [m for m in model.modules() if isinstance(m, InlayLinear)]


def test_every_method_has_a_row():
    assert {row.method.name for row in CONTRACT.values()} == {m.name for m in methods.METHODS}
    assert len({m.name for m in methods.METHODS}) == len(methods.METHODS)


@every_method
def test_a_method_is_found_by_its_name_and_is_final(row):
    cls = type(row.method)
    assert methods.find(row.method.name) is cls
    assert cls.__bases__[0] in (Method, LowRank, Diagonal)
    assert all(getattr(cls, field) for field in ("title", "equation", "paper", "trains"))


@every_row
def test_init_gives_the_shapes_and_the_count_of_the_formula(row):
    W = torch.randn(row.shape)
    p = begin(row.method, W)
    assert set(p) - row.method.frozen == row.trained
    assert sum(v.numel() for k, v in p.items() if k in row.trained) == row.numbers(*row.shape)
    assert {v.dtype for k, v in p.items() if k in row.trained} == {torch.float32}
    assert {v.dtype for v in p.values()} <= {torch.float32, torch.int32}  # positions
    assert all(v.isfinite().all() for v in p.values())


@every_row
def test_init_on_meta_tensors_gives_the_same_shapes_and_allocates_nothing(row):
    real, meta = begin(row.method, torch.randn(row.shape)), begin(row.method, torch.empty(row.shape, device="meta"))
    assert list(meta) == list(real)
    for k in real:
        assert meta[k].is_meta
        assert (meta[k].shape, meta[k].dtype) == (real[k].shape, real[k].dtype)


@every_row
def test_init_leaves_the_weight_alone_and_shares_no_memory_with_it(row):
    W = torch.randn(row.shape)
    before = W.clone()
    for value in begin(row.method, W).values():
        value.add_(1)
    assert torch.equal(W, before)


@every_row
def test_zero_init_says_the_truth(row):
    W = torch.randn(row.shape)
    start = row.delta(begin(row.method, W), W)
    assert (largest(start) == 0) == row.method.zero_init


@every_row
def test_a_start_is_deterministic_under_a_seed(row):
    W = torch.randn(row.shape)
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        starts.append(begin(row.method, W))
    assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])
    assert all(torch.equal(starts[0][k], starts[2][k]) for k in starts[0]) != row.seeded


@every_row
def test_delta_is_the_equation_of_the_paper(row):
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, _ = theta(row, W)
    before = W.clone()
    torch.testing.assert_close(method.delta(p, W), row.delta(p, W), rtol=1e-12, atol=1e-12)
    assert torch.equal(W, before)


@every_row
@pytest.mark.parametrize(
    ("bias", "lead", "scale"),
    [(False, (5,), None), (True, (2, 3), 0.37), (True, (1, 1), None), (False, (1, 1), 0.37)],
    ids=["2d", "bias-3d-s=.37", "bias-one token", "one token-s=.37"],
)
def test_apply_is_the_equation_with_its_gradients(row, bias, lead, scale):
    out, inp = row.shape
    W = torch.randn(out, inp, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64) if bias else None
    method, p, p0 = theta(row, W, scale)
    x = torch.randn(*lead, inp, dtype=torch.float64)
    g = torch.randn(*lead, out, dtype=torch.float64)
    leaves = [x, *(p[k] for k in sorted(row.trained))]
    for leaf in leaves:
        leaf.requires_grad_()
    y = method.apply(p, given(method, p0), x, Under(W, b))
    s = method.s if scale is None else scale
    expected = F.linear(x, W, b) + s * F.linear(x, row.delta(p, W) - row.delta(p0, W))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert largest(want) > 0
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@every_row
def test_gradcheck_of_apply(row):
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, p0 = theta(row, W, 0.5)
    names = sorted(row.trained)

    def layer(x, *values):
        return method.apply({**p, **dict(zip(names, values, strict=True))}, given(method, p0), x, Under(W))

    inputs = [torch.randn(2, row.shape[1], dtype=torch.float64), *(p[k] for k in names)]
    assert torch.autograd.gradcheck(layer, [i.detach().requires_grad_() for i in inputs])


@every_row
@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_apply_without_a_gradient_on_one_side(row, frozen):
    """The first layer of a model gets an x that needs no gradient, and an inference pass has no trained numbers."""
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, p0 = theta(row, W)
    x = torch.randn(3, row.shape[1], dtype=torch.float64, requires_grad=frozen != "x")
    for k in row.trained:
        p[k].requires_grad_(frozen != "parameters")
    leaves = [x] if frozen == "parameters" else [p[k] for k in sorted(row.trained)]
    expected = F.linear(x, W + method.s * (row.delta(p, W) - row.delta(p0, W))).square().sum()
    got = method.apply(p, given(method, p0), x, Under(W)).square().sum()
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_row
def test_apply_at_the_start_is_the_base_whatever_the_dtypes(row):
    W = torch.randn(row.shape)
    p = begin(row.method, W)
    for theta_dtype, x_dtype in itertools.product((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16)):
        base = Under(W.to(x_dtype), torch.randn(row.shape[0], dtype=x_dtype))
        narrow = {k: cast(v, theta_dtype) for k, v in p.items()}
        x = torch.randn(9, row.shape[1], dtype=x_dtype)
        y = row.method.apply(narrow, given(row.method, p), x, base)
        assert y.dtype == x_dtype
        assert largest(y - base(x)) == 0


def test_bat_col_in_many_strips_is_bat_col_in_one(monkeypatch):
    row = CONTRACT["bat_col"]
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, _ = theta(row, W)
    x = torch.randn(2, 3, row.shape[1], dtype=torch.float64, requires_grad=True)
    p["B"].requires_grad_()
    results = []
    for scratch in (1 << 20, 8 * row.shape[1] * 2, 1):
        monkeypatch.setattr(shared, "SCRATCH", scratch)
        y = method.apply(p, None, x, Under(W))
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, p["B"]])))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_starts_at_the_base_exactly(row, dtype):
    net, x = Net(row.shape).to(dtype), torch.randn(7, row.shape[1], dtype=dtype)
    before = net(x)
    model = adapt(net, row.method)
    assert largest(model(x) - before) == 0
    model.train()
    assert largest(model(x) - before) == 0


@every_row
def test_the_start_is_exact_under_autocast(row):
    net, x = Net(row.shape), torch.randn(7, row.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
        assert before.dtype == torch.bfloat16
        model = adapt(net, row.method)
        assert largest(model(x) - before) == 0
        model(x).float().square().sum().backward()
    assert any(p.grad is not None and largest(p.grad) > 0 for p in model.parameters())


@every_row
def test_training_under_autocast_works_with_fp32_parameters(row):
    model, x = adapt(Net(row.shape), row.method), torch.randn(7, row.shape[1])
    wander(model)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
        half.float().square().sum().backward()
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_row
def test_exactly_the_stated_symbols_train(row):
    model = adapt(Net(row.shape), row.method)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(PREFIX)[1].split(".")[0] for n in trained} == row.trained
    assert sum(p.numel() for p in trained.values()) == row.numbers(*row.shape)
    assert model.get_nb_trainable_parameters()[0] == row.numbers(*row.shape)
    layer = layers_of(model)[0]
    assert any(name.startswith(START) for name in layer._modules) != row.method.zero_init


@every_row
def test_training_moves_the_output_and_leaves_the_base_alone(row):
    net, x = Net(row.shape), torch.randn(7, row.shape[1])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    start = net(x)
    model = adapt(net, row.method)
    losses = train(model, x, steps=5)
    assert losses[-1] < losses[0]
    assert largest(model(x) - start) > 1e-3
    base = model.base_model.model
    assert torch.equal(base.layer.base_layer.weight, before["layer.weight"])
    assert torch.equal(base.layer.base_layer.bias, before["layer.bias"])
    assert torch.equal(base.head.weight, before["head.weight"])
    assert all(p.grad is None for n, p in model.named_parameters() if PREFIX not in n)


@every_row
def test_training_does_not_move_the_stored_start(row):
    model, x = adapt(Net(row.shape), row.method), torch.randn(7, row.shape[1])
    constant = {k: v.clone() for k, v in model.named_buffers()}
    assert (len(constant) == 0) == (row.method.zero_init and not row.method.frozen)
    train(model, x, steps=3)
    noted = tuple(f"{PREFIX}{symbol}." for symbol in row.notes)
    assert all(torch.equal(v, constant[k]) for k, v in model.named_buffers() if not any(n in k for n in noted))


@every_row
def test_the_layer_is_the_base_plus_the_dense_equation(row):
    net = Net(row.shape)
    W, b = net.layer.weight.detach().clone(), net.layer.bias.detach().clone()
    model = adapt(net, dataclasses.replace(row.method, scale=0.37))
    wander(model)
    layer, x = layers_of(model)[0], torch.randn(2, 5, row.shape[1])
    _, p, p0 = layer.theta("default")
    delta = 0.37 * (row.delta(p, W) - (0 if p0 is None else row.delta(p0, W)))
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), F.linear(x, W + delta, b), rtol=1e-4, atol=1e-5)


KINDS = {"lora", "pissa", "dota", "bat"}  # ΔW(θ₀) = 0; thin factors away from it; ΔW as a whole; from what W is
PAIRS = [
    pytest.param(*pair, marks=() if KINDS & {*pair} else pytest.mark.slow)
    for pair in itertools.permutations(BY_NAME, 2)
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name.replace("_", "-"))
def test_two_active_adapters_nest_with_their_gradients(first, second):
    """The second is cut from what the first has made of the weight, as if it were merged."""
    shape = (24, 40)
    rows = {"one": BY_NAME[first], "two": BY_NAME[second]}
    net = Net(shape)
    W, bias = net.layer.weight.detach().double(), net.layer.bias.detach().double()
    model = adapt(net, rows["one"].method, name="one")
    model.add_adapter("two", InlayConfig(method=rows["two"].method, scale=None, target_modules=["layer"]))
    ready(model, rows["two"].method, "two")
    model.base_model.set_adapter(["one", "two"])
    model.double()
    wander(model, 0.2)
    layer, x = layers_of(model)[0], torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    leaves, expected = [x], W
    for name, row in rows.items():
        _, p, p0 = layer.theta(name)
        leaves += [p[k] for k in sorted(row.trained)]
        change = row.delta(p, expected) - (0 if p0 is None else row.delta(p0, expected))
        expected = expected + row.method.s * change
    y, want = layer(x), F.linear(x, expected, bias)
    torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-8)
    g = torch.randn_like(y)
    for got, ref in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-8, atol=1e-8)


@every_row
def test_merge_in_fp32_keeps_the_output_and_unmerge_restores_the_bits(row):
    net, x = Net(row.shape).eval(), torch.randn(7, row.shape[1])
    before = net.layer.weight.detach().clone()
    model = adapt(net, row.method)
    wander(model)
    adapted = model(x)
    for _ in range(3):
        model.merge_adapter()
        assert largest(layers_of(model)[0].base_layer.weight - before) > 1e-3
        torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(layers_of(model)[0].base_layer.weight, before)
        assert torch.equal(model(x), adapted)


@every_row
def test_merge_in_bf16_rounds_once(row):
    net = Net(row.shape).to(torch.bfloat16)
    W = net.layer.weight.detach().clone()
    model = adapt(net, row.method)
    wander(model, 0.05)
    layer = layers_of(model)[0]
    _, p, p0 = layer.theta("default")
    delta = row.delta({k: cast(v, torch.float64) for k, v in p.items()}, W.double())
    delta = delta - (0 if p0 is None else row.delta({k: v.double() for k, v in p0.items()}, W.double()))
    exact = W.double() + row.method.s * delta
    model.merge_adapter()
    half_a_step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
    error = (layer.base_layer.weight.double() - exact).abs()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert (error <= half_a_step * 1.01 + 1e-6).all()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, W)


@every_method
def test_merge_and_unload_gives_a_plain_model(row, llama):
    model = adapt(llama, row.method, LINEARS)
    wander(model, 0.02)
    adapted = logits(model)
    plain = model.merge_and_unload()
    assert not layers_of(plain)
    assert largest(logits(plain) - adapted) < 1e-4


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_save_and_load_is_bit_equal_and_decomposes_nothing(row, dtype, llama_original, tmp_path, monkeypatch):
    """And training goes on after loading as if nothing had happened."""
    x = torch.arange(24).view(2, 12)
    model = adapt(copy.deepcopy(llama_original).to(dtype), row.method, LINEARS)
    train(model, x)
    trained, stored = logits(model.eval()), adapter_tensors(model)
    with model.disable_adapter():
        assert largest(trained - logits(model)) > 1e-3
    model.save_pretrained(tmp_path)
    forbid_decompositions(monkeypatch, type(row.method))
    torch.manual_seed(99)
    for how in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original).to(dtype), tmp_path, **how).eval()
        assert torch.equal(logits(loaded), trained)
        read = adapter_tensors(loaded)
        assert stored.keys() == read.keys()
        assert all(torch.equal(stored[k], read[k]) and stored[k].dtype == read[k].dtype for k in stored)
        assert any(p.requires_grad for p in loaded.parameters()) == bool(how.get("is_trainable"))
    if dtype == torch.float32:
        assert train(model.train(), x) == train(loaded.train(), x)
        assert torch.equal(logits(model), logits(loaded))


def adapter_tensors(model: nn.Module) -> Params:
    return {k: v for k, v in model.state_dict().items() if PREFIX in k}


def forbid_decompositions(monkeypatch, cls: type[Method]) -> None:
    """From here on only meta tensors may be decomposed or given a start."""

    def guarded(function, matrix: int):
        def call(*args, **kwargs):
            assert args[matrix].is_meta, f"{function.__name__} decomposed a weight"
            return function(*args, **kwargs)

        return call

    for module, names in (
        (linalg, ("svd", "top_svd")),
        (torch.linalg, ("svd", "eigh", "qr", "lu_factor")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, guarded(getattr(module, name), 0))
    monkeypatch.setattr(cls, "start", guarded(cls.start, 1))


def test_the_guard_against_decompositions_can_fail(llama, monkeypatch):
    forbid_decompositions(monkeypatch, PiSSA)
    with pytest.raises(AssertionError, match="decomposed"):
        adapt(llama, PiSSA(r=8), LINEARS)


def test_adapters_of_all_methods_share_one_model(llama):
    """Switch, disable, delete, add again: every adapter gives the bits it gave alone, and so does the base."""
    base, x = logits(llama), torch.arange(24).view(2, 12)
    model, seen = None, {}
    for name, row in BY_NAME.items():
        config = InlayConfig(method=row.method, target_modules=LINEARS)
        if model is None:
            model = get_peft_model(llama, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        ready(model, row.method, name)
        model.set_adapter(name)
        assert torch.equal(logits(model), base)
        train(model, x)
        seen[name] = logits(model)
        assert largest(seen[name] - base) > 1e-3
    for name in [*BY_NAME, *reversed(BY_NAME)]:
        model.set_adapter(name)
        assert torch.equal(logits(model), seen[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), seen[name])
    for name, row in BY_NAME.items():
        survivor = next(other for other in BY_NAME if other != name)
        model.set_adapter(survivor)
        model.delete_adapter(name)
        assert torch.equal(logits(model), seen[survivor])
        model.add_adapter(name, InlayConfig(method=row.method, target_modules=LINEARS))
        ready(model, row.method, name).set_adapter(name)
        assert torch.equal(logits(model), base)
        wander(model)
        seen[name] = logits(model)
    assert torch.equal(logits(model.unload()), base)


@every_row
def test_dropout_acts_on_the_change_only(row):
    net, x = Net(row.shape), torch.randn(7, row.shape[1])
    method = dataclasses.replace(row.method, dropout=0.5)
    before = net.layer(x).detach()
    model = adapt(net, method).train()
    layer = layers_of(model)[0]
    assert largest(layer(x) - before) == 0
    wander(model)
    draws = layer(x[:1].expand(4000, -1))
    error = draws.std(0) / len(draws) ** 0.5
    assert largest(draws.std(0)) > 0
    model.eval()
    plain = layer(x[:1])[0]
    assert ((draws.mean(0) - plain).abs() < 6 * error + 1e-5).all()
    assert torch.equal(layer(x), layer(x))


@every_row
def test_dropout_repeats_under_a_seed(row):
    model, x = adapt(Net(row.shape), dataclasses.replace(row.method, dropout=0.5)).train(), torch.randn(7, row.shape[1])
    wander(model)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(x))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@every_method
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(row, dropout, llama):
    model = adapt(llama, dataclasses.replace(row.method, dropout=dropout), LINEARS).train()
    wander(model)
    x, gradients = torch.arange(24).view(2, 12), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(3)
        model(x, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert any(largest(g) > 0 for g in gradients[0].values())
    for n, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], g, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does it to itself
@every_method
def test_compiled_output_and_gradients_are_the_eager_ones(row):
    net, x = Net((24, 40)), torch.randn(4, 40)
    model = adapt(net, row.method)
    wander(model)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@every_row
def test_the_same_seed_trains_the_same_numbers(row):
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model, x = adapt(Net(row.shape), dataclasses.replace(row.method, dropout=0.1)), torch.randn(7, row.shape[1])
        train(model.train(), x)
        results.append(adapter_tensors(model))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@every_row
def test_the_change_has_the_rank_that_export_relies_on(row):
    W = torch.randn(row.shape, dtype=torch.float64)
    method, p, p0 = theta(row, W)
    rank = torch.linalg.matrix_rank(row.delta(p, W) - row.delta(p0, W)).item()
    assert isinstance(method, LowRank) == row.lora_exact
    if row.lora_exact:
        B, A = method.factors(p, W)
        torch.testing.assert_close(B @ A, row.delta(p, W), rtol=1e-10, atol=1e-10)
        assert rank <= (row.rank or method.r) * (1 if method.zero_init else 2)
    else:
        assert rank > row.numbers(*row.shape) / sum(row.shape)  # more than as many numbers give as thin factors


WRONG = [
    ("unknown", {}, ["unknown", *(m.name for m in methods.METHODS)]),
    ("lora", {"rank": 4}, ["rank", "r", "alpha", "scale", "dropout"]),
    ("lora", {"r": 0}, ["r=0", "1"]),
    ("lora", {"r": -3}, ["r=-3"]),
    ("lora", {"r": 4.0}, ["r=4.0", "whole number"]),
    ("lora", {"r": "4"}, ["r='4'", "whole number"]),
    ("lora", {"r": True}, ["r=True", "whole number"]),
    ("lora", {"r": None}, ["r=None"]),
    ("lora", {"alpha": 16, "scale": 2.0}, ["alpha=16", "scale=2.0"]),
    ("lora", {"alpha": -1}, ["above 0"]),
    ("pissa", {"scale": -1.0}, ["-1.0", "above 0"]),
    ("pissa", {"scale": 0.0}, ["above 0"]),
    ("bone", {"scale": True}, ["scale=True", "number"]),
    ("bone", {"scale": "1"}, ["scale='1'", "number"]),
    ("bone", {"scale": float("nan")}, ["scale=nan"]),
    ("bone", {"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
    ("bone", {"dropout": -0.1}, ["dropout=-0.1"]),
    ("bone", {"dropout": None}, ["dropout=None"]),
    ("milora", {"side": "major"}, ["side='major'", "minor", "middle", "random"]),
    ("lamda", {"init": "zero"}, ["init='zero'", "svd", "svd_zero", "kaiming"]),
    ("lamda", {"eta": 0.0}, ["eta=0.0", "above 0"]),
    ("lamda", {"eta": 1.5}, ["eta=1.5", "above 1"]),
    ("lamda", {"stages": 0}, ["stages=0", "below 1"]),
    ("lamda", {"freeze_order": "first"}, ["freeze_order='first'", "largest", "smallest"]),
    ("milora", {"side": ["minor"]}, ["side=['minor']"]),
    ("dota", {"r": 8}, ["'r'", "bond", "cores", "shapes", "init"]),
    ("dota", {"bond": 0}, ["bond=0", "1"]),
    ("dota", {"bond": 4.0}, ["bond=4.0", "whole number"]),
    ("dota", {"cores": 0}, ["cores=0", "1"]),
    ("dota", {"init": "svd"}, ["init='svd'", "mpo", "random"]),
    ("dota", {"shapes": 4}, ["shapes=4", "[[o_1..o_N], [i_1..i_N]]", "{dimension: factors}"]),
    ("dota", {"shapes": [[4, 6]], "cores": 2}, ["shapes=[[4, 6]]", "pair"]),
    ("dota", {"shapes": [[4, 6], [5, 8]]}, ["[4, 6]", "2 factors", "cores=5", "set cores=2"]),
    ("dota", {"shapes": [[4, 6], [5, 8.0]], "cores": 2}, ["[5, 8.0]", "whole numbers"]),
    ("dota", {"shapes": [[4, 0], [5, 8]], "cores": 2}, ["[4, 0]", "from 1 on"]),
    ("dota", {"shapes": {"40": [5, 9]}, "cores": 2}, ["[5, 9]", "45", "40", "[5, 8]"]),
    ("dota", {"shapes": {"wide": [5, 8]}, "cores": 2}, ["'wide'", "whole numbers as keys"]),
]


@pytest.mark.parametrize(("name", "args", "words"), WRONG, ids=lambda v: str(v) if not isinstance(v, list) else "")
def test_a_wrong_hyperparameter_is_refused_with_its_value_and_the_choices(name, args, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        InlayConfig(method=name, args=args, target_modules=["layer"])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LoRA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (PiSSA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (MiLoRA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (LaMDA(r=25), ["layer", "r=25", "24 × 40", "r <= 24"]),
        (Bone(r=41), ["layer", "r=41", "40"]),
        (Bat(r=5), ["layer", "r=5", "24 × 40", "[1, 2, 4, 8]"]),
        (BatCol(r=3), ["layer", "r=3", "24 × 40", "[1, 2, 4, 8]"]),
        (
            DoTA(cores=2, shapes=[[4, 6], [5, 9]]),
            ["layer", "[5, 9]", "45", "40", "[5, 8]", "{dimension: factors}"],
        ),
    ],
    ids=lambda v: str(v) if isinstance(v, Method) else "",
)
def test_a_hyperparameter_that_does_not_fit_the_weight_is_refused_by_name(method, words):
    net = Net((24, 40))
    with pytest.raises(ValueError, match=words[0]) as error:
        adapt(net, method)
    assert all(word in str(error.value) for word in words)
    assert type(net.layer) is nn.Linear


def test_whole_numbers_are_welcome_where_a_float_is_asked_for():
    assert LoRA(r=8, alpha=16).s == 2.0
    assert Bone(scale=2).s == 2.0


def quantised(bits: int, shape: tuple[int, int]) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    net = Net(shape)
    if bits == 4:
        layer = bnb.nn.Linear4bit(shape[1], shape[0], quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(shape[1], shape[0], has_fp16_weights=False)
    layer.load_state_dict(net.layer.state_dict())
    try:
        net.layer = layer.to("cpu")
        with torch.no_grad():
            net(torch.zeros(1, shape[1]))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes has no {bits}-bit CPU kernels here: {error}")
    return net


@every_method
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(row, bits):
    net, x = quantised(bits, (64, 64)), torch.randn(7, 64)
    with torch.no_grad():
        before = net(x)
    packed = net.layer.weight.detach().clone()
    assert packed.dtype in (torch.uint8, torch.int8)
    model = adapt(net, row.method)
    assert torch.equal(model(x), before)
    losses = train(model, x, steps=4)
    assert losses[-1] < losses[0]
    trained = model(x).detach()
    assert largest(trained - before) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert torch.equal(layers_of(model)[0].base_layer.weight, packed)


@pytest.mark.filterwarnings("ignore:Merge")
@every_method
@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_a_quantised_base_and_back(row, bits):
    model, x = adapt(quantised(bits, (64, 64)), row.method), torch.randn(7, 64)
    wander(model, 0.5)
    with torch.no_grad():
        with model.disable_adapter():
            before = model(x)
        adapted = model(x)
        for _ in range(2):
            model.merge_adapter()
            assert largest(model(x) - adapted) < 0.5 * largest(before - adapted)  # it is quantised again
            model.unmerge_adapter()
            assert torch.equal(model(x), adapted)
        with model.disable_adapter():
            assert torch.equal(model(x), before)


@every_method
@pytest.mark.parametrize("bits", [4, 8])
def test_an_inference_pass_does_not_change_what_is_read_of_a_quantised_weight(row, bits):
    """On some CPUs bitsandbytes repacks a 4-bit weight at the first inference pass."""
    net, x = quantised(bits, (64, 64)), torch.randn(7, 64)
    model = adapt(net, row.method)
    wander(model, 0.02)
    layer = layers_of(model)[0]
    W, delta = layer.matrix().float(), layer.get_delta_weight("default")
    model.eval()
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(layer.matrix().float(), W, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(layer.get_delta_weight("default").float(), delta.float(), rtol=0.02, atol=2e-3)


def test_a_4_bit_weight_that_bitsandbytes_misreads_is_named():
    net = quantised(4, (64, 96))
    with pytest.warns(UserWarning, match="96 is no multiple of its block of 64"):
        adapt(net, Bone(r=4))
