"""What a method may do beside ΔW: shift the bias, and keep θ small by a penalty. And what a cast leaves of θ."""

import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from contract import BY_NAME, Net, adapt, every_method, layers_of, wander
from helpers import fails
from peft import PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.host.config import InlayConfig
from inlay.host.penalty import add_penalty
from inlay.method import LowRank, Params
from inlay.methods.kasa import KaSA
from inlay.recipe.recipe import Recipe
from inlay.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
LIGHT = {"steps": 4, "batch_size": 4, "eval_size": 4, "samples": 0, "dtype": "float32", "save_every": 0}


@dataclass(frozen=True, kw_only=True)
class Biased(LowRank):
    """A LoRA that trains the bias too, and keeps it small."""

    name = "biased"
    title = "LoRA with a bias"
    equation = "ΔW = B A, c"
    paper = "this test"
    trains = "A (r × in), B (out × r), c (out)"
    zero_init = True

    weight: float = field(default=0.5, metadata={"help": "of the penalty"})

    def start(self, W: Tensor, stats: Params | None = None) -> Params:
        new = {"device": W.device}
        return {"A": torch.ones(self.r, W.shape[1], **new), "B": torch.zeros(W.shape[0], self.r, **new),
                "c": torch.zeros(W.shape[0], **new)}  # fmt: skip

    def shift(self, p: Params) -> Tensor:
        return p["c"]

    def penalty(self, p: Params) -> Tensor:
        return self.weight * p["c"].square().sum()


def biased(dtype: torch.dtype = torch.float32, bias: bool = True, **more) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4, bias=bias)).to(dtype), torch.randn(5, 6, dtype=dtype)
    before = net(x).detach()
    return get_peft_model(net, InlayConfig(method=Biased(r=2, **more), target_modules=["0"])), x, before


# A shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_shift_is_part_of_the_layer_and_is_switched_off_with_it(dtype):
    model, x, before = biased(dtype, scale=0.7)
    assert torch.equal(model(x), before)
    wander(model)
    layer = model.base_model.model[0]
    _, p, _ = layer.theta("default")
    expected = before.float() + 0.7 * (x.float() @ (p["B"] @ p["A"]).T + p["c"])
    torch.testing.assert_close(
        model(x).float(), expected, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05})
    )
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    full = model(x)
    inlay.set_scale(model, 0.5)
    torch.testing.assert_close(model(x).float(), (full.float() + before.float()) / 2, rtol=0.02, atol=0.02)


def test_the_gradient_of_a_shift_is_that_of_the_formula():
    model, x, _ = biased(scale=0.7)
    wander(model)
    _, p, _ = model.base_model.model[0].theta("default")
    y = model(x)
    (slope,) = torch.autograd.grad(y.square().sum(), p["c"])
    torch.testing.assert_close(slope, 0.7 * 2 * y.sum(0))


def test_the_adapter_above_sees_the_shifted_bias():
    model, x, _ = biased()
    model.add_adapter("two", InlayConfig(method=Biased(r=2), target_modules=["0"]))
    model.base_model.set_adapter(["default", "two"])
    wander(model)
    layer = model.base_model.model[0]
    W, b = layer.base_layer.weight, layer.base_layer.bias
    for name in ("default", "two"):
        _, p, _ = layer.theta(name)
        W, b = W + p["B"] @ p["A"], b + p["c"]
    torch.testing.assert_close(model(x), x @ W.T + b)
    torch.testing.assert_close(layer._under(["default", "two"], (), {}).bias, b)


def test_a_shift_is_saved_and_loaded(tmp_path):
    model, x, _ = biased()
    wander(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 4)), tmp_path)(x), model(x))


def test_a_shift_is_merged_into_the_bias_and_taken_out_again():
    model, x, before = biased()
    wander(model)
    adapted, layer = model(x), model.base_model.model[0]
    held = layer.base_layer.bias.detach().clone()
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        assert not torch.equal(layer.base_layer.bias, held)
        torch.testing.assert_close(model(x), adapted)
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.bias, held)
        assert torch.equal(model(x), adapted)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


def test_a_layer_without_a_bias_takes_a_shift_but_no_merge():
    model, _, _ = biased(bias=False)
    wander(model)
    before = model.base_model.model[0].base_layer.weight.clone()
    with pytest.raises(
        ValueError, match=r"0: biased shifts the bias, and this layer has none .* use the adapter unmerged"
    ):
        model.merge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)
    assert not model.base_model.model[0].merged


