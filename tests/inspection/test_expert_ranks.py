"""Spectra, and ranks from spectra and data, of each expert of a mixture of experts."""

import json
from dataclasses import replace

import pytest
import torch
from moe import config, model_of
from rich.console import Console
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import inlay
from inlay.cli import main
from inlay.host.layer import adapted
from inlay.inspection.ranks import patterns
from inlay.inspection.singular_values import target_weights, weight_spectra
from inlay.models.base import BaseModel
from inlay.models.sizes import count_parameters
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.training.dry_run import dry_run
from inlay.training.train import train

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, small_tokenizer) -> str:
    """A small Mixtral of two layers whose experts have very different spectra: the higher its number, the steeper."""
    torch.manual_seed(0)
    settings = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, vocab_size=len(small_tokenizer), bos_token_id=small_tokenizer.bos_token_id,
        eos_token_id=small_tokenizer.eos_token_id, pad_token_id=small_tokenizer.pad_token_id,
    )  # fmt: skip
    model = MixtralForCausalLM(settings)
    for p in model.parameters():
        if p.ndim == 3:
            for e in range(4):
                U, S, Vh = torch.linalg.svd(p[e].detach(), full_matrices=False)
                p.data[e] = U * torch.arange(1.0, len(S) + 1) ** -(0.1, 1.5, 2.0, 3.0)[e] @ Vh
    path = tmp_path_factory.mktemp("models") / "moe"
    model.save_pretrained(path)
    small_tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_spectra_are_of_each_experts_matrix_however_it_is_stored(kind, uneven, tmp_path):
    """Mixtral stores a matrix for each expert and projection, gpt-oss all of them, as (in, out)."""
    if kind == "GptOss":
        model_of(kind, "eager").save_pretrained(tmp_path / "base")
    base = BaseModel(uneven if kind == "Mixtral" else str(tmp_path / "base"))
    shapes = target_weights(base, config("lora", 2))
    found = weight_spectra(base, shapes)
    model = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float32)
    assert len(found) == 8 * model.config.num_hidden_layers
    for name, S in found.items():
        parameter, _, e = name.rpartition(".")
        W = model.get_parameter(parameter)[int(e)].detach()
        assert sorted(shapes[name]) == sorted(W.shape)
        torch.testing.assert_close(S, torch.linalg.svdvals(W), rtol=1e-4, atol=1e-5)


def test_experts_that_are_left_out_have_no_spectrum(uneven):
    few = config("lora", 2, experts={"layers.0.mlp.experts": [1, 3]})
    assert list(target_weights(BaseModel(uneven), few)) == [
        f"{EXPERTS}.{part}.{e}" for part in ("gate_up_proj", "down_proj") for e in (1, 3)
    ]


@pytest.mark.parametrize("method", ["lora", "bat"])
def test_each_expert_gets_a_rank_within_the_budget_of_its_type(method, uneven):
    found = inlay.inspect(uneven, method, 8, experts=True)
    assert set(found.kinds) == {"q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"}
    for kind, of in found.kinds.items():
        assert sum(w.numbers for w in of.values()) <= sum(w.uniform for w in of.values())
        if "experts" in kind and method == "lora":  # flat spectra get more
            ranks = {name.rpartition(".")[2]: w.rank for name, w in of.items() if ".0.mlp" in name}
            assert ranks["0"] > max(ranks[e] for e in "123")
    both = config(method, 8, target_modules="all-linear", patterns=patterns(found.ranks))
    assert count_parameters(BaseModel(uneven), both) == sum(w.numbers for w in found.weights.values())


def test_patterns_name_the_experts_of_a_layer_together():
    wanted = {f"a.{i}.experts.down_proj.{e}": 8 if e == 3 else 4 for i in range(2) for e in range(12)}
    made = patterns(wanted)
    numbers = "|".join(str(e) for e in range(12) if e != 3)
    assert list(made) == [rf"^a\.(0|1)\.experts\.down_proj\.({numbers})", r"^a\.(0|1)\.experts\.down_proj\.3"]
    one = config("lora", 2, patterns=made)
    assert {name: one.build_expert(*name.rsplit(".", 1)).r for name in wanted} == wanted


