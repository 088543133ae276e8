"""Quantised bases: folding (QDoTA, QPiSSA), the offset form in a recipe, and what may be loaded on what."""

import copy
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import BY_NAME
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sizes import SIZES, sized
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import inlay
from inlay.cli import main
from inlay.conversion.fold import Folded
from inlay.conversion.fold_quantizer import FoldPlan, cut_residual
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear
from inlay.host.schedule import Schedule
from inlay.methods import METHODS, find
from inlay.models.adapters import Adapter
from inlay.models.base import BaseModel
from inlay.models.quantized import quantization_config
from inlay.planning.planner import PlannedRun

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of weights this small it is large

ARGS = {**SIZES, "pissa": {"r": 8}, "lamda": {"r": 8}, "dota": {"bond": 4, "cores": 3}}
IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, small_tokenizer) -> str:
    """A small Llama whose widths are multiples of a block of 64: bitsandbytes' CPU kernel misreads others."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(small_tokenizer), max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=small_tokenizer.pad_token_id, bos_token_id=small_tokenizer.bos_token_id,
        eos_token_id=small_tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data += 0.3 * p.data.mean(0)  # a spectrum that is not flat
    model.save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return str(folder)


def config(method: str, **more) -> InlayConfig:
    return InlayConfig(method=method, args=ARGS[method], target_modules="all-linear", **more)


@pytest.fixture(scope="module")
def folds(plain, tmp_path_factory):
    """Folds of every method, each made once."""
    made = {}

    def get(method: str) -> Folded:
        if method not in made:
            made[method] = inlay.fold(plain, tmp_path_factory.mktemp("fold") / method, config(method))
        return made[method]

    return get


def base(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)


def load(made, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(base(made.base), str(made.adapter), is_trainable=trainable).eval()


def errors(folder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "errors.csv").read_text().splitlines()))


def layers(model) -> dict[str, InlayLinear]:
    found = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, InlayLinear)}
    assert found
    return found


def wander(model, scale: float = 0.01) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=scale)


NAMES = sorted(m.name for m in METHODS if not m.needs)
every_method = pytest.mark.parametrize("method", NAMES)


# -- what a fold writes -----------------------------------------------------------------------------------------------


@every_method
def test_a_fold_is_the_quantised_residual_and_its_piece(method, folds, plain):
    """By the definition, weight by weight: W_f = Q(W − s ΔW(θ₀)), and the errors are those of the table.

    A start that is meant to change the model is not taken out.
    """
    made, weights = folds(method), dict(base(plain).named_parameters())
    table = {row["module"]: row for row in errors(made.folder)}
    model, x = load(made), torch.randn(5, 128)
    assert set(table) == set(layers(model))
    for name, layer in layers(model).items():
        W = weights[f"{name}.weight"].detach()
        start = find(method)(**ARGS[method]).start(W)
        cls, p, _ = layer.theta("default")
        for k, value in start.items():
            if not cls.draws:  # of one that is drawn anew the stored start counts
                torch.testing.assert_close(p[k].detach(), value, rtol=1e-4, atol=1e-5)
        D = cls.s * cls.delta(p, W).detach()
        out = torch.zeros_like(W) if cls.departs else D
        packed, state = quantize_4bit(W - out, quant_type="nf4", blocksize=64, compress_statistics=True)
        folded = dequantize_4bit(packed, state)
        torch.testing.assert_close(layer.matrix().float(), folded, rtol=1e-5, atol=1e-6)
        assert ((folded + out - W).norm() / W.norm()).item() == pytest.approx(float(table[name]["folded"]), abs=2e-5)
        alone = dequantize_4bit(*quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=True))
        assert ((alone - W).norm() / W.norm()).item() == pytest.approx(float(table[name]["plain"]), abs=2e-5)
        layer.base_layer.compute_dtype = torch.float32
        y = layer(x[:, : W.shape[1]])
        torch.testing.assert_close(y, F.linear(x[:, : W.shape[1]], folded + D), rtol=1e-3, atol=1e-4)


@every_method
def test_a_folded_start_is_no_worse_than_plain_nf4(method, folds):
    """PiSSA and DoTA's MPO take energy out of what is quantised; for all others the difference is within 1 %, but for
    LoLDU, whose first rows and columns of P L D U are no part of W's energy."""
    found = folds(method).errors
    before, after = (sum(getattr(e, kind) for e in found) / len(found) for kind in ("plain", "folded"))
    assert after <= before * BY_NAME[method].folds
    if find(method)(**ARGS[method]).stores_no_start:
        assert after == pytest.approx(before, rel=1e-6)


