"""An adapter as a plain LoRA: equal to the adapter, read by stock PEFT, within vLLM's rules, in llama.cpp's layout."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from helpers import fails
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sizes import SIZES
from transformers import AutoModelForCausalLM

import inlay
from inlay.cli import main
from inlay.host.config import InlayConfig
from inlay.host.layer import InlayLinear
from inlay.method import LowRank
from inlay.methods import METHODS, find

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of weights this small it is large

ARGS = {**SIZES, "lora": {"r": 4, "alpha": 8}, "lamda": {"r": 6}, "bone": {"r": 5}}
EXACT = {m.name for m in METHODS if issubclass(m, LowRank)}
IDS = torch.arange(24)[None]
VLLM = {1, 8, 16, 32, 64, 128, 256, 320, 512}  # its documented values of max_lora_rank

every_method = pytest.mark.parametrize("method", sorted(m.name for m in METHODS))


def base(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapter(folder: str, out: Path, method: str = "pissa", scale: float = 0.05, **more) -> PeftModel:
    """An adapter away from its start, saved in `out`."""
    config = {"method": method, "args": ARGS[method], "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(base(folder), InlayConfig(**config)).eval()
    if find(method).needs:
        inlay.calibrate(model, [{"input_ids": IDS, "labels": IDS}] * 2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=scale)
    model.save_pretrained(str(out))
    return model


def dense(model: PeftModel) -> dict[str, torch.Tensor]:
    return {m.cuts["default"].module: m.get_delta_weight("default").detach() for m in model.modules()
            if isinstance(m, InlayLinear)}  # fmt: skip


def product(folder: Path) -> dict[str, torch.Tensor]:
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    heads = {k.removesuffix(".lora_A.weight") for k in tensors if k.endswith("lora_A.weight")}
    factor = config["lora_alpha"] / config["r"]
    return {
        k.removeprefix("base_model.model."): factor * tensors[f"{k}.lora_B.weight"] @ tensors[f"{k}.lora_A.weight"]
        for k in heads
    }


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Folders of adapters of every method, each made once, and their dense changes."""
    made = {}

    def get(method: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if method not in made:
            folder = tmp_path_factory.mktemp("adapter")
            made[method] = folder, dense(adapter(tiny, folder, method))
        return made[method]

    return get


@every_method
def test_a_lora_is_the_adapter(method, adapters, tmp_path):
    """Weight by weight against the dense change: 1e-5 where ΔW is low rank, what is said where it is not."""
    folder, wanted = adapters(method)
    rank = None if method in EXACT else 12
    made = inlay.export_lora(folder, tmp_path / "lora", rank=rank)
    found = product(tmp_path / "lora")
    assert set(found) == set(wanted) == set(made.errors)
    for name, D in wanted.items():
        error = ((found[name] - D).norm() / D.norm()).item()
        if method in EXACT:
            assert error < 1e-5
            assert made.errors[name] == 0
        else:
            S = torch.linalg.svdvals(D)
            best = (S[12:].square().sum() / S.square().sum()).sqrt().item()
            assert error == pytest.approx(made.errors[name], abs=1e-4)
            assert error == pytest.approx(best, abs=1e-3)
    stored = json.loads((tmp_path / "lora" / "export.json").read_text())
    assert {row["module"]: row["error"] for row in stored["weights"]} == made.errors


@pytest.mark.parametrize("method", ["pissa", "lamda", "bone", "lora", "milora"])
def test_stock_peft_reads_it_without_inlay(method, tiny, tmp_path):
    model = adapter(tiny, tmp_path / "a", method, scale=0.02)
    inlay.export_lora(tmp_path / "a", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(tiny), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_stock_peft_reads_it_in_a_process_that_has_no_inlay(tiny, tmp_path):
    model = adapter(tiny, tmp_path / "a", "bone")
    inlay.export_lora(tmp_path / "a", tmp_path / "lora")
    code = f"""import sys; sys.modules['inlay'] = None
import torch; from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "lora")!r}, dtype=torch.float32).eval()
torch.save(model(torch.arange(24)[None]).logits, {str(tmp_path / "logits")!r})"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    theirs = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(theirs, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", pytest.param("bone", marks=pytest.mark.slow)])
def test_the_real_model_exports_within_1e_4(method, real_model, tmp_path):
    from inlay.models import builtin

    folder = str(builtin.model_dir())
    model = adapter(folder, tmp_path / "a", method, scale=0.002, args={"r": 16})
    inlay.export_lora(tmp_path / "a", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(folder), str(tmp_path / "lora")).eval()
    ids = torch.arange(1000, 1048)[None]
    with torch.no_grad():
        ours, start = model(ids).logits, real_model(ids).logits
        assert (ours - start).abs().max() > 1
        assert (loaded(ids).logits - ours).abs().max() < 1e-4


@every_method
def test_the_folder_keeps_vllms_rules(method, adapters, tmp_path):
    """A rank it serves, no bias, no DoRA, no rsLoRA, one rank for all, and tensors of linear layers only."""
    rank = None if method in EXACT else 3
    inlay.export_lora(adapters(method)[0], tmp_path / "lora", rank=rank, dtype="bfloat16")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] in VLLM
    assert config["lora_alpha"] == config["r"]
    assert config["bias"] == "none"
    assert not any(config[k] for k in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"))
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, value in tensors.items():
        module, kind, _ = name.rsplit(".", 2)
        assert module.rpartition(".")[2] in config["target_modules"]
        assert value.shape[0 if kind == "lora_A" else 1] == config["r"]
        assert value.dtype == torch.bfloat16


def test_the_rank_is_the_true_one(tiny, tmp_path):
    """At most 2 r, only r while one factor stands still, and 1 at the start, where there is no change."""
    model = adapter(tiny, tmp_path / "a", "pissa")
    assert inlay.export_lora(tmp_path / "a", tmp_path / "l", pad=False).rank == 8
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, InlayLinear)):
            layer._held("inlay_A")["default"].weight.copy_(layer._held("inlay_start_A")["default"].weight)
    model.save_pretrained(str(tmp_path / "b"))
    assert inlay.export_lora(tmp_path / "b", tmp_path / "l", pad=False, overwrite=True).rank == 4
    adapter(tiny, tmp_path / "c", "pissa", scale=0.0)
    made = inlay.export_lora(tmp_path / "c", tmp_path / "l", pad=False, overwrite=True)
    assert (made.rank, max(made.errors.values())) == (1, 0)


def test_what_rounding_to_16_bits_loses_is_said(tiny, tmp_path):
    adapter(tiny, tmp_path / "a", "pissa")
    whole = inlay.export_lora(tmp_path / "a", tmp_path / "l")
    made = inlay.export_lora(tmp_path / "a", tmp_path / "n", dtype="bfloat16")
    assert set(whole.rounding.values()) == {0.0}
    wide, narrow = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "l", tmp_path / "n"))
    for module, lost in made.rounding.items():
        D, N = (
            p[f"base_model.model.{module}.lora_B.weight"].double()
            @ p[f"base_model.model.{module}.lora_A.weight"].double()
            for p in (wide, narrow)
        )
        assert lost == pytest.approx(((D - N).norm() / D.norm()).item(), rel=1e-3)
        assert 1e-4 < lost < 1e-2


def test_energy_chooses_the_rank(tiny, tmp_path):
    model = adapter(tiny, tmp_path / "a", "dota")
    made = inlay.export_lora(tmp_path / "a", tmp_path / "l", energy=0.9, pad=False)
    assert max(made.errors.values()) <= 0.1**0.5 + 1e-6
    needed = []
    for D in dense(model).values():
        S = torch.linalg.svdvals(D).square()
        needed.append(int((S.cumsum(0) < 0.9 * S.sum()).sum()) + 1)
    assert made.rank == max(needed)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_part_of_the_model_and_what_else_was_trained(tiny, tmp_path):
    """Only these layers are targeted, and modules that were trained whole go along."""
    more = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]}
    model = adapter(tiny, tmp_path / "a", "bone", **more)
    made = inlay.export_lora(tmp_path / "a", tmp_path / "l")
    assert set(made.errors) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    loaded = PeftModel.from_pretrained(base(tiny), str(tmp_path / "l")).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_conv1d(gpt2_original, tmp_path):
    gpt2_original.save_pretrained(tmp_path / "gpt2")
    folder = str(tmp_path / "gpt2")
    for method in ("pissa", "bat"):
        args = {"target_modules": ["c_attn", "c_fc", "c_proj"]}  # one of them square
        model = adapter(folder, tmp_path / method, method, **args)
        inlay.export_lora(tmp_path / method, tmp_path / "l", rank=64, overwrite=True)
        loaded = PeftModel.from_pretrained(base(folder), str(tmp_path / "l")).eval()
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_gguf_is_in_llama_cpps_layout(tiny, tmp_path):
    """Names, metadata, and q and k with their rows in pairs, as the built-in model's own GGUF has them."""
    adapter(tiny, tmp_path / "a", "bone")
    main(["export", str(tmp_path / "a"), str(tmp_path / "g"), "--to", "gguf"])
    lora = inlay.export_lora(tmp_path / "a", tmp_path / "l")
    tensors = load_file(tmp_path / "l" / "adapter_model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "g" / "adapter.gguf")
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == lora.rank
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(found) == len(tensors)
    key = "base_model.model.model.layers.1.self_attn.{}.lora_{}.weight"
    torch.testing.assert_close(found["blk.1.attn_v.weight.lora_b"], tensors[key.format("v_proj", "B")])
    torch.testing.assert_close(found["blk.1.attn_q.weight.lora_a"], tensors[key.format("q_proj", "A")])
    for name, kind, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        B = tensors[key.format(kind, "B")]
        d = B.shape[0] // heads
        for row in range(B.shape[0]):  # row 2i + h of a head there is row h d/2 + i here
            head, i, h = row // d, row % d // 2, row % 2
            assert torch.equal(found[f"blk.1.{name}.weight.lora_b"][row], B[head * d + h * d // 2 + i])
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "g" / "Modelfile").read_text()


def test_mistakes_are_named_and_leave_nothing(tiny, gpt2_original, tmp_path, capsys):
    adapter(tiny, tmp_path / "dota", "dota")
    adapter(tiny, tmp_path / "bone", "bone")
    gpt2_original.save_pretrained(tmp_path / "gpt2")
    adapter(str(tmp_path / "gpt2"), tmp_path / "other", "bone", target_modules=["c_attn"])
    before = sorted(p.name for p in tmp_path.iterdir())
    capsys.readouterr()
    cases = {
        ("dota",): "has full rank",
        ("dota", "--rank", "0"): "rank=0 is below 1",
        ("dota", "--energy", "1.5"): "energy=1.5 is not in (0, 1]",
        ("nothing",): "nothing does not exist",
        ("bone", "--to", "onnx"): "invalid choice: 'onnx'",
        ("other", "--to", "gguf"): "gpt2 models are not written as GGUF here",
        ("bone", "--model", str(tmp_path / "gpt2")): "not found in the base model",
    }
    for (name, *extra), says in cases.items():
        with pytest.raises(SystemExit) as stop:
            main(["export", str(tmp_path / name), str(tmp_path / "out"), *extra])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert says in said, said
        assert len(said.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_trained_fold_exports_onto_its_base(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    made = inlay.fold(tiny, tmp_path / "f", InlayConfig(method="pissa", args={"r": 8}, target_modules="all-linear"))
    exported = inlay.export_lora(made.adapter, tmp_path / "l")
    assert exported.rank == 8
    config = json.loads((tmp_path / "l" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made.base.resolve())
    ours = PeftModel.from_pretrained(base(str(made.base)), str(made.adapter)).eval()(IDS).logits
    theirs = PeftModel.from_pretrained(base(str(made.base)), str(tmp_path / "l")).eval()(IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02)  # the base computes in bf16


def test_low_rank_methods_need_no_base_weights(tiny, tmp_path, monkeypatch):
    adapter(tiny, tmp_path / "a", "lamda")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((Path(tiny) / "config.json").read_text())
    inlay.export_lora(tmp_path / "a", tmp_path / "l", model=str(tmp_path / "bare"))
    assert find("bat").reads_weight
    assert not find("lamda").reads_weight


def test_an_adapter_of_pefts_is_sent_to_where_it_becomes_ours(tiny, tmp_path, capsys):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base(tiny), config).save_pretrained(tmp_path / "lora")
    for verb in ("export", "merge"):
        said = fails(capsys, verb, str(tmp_path / "lora"), str(tmp_path / "out"))
        assert "is a LORA of PEFT's; first make it Inlay's: inlay import " in said
    main(["import", *said.partition("inlay import ")[2].split()[:1], str(tmp_path / "imported")])
    main(["merge", str(tmp_path / "imported"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    lora = PeftModel.from_pretrained(base(tiny), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        assert (merged(input_ids=IDS).logits - lora(input_ids=IDS).logits).abs().max() < 1e-4
