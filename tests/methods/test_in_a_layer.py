"""Every method in a layer: starts, trains, merges, saves and reloads, beside other adapters."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from contract import (
    BY_NAME,
    KINDS,
    LINEARS,
    Net,
    adapt,
    cast,
    every_kind,
    every_method,
    every_row,
    largest,
    layers_of,
    logits,
    ready,
    rescaled,
    taken_off,
    theta,
    train,
    wander,
)
from peft import PeftModel, get_peft_model
from torch import nn

from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, START
from inlay.method import LowRank, Method, Params
from inlay.methods.pissa import PiSSA
from inlay.numerics import linalg

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_starts_at_the_base_exactly(row, dtype):
    net, x = Net(row.shape).to(dtype), torch.randn(7, row.shape[1], dtype=dtype)
    before = net(x)
    model = adapt(net, row.method)
    assert (largest(model(x) - before) == 0) != row.method.departs
    model.train()
    assert (largest(model(x) - before) == 0) != row.method.departs


@every_row
def test_the_start_is_exact_under_autocast(row):
    net, x = Net(row.shape), torch.randn(7, row.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
        assert before.dtype == torch.bfloat16
        model = adapt(net, row.method)
        assert (largest(model(x) - before) == 0) != row.method.departs
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
def test_a_trainer_may_cast_what_is_trained_alone(row):
    """As FSDP's mixed precision does: what is frozen is a buffer, and stays in fp32."""
    net, x = Net(row.shape).bfloat16(), torch.randn(7, row.shape[1]).bfloat16()
    before = net(x)
    model = adapt(net, row.method)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    assert (largest(model(x) - before) == 0) != row.method.departs
    model(x).float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.grad is not None)


@every_row
def test_exactly_the_stated_symbols_train(row):
    model = adapt(Net(row.shape), row.method)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(PREFIX)[1].split(".")[0] for n in trained} == row.trained
    assert sum(p.numel() for p in trained.values()) == row.numbers(*row.shape)
    assert model.get_nb_trainable_parameters()[0] == row.numbers(*row.shape)
    layer = layers_of(model)[0]
    assert any(name.startswith(START) for name in layer._modules) != row.method.stores_no_start


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
    assert (len(constant) == 0) == (row.method.stores_no_start and not row.method.frozen)
    train(model, x, steps=3)
    noted = tuple(f"{PREFIX}{symbol}." for symbol in row.notes)
    assert all(torch.equal(v, constant[k]) for k, v in model.named_buffers() if not any(n in k for n in noted))


@every_row
def test_the_layer_is_the_base_plus_the_dense_equation(row):
    net = Net(row.shape)
    W, b = net.layer.weight.detach().clone(), net.layer.bias.detach().clone()
    model = adapt(net, rescaled(row.method, 0.37))
    wander(model)
    layer, x = layers_of(model)[0], torch.randn(2, 5, row.shape[1])
    _, p, p0 = layer.theta("default")
    delta = layer.cuts["default"].method.s * (row.delta(p, W) - (0 if p0 is None else row.delta(p0, W)))
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), F.linear(x, W + delta, b), rtol=1e-4, atol=1e-5)


PAIRED = {"lora", "pissa", "dota", "bat"}  # ΔW(θ₀) = 0; thin factors away from it; ΔW as a whole; from what W is
PAIRS = [
    pytest.param(*pair, marks=() if PAIRED & {*pair} else pytest.mark.slow)
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


@pytest.mark.parametrize(
    "names",
    [[n for n in BY_NAME if n in KINDS], pytest.param([*BY_NAME], marks=pytest.mark.slow)],
    ids=["kinds", "all"],
)
def test_adapters_of_many_methods_share_one_model(names, llama):
    """Switch, disable, delete, add again: every adapter gives the bits it gave alone, and so does the base."""
    base, x = logits(llama), torch.arange(24).view(2, 12)
    model, seen = None, {}
    for name in names:
        row = BY_NAME[name]
        config = InlayConfig(method=row.method, target_modules=LINEARS)
        if model is None:
            model = get_peft_model(llama, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        ready(model, row.method, name)
        model.set_adapter(name)
        assert torch.equal(logits(model), base) != row.method.departs
        train(model, x)
        seen[name] = logits(model)
        assert largest(seen[name] - base) > 1e-3
    for name in [*names, *reversed(names)]:
        model.set_adapter(name)
        assert torch.equal(logits(model), seen[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), seen[name])
    for name in names:
        row = BY_NAME[name]
        survivor = next(other for other in names if other != name)
        model.set_adapter(survivor)
        model.delete_adapter(name)
        assert torch.equal(logits(model), seen[survivor])
        model.add_adapter(name, InlayConfig(method=row.method, target_modules=LINEARS))
        ready(model, row.method, name).set_adapter(name)
        assert torch.equal(logits(model), base) != row.method.departs
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
    assert (largest(layer(x) - before) == 0) != method.departs
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
@every_kind
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
    rank = torch.linalg.matrix_rank(row.delta(p, W) - taken_off(row, p0, W)).item()
    assert isinstance(method, LowRank) == row.lora_exact
    if row.lora_exact:
        B, A = method.factors(p, W)
        torch.testing.assert_close(B @ A, row.delta(p, W), rtol=1e-10, atol=1e-10)
        assert rank <= (row.rank or method.r) * (1 if method.stores_no_start else 2)
    else:
        assert rank > row.numbers(*row.shape) / sum(row.shape)  # more than as many numbers give as thin factors