def test_the_base_is_an_ordinary_4_bit_checkpoint(folds, plain):
    made = folds("dota")
    code = f"""import sys, torch; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(made.base)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__, model.is_loaded_in_4bit, 'inlay' in sys.modules)
print(model(torch.arange(4)[None]).logits.isfinite().all().item())"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["Linear4bit", "True", "False", "True"]
    size = (made.base / "model.safetensors").stat().st_size
    assert size < (Path(plain) / "model.safetensors").stat().st_size
    assert not list(made.folder.parent.glob(".*"))


def test_what_is_not_targeted_is_quantised_as_it_is(plain, tmp_path):
    made = inlay.fold(plain, tmp_path / "f", InlayConfig(method="pissa", args={"r": 8}, target_modules=["q_proj"]))
    assert [e.module for e in made.errors] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    usual = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization_config("nf4"))
    ours, theirs = base(made.base).state_dict(), usual.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if "weight" in k and "proj.weight" in k and "q_" not in k)


def test_conv1d_is_folded_in_its_own_layout(gpt2_original, tmp_path, small_tokenizer):
    gpt2_original.save_pretrained(tmp_path / "gpt2")
    small_tokenizer.save_pretrained(tmp_path / "gpt2")
    made = inlay.fold(
        str(tmp_path / "gpt2"), tmp_path / "f", InlayConfig(method="pissa", args={"r": 8}, target_modules=["c_attn"])
    )
    before, after = (sum(getattr(e, kind) for e in made.errors) for kind in ("plain", "folded"))
    assert 0.05 * len(made.errors) < after < before
    difference = load(made)(IDS).logits - gpt2_original(IDS).logits
    assert difference.norm() < 0.2 * gpt2_original(IDS).logits.norm()


def test_rounds_lower_the_error_and_keep_the_best(plain, tmp_path, folds):
    again = inlay.fold(plain, tmp_path / "f", config("pissa"), rounds=4)
    once = {e.module: e.folded for e in folds("pissa").errors}
    assert all(e.folded <= once[e.module] + 1e-7 for e in again.errors)
    assert sum(e.folded for e in again.errors) < 0.99 * sum(once.values())
    assert {e.round for e in again.errors} - {1}
    assert [int(row["round"]) for row in errors(tmp_path / "f")] == [e.round for e in again.errors]
    model = load(again)
    for name, layer in layers(model).items():
        W = dict(base(plain).named_parameters())[f"{name}.weight"]
        put_back = layer.matrix().float() + layer.get_delta_weight("default")
        error = ((put_back - W).norm() / W.norm()).item()
        assert error == pytest.approx(next(e.folded for e in again.errors if e.module == name), abs=1e-4)


# -- loading ----------------------------------------------------------------------------------------------------------


@every_method
def test_a_trained_pair_reloads_to_the_same_model(method, folds, tmp_path):
    made = folds(method)
    model = load(made, trainable=True)
    wander(model)
    logits = model(IDS).logits
    model.save_pretrained(str(tmp_path))
    assert not any("start" in name for name, _ in model.named_buffers())
    for low in (False, True):
        again = PeftModel.from_pretrained(base(made.base), str(tmp_path), low_cpu_mem_usage=low).eval()
        assert torch.equal(again(IDS).logits, logits)


def test_a_folded_adapter_fits_no_other_base(folds, plain):
    """Not the first model, not its plain 4-bit form, not the base of another fold; nor by transformers' own call."""
    made = folds("pissa")
    others = {
        "first": base(plain),
        "plain nf4": AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization_config("nf4")),
        "int8": AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization_config("int8")),
        "dota's": base(folds("dota").base),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match="cut from another base"):
            PeftModel.from_pretrained(other, str(made.adapter))
        if name == "dota's":
            other = base(folds("dota").base)
            other.load_adapter(str(made.adapter))
            with pytest.raises(ValueError, match="cut from another base"):
                other(IDS)
    insist = InlayConfig.from_pretrained(str(made.adapter))
    insist.seals = None
    PeftModel.from_pretrained(base(plain), str(made.adapter), config=insist)


