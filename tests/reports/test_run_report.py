"""What a run's page shows of its weights, against dense references; and the page in a real browser."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import fails
from peft import AdaLoraConfig, AutoPeftModelForCausalLM, LilyConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli import main
from inlay.host.layer import adapted
from inlay.inspection.changes import PART, changes, changes_as_data, chosen_modules, energy_along
from inlay.inspection.noise_edge import effective_rank, stable_rank
from inlay.models.base import BaseModel
from inlay.recipe.recipe import Recipe
from inlay.reports.result import Result
from inlay.reports.run_page import run_page
from inlay.training.train import train

SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tiny, records, painted, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "milora"
    values = {"steps": 3, "batch_size": 4, "eval_size": 4, "samples": 1, "learning_rate": 1e-2, "dtype": "float32"}
    made = {"method": "milora", "args": {"r": 4}, "patterns": {"k_proj": {"r": 2}}, "max_length": 64}
    with painted():
        train(Recipe(model=tiny, data=records, output=str(out), **made, **values), SILENT)
    return out


def test_what_changed_is_what_the_dense_weights_say(folder):
    """‖ΔW‖ / ‖W‖ and its shares in the first and last eighth, from fp64 SVDs of the weights themselves."""
    told = json.loads((folder / "changes.json").read_text())
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder / "adapter"))
    for layer in adapted(model, "default").values():
        found = told[layer.cuts["default"].module]
        W, D = layer.base_layer.weight.double(), layer.get_delta_weight("default").double()
        assert found["size"] == pytest.approx((D.norm() / W.norm()).item(), rel=1e-4)
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        basis, other = (U.T, D) if W.shape[0] <= W.shape[1] else (Vh, D.T)
        part = len(basis) // PART
        for name, rows in (("principal", basis[:part]), ("minor", basis[-part:])):
            assert found[name] == pytest.approx(((rows @ other).norm() / D.norm()).item() ** 2, rel=1e-3)
        S = torch.linalg.svdvals(D)
        assert found["stable_rank"] == pytest.approx((S.square().sum() / S[0] ** 2).item(), rel=1e-3)
        assert found["rank"] == (2 if "k_proj" in layer.cuts["default"].module else 4)


def test_spectra_before_and_after_are_those_of_the_weights():
    """Of a change on the minor side of a wide and of a tall weight, by fp64 SVDs; and the ranks of ΔW."""
    torch.manual_seed(0)
    W, r = torch.randn(40, 96, dtype=torch.float64), 3
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    D = U[:, -r:] @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) @ Vh[-r:]
    for weight, change in ((W, D), (W.T, D.T)):
        before, shares = energy_along(change.float(), weight.float())
        torch.testing.assert_close(before.double(), S, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shares[-r:], torch.tensor([9.0, 4.0, 1.0]) / 14, atol=1e-4, rtol=0)
    assert stable_rank(torch.linalg.svdvals(D)) == pytest.approx(14 / 9)
    p = torch.tensor([3.0, 2.0, 1.0]) / 6
    entropy = -(p * p.log()).sum()
    assert effective_rank(torch.linalg.svdvals(D)) == pytest.approx(entropy.exp().item(), rel=1e-4)


def test_a_random_change_has_an_eighth_in_either():
    W, D = torch.randn(64, 256), torch.randn(64, 256)
    shares = energy_along(D, W)[1]
    assert (shares[:8].sum().item(), shares[-8:].sum().item()) == pytest.approx((1 / 8, 1 / 8), abs=0.01)


def test_one_weight_of_each_type_in_three_layers_is_shown():
    names = [f"m.{i}.{part}" for i in range(5) for part in ("q", "experts.0.up", "experts.1.up")]
    assert chosen_modules(names) == {f"m.{i}.{part}" for i in (0, 2, 4) for part in ("q", "experts.0.up")}


@pytest.mark.parametrize("start", [True, "pissa"])
def test_what_pefts_methods_changed_is_against_the_checkpoint(tiny, start):
    """DoRA, and PiSSA, which cuts the base's own weight: merged minus stored; the model is left as it was."""
    config = LoraConfig(r=4, use_dora=start is True, init_lora_weights=start, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1) if "lora_B" in name else None
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = changes(model, lambda: BaseModel(tiny).weights())
    assert all(torch.equal(tensor, was[name]) for name, tensor in model.state_dict().items())
    assert len(found) == 4
    stored, after = BaseModel(tiny).weights(), model.merge_and_unload()
    for module, change in found.items():
        W = stored.read(f"{module}.weight").double()
        D = after.get_submodule(module).weight.detach().double() - W
        assert change.size == pytest.approx((D.norm() / W.norm()).item(), rel=1e-4)
        assert change.numbers == 4 * sum(W.shape) + (len(W) if start is True else 0)
        assert change.spectrum is not None


