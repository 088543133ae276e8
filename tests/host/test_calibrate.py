"""The pass over data that some starts need: what it shows a method, what it keeps, and the starts that come of it."""

import copy
import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

import inlay
from inlay.host.calibrate import gather_statistics
from inlay.host.config import InlayConfig
from inlay.method import Method
from inlay.methods.eva import EVA
from inlay.methods.lora_ga import LoRAGA

QKV = ["q_proj", "k_proj", "v_proj"]
PATH = "model.layers.1.self_attn.q_proj"


@dataclass(frozen=True, kw_only=True)
class Mean(Method):
    name = "mean_of_what_is_seen"
    title = equation = paper = trains = "a test"
    needs = "gradients"

    def start(self, W, stats=None):
        return {"D": torch.zeros_like(W)}

    def delta(self, p, W):
        return p["D"]


def batches(count: int = 3, rows: int = 4, length: int = 12, vocabulary: int = 128) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 4 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def gradients(model: nn.Module, path: str, data: list[dict]) -> list[torch.Tensor]:
    """By autograd, of the weight itself."""
    W = model.get_submodule(path).weight
    return [torch.autograd.grad(model(**batch).loss, W)[0] for batch in data]


def inputs(model: nn.Module, path: str, data: list[dict]) -> list[torch.Tensor]:
    """A layer's inputs, without padding."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    return [x[batch["attention_mask"].bool()] for x, batch in zip(seen, data, strict=True)]


def same_space(one: torch.Tensor, other: torch.Tensor) -> float:
    """The least cosine between two row spaces."""
    bases = [torch.linalg.qr(rows.double().mT).Q for rows in (one, other)]
    return torch.linalg.svdvals(bases[0].mT @ bases[1]).min().item()


def test_the_mean_gradient_is_autograds(llama):
    data = batches()
    expected = torch.stack(gradients(llama, PATH, data)).mean(0)
    for p in llama.parameters():
        p.requires_grad_(False)
    found = gather_statistics(llama, {PATH: Mean()}, data)
    assert found.batches == 3
    torch.testing.assert_close(found.stats[PATH]["mean"], expected, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None and not p.requires_grad for p in llama.parameters())
    assert not any(m._forward_hooks for m in llama.modules())


def test_one_gradient_lives_at_a_time(llama):
    names, seen = [n for n, m in llama.named_modules() if n.endswith("_proj")], []

    @dataclass(frozen=True, kw_only=True)
    class Watch(Mean):
        def statistic(self, seen_now):
            assert not any(reference() is not None for reference in seen)
            seen.append(weakref.ref(seen_now))
            return {"size": seen_now.abs().mean()}

    found = gather_statistics(llama, {name: Watch() for name in names}, batches(2))
    assert len(seen) == 2 * len(names) == 28
    assert all(stats["size"] > 0 for stats in found.stats.values())


def test_gpt2_layers_hold_their_weights_transposed(gpt2):
    data, path = batches(1), "transformer.h.0.attn.c_attn"
    expected = gradients(gpt2, path, data)[0].mT
    found = gather_statistics(gpt2, {path: Mean()}, data).stats[path]["mean"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_eva_is_the_svd_of_the_centred_inputs_without_padding(llama):
    data = batches()
    X = torch.cat(inputs(llama, PATH, data)).double()
    found = gather_statistics(llama, {PATH: EVA(r=64)}, data).stats[PATH]
    S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)[1:]
    torch.testing.assert_close(found["S"].double()[:32], S[:32], rtol=1e-4, atol=1e-5)
    assert same_space(found["V"][:8], Vh[:8]) > 0.9999
    torch.testing.assert_close(found["total"].double(), S.square().sum(), rtol=1e-4, atol=0)


def test_eva_finds_the_vectors_of_pefts_incremental_svd(llama):
    data = batches(6, rows=8)
    theirs = IncrementalPCA(n_components=16, copy=True, lowrank=False)  # ρ r, as its EVA has it
    for x in inputs(llama, PATH, data):
        theirs.partial_fit(x)
    found = gather_statistics(llama, {PATH: EVA(r=8, tau=1.0)}, data).stats[PATH]
    assert found["V"].shape == theirs.components_.shape
    assert same_space(found["V"][:8], theirs.components_[:8]) > 0.999


def test_layers_that_read_the_same_input_share_one_svd(llama):
    model = get_peft_model(llama, InlayConfig(method="eva", target_modules=[*QKV, "o_proj", "gate_proj", "up_proj"]))
    stats = inlay.calibrate(model, batches()).stats
    assert len(stats) == 12
    assert len({id(one) for one in stats.values()}) == 6  # of two layers: q, k, v; o; gate, up


def test_eva_stops_when_all_have_settled_and_tells_who_has_not(llama_original):
    data = batches(1) * 20
    config = InlayConfig(method="eva", args={"r": 2}, target_modules=QKV)
    model = get_peft_model(copy.deepcopy(llama_original), config)
    found = inlay.calibrate(model, data)  # the same batch again and again
    assert found.batches < 20
    assert not found.unsettled
    model = get_peft_model(copy.deepcopy(llama_original), config)
    found = inlay.calibrate(model, data, most=1)
    assert (found.batches, len(found.unsettled)) == (1, 6)


def test_lora_ga_is_the_papers_formula_and_steps_along_the_gradient(llama):
    data, r = batches(1), 4
    G = gradients(llama, PATH, data)[0].double()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    model = get_peft_model(llama, InlayConfig(method="lora_ga", args={"r": r}, target_modules=QKV))
    inlay.calibrate(model, data)
    method, p, p0 = model.get_submodule(f"base_model.model.{PATH}").theta("default")
    p = {k: v.detach() for k, v in p.items()}
    c = 64**0.25 / math.sqrt(16)
    assert method.s == 16 / math.sqrt(r)
    for got, want in ((p["A"].mT, Vh[:r].mT), (p["B"], U[:, r : 2 * r])):
        signs = (got.double() * want).sum(0).sign()
        torch.testing.assert_close(got.double(), c * want * signs, rtol=1e-2, atol=1e-3)
    assert all(torch.equal(p[k], p0[k]) for k in p)
    # The update that one gradient step gives is the best that factors of this rank can: ‖G − PG − GP'‖ is that of 2 r.
    A, B = p["A"].double(), p["B"].double()
    step = (G @ A.mT @ A + B @ B.mT @ G) / c**2
    assert torch.linalg.matrix_norm(G - step) == pytest.approx(torch.linalg.svdvals(G)[2 * r :].norm().item(), rel=1e-2)


def test_lora_ga_over_batches_is_near_the_svd_of_the_mean(real_model, real_tokenizer):
    """On the built-in model, layer 15, where only 4 r triplets are carried from batch to batch."""
    path, r = "model.layers.15.self_attn.q_proj", 8
    texts = ["The Eagle is a cheap pub near the river.", "Water boils at a lower temperature on a mountain."]
    texts += ["def add(a, b): return a + b", "She sold the house in spring and moved to the coast."]
    data = [{k: torch.tensor([real_tokenizer(text=t)["input_ids"]]) for k in ("input_ids", "labels")} for t in texts]
    W = real_model.get_submodule(path).weight
    G = torch.stack([torch.autograd.grad(real_model(**batch).loss, W)[0] for batch in data]).mean(0)
    _, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    found = gather_statistics(real_model, {path: LoRAGA(r=r)}, data).stats[path]
    kept = (G.double() @ found["V"][:r].double().mT).norm() / S[:r].norm()
    assert kept > 0.999
    assert same_space(found["V"][:r], Vh[:r]) > 0.95


def test_lq_lora_weighs_by_the_squared_gradients(llama):
    data = batches()
    F = torch.stack([g.square() for g in gradients(llama, PATH, data)]).mean(0).double()
    W, r = llama.get_submodule(PATH).weight.detach().clone(), 4
    D1, D2 = F.mean(1).sqrt(), F.mean(0).sqrt()
    model = get_peft_model(llama, InlayConfig(method="lq_lora", args={"r": r}, target_modules=QKV))
    inlay.calibrate(model, data)
    _, p, _ = model.get_submodule(f"base_model.model.{PATH}").theta("default")
    A, B = p["A"].detach().double(), p["B"].detach().double()
    rest = D1[:, None] * (W.double() - B @ A) * D2
    best = torch.linalg.svdvals(D1[:, None] * W.double() * D2)
    assert rest.norm() == pytest.approx(best[r:].norm().item(), rel=1e-3)
    U, S, Vh = torch.linalg.svd(W.double())
    plain = D1[:, None] * (W.double() - (U[:, :r] * S[:r]) @ Vh[:r]) * D2
    assert rest.norm() < plain.norm()


@pytest.mark.parametrize("name", ["eva", "lora_ga", "lq_lora"])
def test_an_uncalibrated_adapter_says_so_and_a_calibrated_one_is_stored_whole(name, llama_original, tmp_path):
    def fresh():
        return get_peft_model(
            copy.deepcopy(llama_original), InlayConfig(method=name, target_modules=QKV, task_type="CAUSAL_LM")
        )

    model, (batch, *_) = fresh(), batches()
    for use in (lambda: model(**batch), lambda: model.save_pretrained(tmp_path), model.merge_adapter):
        with pytest.raises(ValueError, match=r"inlay\.calibrate"):
            use()
    base = llama_original(**batch).logits
    inlay.calibrate(model, batches())
    assert torch.equal(model(**batch).logits, base)
    assert all(p.requires_grad == ("inlay_" in n) for n, p in model.named_parameters())
    again = fresh()
    inlay.calibrate(again, batches())
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    with pytest.raises(ValueError, match="has its start already"):
        inlay.calibrate(model, batches())


def test_what_cannot_be_calibrated_is_refused(llama_original):
    def fresh(method):
        return get_peft_model(copy.deepcopy(llama_original), InlayConfig(method=method, target_modules=QKV))

    with pytest.raises(ValueError, match="nothing to calibrate"):
        inlay.calibrate(fresh("lora"), batches())
    with pytest.raises(ValueError, match="batches with labels"):
        inlay.calibrate(fresh("lora_ga"), [{"input_ids": torch.arange(8)[None]}])
    with pytest.raises(ValueError, match="no tokens in 0 batches"):
        inlay.calibrate(fresh("eva"), [])
    with pytest.raises(ValueError, match="r=8 vectors cannot be computed from 5 inputs"):
        inlay.calibrate(fresh("eva"), [{"input_ids": torch.arange(5)[None]}])
