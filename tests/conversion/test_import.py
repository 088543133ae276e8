"""PEFT's own adapters as Inlay adapters: stock PEFT is the judge of what they compute."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import inlay
from inlay.cli import main
from inlay.host.layer import InlayLinear

IDS = torch.arange(24)[None]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["up_proj", "down_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),  # PEFT's, of a second adapter
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def base(folder: str, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def shake(model: torch.nn.Module, scale: float = 0.02) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=scale)


def theirs(folder: str, out: Path, config, scale: float = 0.02, initial: Path | None = None) -> PeftModel:
    """An adapter of PEFT's, trained a little, saved in `out` (and before that in `initial`)."""
    model = get_peft_model(base(folder), config).eval()
    if initial is not None:
        model.save_pretrained(str(initial))
    shake(model, scale)
    model.save_pretrained(str(out))
    return model


def ours(folder: str, adapter: Path, **more) -> PeftModel:
    return PeftModel.from_pretrained(base(folder), str(adapter), **more).eval()


def same(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(IDS).logits, other(IDS).logits, rtol=tolerance, atol=tolerance)


LORAS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "regex": {"target_modules": r".*layers\.1\..*(k|up)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "absent": {"target_modules": ["q_proj", "query"]},
    "rslora": {"use_rslora": True, "lora_alpha": 7, "target_modules": ATTENTION},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2, r"layers\.1\..*": 6},
        "alpha_pattern": {"(k|v)_proj": 3, "model.layers.0.mlp.up_proj": 32},
    },
    "rslora with patterns": {
        "use_rslora": True,
        "target_modules": ATTENTION,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "dropout": {"target_modules": ATTENTION, "lora_dropout": 0.1},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "random": {"target_modules": ATTENTION, "init_lora_weights": False},
    "orthogonal": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
    "more ranks than outputs": {"target_modules": ATTENTION, "r": 80},
    "whole modules": {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "norm"]},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": [3, 5]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "pissa": {"target_modules": "all-linear", "init_lora_weights": "pissa"},
    "pissa, scaled": {"target_modules": ATTENTION, "init_lora_weights": "pissa", "lora_alpha": 12, "use_rslora": True},
    "pissa, patterns": {"target_modules": ATTENTION, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 7}},
    "olora": {"target_modules": "all-linear", "init_lora_weights": "olora"},
    "olora, nearly full": {"target_modules": ATTENTION, "init_lora_weights": "olora", "r": 24},
}


@pytest.mark.parametrize("case", LORAS)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
def test_a_lora_computes_the_same(case, tiny, tmp_path):
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **LORAS[case]}
    model = theirs(tiny, tmp_path / "peft", LoraConfig(**settings))
    done = inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
    start = str(settings.get("init_lora_weights"))
    assert done.method == ("pissa" if "pissa" in start else "lora")
    mine = ours(tiny, done.folder)
    same(mine, model)
    with torch.no_grad(), mine.disable_adapter():
        if "modules_to_save" not in settings and "trainable_token_indices" not in settings:
            assert torch.equal(mine(IDS).logits, base(tiny)(IDS).logits)


BLOCKS = {
    "miss": {"target_modules": "all-linear", "r": 8},
    "miss, short last block": {"target_modules": ATTENTION, "r": 7},
    "miss, dropout": {"target_modules": ATTENTION, "miss_dropout": 0.2},
    "random": {"target_modules": ATTENTION, "init_weights": False},
    "mini": {"target_modules": ATTENTION, "init_weights": "mini", "mini_r": 16},
    "bat": {"target_modules": "all-linear", "init_weights": "bat", "r": 16, "miss_dropout": 0.2},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "init_weights": "bat", "r": 16},
    "whole modules": {"target_modules": ATTENTION, "modules_to_save": ["norm"]},
    "biases": {"target_modules": ATTENTION, "bias": "MiSS_only"},
}


@pytest.mark.parametrize(
    ("case", "kind"), [(c, k) for c in BLOCKS for k in ("MISS", "BONE") if (c, k) != ("mini", "BONE")]
)
def test_miss_and_the_old_bone_compute_the_same(case, kind, tiny, tmp_path):
    """PEFT 0.21 has no Bone any more: its adapters are MiSS's under other names, without mini and dropout."""
    settings = {"r": 4, "task_type": "CAUSAL_LM", **BLOCKS[case]}
    model = theirs(tiny, tmp_path / "peft", MissConfig(**settings))
    if kind == "BONE":
        as_bone(tmp_path / "peft")
    done = inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
    assert done.method == ("bat_col" if settings.get("init_weights") == "bat" else "bone")
    same(ours(tiny, done.folder), model)
    stored = json.loads((done.folder / "adapter_config.json").read_text())
    assert stored["dropout"] == (0.2 if case == "miss, dropout" and kind == "MISS" else 0)