def test_what_full_fine_tuning_changed(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight *= 1.01
    found = changes(model, lambda: BaseModel(tiny).weights())
    assert {module for module, change in found.items() if change.size} == {"model.layers.1.mlp.down_proj"}
    assert found["model.layers.1.mlp.down_proj"].size == pytest.approx(0.01, rel=1e-4)
    assert found["model.layers.1.mlp.down_proj"].numbers == weight.numel()


def test_what_cannot_be_compared_has_no_changes(tiny):
    """A base that is not stored as safetensors; an adapter that has no merged form."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert changes(model, lambda: BaseModel("/nowhere").weights()) == {}
    lily = get_peft_model(model, LilyConfig(r=2, stride_A=1, num_B=2, target_modules=["q_proj"]))
    assert changes(lily, lambda: BaseModel(tiny).weights()) == {}


def test_the_page_has_no_section_of_what_there_is_not():
    bare = Result(Recipe(method="milora", args={"r": 4}), Path("run"), 10, 100, 2.0, 1.0, 3.0, 40, 2**20)
    asked = [{"prompt": "Where?", "before": "a", "after": "b", "reference": "c"}]
    pages = [run_page(bare, {}, {}), run_page(replace(bare, samples=asked), {}, {})]
    assert ["Held-out prompts" in page for page in pages] == [False, True]
    assert "<td>dropout=0.0, r=4, side=minor</td>" in pages[0]


def test_the_page_in_a_browser(folder, phone):
    """Every plot is there, with its name; wide ones scroll in their place; the table of changes sorts."""
    page = phone(folder / "report.html")
    names = page.evaluate("[...document.querySelectorAll('svg[role=img]')].map(i => i.getAttribute('aria-label'))")
    drawn = {path.stem for path in (folder / "plots").glob("*.svg")}
    assert len({*names}) == len(names) == len(drawn)
    assert drawn == {"loss", "changes", "principal", "minor", "ranks", "spectra", "memory"}
    sizes = "[...document.querySelectorAll('svg image')].map(i => i.getBoundingClientRect().width)"
    assert min(page.evaluate(sizes)) > 2
    column = "[...document.querySelectorAll('table.sortable td:nth-child(3)')].map(c => Number(c.dataset.value))"
    for down in (False, True):
        page.click("table.sortable th:nth-child(3) button")
        shown = page.evaluate(column)
        assert len(shown) == 7
        assert shown == sorted(shown, reverse=down)


def test_inspect_tells_of_an_adapter_what_its_run_did(folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["inspect", str(folder), "--output", str(out)])
    said = " ".join(capsys.readouterr().out.split())
    assert "q_proj (2)" in said
    assert "in the median ΔW has" in said
    told, own = (json.loads((path / "changes.json").read_text()) for path in (out, folder))
    assert told.keys() == own.keys()
    for module, values in own.items():
        assert told[module] == pytest.approx(values, rel=1e-4)
    drawn = {path.name for path in (out / "plots").iterdir()}
    assert drawn == {f"{n}.{e}" for n in ("changes", "principal", "minor", "ranks", "spectra") for e in ("png", "svg")}
    assert set(inlay.inspect_adapter(folder, layers=[1])) == {module for module in own if ".1." in module}


def test_inspect_reads_a_lora_of_pefts(tiny, tmp_path):
    """Its ΔW against the factors themselves; an adapter of a weight that does not change says so."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(str(tmp_path / "lora"))
    found = inlay.inspect_adapter(tmp_path / "lora", model=tiny)
    D, W = (t.detach().double() for t in (layer.get_delta_weight("default"), layer.base_layer.weight))
    S = torch.linalg.svdvals(D)
    assert found[name].size == pytest.approx((D.norm() / W.norm()).item(), rel=1e-4)
    assert found[name].stable_rank == pytest.approx((S.square().sum() / S[0] ** 2).item(), rel=1e-4)
    assert found[name].numbers == 2 * (64 + 128)
    other = found["model.layers.1.mlp.down_proj"]
    assert (other.size, other.principal, other.stable_rank) == (0, None, None)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=2, use_dora=True), VeraConfig(r=2), AdaLoraConfig(init_r=2, total_step=9)]
)
def test_inspect_merges_what_has_no_equal_here(config, tiny, tmp_path, capsys):
    config = replace(config, target_modules={"down_proj"}, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers.0" in name and p.requires_grad:
                p += 0.1
    model.save_pretrained(str(tmp_path / "a"))
    wanted = changes(model, lambda: BaseModel(tiny).weights())
    found = inlay.inspect_adapter(tmp_path / "a", model=tiny)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert one.numbers == wanted[name].numbers
        assert one.size == pytest.approx(wanted[name].size, rel=1e-3, abs=1e-6)
    assert found["model.layers.0.mlp.down_proj"].size > 1e-4
    assert list(inlay.inspect_adapter(tmp_path / "a", model=tiny, layers=[1])) == ["model.layers.1.mlp.down_proj"]
    lily = LilyConfig(r=2, stride_A=1, num_B=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lily).save_pretrained(str(tmp_path / "lily"))
    assert "is not one of LORA" in fails(capsys, "inspect", str(tmp_path / "lily"), "--base", tiny)


def test_inspect_counts_a_fold_from_where_it_began(tiny, records, tmp_path, capsys):
    """W is the base with its piece, ΔW what training made of that; its run says the same; of a fold that keeps no start
    nothing is said."""
    pytest.importorskip("bitsandbytes")
    fold, ask = tmp_path / "fold", ["--steps", "1", "--samples", "0", "--learning-rate", "1e-3", "--data", records]
    main(["fold", tiny, str(fold), "--method", "pissa", "--r", "4"])
    assert "was not trained yet" in fails(capsys, "inspect", str(fold))
    main(["train", "--model", str(fold), "--method", "pissa", "--r", "4", *ask, "--output", str(tmp_path / "run")])
    found = inlay.inspect_adapter(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "changes.json").read_text()) == changes_as_data(found)
    start, end = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (fold, tmp_path / "run"))
    name = "model.layers.0.mlp.down_proj"
    key = f"base_model.model.{name}.inlay_%s.weight"
    B, A, B0, A0 = (side[key % symbol] for side in (end, start) for symbol in "BA")
    W = AutoModelForCausalLM.from_pretrained(tiny).get_submodule(name).weight  # all but what the quantisation lost
    assert found[name].size == pytest.approx(((B @ A - B0 @ A0).norm() / W.norm()).item(), rel=0.02)
    shutil.rmtree(fold / "adapter")
    assert "is folded, and the adapter it began with" in fails(capsys, "inspect", str(tmp_path / "run"))


