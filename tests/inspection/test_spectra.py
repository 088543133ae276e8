"""Fingerprints, spectra and their cache, `inlay inspect`, and `allocate` in a recipe, from the command line on."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from contract import BY_NAME
from helpers import fails
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import inlay
from inlay.cli import main
from inlay.files import cache
from inlay.host.config import InlayConfig
from inlay.inspection import ranks, singular_values
from inlay.inspection.figures import heat_map
from inlay.inspection.inspect_model import suggestion
from inlay.inspection.noise_edge import edge, marchenko_pastur_median, signal
from inlay.inspection.ranks import Inspection, Weight, inspection, patterns
from inlay.inspection.singular_values import all_singular_values, kept_spectrum, target_weights, weight_spectra
from inlay.inspection.spectra_plots import draw_spectra
from inlay.methods import METHODS
from inlay.models.base import BaseModel
from inlay.models.sizes import count_parameters
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.training.allocate_ranks import settle_ranks

ALL = InlayConfig(method="lora", args={"r": 8}, target_modules="all-linear")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spectra"


@pytest.fixture
def computed(monkeypatch):
    """The shapes of weights whose singular values are computed from now on."""
    shapes, real = [], all_singular_values
    monkeypatch.setattr(singular_values, "all_singular_values", lambda W: (shapes.append(tuple(W.shape)), real(W))[1])
    return shapes


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory) -> str:
    """The tiny model with very different spectra: each layer's weights get a power law of their own."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "proj" in name:
            U, S, Vh = torch.linalg.svd(p.detach(), full_matrices=False)
            power = 0.1 if "layers.0" in name else 2.0
            p.data = U * torch.arange(1.0, len(S) + 1) ** -power @ Vh
    path = tmp_path_factory.mktemp("models") / "uneven"
    model.save_pretrained(path)
    for file in Path(tiny).glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    for file in Path(tiny).glob("*.jinja"):
        (path / file.name).write_bytes(file.read_bytes())
    return str(path)


# -- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn])
def test_a_fingerprint_sees_every_bit_the_dtype_and_the_shape(dtype):
    W = torch.arange(24.0).reshape(4, 6).to(dtype)
    mark = cache.fingerprint(W)
    assert re.fullmatch("[0-9a-f]{64}", mark)
    assert cache.fingerprint(W.clone()) == mark
    assert cache.fingerprint(W.reshape(6, 4)) != mark
    flipped = W.clone()
    flipped.view(torch.uint8).view(-1)[-1] ^= 1
    assert cache.fingerprint(flipped) != mark
    other = torch.int8 if dtype == torch.uint8 else torch.uint8
    same_bytes = torch.zeros_like(W).view(torch.uint8).view(other)
    assert cache.fingerprint(torch.zeros_like(W).view(torch.uint8).view(other)) == cache.fingerprint(same_bytes)
    assert cache.fingerprint(same_bytes) != cache.fingerprint(torch.zeros_like(W))


def test_a_fingerprint_is_of_the_content_not_of_where_it_lies(monkeypatch):
    W = torch.randn(40, 30)
    assert cache.fingerprint(W.T) == cache.fingerprint(W.T.contiguous())
    assert cache.fingerprint(torch.nn.Parameter(W)) == cache.fingerprint(W)
    assert cache.fingerprint(torch.randn(80, 60)[::2, ::2].copy_(W)) == cache.fingerprint(W)
    whole = cache.fingerprint(W)
    monkeypatch.setattr("inlay.files.cache.CHUNK", 64)
    assert cache.fingerprint(W) == whole
    assert cache.fingerprint(torch.tensor(1.0)) != cache.fingerprint(torch.tensor([1.0]))
    assert cache.fingerprint(torch.zeros(0)) != cache.fingerprint(torch.zeros(0, 1))
    with pytest.raises(ValueError, match="meta tensor"):
        cache.fingerprint(torch.empty(2, device="meta"))


# -- spectra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.up_proj"])
def test_spectra_of_real_weights_are_those_of_a_float64_svd(name):
    W = BaseModel("builtin").weights().read(f"model.layers.7.{name}.weight")
    S, expected = all_singular_values(W), torch.linalg.svdvals(W.double())
    assert S.dtype == torch.float32
    torch.testing.assert_close(S.double(), expected, rtol=1e-5, atol=1e-8 * expected[0].item())
    assert (S[1:] <= S[:-1]).all()