def test_a_changed_bit_of_the_base_is_another_base(folds):
    made = folds("pissa")
    other = base(made.base)
    other.model.layers[1].mlp.up_proj.weight.data[7] ^= 1
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the adapter was cut from another base"):
        PeftModel.from_pretrained(other, str(made.adapter))


def test_an_offset_adapter_fits_any_quantisation_of_its_base(plain, tmp_path):
    model = get_peft_model(base(plain), config("pissa"))
    model.save_pretrained(str(tmp_path))
    for kind in ("nf4", "int8"):
        packed = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=quantization_config(kind, torch.float32)
        )
        before = packed(IDS).logits
        assert torch.equal(PeftModel.from_pretrained(packed, str(tmp_path))(IDS).logits, before)


def test_a_folded_config_starts_nothing_by_itself(folds):
    model = get_peft_model(base(folds("bone").base), config("pissa", folded=True))
    with pytest.raises(ValueError, match="a folded adapter has no start of its own"):
        model(IDS)


def test_an_edited_folded_flag_is_refused(folds, tmp_path):
    shutil.copytree(folds("pissa").adapter, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"folded": true', '"folded": false'))
    with pytest.raises(ValueError, match="edited after it was saved"):
        PeftModel.from_pretrained(base(folds("pissa").base), str(tmp_path / "a"))


def test_a_second_adapter_on_a_folded_base_and_a_reference_copy(folds):
    """A copy of the folded adapter under its config object, as trl's DPO makes one, has the same numbers."""
    model = load(folds("pissa"), trainable=True)
    wander(model)
    logits = model(IDS).logits
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(model(IDS).logits, logits)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_mistakes_are_named_and_leave_nothing(plain, folds, tmp_path, capsys):
    cases = {
        ("--method", "pissa", "--r", "999"): "choose r <=",
        ("--method", "nothing"): "unknown method",
        ("--method", "pissa", "--target-modules", "lm_head,q_proj"): "lm_head stays in full precision",
        ("--method", "pissa", "--target-modules", "q_prj"): "q_prj",
        ("--rounds", "0"): "not a whole number from 1 up",
    }
    for extra, says in cases.items():
        with pytest.raises(SystemExit) as stop:
            main(["fold", plain, str(tmp_path / "f"), *extra])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert says in said, extra
        assert len(said.strip().splitlines()) == 1
    for model, says in ((str(folds("bone").base), "no model without its adapter"), (str(tmp_path / "x"), "not exist")):
        with pytest.raises(SystemExit):
            main(["fold", model, str(tmp_path / "f"), "--method", "pissa"])
        assert says in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not one of nf4"):
        inlay.fold(plain, tmp_path / "f", config("bone"), quantization="int3")
    with pytest.raises(ValueError, match="is of a folded adapter"):
        inlay.fold(plain, tmp_path / "f", config("bone", folded=True))
    assert not list(tmp_path.iterdir())


def test_a_quantised_model_is_not_folded(plain, tmp_path, small_tokenizer):
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization_config("nf4"))
    packed.save_pretrained(tmp_path / "packed")
    small_tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="is quantised already"):
        inlay.fold(str(tmp_path / "packed"), tmp_path / "f", config("bone"))