def as_bone(folder: Path) -> None:
    """A MiSS folder in the format of PEFT's former Bone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("miss_dropout", "mini_r")} | {"peft_type": "BONE"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {k.replace("miss_block", "bone_block"): v for k, v in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_conv1d_and_biases(start, bias, gpt2_original, tmp_path):
    gpt2_original.save_pretrained(tmp_path / "gpt2")
    folder = str(tmp_path / "gpt2")
    config = LoraConfig(
        r=4, init_lora_weights=start, bias=bias, fan_in_fan_out=True, target_modules=["c_attn", "c_fc", "attn.c_proj"]
    )
    model = theirs(folder, tmp_path / "peft", config)
    inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert stored["bias"] == {"lora_only": "inlay_only"}.get(bias, bias)
    assert all(mark["base"] for name, mark in stored["seals"].items() if name != "*")
    same(ours(folder, tmp_path / "ours"), model)


def gradients(model: torch.nn.Module) -> torch.nn.Module:
    """Something for LoRA-GA to start from."""
    for m in model.modules():
        if isinstance(m, torch.nn.Linear):
            m._peft_loraga_grad = torch.randn_like(m.weight)
    return model


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_a_start_is_read_from_the_adapter_before_training(start, tiny, tmp_path):
    """Also where it is random or came from data, and PEFT's own reload computes something else."""
    more = {"lora_ga_config": LoraGAConfig()} if start == "lora_ga" else {}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, init_lora_weights=start, **more)
    model = get_peft_model(gradients(base(tiny)), config).eval()
    model.save_pretrained(str(tmp_path / "initial"))
    shake(model)
    model.save_pretrained(str(tmp_path / "peft"))
    random = start in ("pissa_niter_4", "lora_ga")
    if random:
        with pytest.raises(ValueError, match="--initial"):
            inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
        again = PeftModel.from_pretrained(base(tiny), str(tmp_path / "peft")).eval()
        with torch.no_grad():
            assert (again(IDS).logits - model(IDS).logits).abs().max() > 0.01  # PEFT's fault, without a word
    done = inlay.import_adapter(tmp_path / "peft", tmp_path / "ours", initial=tmp_path / "initial")
    assert done.method == ("pissa" if "pissa" in start else "lora")
    same(ours(tiny, tmp_path / "ours"), model)


def test_what_peft_converted_is_a_plain_lora(tiny, tmp_path):
    """Saved with path_initial_model_for_weight_conversion it has twice the rank and needs no start."""
    config = LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(base(tiny), config).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT asks for
    model.save_pretrained(str(tmp_path / "initial"))
    shake(model)
    model.save_pretrained(str(tmp_path / "peft"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    done = inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
    assert done.method == "lora"
    assert done.notes == ()
    same(ours(tiny, tmp_path / "ours"), model)
    model.save_pretrained(str(tmp_path / "raw"))  # says init_lora_weights=True as well, but is B A on the residual
    assert inlay.import_adapter(tmp_path / "raw", tmp_path / "two", initial=tmp_path / "initial").method == "lora"
    same(ours(tiny, tmp_path / "two"), model)


def test_a_start_may_differ_in_signs(tiny, tmp_path):
    """LAPACK chooses those of singular vectors: a checkpoint from another machine may have them turned."""
    config = LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa")
    model = theirs(tiny, tmp_path / "peft", config)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    turned = {k: -v for k, v in load_file(path).items()}
    save_file(turned, path, metadata={"format": "pt"})
    inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
    mine = ours(tiny, tmp_path / "ours")
    same(mine, model)
    for layer in (m for m in mine.modules() if isinstance(m, InlayLinear)):
        _, p, p0 = layer.theta("default")
        assert (p["A"] - p0["A"]).norm() < p0["A"].norm()


def test_an_ill_determined_start_is_said(tiny, tmp_path):
    """Two equal singular values at the cut: which of their vectors PiSSA takes is a matter of rounding."""
    model = base(tiny)
    q = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        q.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 2.0] + [1.0] * 60)))
    model.save_pretrained(tmp_path / "equal")
    for r, said in ((2, False), (3, True)):
        config = LoraConfig(r=r, target_modules=["layers.0.self_attn.q_proj"], init_lora_weights="pissa")
        theirs(str(tmp_path / "equal"), tmp_path / f"peft{r}", config, scale=0)
        notes = inlay.import_adapter(tmp_path / f"peft{r}", tmp_path / f"ours{r}").notes
        assert any("ill-determined" in note for note in notes) == said
        assert "training moved it by 0.0%" in notes[0]