def test_spectra_of_odd_weights():
    U, V = torch.linalg.qr(torch.randn(40, 20))[0], torch.linalg.qr(torch.randn(30, 20))[0]
    S = torch.logspace(0, -6, 20)
    W = U.double() * S.double() @ V.double().T
    torch.testing.assert_close(all_singular_values(W)[:20], S, rtol=1e-3, atol=1e-8)
    assert all_singular_values(W)[20:].max() < 1e-7
    assert all_singular_values(torch.zeros(3, 5)).tolist() == [0, 0, 0]
    assert all_singular_values(torch.full((2, 2), 1e30))[0].item() == pytest.approx(2e30)
    assert all_singular_values(torch.full((2, 2), 1e-30))[0].item() == pytest.approx(2e-30)
    half = torch.randn(8, 8).bfloat16()
    torch.testing.assert_close(all_singular_values(half), torch.linalg.svdvals(half.float()))
    with pytest.raises(ValueError, match="NaN or Inf"):
        all_singular_values(torch.tensor([[1.0, float("nan")]]))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    all_singular_values(torch.randn(4, 4))
    assert torch.get_num_threads() == before


def test_the_targets_are_those_that_an_adapter_gets(tiny):
    config = InlayConfig(method="lora", args={"r": 2}, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    shapes = target_weights(BaseModel(tiny), config)
    assert shapes == {"model.layers.1.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}
    assert len(target_weights(BaseModel(tiny), ALL)) == 14


def test_gpt2_stores_its_weights_transposed(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    config = InlayConfig(method="lora", args={"r": 2}, target_modules=["c_attn"])
    shapes = target_weights(BaseModel(str(tmp_path / "gpt2")), config)
    assert set(shapes.values()) == {(192, 64)}
    found = weight_spectra(BaseModel(str(tmp_path / "gpt2")), shapes)
    expected = torch.linalg.svdvals(gpt2.transformer.h[0].attn.c_attn.weight.detach())
    torch.testing.assert_close(found["transformer.h.0.attn.c_attn"], expected, rtol=1e-4, atol=1e-5)


def test_the_second_time_nothing_is_computed(tiny, folder, computed):
    shapes = target_weights(BaseModel(tiny), ALL)
    first = weight_spectra(BaseModel(tiny), shapes)
    assert len(computed) == len(shapes) == len(list(folder.iterdir()))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    computed.clear()
    second = weight_spectra(BaseModel(tiny), shapes)
    assert computed == []
    assert all(torch.equal(first[name], second[name]) for name in shapes)


def test_models_share_what_they_have_in_common(tiny, folder, computed, tmp_path):
    shapes = target_weights(BaseModel(tiny), ALL)
    weight_spectra(BaseModel(tiny), shapes)
    computed.clear()
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    weight_spectra(BaseModel(str(tmp_path / "other")), shapes)
    assert computed == [(128, 64)]


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "other", "unmarked"])
def test_a_damaged_entry_is_made_again(folder, computed, damage):
    W = torch.randn(6, 9)
    S = kept_spectrum(W)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    if damage == "other":
        save_file({"S": torch.ones(5)}, path)
    elif damage == "unmarked":
        save_file({"S": torch.ones(6)}, path)
    else:
        bit = whole[:-1] + bytes([whole[-1] ^ 1])
        path.write_bytes({"cut": whole[:-8], "empty": b"", "bit": bit}[damage])
    computed.clear()
    assert torch.equal(kept_spectrum(W), S)
    assert computed == [(6, 9)]
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "file"))
    W = torch.randn(6, 9)
    with pytest.warns(UserWarning, match="cannot be written .*name another folder in INLAY_CACHE"):
        S = kept_spectrum(W)
    torch.testing.assert_close(S, torch.linalg.svdvals(W))


def test_a_weight_that_cannot_be_read_is_named(tiny, llama, tmp_path):
    shapes = target_weights(BaseModel(tiny), ALL)
    with pytest.raises(ValueError, match=r"stores no tensor lm_head\.weight \(tied to another"):
        weight_spectra(BaseModel(tiny), {"lm_head": (10, 64)})
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"{name} is stored as \(128, 64\), not as \(7, 7\)"):
        weight_spectra(BaseModel(tiny), {name: (7, 7)})
    llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    llama.save_pretrained(tmp_path / "inf")
    with pytest.raises(ValueError, match=f"the weight of {name} holds NaN or Inf; repair it"):
        weight_spectra(BaseModel(str(tmp_path / "inf")), target_weights(BaseModel(str(tmp_path / "inf")), ALL))
    tensors = load_file(f"{tiny}/model.safetensors")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.uint8)
    save_file(tensors, tmp_path / "inf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is stored quantised"):
        weight_spectra(BaseModel(str(tmp_path / "inf")), {name: shapes[name]})