def test_a_run_that_folds_keeps_what_it_began_with(tiny, records, tmp_path):
    """Its report and `inlay inspect` tell the same changes; LoRA's B starts at 0, so that ΔW is all of it."""
    pytest.importorskip("bitsandbytes")
    ask = ["--steps", "2", "--samples", "0", "--learning-rate", "1e-2", "--data", records, "--quantize", "nf4"]
    main(["train", "--model", tiny, "--method", "lora", "--r", "4", *ask, "--output", str(tmp_path / "run")])
    told, found = json.loads((tmp_path / "run" / "changes.json").read_text()), inlay.inspect_adapter(tmp_path / "run")
    assert told == changes_as_data(found)
    held = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.v_proj.inlay_%s.weight"
    W = AutoModelForCausalLM.from_pretrained(tiny).model.layers[1].self_attn.v_proj.weight
    size = (held[key % "B"] @ held[key % "A"]).norm() / W.norm()
    assert told["model.layers.1.self_attn.v_proj"]["size"] == pytest.approx(size.item(), rel=0.02)


def test_mistakes_in_inspecting_an_adapter_are_one_line(folder, tiny, tmp_path, capsys):
    assert "--joint, --r is asked of a model" in fails(capsys, "inspect", str(folder), "--r", "8", "--joint")
    assert "--base is of an adapter" in fails(capsys, "inspect", tiny, "--base", tiny)
    assert "adapts none of these; it adapts 0, 1" in fails(capsys, "inspect", str(folder), "--layers", "7")
    assert "exists" in fails(capsys, "inspect", str(folder), "--output", str(folder))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    torch.nn.init.normal_(base.model.layers[0].self_attn.q_proj.weight)
    base.save_pretrained(str(tmp_path / "other"))
    assert "q_proj" in fails(capsys, "inspect", str(folder), "--base", str(tmp_path / "other"))


def test_their_runner_finds_our_experiment(tmp_path, monkeypatch, capsys):
    """PEFT's own loader reads what benchmarks/metamath.py writes, by the one type."""
    (tmp_path / "method_comparison" / "MetaMathQA").mkdir(parents=True)
    script = str(Path(__file__).parents[2] / "benchmarks" / "metamath.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "bone", "--write-only"])
    runpy.run_path(script, run_name="__main__")
    made = capsys.readouterr().out.strip()
    config = PeftConfig.from_pretrained(made)
    assert (config.peft_type.value.lower(), config.method, config.args["r"]) == ("inlay", "bone", 32)
    assert Path(made).parent.name == "inlay"
    assert json.loads((Path(made) / "training_params.json").read_text())["optimizer_kwargs"]["lr"] == 1e-4


def test_after_few_tokens_three_layers_are_decomposed():
    """And the sizes of all changes are there; after many tokens everything is."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=5, **sizes))
    model = get_peft_model(base, inlay.InlayConfig(method="bone", args={"r": 4}, target_modules=["q_proj"]))
    for p in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(p)
    few, many = (changes(model, lambda: BaseModel("/nowhere").weights(), spent) for spent in (1e3, 1e12))
    assert len(few) == len(many) == 5
    assert [change.principal is not None for change in few.values()] == [True, False, True, False, True]
    assert all(change.principal is not None and change.size == few[name].size for name, change in many.items())