def test_a_start_needs_numbers(tiny, tmp_path):
    """Not the packed ones of a quantised checkpoint."""
    theirs(tiny, tmp_path / "peft", LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text((Path(tiny) / "config.json").read_text())
    weights = load_file(Path(tiny) / "model.safetensors")
    packed = {k: v.to(torch.uint8) for k, v in weights.items()}
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is stored as torch\.uint8"):
        inlay.import_adapter(tmp_path / "peft", tmp_path / "ours", model=str(tmp_path / "packed"))


def test_the_real_model_with_pissa(real_model, tmp_path):
    from inlay.models import builtin

    folder = str(builtin.model_dir())
    config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(real_model), config).eval()
    shake(model, 0.01)
    model.save_pretrained(str(tmp_path / "peft"))
    done = inlay.import_adapter(tmp_path / "peft", tmp_path / "ours", model="builtin")
    ids = torch.arange(1000, 1048)[None]
    with torch.no_grad():
        wanted, start = model(input_ids=ids).logits, real_model(input_ids=ids).logits
        found = ours(folder, done.folder)(input_ids=ids).logits
        assert (wanted - start).abs().max() > 1
        assert (found - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["lora", "pissa", "olora", "miss", "bat"])
def test_it_is_an_adapter_like_any_other(kind, tiny, tmp_path):
    """It trains on, saves, merges, exports, stands beside another, and is refused on another base."""
    lora = {"lora": True, "pissa": "pissa", "olora": "olora"}
    config = (
        LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=lora[kind])
        if kind in lora
        else MissConfig(r=16, target_modules=ATTENTION, init_weights={"bat": "bat"}.get(kind, True))
    )
    theirs(tiny, tmp_path / "peft", config)
    folder = inlay.import_adapter(tmp_path / "peft", tmp_path / "ours").folder
    model = ours(tiny, folder, is_trainable=True)
    before = model(IDS).logits.detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(model(IDS).logits, before)
    model.save_pretrained(str(tmp_path / "more"))
    same(ours(tiny, tmp_path / "more"), model)
    model.load_adapter(str(folder), "two")
    model.set_adapter("two")
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)
    made = inlay.export_lora(folder, tmp_path / "lora", rank=64 if kind == "bat" else None)
    same(PeftModel.from_pretrained(base(tiny), str(made.folder)).eval(), ours(tiny, folder))
    merged = ours(tiny, folder).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-5, atol=1e-5)
    other = base(tiny)
    shake(other)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(other, str(folder))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_on_the_head(start, tiny, tmp_path):
    """Beside an adapter on the head PEFT stores the head itself, which is then W − s B₀ A₀."""
    untied = AutoModelForCausalLM.from_pretrained(tiny, tie_word_embeddings=False)
    shake(untied)
    untied.save_pretrained(tmp_path / "untied")
    folder = str(tmp_path / "untied")
    model = theirs(folder, tmp_path / "peft", LoraConfig(target_modules=["lm_head"], init_lora_weights=start))
    inlay.import_adapter(tmp_path / "peft", tmp_path / "ours")
    same(ours(folder, tmp_path / "ours"), model)


def test_a_lora_needs_no_weights_of_the_base(tiny, tmp_path):
    model = theirs(tiny, tmp_path / "peft", LoraConfig(r=4, target_modules=ATTENTION))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((Path(tiny) / "config.json").read_text())
    inlay.import_adapter(tmp_path / "peft", tmp_path / "ours", model=str(tmp_path / "bare"))
    stored = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {mark["base"] for mark in stored["seals"].values()} == {None}
    assert stored["base_model_name_or_path"] == str(tmp_path / "bare")
    same(ours(tiny, tmp_path / "ours"), model)


def edited(folder: Path, **changed) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