# -- the noise edge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.25, 0.5, 0.75, 1.0])
def test_the_median_of_noise_is_gavishs_and_donohos(beta):
    """Their table of ω = λ* / √μ by its published fit, good to 0.02; and the median of noise that is drawn."""
    median = marchenko_pastur_median(beta)
    best = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    assert best / math.sqrt(median) == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)
    S = torch.linalg.svdvals(torch.randn(int(400 * beta), 400))
    assert S.square().median().item() / 400 == pytest.approx(median, rel=0.05)


@pytest.mark.parametrize("shape", [(200, 600), (600, 200), (300, 300)])
def test_the_edge_counts_what_was_planted(shape):
    """Over noise that is not even normal, at any scale; of noise alone nothing stands out, or one value by chance."""
    noise = 0.1 * math.sqrt(12) * (torch.rand(shape) - 0.5)
    U, V = (torch.linalg.qr(torch.randn(side, 7)).Q for side in shape)
    planted = noise + U * torch.linspace(6, 9, 7) @ V.T
    for factor in (1.0, 1e4):
        S = torch.linalg.svdvals(factor * planted)
        assert edge(S, shape) == pytest.approx(factor * 0.1 * sum(math.sqrt(side) for side in shape), rel=0.03)
        assert signal(S, shape) == 7
    assert signal(torch.linalg.svdvals(noise), shape) <= 1
    assert signal(torch.zeros(200), (200, 600)) == 0


def test_a_side_is_suggested_by_what_stands_out_of_noise():
    """Few strong directions: the principal side, with as many; more than the rank: the minor side; none: neither."""

    def found(planted, r):
        weights = {}
        for i in range(3):
            U, V = (torch.linalg.qr(torch.randn(80, 40)).Q[:, :planted] for _ in range(2))
            S = torch.linalg.svdvals(torch.randn(80, 80) + 40 * U @ V.T)
            weights[f"l.{i}.q"] = Weight((80, 80), S, r, 1, 1)
        return suggestion(Inspection("m", "lora", r, "flat", weights))

    few = found(3, 16)
    assert (few.method, few.side, few.r) == ("pissa", "principal", 3)
    assert "first 3 triplets hold the signal" in str(few)
    many = found(20, 16)
    assert (many.method, many.side, many.r) == ("milora", "minor", 16)
    assert "20 singular values stand above the noise edge" in many.reason
    assert found(0, 16).method == "lora"


# -- ranks as patterns ------------------------------------------------------------------------------------------------


def test_patterns_give_every_module_its_rank_and_no_other():
    wanted = {"a.0.q": 4, "a.1.q": 4, "a.10.q": 8, "b.a.0.q": 2, "q": 16, "a.0.x+y": 6, "a.2.e.3.q": 3, "0": 5, "1": 7}
    config = InlayConfig(method="lora", args={"r": 1}, patterns=patterns(wanted), target_modules=["q"])
    assert {name: config.build(name).r for name in wanted} == wanted
    assert config.build("c.a.0.q").r == 1
    assert list(patterns({"a.0.q": 4, "a.1.q": 4}).items()) == [(r"^a\.(0|1)\.q", {"r": 4})]


RANKED = [m.name for m in METHODS if m.size == "r" and not m.shared and BY_NAME[m.name].grows]


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("direction", ["flat", "peaked"])
def test_every_method_with_an_r_stays_within_its_budget(uneven, method, direction):
    config = InlayConfig(method=method, args={"r": 8}, target_modules="all-linear")
    found = inspection(BaseModel(uneven), config, direction)
    assert len(set(found.ranks.values())) > 1 or method != "lora"  # one whose next size is dear may keep that of all
    for of in found.kinds.values():
        assert sum(w.numbers for w in of.values()) <= sum(w.uniform for w in of.values())
    config.patterns = patterns(found.ranks)
    assert count_parameters(BaseModel(uneven), config) == sum(w.numbers for w in found.weights.values())