def test_a_failure_on_the_way_leaves_the_earlier_fold(plain, tmp_path, monkeypatch):
    made = inlay.fold(plain, tmp_path / "f", config("bone"))
    monkeypatch.setattr(find("pissa"), "factors", lambda *_: (_ for _ in ()).throw(ValueError("half way")))
    with pytest.raises(ValueError, match="half way"):
        inlay.fold(plain, tmp_path / "f", config("pissa"), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    load(made)


# -- recipes, merge, generate -----------------------------------------------------------------------------------------


RUN = "--steps 2 --batch-size 4 --eval-size 4 --samples 1 --learning-rate 1e-2 --dtype float32".split()


@pytest.mark.parametrize(
    ("quantize", "method"),
    [
        pytest.param("nf4", "dota", marks=pytest.mark.slow),
        ("nf4", "lamda"),
        pytest.param("nf4_offset", "lamda", marks=pytest.mark.slow),
        ("nf4_offset", "bat"),
        ("int8", "pissa"),
    ],
)
def test_a_recipe_on_a_quantised_base(quantize, method, plain, tmp_path, capsys):
    """It trains, and its folder generates and merges, also when it was moved."""
    hyper = [f"--{k}={v}" for k, v in ARGS[method].items()]
    out = tmp_path / "run"
    main(["train", "--model", plain, "--quantize", quantize, "--method", method, *hyper, "--output", str(out), *RUN])
    said = capsys.readouterr().out
    assert ("folded: the base starts at" in said) == (quantize == "nf4")
    assert (out / "base" / "config.json").exists() == (quantize == "nf4")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    moved = out.rename(tmp_path / "moved")
    main(["generate", str(moved), "--prompt", "hi", "--tokens", "2"])
    main(["merge", str(moved), str(tmp_path / "merged"), "--dtype", "float32"])
    merged = base(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    adapted, _ = Adapter.open(moved / "adapter").load(torch.float32)
    for layer in layers(adapted).values():
        assert quantize != "nf4" or layer.base_layer.compute_dtype == torch.float32
    torch.testing.assert_close(merged(IDS).logits, adapted.eval()(IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_fold_is_trained_again_and_again(folds, tmp_path, capsys):
    """As the model of a recipe; with the hyperparameters it was folded with, which are part of its base."""
    made = folds("pissa")
    flags = ["train", "--model", str(made.folder), "--method", "pissa", "--output", str(tmp_path / "run"), *RUN]
    main([*flags, "--r", "8"])
    adapted, _ = Adapter.open(tmp_path / "run" / "adapter").load(torch.float32)
    assert not torch.equal(adapted.eval()(IDS).logits, load(made)(IDS).logits)
    assert adapted.base_model.model.name_or_path == str(made.base.resolve())
    capsys.readouterr()
    for wrong, says in {
        ("--r", "4"): "was folded with args={'r': 8}",
        ("--method", "bone"): "was folded with method=pissa",
        ("--r", "8", "--target-modules", "q_proj"): "was folded with target_modules",
        ("--r", "8", "--quantize", "nf4"): "is folded already",
    }.items():
        with pytest.raises(SystemExit):
            main([*flags, "--overwrite", *wrong])
        assert says in capsys.readouterr().err, wrong


@pytest.mark.parametrize("method", ["pissa", "lamda", "lora"])
@pytest.mark.parametrize("kind", ["folded", "offset"])
def test_trl_leaves_theta_in_fp32_where_schedule_is_given(method, kind, folds, plain, tmp_path, small_tokenizer):
    """On quantised bases trl casts θ to bf16, in which a step of 1e-4 of a value's size is lost."""

    def fresh():
        if kind == "folded":
            return load(folds(method), trainable=True)
        packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization_config("nf4"))
        torch.manual_seed(1)
        return get_peft_model(packed, config(method))

    def trainer(model, callbacks):
        args = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=1)
        rows = [{"prompt": "a", "completion": "b"}] * 4
        from datasets import Dataset

        return SFTTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=small_tokenizer,
            callbacks=callbacks,
        )  # fmt: skip

    cast = trainer(fresh(), []).model
    assert {p.dtype for p in cast.parameters() if p.requires_grad} == {torch.bfloat16}
    ours, exact = trainer(fresh(), [Schedule()]).model, fresh().state_dict()
    found = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert found
    assert all(torch.equal(p, exact[n]) and p.dtype == torch.float32 for n, p in found.items())


def test_a_cast_of_changed_numbers_is_widened_not_undone(plain):
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization_config("nf4"))
    model = get_peft_model(packed, config("pissa"))
    weight = next(p for p in model.parameters() if p.requires_grad)
    weight.data = (weight.data + 1).bfloat16()
    changed = weight.data.float()
    inlay.host.slot.restore_precision(model)
    assert torch.equal(weight, changed)
    assert weight.dtype == torch.float32