MISTAKES = {
    "dora": ({"use_dora": True}, "use_dora=True has no equal in Inlay: DoRA rescales"),
    "bias": ({"lora_bias": True}, "lora_bias=True has no equal"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "an aLoRA is active on a part of the text only"),
    "experts": ({"target_parameters": ["mlp.experts.w"]}, "fused expert weights"),
    "copies": ({"layer_replication": [[0, 2], [1, 2]]}, "layers were copied"),
    "later": ({"use_new_variant": {"x": 1}}, "use_new_variant={'x': 1} has no equal in Inlay"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is not CAUSAL_LM"),
    "type": ({"peft_type": "LOHA"}, "peft_type='LOHA' is not one of LORA, MISS, BONE"),
    "inlay": ({"peft_type": "INLAY"}, "is an Inlay adapter already"),
    "random": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' is a random decomposition"),
    "corda": ({"init_lora_weights": "corda"}, "'corda' came from data"),
    "gradients": ({"init_lora_weights": "lora_ga"}, "'lora_ga' came from gradients"),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "quantises the base when it is loaded",
    ),
    "start": ({"init_lora_weights": "magic"}, "init_lora_weights='magic' is not one of true, false"),
    "rank": ({"r": 5}, "lora_A.weight has shape (4, 64), not (5, 64)"),
    "rank in words": ({"r": "four"}, "PEFT cannot build this adapter"),
    "fewer": ({"target_modules": ["q_proj"]}, "belongs to no module it targets"),
    "more": ({"target_modules": ["q_proj", "k_proj", "up_proj"]}, "up_proj.lora_A.weight is missing"),
    "base": ({"base_model_name_or_path": None}, "does not name its base model"),
    "no base": ({"base_model_name_or_path": "./nothing"}, "model folder ./nothing does not exist"),
    "alpha": ({"lora_alpha": 0}, "alpha=0.0 is not above 0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(case, tiny, tmp_path, capsys):
    theirs(tiny, tmp_path / "peft", LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    changed, says = MISTAKES[case]
    edited(tmp_path / "peft", **changed)
    refused([str(tmp_path / "peft"), str(tmp_path / "out")], says, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft"]


def refused(arguments: list[str], says: str, capsys) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["import", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in said, said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_what_has_no_equal_is_refused(tiny, gpt2_original, tmp_path, capsys):
    """Embeddings, a start on tied weights, OLoRA on a Conv1D, a resized vocabulary, a pickle, a broken file."""
    out = str(tmp_path / "out")

    def tried(name: str, config, says: str, *more: str, folder: str = tiny) -> None:
        if not (tmp_path / name).exists():
            theirs(folder, tmp_path / name, config)
        refused([str(tmp_path / name), out, *more], says, capsys)

    tried("tokens", LoraConfig(target_modules=["embed_tokens"]), "embed_tokens is a Embedding")
    tried("tied", LoraConfig(target_modules=["lm_head"], init_lora_weights="olora"), "lm_head shares its weight")
    gpt2_original.save_pretrained(tmp_path / "gpt2")
    tried(
        "conv1d",
        LoraConfig(target_modules=["attn.c_proj"], init_lora_weights="olora"),
        "is a Conv1D",
        folder=str(tmp_path / "gpt2"),
    )
    grown = base(tiny)
    grown.resize_token_embeddings(grown.get_input_embeddings().num_embeddings + 2, mean_resizing=False)
    get_peft_model(grown, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "grown"))
    tried("grown", None, "that is not the base's (a resized vocabulary")
    theirs(tiny, tmp_path / "plain", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian"))
    tried("plain", None, "'gaussian' leaves the base as it is", "--initial", str(tmp_path / "plain"))
    theirs(tiny, tmp_path / "p", LoraConfig(target_modules=["q_proj"]), initial=tmp_path / "zero")
    tried("p", None, "the initial adapter is zero", "--initial", str(tmp_path / "zero"))
    theirs(tiny, tmp_path / "miss", MissConfig(r=4, target_modules=["q_proj"]))
    tried("miss", None, "a MISS adapter leaves the base as it is", "--initial", str(tmp_path / "miss"))
    tensors = tmp_path / "plain" / "adapter_model.safetensors"
    values = load_file(tensors)
    save_file({k: v / 0 for k, v in values.items()}, tensors)
    tried("plain", None, "holds NaN or Inf")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    tried("plain", None, "cannot be read")
    tensors.unlink()
    tried("plain", None, "cannot be read")
    (tmp_path / "plain" / "adapter_model.bin").write_bytes(b"not looked at")
    tried("plain", None, "is a pickle")
    (tmp_path / "plain" / "adapter_config.json").write_text("{")
    tried("plain", None, "is not an adapter's configuration")
    (tmp_path / "empty").mkdir()
    tried("empty", None, "holds no adapter")


def test_the_command(tiny, tmp_path, capsys):
    theirs(tiny, tmp_path / "peft", LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="olora"))
    main(["import", str(tmp_path / "peft"), str(tmp_path / "ours")])
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1] == f"{tmp_path / 'ours'}: lora on 8 weights"
    assert [line for line in said if line.startswith("note: its start was computed from")]
    assert [line for line in said if line.startswith("note: its start is no method here")]
    refused([str(tmp_path / "peft"), str(tmp_path / "ours")], "exists; choose another output", capsys)
    main(["import", str(tmp_path / "peft"), str(tmp_path / "ours"), "--overwrite"])
    refused([str(tmp_path / "peft"), str(tmp_path / "peft"), "--overwrite"], "is not overwritten", capsys)