def test_ranks_are_not_allocated_where_they_save_numbers(uneven):
    """RandLoRA's bases are fewer the wider each is."""
    config = InlayConfig(method="randlora", args={"r": 8}, target_modules="all-linear")
    with pytest.raises(ValueError, match="a smaller r trains more parameters"):
        inspection(BaseModel(uneven), config, "flat")


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_shows_and_writes(uneven, painted, tmp_path, capsys):
    out = tmp_path / "out"
    with painted():
        main(["inspect", uneven, "--method", "pissa", "--r", "8", "--output", str(out)])
    said = capsys.readouterr().out
    assert "q_proj (2)" in said
    assert "ranks by energy (flat)" in said
    assert "suggested: " in said
    found = inlay.inspect(uneven, "pissa", 8)
    data = json.loads((out / "spectra.json").read_text())
    assert {name: m["rank"] for name, m in data["modules"].items()} == found.ranks
    name = "model.layers.0.mlp.up_proj"
    assert data["modules"][name]["singular_values"] == pytest.approx(found.weights[name].S.tolist(), rel=1e-6)
    assert data["modules"][name]["energies"]["8"] == pytest.approx(found.weights[name].energy(8), abs=1e-6)
    told = data["modules"][name]
    W = AutoModelForCausalLM.from_pretrained(uneven).get_submodule(name).weight.detach().double()
    S = torch.linalg.svdvals(W)
    assert told["stable_rank"] == pytest.approx((W.norm() ** 2 / S[0] ** 2).item(), rel=1e-4)
    assert told["minor_energies"]["8"] == pytest.approx((S[-8:].square().sum() / S.square().sum()).item(), rel=1e-4)
    assert told["signal"] == int((told["noise_edge"] < S).sum())
    assert data["suggestion"]["method"] in ("lora", "pissa", "milora")
    patterns = yaml.safe_load((out / "ranks.yaml").read_text())["patterns"]
    assert patterns == ranks.patterns(found.ranks)
    names = {"spectra", "energy", "signal", "ranks"}
    assert {p.name for p in (out / "plots").iterdir()} == {f"{n}.{end}" for n in names for end in ("png", "svg")}
    assert "exists" in fails(capsys, "inspect", uneven, "--output", str(out))
    with painted():
        main(["inspect", uneven, "--method", "pissa", "--r", "8", "--output", str(tmp_path / "again")])
    for file in ("spectra.json", "plots/ranks.svg", "plots/spectra.svg"):
        assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    main(["inspect", uneven, "--output", str(out), "--overwrite"])


def test_inspect_a_part_of_a_model(uneven, capsys):
    main(["inspect", uneven, "--target-modules", "q_proj,v_proj", "--layers", "1", "--r", "4"])
    said = capsys.readouterr().out
    assert "2 weights" in said
    assert "up_proj" not in said


def test_pictures_of_a_model_without_layers_and_with_one_value(painted, tmp_path):
    weight = Weight((4, 4), torch.zeros(4), 2, 16, 16)
    found = Inspection("m", "lora", 2, "flat", {"lm_head": weight})
    experts = {f"l.{i}.experts.{j}.up": weight for i in range(2) for j in range(3)}
    with painted():
        draw_spectra(found, tmp_path / "plots")
        draw_spectra(Inspection("m", "lora", 2, "flat", {"l.0.q": weight, **experts}), tmp_path / "more")


def test_a_map_prints_numbers_that_differ_where_values_do():
    values = {f"layers.{i}.q_proj": 0.0081 + 0.0003 * i for i in range(5)}
    figure = heat_map(values, "sizes", ".3f")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.00810", "0.00840", "0.00870", "0.00900", "0.00930"]
    ranks = heat_map({"layers.0.q_proj": 8, "layers.1.q_proj": 16}, "ranks", ".4g")
    assert [text.get_text() for text in ranks.axes[0].texts] == ["8", "16"]
    same = heat_map({"layers.0.q_proj": 0.5, "layers.1.q_proj": 0.5}, "one value", ".2f")
    assert [text.get_text() for text in same.axes[0].texts] == ["0.50", "0.50"]