def test_inspect_has_a_row_for_the_experts_of_a_projection_and_a_range_for_those_of_a_layer(uneven, capsys):
    main(["inspect", uneven, "--method", "lora", "--r", "8", "--experts", "true"])
    said = capsys.readouterr().out
    assert "experts.down_proj (8)" in said
    found = inlay.inspect(uneven, "lora", 8, experts=True).kinds["experts.down_proj"]
    each = [[w.rank for name, w in found.items() if f"layers.{i}." in name] for i in range(2)]
    told = [f"{min(ranks)}..{max(ranks)}" for ranks in each]
    assert " ".join(["experts.down_proj", *told]) in " ".join(said.split())
    assert not any(f"down_proj.{e}" in said for e in range(4))
    main(["inspect", uneven, "--method", "lora", "--r", "8", "--experts", f"{{{EXPERTS}: [0]}}", "--json"])
    told = json.loads(capsys.readouterr().out)["modules"]
    assert [name for name in told if "experts" in name] == [f"{EXPERTS}.gate_up_proj.0", f"{EXPERTS}.down_proj.0"]


def recipe_of(uneven, records, tmp_path, **more) -> Recipe:
    return Recipe(**{
        "model": uneven, "data": records, "output": str(tmp_path / "run"), "method": "lora", "args": {"r": 4},
        "steps": 1, "batch_size": 2, "eval_size": 4, "samples": 0, "dtype": "float32", "calibration": 2,
        "experts": True, **more,
    })  # fmt: skip


def test_a_dry_run_counts_as_many_experts_as_the_run_will_train(uneven, records, tmp_path):
    console = Console(record=True, width=250)
    few = recipe_of(uneven, records, tmp_path, experts=2)
    dry_run(few, console)
    said = console.export_text()
    assert "the busiest 2 experts of each layer" in said
    chosen = {f"model.layers.{i}.mlp.experts": [0, 1] for i in range(2)}
    numbers = count_parameters(BaseModel(uneven), replace(few, experts=chosen).config())
    assert f"{numbers:,} trainable parameters" in said
    with pytest.raises(ValueError, match="has 4 experts; choose 1 to 4"):
        dry_run(recipe_of(uneven, records, tmp_path, experts=5), console)


@pytest.mark.parametrize(
    ("method", "allocate", "experts"),
    [
        pytest.param("lora", "energy", 2, marks=pytest.mark.slow),
        pytest.param("lora", "welore", True, marks=pytest.mark.slow),
        pytest.param("eva", "variance", True, marks=pytest.mark.slow),
        pytest.param("smt", "blocks", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_allocates_to_experts_and_runs_again(method, allocate, experts, uneven, records, tmp_path):
    args = {"r": 8, "blocks": 2} if method == "smt" else {"r": 4}
    where = {"target_modules": []} if method == "smt" else {}  # whose gradients would be the largest here
    asked = recipe_of(uneven, records, tmp_path, method=method, args=args, allocate=allocate, experts=experts, **where)
    train(asked, Console(quiet=True))
    settled = load_recipe(str(tmp_path / "run/recipe.yaml"), {})
    assert settled.allocate == "none"
    name = "blocks" if method == "smt" else "r"
    model = inlay.models.adapters.Adapter.open(tmp_path / "run/adapter").load_blank()
    sizes = {}
    for layer in adapted(model, "default").values():
        module, shares = layer.cuts["default"].module, getattr(layer, "shares", {})
        each = shares["default"].methods if shares else {"": layer.cuts["default"].method}
        sizes |= {f"{module}.{e}".rstrip("."): vars(one)[name] for e, one in each.items()}
    wanted = {module: settled.config().build(module) for module in sizes}
    assert sizes == {module: vars(one)[name] for module, one in wanted.items()}
    assert len({n for module, n in sizes.items() if "experts" in module}) > 1
    again = replace(settled, output=str(tmp_path / "again"))
    train(again, Console(quiet=True))
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
