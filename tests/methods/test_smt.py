"""SMT: the blocks with the largest gradient, under one budget for the model; only what they read is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import inlay
from inlay.host.calibrate import gather_statistics
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear
from inlay.methods.smt import SMT
from inlay.numerics import ops, rank_allocation

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(48).view(4, 12)
BATCHES = [{"input_ids": t[None], "labels": t[None]} for t in TOKENS]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The mean over the batches of |gradient|, weight by weight, by autograd."""
    weights = {n: p for n, p in model.named_parameters() if any(n.endswith(f"{t}.weight") for t in LINEARS)}
    found: dict[str, Tensor] = {n.removesuffix(".weight"): torch.zeros_like(p) for n, p in weights.items()}
    for batch in BATCHES:
        grads = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for name, g in zip(found, grads, strict=True):
            found[name] += g.abs() / len(BATCHES)
    return found


def test_the_blocks_are_the_largest_of_the_whole_model(llama_original, tmp_path):
    base, r, count = copy.deepcopy(llama_original), 16, 20
    G = gradients(base)
    scores = {(n, i, j): g[i : i + r, j : j + r].mean().item() for n, g in G.items()
              for i in range(0, g.shape[0], r) for j in range(0, g.shape[1], r)}  # fmt: skip
    wanted = set(sorted(scores, key=lambda key: -scores[key])[:count])
    method = SMT(r=r)
    seen = gather_statistics(base, dict.fromkeys(G, method), BATCHES)
    shares = rank_allocation.allocate_blocks({name: stats["score"] for name, stats in seen.stats.items()}, count)
    assert sum(shares.values()) == count
    assert 0 in shares.values()
    patterns = {f"^{name}": {"blocks": n} for name, n in shares.items()}
    config = InlayConfig(method=method, target_modules=LINEARS, patterns=patterns, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    inlay.calibrate(model, BATCHES)
    found = set()
    for layer in (m for m in model.modules() if isinstance(m, InlayLinear)):
        _, p, _ = layer.theta("default")
        found |= {
            (layer.cuts["default"].module, r * int(i), r * int(j)) for i, j in zip(p["rows"], p["cols"], strict=True)
        }
    assert found == wanted
    assert model.get_nb_trainable_parameters()[0] == count * r * r
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("n", [0, 2, 9])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_are_their_reference(n, joined, dtype):
    x, W, b = (torch.randn(*s, dtype=dtype) for s in ((2, 3, 40), (24, 40), (24,)))
    D, where = torch.randn(n, 8, 8, dtype=torch.promote_types(dtype, torch.float32)), torch.randperm(15)[:n].int()
    leaves, linear = [x.requires_grad_(), D.requires_grad_()], (W, b) if joined else None
    results = []
    for function in (ops.blocks, ops.blocks_reference):
        y = function(x, linear, D, where // 5, where % 5, 24)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    for a, c in zip(*results, strict=True):
        assert (a - c).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-12) * c.norm()


@pytest.mark.parametrize("n", [2, 9])
def test_only_what_blocks_read_is_kept(n):
    """Two blocks of 8 of 40 columns: 16 numbers a token. Nine would be more than x itself, which is then kept."""
    x, W, D = torch.randn(50, 40), torch.randn(24, 40), torch.randn(n, 8, 8, requires_grad=True)
    where, seen = torch.arange(n).int(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        ops.blocks(x, (W, None), D, where // 5, where % 5, 24)
    mine = {t.data_ptr() for t in (W, D)}
    kept = [t for t in seen if t.is_floating_point() and t.data_ptr() not in mine]
    assert [t.untyped_storage().nbytes() for t in kept] == [4 * 50 * (16 if n == 2 else 40)]
    assert (kept[0].data_ptr() == x.data_ptr()) == (n == 9)


def test_a_block_trains_as_if_all_of_the_weight_did():
    """With plain gradient descent, the entries of a block move as they would in full fine-tuning; others rest."""
    net, x, y = nn.Sequential(nn.Linear(40, 24)), torch.randn(16, 40), torch.randn(16, 24)
    whole = copy.deepcopy(net)
    model = get_peft_model(net, InlayConfig(method=SMT(r=8, blocks=3), target_modules=["0"]))
    inlay.calibrate(model, [{"input": x}], loss=lambda m, b: F.mse_loss(m(b["input"]), y))
    F.mse_loss(model(x), y).backward()
    F.mse_loss(whole(x), y).backward()
    (D,) = (p for p in model.parameters() if p.requires_grad)
    p = model.base_model.model[0].theta("default")[1]
    for b, i, j in zip(D.grad, p["rows"].tolist(), p["cols"].tolist(), strict=True):
        torch.testing.assert_close(b, whole[0].weight.grad[8 * i : 8 * i + 8, 8 * j : 8 * j + 8])


def test_a_budget_that_the_model_has_not_is_refused():
    scores = {"a": torch.ones(2, 2), "b": torch.ones(3)}
    assert rank_allocation.allocate_blocks(scores, 7) == {"a": 4, "b": 3}
    for count in (0, 8):
        with pytest.raises(ValueError, match=f"a budget of {count} blocks is not one of 1 to 7"):
            rank_allocation.allocate_blocks(scores, count)
    with pytest.raises(ValueError, match="blocks=16 is more than the 15"):
        SMT(r=8, blocks=16).start(torch.empty(24, 40, device="meta"))