@pytest.mark.parametrize("bias", [True, False])
def test_a_shift_from_file_to_file(bias, tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "base")
    config = LlamaConfig.from_pretrained(tiny, attention_bias=bias)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = InlayConfig(method=Biased(r=2), target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    wander(model)
    model.save_pretrained(str(tmp_path / "a"))
    capsys.readouterr()  # bars of what was loaded
    assert "biased shifts the bias, which a LoRA does not; merge" in fails(
        capsys, "export", str(tmp_path / "a"), str(tmp_path / "out")
    )
    if not bias:
        error = fails(capsys, "merge", str(tmp_path / "a"), str(tmp_path / "m"))
        assert "q_proj.bias, which the adapter shifts, is not stored in the base" in error
        return
    inlay.merge(tmp_path / "a", tmp_path / "m")
    ids = torch.arange(12)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


# A penalty


def test_kasas_penalty_is_the_papers():
    p = {k: v.double() for k, v in KaSA(r=3).start(torch.randn(5, 7)).items()}
    p["B"] = torch.randn(5, 3).double()
    expected = 0.2 * sum(value**2 for value in p["sigma"])
    for M in (p["B"].T @ p["B"], p["A"] @ p["A"].T):
        expected += 0.3 * sum((M[i, j] - float(i == j)) ** 2 for i in range(3) for j in range(3)).sqrt()
    torch.testing.assert_close(KaSA(r=3, beta=0.2, gamma=0.3).penalty(p), expected)


def test_the_penalty_is_the_mean_over_weights_and_its_gradient_is_added():
    net = Net((24, 40))
    model = get_peft_model(net, InlayConfig(method=Biased(r=2), target_modules=["layer", "head"]))
    wander(model)
    x = torch.randn(7, 40)
    cs = [layer.theta("default")[1]["c"] for layer in layers_of(model)]
    expected = 0.5 * sum(c.square().sum() for c in cs) / 2
    torch.testing.assert_close(inlay.penalty(model), expected)
    (model(x).square().mean() + expected).backward()
    together = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).square().mean().backward()
    assert add_penalty(model) == pytest.approx(expected.item())
    for p, want in zip((p for p in model.parameters() if p.requires_grad), together, strict=True):
        torch.testing.assert_close(p.grad, want)


def test_without_a_penalty_nothing_is_added_or_reported(tiny, records, tmp_path):
    assert inlay.penalty(adapt(Net((24, 40)), BY_NAME["lora"].method)) is None
    train(Recipe(model=tiny, data=records, output=str(tmp_path / "run"), **LIGHT | {"steps": 1}), Console(quiet=True))
    assert "penalty" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_it_counts_once_a_step_whatever_the_accumulation(tiny, records, tmp_path):
    """And has a column of its own, beside a loss that is of the data alone."""
    rows = {}
    for batch, more in ((4, 1), (1, 4)):
        recipe = Recipe(
            model=tiny, data=records, output=str(tmp_path / str(batch)), method="kasa", learning_rate=1e-2, seed=3,
            args={"r": 4, "beta": 3.0, "gamma": 1.0}, **LIGHT | {"batch_size": batch, "accumulation": more},
        )  # fmt: skip
        train(recipe, Console(quiet=True))
        lines = (tmp_path / str(batch) / "metrics.jsonl").read_text().splitlines()
        rows[batch] = [row for row in map(json.loads, lines) if "penalty" in row]
    assert len(rows[4]) == LIGHT["steps"]
    for one, other in zip(rows[4], rows[1], strict=True):
        for name in ("penalty", "loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
    assert rows[4][-1]["penalty"] < rows[4][0]["penalty"] - 0.1
    assert rows[4][0]["loss"] < 10 < rows[4][0]["penalty"]


def test_a_step_of_losses_alone_refuses_a_penalty(capsys):
    error = fails(capsys, "train", "--method", "kasa", "--step", "mezo", "--dry-run")
    assert "step: mezo looks at losses alone, and method kasa has a penalty" in error


# A cast


@every_method
def test_symbols_arrive_in_one_dtype_where_what_is_trained_is_cast(row, monkeypatch):
    """FSDP's mixed precision casts parameters and leaves buffers, which frozen symbols are; notes stay as they are."""
    method, seen = row.method, []
    model = adapt(Net(row.shape).bfloat16(), method)
    for name in ("delta", "factors", "shift", "change", "rows"):
        if (function := vars(type(method)).get(name)) is not None:

            def spy(self, p, *args, function=function):
                seen.append({v.dtype for k, v in p.items() if v.is_floating_point() and k not in row.notes})
                return function(self, p, *args)

            monkeypatch.setattr(type(method), name, spy)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    model(torch.randn(7, row.shape[1]).bfloat16()).float().square().sum().backward()
    assert all(len(dtypes) == 1 for dtypes in seen)
    seen.clear()
    layers_of(model)[0].get_delta_weight("default")
    assert all(dtypes == {torch.float32} for dtypes in seen)
