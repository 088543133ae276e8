"""The contract's table: each method with its dense reference, and the small layers that the tests put it in."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import inlay
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear
from inlay.method import Method, Params
from inlay.methods.bat import Bat
from inlay.methods.bat_col import BatCol
from inlay.methods.bone import Bone
from inlay.methods.corda import CorDA
from inlay.methods.deep_lora import DeepLoRA
from inlay.methods.dota import DoTA
from inlay.methods.eva import EVA
from inlay.methods.hira import HiRA
from inlay.methods.kasa import KaSA
from inlay.methods.lamda import LaMDA
from inlay.methods.loldu import LoLDU
from inlay.methods.lora import LoRA
from inlay.methods.lora_ga import LoRAGA
from inlay.methods.lora_null import LoRANull
from inlay.methods.lora_one import LoRAOne
from inlay.methods.lora_xs import LoRAXS
from inlay.methods.lorta import LoRTA
from inlay.methods.lq_lora import LQLoRA
from inlay.methods.mica import MiCA
from inlay.methods.milora import MiLoRA
from inlay.methods.mora import MoRA
from inlay.methods.mora_rope import MoRARope
from inlay.methods.olora import OLoRA
from inlay.methods.oplora import OPLoRA
from inlay.methods.peanut import PEANuT
from inlay.methods.pissa import PiSSA
from inlay.methods.psoft import PSOFT
from inlay.methods.randlora import RandLoRA
from inlay.methods.smt import SMT
from inlay.methods.snell import SNELL
from inlay.methods.spiel import SpIEL
from inlay.methods.svfit import SVFit
from inlay.methods.xgblora import XGBLoRA
from inlay.numerics import linalg


def low_rank(p: Params, W: Tensor) -> Tensor:
    return torch.einsum("or,ri->oi", p["B"], p["A"])


def diagonal(p: Params, W: Tensor) -> Tensor:
    (z,) = p.keys() - {"A", "B"}
    return sum(p[z][k] * torch.outer(p["B"][:, k], p["A"][k]) for k in range(len(p[z])))


def lamda(p: Params, W: Tensor) -> Tensor:
    B = torch.cat([p[k] for k in sorted(p) if k.startswith("B_")], dim=1)
    return torch.einsum("ok,kr,ri->oi", B, p["S"], p["A"])


def lora_xs(p: Params, W: Tensor) -> Tensor:
    return torch.einsum("oa,ab,bi->oi", p["B"], p["R"], p["A"])


def kasa(p: Params, W: Tensor) -> Tensor:
    learned = torch.einsum("or,r,ri->oi", p["B"], p["sigma"], p["A"])
    return learned - sum(torch.outer(u, v) for u, v in zip(p["U"].T, p["V"], strict=True))


def psoft(p: Params, W: Tensor) -> Tensor:
    r, q = len(p["a"]), iter(p["q"])
    Q = torch.zeros(r, r, dtype=p["q"].dtype)
    for i in range(r):
        for j in range(i + 1, r):
            entry = torch.zeros_like(Q)
            entry[i, j], entry[j, i] = 1, -1
            Q = Q + next(q) * entry
    eye = torch.eye(r, dtype=Q.dtype)
    R = (eye + Q) @ torch.linalg.inv(eye - Q)
    return p["B"] @ (torch.diag(p["b"]) @ R @ torch.diag(p["a"]) - eye) @ p["A"]


def oplora(p: Params, W: Tensor) -> Tensor:
    left, right = (torch.eye(len(p[k]), dtype=W.dtype) - p[k] @ p[k].T for k in "UV")
    return left @ (p["B"] @ p["A"]) @ right


def hira(p: Params, W: Tensor) -> Tensor:
    return torch.einsum("oi,or,ri->oi", W.to(p["A"].dtype), p["B"], p["A"])


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
    parts: str | None = None  # what its symbols do (`Method.role`): of in, out, core and magnitude
    stops: bool = False  # the paper stops a gradient, so that derivatives are not those of finite differences
    keeps_x: bool = True  # a layer keeps its input for the backward pass
    width: int = 4  # and so many numbers of each token beside it, in a layer of 24 × 40 at size 4
    joins: bool | None = None  # multiplies with W + B A where that pays (None: if `lora_exact`)
    grows: bool = True  # a larger size trains more numbers, so that ranks can be allocated
    folds: float = 1.01  # the error of a fold to 4 bits against that of plain NF4, at most
    stride: float = 1e-3  # how far to move its numbers for a model's answers to move as far


LAMDA = {"S", "B_1", "B_2", "B_3", "B_4"}


# fmt: off
CONTRACT = {
    "lora": Row(LoRA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank, seeded=True, parts="in out"),
    "pissa": Row(PiSSA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank, parts="in out", folds=1),
    "milora": Row(MiLoRA(r=8), (40, 24), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank, parts="in out"),
    "milora middle": Row(MiLoRA(r=8, side="middle"), (24, 24), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "milora random": Row(
        MiLoRA(r=8, side="random"), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank, seeded=True
    ),
    "milora skip": Row(
        MiLoRA(r=8, side="middle", skip=3), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank
    ),
    "olora": Row(OLoRA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank, parts="in out"),
    "mica": Row(MiCA(r=8), (40, 24), {"A"}, lambda m, n: 8 * n, low_rank, parts="in"),
    "kasa": Row(
        KaSA(r=8), (24, 40), {"A", "B", "sigma"}, lambda m, n: 8 * (m + n) + 8, kasa, seeded=True,
        parts="in magnitude out", rank=16, width=8,
    ),
    "oplora": Row(
        OPLoRA(r=8, k=4), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), oplora, seeded=True, parts="in out"
    ),
    "lora_xs": Row(LoRAXS(r=8), (24, 40), {"R"}, lambda m, n: 64, lora_xs, parts="core", keeps_x=False),
    "psoft": Row(
        PSOFT(r=8), (24, 40), {"q", "a", "b"}, lambda m, n: 28 + 16, psoft, parts="core magnitude", keeps_x=False
    ),
    "svfit": Row(
        SVFit(r=8), (40, 24), {"sigma"}, lambda m, n: 8, diagonal, parts="magnitude", keeps_x=False, stride=0.1,
    ),
    "loldu": Row(LoLDU(r=8), (24, 40), {"z"}, lambda m, n: 8, diagonal, parts="magnitude", keeps_x=False, folds=1.25),
    "lamda": Row(
        LaMDA(r=8, stages=4), (24, 40), LAMDA, lambda m, n: 64 + 8 * m, lamda, parts="core out", keeps_x=False, folds=1,
    ),
    "lamda svd_core": Row(
        LaMDA(r=8, stages=4, init="svd_core"), (24, 40), LAMDA, lambda m, n: 64 + 8 * m, lamda
    ),
    "lamda svd_zero": Row(
        LaMDA(r=8, stages=4, init="svd_zero"), (40, 24), LAMDA, lambda m, n: 64 + 8 * m, lamda
    ),
    "lamda kaiming": Row(
        LaMDA(r=7, stages=4, init="kaiming"), (24, 40), LAMDA, lambda m, n: 49 + 7 * m, lamda, seeded=True
    ),
    "bone": Row(Bone(r=8), (24, 40), {"D"}, lambda m, n: 8 * m, bone, parts="out", keeps_x=False, width=5, joins=False),
    "bone short": Row(Bone(r=7), (24, 40), {"D"}, lambda m, n: 7 * m, bone),
    "bat": Row(Bat(r=8), (24, 40), {"B"}, lambda m, n: 8 * n, bat, lora_exact=False, parts="core", width=40),
    "bat_col": Row(BatCol(r=8), (24, 40), {"B"}, lambda m, n: 8 * m, bat_col, lora_exact=False, parts="core"),
    # 24 = 2 · 4 · 3 and 40 = 2 · 5 · 4; 24 = 4 · 6 and 40 = 5 · 8
    "dota": Row(
        DoTA(bond=2, cores=3), (24, 40), {"T1", "T2", "T3"},
        lambda m, n: 2 * (2 * 2) + 2 * (4 * 5) * 2 + (3 * 4) * 2, mpo, lora_exact=False,
        parts="core", folds=1,
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
    "mora": Row(
        MoRA(r=2), (24, 40), {"M"}, lambda m, n: 11**2, mora, rank=11,
        parts="core", keeps_x=False, width=17, joins=False,
    ),
    "mora even": Row(MoRA(r=4), (16, 48), {"M"}, lambda m, n: 16**2, mora, rank=16),
    "mora_rope": Row(
        MoRARope(r=2), (24, 40), {"M"}, lambda m, n: 10**2, mora_rope, lora_exact=False, parts="core", width=18,
    ),
    "mora_rope tiled": Row(MoRARope(r=2), (50, 26), {"M"}, lambda m, n: 12**2, mora_rope, lora_exact=False),
    "randlora": Row(
        RandLoRA(r=5), (24, 40), {"lambda", "gamma"}, lambda m, n: 5 * (5 + m), randlora, lora_exact=False,
        parts="magnitude", keeps_x=False, width=24, joins=True, grows=False,
    ),
    "randlora tall": Row(
        RandLoRA(r=8), (40, 24), {"lambda", "gamma"}, lambda m, n: 3 * (8 + n), randlora, lora_exact=False
    ),
    "peanut": Row(PEANuT(r=8), (24, 40), {"A", "B"}, lambda m, n: 16 * m, peanut, seeded=True, parts="in out"),
    "hira": Row(
        HiRA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), hira, seeded=True, lora_exact=False, parts="in out"
    ),
    "deep_lora": Row(
        DeepLoRA(r=8), (24, 40), {"W1", "W2", "W3"}, lambda m, n: 8 * (m + n + 8), deep, seeded=True,
        parts="core in out", width=8, stride=0.03,
    ),
    "snell": Row(
        SNELL(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), snell, seeded=True, lora_exact=False,
        parts="in out",
    ),
    "lorta": Row(
        LoRTA(r=8), (24, 40), {"A", "B", "C_L", "C_M", "C_H"}, lambda m, n: 8 * (m + n + 3), lorta, seeded=True
    ),
    "xgblora": Row(
        XGBLoRA(r=2, rounds=3), (24, 40), {"A", "B"}, lambda m, n: 2 * (m + n), boosted, seeded=True,
        width=64,
    ),
    "spiel": Row(
        SpIEL(r=4), (24, 40), {"phi"}, lambda m, n: 4 * (m + n), spiel, seeded=True, lora_exact=False,
        notes=frozenset({"candidates", "g"}),
    ),
    # 24 × 40 in blocks of 8: 15, of which one reads fewer columns than there are, and the default, 8 (24 + 40) / 64
    "smt": Row(SMT(r=8), (24, 40), {"D"}, lambda m, n: 8 * 64, smt, lora_exact=False, grows=False),
    "smt few": Row(SMT(r=8, blocks=4), (24, 40), {"D"}, lambda m, n: 4 * 64, smt, lora_exact=False),
    "eva": Row(EVA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "corda": Row(CorDA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "corda kpm": Row(CorDA(r=8, mode="kpm"), (40, 24), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lora_null": Row(LoRANull(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lora_null v2": Row(LoRANull(r=8, variant="v2"), (40, 24), {"B"}, lambda m, n: 8 * m, low_rank),
    "lora_one": Row(LoRAOne(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lora_ga": Row(LoRAGA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lq_lora": Row(LQLoRA(r=8), (24, 40), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank),
    "lq_lora none": Row(
        LQLoRA(r=8, weights="none"), (40, 24), {"A", "B"}, lambda m, n: 8 * (m + n), low_rank
    ),
}
# fmt: on
BY_NAME = {row.method.name: row for row in reversed(CONTRACT.values())}
every_row = pytest.mark.parametrize("row", CONTRACT.values(), ids=CONTRACT)
every_method = pytest.mark.parametrize("row", BY_NAME.values(), ids=BY_NAME)
KINDS = set("lora pissa lamda dota bat lorta xgblora spiel".split())  # of what a start stores, shares, notes
every_kind = pytest.mark.parametrize(  # all the others in make test-all
    "row",
    [pytest.param(row, id=name, marks=() if name in KINDS else pytest.mark.slow) for name, row in BY_NAME.items()],
)
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


def rescaled(method: Method, scale: float) -> Method:
    """With another s, where the method takes one."""
    return dataclasses.replace(method, scale=scale) if method.scales else method


def theta(row: Row, W: Tensor, scale: float | None = None) -> tuple[Method, Params, Params]:
    """The method, random parameters away from the start, and the start, in W's dtype."""
    method = row.method if scale is None else rescaled(row.method, scale)
    p0 = {k: cast(v, W.dtype) for k, v in begin(method, W.float()).items()}
    p = {k: v if k in method.frozen else v + 0.3 * torch.randn_like(v) for k, v in p0.items()}
    return method, p, p0


def cast(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype) if v.is_floating_point() else v


def given(method: Method, p0: Params) -> Params | None:
    """θ₀ as the host passes it on."""
    return None if method.stores_no_start else p0


def taken_off(row: Row, p0: Params, W: Tensor) -> Tensor:
    """What of the start the formula takes off: all of it, unless it is meant to change the model."""
    return torch.zeros_like(W) if row.method.departs else row.delta(p0, W)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def layers_of(model: nn.Module) -> list[InlayLinear]:
    return [m for m in model.modules() if isinstance(m, InlayLinear)]