def test_mistakes_in_inspect_are_one_line(uneven, tmp_path, capsys):
    assert "dota has no hyperparameter 'r'" in fails(capsys, "inspect", uneven, "--method", "dota")
    assert "choose one of lora" in fails(capsys, "inspect", uneven, "--method", "dora")
    assert "r=0 is below 1" in fails(capsys, "inspect", uneven, "--r", "0")
    assert "choose r <= 32" in fails(capsys, "inspect", uneven, "--r", "99", "--target-modules", "k_proj")
    assert "q_prj" in fails(capsys, "inspect", uneven, "--target-modules", "q_prj,v_proj")
    assert "list of names" in fails(capsys, "inspect", uneven, "--layers", "0")
    assert "does not exist" in fails(capsys, "inspect", str(tmp_path / "no"))
    assert "steep" in fails(capsys, "inspect", uneven, "--direction", "steep")
    with pytest.raises(ValueError, match="direction='steep' is not one of flat, peaked"):
        inlay.inspect(uneven, direction="steep")


# -- in a recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "allocate"),
    [
        ("lamda", "energy"),
        pytest.param("bat", "energy", marks=pytest.mark.slow),
        pytest.param("lora", "energy_peaked", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_allocates_trains_reloads_and_runs_again(
    method, allocate, uneven, records, tmp_path, capsys, computed
):
    out = tmp_path / "run"
    flags = "--r 8 --steps 2 --batch-size 4 --eval-size 4 --samples 1 --dtype float32".split()
    start = ["train", "--model", uneven, "--data", records, "--method", method, *flags]
    main([*start, "--allocate", allocate, "--output", str(out)])
    said = capsys.readouterr().out
    found = inlay.inspect(uneven, method, 8, "peaked" if allocate == "energy_peaked" else "flat")
    assert found.summary() in said.replace("\n", " ")
    model = AutoPeftModelForCausalLM.from_pretrained(str(out / "adapter"))
    assert {cut.module: cut.method.r for m in model.modules() for cut in getattr(m, "cuts", {}).values()} == found.ranks
    settled = load_recipe(str(out / "recipe.yaml"), {})
    assert (settled.allocate, settled.patterns) == ("none", patterns(found.ranks))
    computed.clear()
    main(["train", str(out / "recipe.yaml"), "--output", str(tmp_path / "again")])
    assert computed == []
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_dry_run_and_an_automatic_batch_see_the_ranks(uneven, records, tmp_path, capsys):
    start = ["train", "--model", uneven, "--data", records, "--method", "lamda", "--r", "8", "--batch-size", "auto"]
    main([*start, "--allocate", "energy", "--output", str(tmp_path / "r"), "--dry-run", "--verbose"])
    said = capsys.readouterr().out
    found = inlay.inspect(uneven, "lamda", 8)
    assert f"{sum(w.numbers for w in found.weights.values()):,} trainable parameters" in said
    assert "patterns:\n  ^model" in said
    assert not (tmp_path / "r").exists()


def test_mistakes_with_allocate_are_one_line(uneven, records, tmp_path, capsys):
    start = ["train", "--model", uneven, "--data", records, "--output", str(tmp_path / "r"), "--allocate", "energy"]
    assert "dota has no rank r; set allocate: none" in fails(capsys, *start, "--method", "dota")
    assert "remove one of the two" in fails(capsys, *start, "--patterns", "{q_proj: {r: 2}}")
    assert "choose r <= " in fails(capsys, *start, "--method", "lora", "--r", "99", "--eval-size", "4")
    assert "one of none, energy, energy_peaked" in fails(capsys, *start[:-1], "entropy")
    assert "unknown method" in fails(capsys, *start, "--method", "dora")
    assert not list(tmp_path.iterdir())


def test_without_allocate_a_recipe_stays_as_it_is(capsys):
    made = Recipe()
    assert settle_ranks(made, made.base_model, None, None) is made


def test_ranks_are_allocated_before_a_fold(uneven, records, tmp_path, capsys):
    out = tmp_path / "run"
    flags = "--r 8 --steps 1 --batch-size 4 --eval-size 4 --samples 0 --quantize nf4 --allocate energy".split()
    main(["train", "--model", uneven, "--data", records, "--method", "pissa", "--output", str(out), *flags])
    model = AutoPeftModelForCausalLM.from_pretrained(str(out / "adapter"))
    held = {cut.module: cut.method.r for m in model.modules() for cut in getattr(m, "cuts", {}).values()}
    assert held == inlay.inspect(uneven, "pissa", 8).ranks
