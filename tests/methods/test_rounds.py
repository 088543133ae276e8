"""Methods that begin anew on the way: XGBLoRA's rounds, SpIEL's entries; what the optimiser then forgets; resuming."""

import copy
import faulthandler

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, InlayLinear
from inlay.host.schedule import Schedule, forget, step
from inlay.method import Method, Place
from inlay.methods.spiel import SpIEL
from inlay.methods.xgblora import XGBLoRA

TOKENS = torch.arange(24).view(2, 12)
BOTH = [XGBLoRA(rounds=4), SpIEL(r=2, rounds=2, rate=0.5)]
both = pytest.mark.parametrize("method", BOTH, ids=lambda m: m.name)


def adapt(model: nn.Module, method: Method, targets="all-linear") -> PeftModel:
    return get_peft_model(model, InlayConfig(method=method, target_modules=targets, task_type="CAUSAL_LM"))


def adamw(model: nn.Module, **more) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **more})


def layers(model: nn.Module) -> dict[str, InlayLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, InlayLinear)}


def held(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if PREFIX in k}


def one_layer(method: Method, out: int = 12, inp: int = 20) -> tuple[PeftModel, Tensor, Tensor]:
    torch.manual_seed(3)
    net, x, y = nn.Sequential(nn.Linear(inp, out)), torch.randn(16, inp), torch.randn(16, out)
    return get_peft_model(net, InlayConfig(method=method, target_modules=["0"])), x, y


# XGBLoRA


def test_rounds_are_those_of_a_plain_loop_that_merges():
    """By the paper: a rank-1 LoRA with its own optimiser for κ steps, merged into an fp32 weight, over and over."""
    model, x, y = one_layer(XGBLoRA(rounds=3))
    layer = layers(model)["base_model.model.0"]
    W, bias = (t.detach().clone() for t in (layer.base_layer.weight, layer.base_layer.bias))
    optimizer, own = adamw(model, weight_decay=0.1), None
    step(model, 0.0, optimizer)
    for i in range(12):
        p = layer.theta("default")[1]
        if i % 4 == 0:
            W = W if i == 0 else W + (own[1] @ own[0]).detach()
            own = [nn.Parameter(p[k].detach().clone()) for k in "AB"]
            assert own[1].abs().max() == 0
            assert own[0].abs().max() <= 20**-0.5
            theirs = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1)
        for net, adam in ((model, optimizer), (None, theirs)):
            out = F.linear(x, W + own[1] @ own[0], bias) if net is None else net(x)
            F.mse_loss(out, y).backward()
            adam.step()
            adam.zero_grad()
        assert step(model, (i + 1) / 12, optimizer) == 32
    change = W + own[1] @ own[0] - layer.base_layer.weight
    torch.testing.assert_close(layer.get_delta_weight("default"), change, rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_rank(change) == 3


def test_each_round_trains_the_layers_it_drew(llama):
    model = adapt(llama, XGBLoRA(rounds=4, layers_per_round=1))
    optimizer, seen = adamw(model), []
    parameters, before = dict(model.named_parameters()), step(model, 0.0)
    for i in range(8):
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        drawn = {n.split("layers.")[1][0] for n in trained}
        assert len(drawn) == 1  # the same for all of its modules
        assert len(trained) == 2 * 7
        assert all(parameters[n] is p for n, p in model.named_parameters() if PREFIX in n)
        still = {k: v for k, v in held(model).items() if f"layers.{next(iter(drawn))}" not in k}
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(held(model)[k], v) for k, v in still.items())
        assert set(optimizer.state) == {parameters[n] for n in trained}
        assert step(model, (i + 1) / 8, optimizer) == before
        seen += drawn
    assert seen[0::2] == seen[1::2]  # two steps a round
    assert set(seen) == {"0", "1"}
    other = [XGBLoRA(rounds=99, round_seed=s).at(Place(layers=50)).schedule({}, 0.5) for s in range(40)]
    assert 5 < sum(bool(frozen) for frozen in other) < 35  # half, by the seed


def test_a_round_ends_without_a_change_of_the_model(llama):
    model = adapt(llama, XGBLoRA(rounds=4))
    optimizer = adamw(model)
    step(model, 0.0)
    for i in range(4):
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            before = model(TOKENS).logits
            step(model, (i + 1) / 4, optimizer)
            torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-5, atol=1e-5)
            step(model, (i + 1) / 4, optimizer)  # again: a run that goes on here
    assert all(int(m.theta("default")[1]["round"]) == 3 for m in layers(model).values())