def test_precision_outlives_copies_moves_loads_and_a_second_trainer(folds):
    """What trl does to a parameter is undone, whatever happened to it before; a cast that is meant stays."""

    def cast(model):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.bfloat16()

    made = folds("pissa")
    ways = {
        "low memory": PeftModel.from_pretrained(
            base(made.base), str(made.adapter), is_trainable=True, low_cpu_mem_usage=True
        ),
        "copy": copy.deepcopy(load(made, trainable=True)),
        "there and back": load(made, trainable=True).double().float(),
    }
    for model in ways.values():
        for _ in range(2):  # a second trainer on the same model
            wander(model)
            exact = [p.detach().clone() for p in model.parameters() if p.requires_grad]
            cast(model)
            inlay.host.slot.restore_precision(model)
            assert all(map(torch.equal, exact, [p for p in model.parameters() if p.requires_grad]))
    half = load(made, trainable=True).half()
    inlay.host.slot.restore_precision(half)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float16}


def test_what_is_trained_whole_keeps_its_dtype_too(plain, tmp_path):
    flags = ["--quantize", "nf4", "--modules-to-save", "norm", "--method", "bone", "--r", "4", *RUN]
    main(["train", "--model", plain, "--output", str(tmp_path / "run"), *flags])
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert any("norm" in name for name in stored)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_is_trained_whole_on_a_quantised_base(plain, tmp_path):
    flags = ["--quantize", "nf4_offset", "--modules-to-save", "lm_head", "--method", "bone", "--r", "4", *RUN]
    main(["train", "--model", plain, "--output", str(tmp_path / "run"), *flags])


def test_a_quantised_module_is_not_trained_whole(plain):
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization_config("nf4"))
    with pytest.raises(ValueError, match="down_proj is quantised and cannot be trained whole"):
        get_peft_model(packed, InlayConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))