def test_switching_adapters_leaves_the_drawn_layers_as_they_are(llama):
    model = adapt(llama, XGBLoRA(layers_per_round=1))
    model.add_adapter("other", InlayConfig(method="bone", target_modules=["q_proj"]))
    count = step(model, 0.0)
    model.set_adapter("other")
    step(model, 0.5)
    model.set_adapter("default")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert step(model, 0.0) == count


# SpIEL


def test_entries_are_dropped_and_grown_by_the_paper():
    """In sets and dictionaries, from dense gradients: 24 steps, three rounds of 8, of which 2 look."""
    model, x, y = one_layer(SpIEL(r=2, rounds=3, rate=0.5))
    layer = layers(model)["base_model.model.0"]
    W, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    optimizer, k = adamw(model), 64
    (phi,) = (p for p in model.parameters() if p.requires_grad)
    step(model, 0.0, optimizer)
    eta = layer.theta("default")[1]["eta"].tolist()
    assert len(set(eta)) == k
    sums: dict[int, float] = {}
    changed = 0
    for i in range(24):
        D = layer.get_delta_weight("default").detach().requires_grad_()
        F.mse_loss(F.linear(x, W + D, bias), y).backward()
        g = D.grad.flatten().tolist()
        if i % 8 == 0:
            sums = dict.fromkeys(sorted(range(240), key=lambda j: -abs(g[j]))[:k], 0.0)
        if i % 8 < 2:
            sums = {j: total + g[j] for j, total in sums.items()}
        F.mse_loss(model(x), y).backward()
        torch.testing.assert_close(phi.grad, torch.tensor([g[j] for j in eta]), rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        old, state = phi.detach().clone(), {n: s.clone() for n, s in optimizer.state[phi].items()}
        step(model, (i + 1) / 24, optimizer)
        if i % 8 == 2:
            count = k if i == 2 else int(0.5 * (1 - (i + 1) / 24) * k)
            leave = sorted(range(k), key=lambda j: abs(old[j]))[:count]
            stay = {eta[j] for j in range(k)} - {eta[j] for j in leave}
            best = sorted((j for j in sums if j not in stay), key=lambda j: -abs(sums[j]))[:count]
            free = [j for j in leave if eta[j] not in best]
            new = [j for j in best if j not in {eta[j] for j in leave}]
            for slot, position in zip(free, new, strict=False):
                eta[slot] = position
            zero = free[: len(new)]
            rest = [j for j in range(k) if j not in zero]
            changed += len(zero)
            assert phi[zero].abs().max() == 0
            assert torch.equal(phi[rest], old[rest])
            for name in ("exp_avg", "exp_avg_sq"):
                assert optimizer.state[phi][name][zero].abs().max() == 0
                assert torch.equal(optimizer.state[phi][name][rest], state[name][rest])
                assert state[name][zero].abs().max() > 0
        else:
            assert torch.equal(phi, old)
        assert layer.theta("default")[1]["eta"].tolist() == eta
    assert changed > 40
    assert int(layer.theta("default")[1]["round"]) == 3


def test_it_finds_the_entries_that_matter():
    """A target that differs from W in 20 entries: of 64 that are trained, evenly drawn at first, all 20 are found."""
    model, x, _ = one_layer(SpIEL(r=2, rounds=5))
    layer, x = layers(model)["base_model.model.0"], torch.randn(64, 20)
    where = torch.randperm(240)[:20]
    target = torch.zeros(240).index_fill(0, where, 1.0).view(12, 20)
    y = F.linear(x, target) + model(x).detach()
    optimizer = adamw(model, lr=5e-2)
    for i in range(150):
        step(model, i / 150, optimizer)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(where.tolist()) <= set(layer.theta("default")[1]["eta"].tolist())
    torch.testing.assert_close(layer.get_delta_weight("default"), target, rtol=0, atol=0.05)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
@pytest.mark.parametrize("when", [0, 1])
def test_a_step_that_is_passed_over_leaves_no_mark(wrong, when):
    """As the first ones of fp16, whose gradients are infinite until its loss scaling has found its scale."""
    found = []
    for bad in ((), (when,)):
        model, x, y = one_layer(SpIEL(r=2, rounds=1))
        (layer,) = layers(model).values()
        step(model, 0.0)
        for i in range(2):
            F.mse_loss(model(x), y).backward()
            if i in bad:
                (F.mse_loss(model(x), y) * wrong).backward()
        found.append({k: layer.theta("default")[1][k].clone() for k in ("candidates", "g")})
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_no_more_is_kept_than_the_input_and_the_entries():
    model, x, _ = one_layer(SpIEL(r=2))
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        model(x)
    own = {t.data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    assert seen
    assert all(t.data_ptr() in own for t in seen)


def test_too_many_entries_are_refused():
    with pytest.raises(ValueError, match="r=8 is too large for this weight; choose r <= 7"):
        one_layer(SpIEL(r=8))


def test_positions_survive_a_cast_of_the_model(llama):
    model = adapt(llama, SpIEL(r=2))
    before = {k: v for k, v in held(model).items() if "eta" in k}
    model.to(torch.bfloat16)
    assert all(torch.equal(held(model)[k], v) for k, v in before.items())
    assert {v.dtype for v in before.values()} == {torch.int32}


def test_a_changed_position_is_seen_when_it_is_loaded(llama_original, tmp_path):
    """Also one whose last bit fp32 has no place for."""
    from safetensors.torch import load_file, save_file

    model = adapt(copy.deepcopy(llama_original), SpIEL(r=2), ["q_proj"])
    for layer in layers(model).values():
        layer.theta("default")[1]["candidates"].fill_(1 << 25)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    next(v for k, v in tensors.items() if "candidates" in k)[0] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not those it was saved with"):
        PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)


# What an optimiser forgets


def test_what_an_optimiser_forgets():
    weight, mask = nn.Parameter(torch.randn(4)), torch.tensor([True, False, False, True])
    for optimizer in (torch.optim.SGD([weight], momentum=0.9), torch.optim.AdamW([weight])):
        weight.grad = torch.ones(4)
        optimizer.step()
        forget(optimizer, weight, mask)
        moments = [v for v in optimizer.state[weight].values() if v.dim()]
        assert moments
        assert all(((v != 0) == ~mask).all() for v in moments)
        forget(optimizer, weight, None)
        assert weight not in optimizer.state
        forget(optimizer, weight, mask)  # it knows nothing: fine
    optimizer.state[weight] = {"state1": torch.ones(4, dtype=torch.uint8), "step": 3}  # codes, of which 0 is not 0.0
    forget(optimizer, weight, mask)
    assert weight not in optimizer.state


# transformers' Trainer


@both
@pytest.mark.parametrize(("accumulation", "at"), [(2, [1]), pytest.param(1, [1, 2, 5, 6], marks=pytest.mark.slow)])
def test_the_trainer_resumes_in_the_middle(method, accumulation, at, llama_original, tmp_path):
    data = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(64)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.5, use_cpu=True,
        gradient_accumulation_steps=accumulation, report_to="none", disable_tqdm=True, save_steps=1,
    )  # fmt: skip
    results = []
    for resume in (None, *at):
        torch.manual_seed(0)
        model = adapt(copy.deepcopy(llama_original), method)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Schedule()])
        trainer.train(resume_from_checkpoint=None if resume is None else str(tmp_path / f"checkpoint-{resume}"))
        results.append(held(model))
        if resume is None:
            arguments.save_strategy = "no"
            loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path / "checkpoint-1")
            key = next(k for k in held(loaded) if "inlay_round" in k)
            assert results[0][key] > held(loaded)[key]  # something begins anew in between
    for other in results[1:]:
        assert all(torch.equal(results[0][k], v) for k, v in other.items())


# Two processes


def small(method: Method) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 40)), torch.randn(8, 40)
    return get_peft_model(net, InlayConfig(method=method, target_modules=["0", "2"])), x


def one_process(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(60, exit=True)  # rather than hang
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method in BOTH:
        model, x = small(method)
        model = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = adamw(model)
        step(model, 0.0, optimizer)
        torch.manual_seed(rank)  # what is drawn on the way must not depend on it
        for i in range(16):
            model(x[rank::2]).square().mean().backward()
            optimizer.step()
            step(model, (i + 1) / 16, optimizer)
            optimizer.zero_grad()
        model(x[rank::2])  # which gives all processes the buffers of the first
        torch.save(held(model.module), f"{folder}/{method.name}-{rank}.pt")
        del model
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
def test_two_processes_begin_anew_in_step(tmp_path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    for method, moved in zip(BOTH, ("inlay_B_past", "inlay_eta"), strict=True):
        one, two = (torch.load(tmp_path / f"{method.name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(one[k], two[k]) for k in one)
        start = held(small(method)[0])
        assert all(not torch.equal(start[k], v) for k, v in one.items() if moved in k)