@pytest.mark.parametrize("quantize", ["nf4", "nf4_offset"])
def test_a_merge_reads_layers_without_an_adapter_too(quantize, plain, tmp_path, capsys):
    """bitsandbytes repacks them at the first inference pass on some CPUs."""
    flags = ["--quantize", quantize, "--method", "pissa", "--r", "4", "--target-modules", "q_proj,v_proj", *RUN]
    main(["train", "--model", plain, "--output", str(tmp_path / "run"), *flags])
    main(["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--dtype", "float32"])
    error = float(capsys.readouterr().out.rpartition(" ")[2])
    assert error < 1e-3
    adapted, _ = Adapter.open(tmp_path / "run" / "adapter").load(torch.float32)
    if quantize == "nf4":
        torch.testing.assert_close(base(tmp_path / "merged")(IDS).logits, adapted(IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_folded_base_computes_in_the_dtype_asked_for(folds):
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = Adapter.open(folds("pissa").adapter).load(dtype)
        assert model(IDS).logits.dtype == dtype
        assert {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")} == {dtype}


def test_a_folded_adapter_saved_while_merged_is_still_its_bases(folds, tmp_path):
    model = load(folds("pissa"))
    logits = model(IDS).logits
    model.merge_adapter()
    model.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(base(folds("pissa").base), str(tmp_path)).eval()(IDS).logits, logits)


def test_hot_swap_keeps_to_the_base(folds, plain, tmp_path, small_tokenizer):
    from peft.utils.hotswap import hotswap_adapter

    other = AutoModelForCausalLM.from_pretrained(plain)
    other.model.layers[0].mlp.up_proj.weight.data += 0.01
    other.save_pretrained(tmp_path / "other")
    small_tokenizer.save_pretrained(tmp_path / "other")
    elsewhere = inlay.fold(str(tmp_path / "other"), tmp_path / "f", config("pissa"))
    model = load(folds("pissa"))
    with pytest.raises(ValueError, match="folded_base"):
        hotswap_adapter(model, str(elsewhere.adapter), "default")
    hotswap_adapter(model, str(folds("pissa").adapter), "default")


def test_a_moved_fold_trains_and_names_its_new_place(plain, tmp_path, capsys):
    inlay.fold(plain, tmp_path / "f", config("bone"))
    (tmp_path / "f").rename(tmp_path / "moved")
    flags = ["--model", str(tmp_path / "moved"), "--method", "bone", "--r", "4", *RUN]
    main(["train", *flags, "--output", str(tmp_path / "run")])
    main(["generate", str(tmp_path / "run"), "--prompt", "hi", "--tokens", "2"])
    capsys.readouterr()
    for wrong in (["--bias", "all"], ["--modules-to-save", "norm"], ["--exclude-modules", "q_proj"]):
        for more in (["--dry-run"], []):
            with pytest.raises(SystemExit):
                main(["train", *flags, "--output", str(tmp_path / "no"), *wrong, *more])
            assert "was folded with" in capsys.readouterr().err


def test_what_cannot_be_folded_is_named(plain, tmp_path):
    tensors = load_file(f"{plain}/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for fault, says in (("nan", "up_proj holds NaN or Inf"), ("missing", "stores no weight for model.layers.0.mlp.up")):
        broken = dict(tensors)
        broken[name] = torch.full_like(broken[name], torch.nan)
        if fault == "missing":
            del broken[name]
        shutil.copytree(plain, tmp_path / fault)
        save_file(broken, tmp_path / fault / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=says):
            inlay.fold(str(tmp_path / fault), tmp_path / "f", config("bone"))
    assert not (tmp_path / "f").exists()


def test_a_loaded_config_may_fold_again(plain, tmp_path, folds):
    again = InlayConfig.from_pretrained(str(folds("bone").adapter))
    again.folded = False
    inlay.fold(plain, tmp_path / "f", again)


def test_bat_on_a_quantised_base_is_merged_not_exported(folds, tmp_path):
    with pytest.raises(ValueError, match="is stored quantised, and bat reads its weight: it is no LoRA without"):
        inlay.export_lora(folds("bat").adapter, tmp_path / "l", rank=4)


def test_counted_weights_are_those_of_the_packed_model(plain):
    for kind in ("nf4", "int8"):
        packed = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=quantization_config(kind)
        )
        stored = {id(t): t for t in packed.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
        real = sum(t.numel() * t.element_size() for t in stored.values())
        counted = PlannedRun(BaseModel(plain), config("bone"), quantize=kind).step(1, 8).frozen
        assert abs(counted - real) < 0.02 * real


# -- the real model --------------------------------------------------------------------------------------------------


def pack(W: torch.Tensor):
    return bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=True).to("cpu")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("method", "args", "error"),
    [("pissa", {"r": 16}, 0.0874), ("dota", {"bond": 16}, 0.0929), ("dota", {"bond": 64}, 0.0835)],
)
def test_known_errors_of_a_real_weight(method, args, error, real_model):
    """SmolLM2-135M, gate of layer 15: NF4 .0942, QPiSSA r 16 .0874, QDoTA R 16 .0929, R 64 .0835."""
    W = real_model.model.layers[15].mlp.gate_proj.weight.detach()
    plan = FoldPlan({"gate": find(method)(**args)}, 1, lambda module: None)
    cut_residual(plan, "gate", W, pack, transposed=False)
    (found,) = plan.errors
    assert found.plain == pytest.approx(0.0942, abs=3e-4)
    assert found.folded == pytest.approx(error, abs=3e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "method", [InlayConfig(method=m, args=sized(m, 16)) for m in NAMES],
    ids=NAMES,
)  # fmt: skip
def test_the_real_model_folds(method, tmp_path):
    method.target_modules = "all-linear"
    made = inlay.fold("builtin", tmp_path / "f", method)
    before, after = (sum(getattr(e, kind) for e in made.errors) / len(made.errors) for kind in ("plain", "folded"))
    assert len(made.errors) == 210
    assert after <= before * (1 if method.method in ("pissa", "dota") else 1.01)
    adapted, _ = Adapter.open(made.adapter).load(torch.float32)
    reference = BaseModel("builtin").load(torch.float32)
    text = torch.arange(100, 164)[None]
    with torch.no_grad():
        difference = (adapted(text).logits - reference(text).logits).norm() / reference(text).logits.norm()
    assert difference < 0.2
