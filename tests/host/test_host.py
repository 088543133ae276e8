"""Life inside PEFT, transformers and TRL: a test for every feature we promise and every trap we know."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from inlay import methods
from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX, START, InlayLinear
from inlay.method import Method
from inlay.methods.lora import LoRA
from inlay.methods.milora import MiLoRA

NAMES = [m.name for m in methods.METHODS if not m.needs]
FIRST = ("lora", "pissa", "milora", "lamda", "dota", "bone", "bat", "bat_col")  # on the real model in the fast suite
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(24).view(2, 12)
KINDS = "lora pissa lamda dota bat lorta xgblora spiel".split()  # of what a start stores, shares, notes


def in_fast_suite(names):
    marks = {n: () if n in names else pytest.mark.slow for n in NAMES}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=mark) for n, mark in marks.items()])


every_method, every_kind = pytest.mark.parametrize("name", NAMES), in_fast_suite(KINDS)


pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


def config(name="pissa", target_modules=LINEARS, r=8, **more) -> InlayConfig:
    """Of any method; `r` is its size, whatever the method calls that."""
    size = next(f.name for f in fields(methods.find(name)) if f.name in ("r", "bond"))
    return InlayConfig(method=name, args={size: r}, target_modules=target_modules, **more)


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


def difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def wander(model: nn.Module, size: float = 0.05) -> None:
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and PREFIX in n:
                p.add_(torch.randn_like(p), alpha=size)


def layers_of(model: nn.Module) -> dict[str, InlayLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, InlayLinear)}


def adapted_names(model: nn.Module) -> set[str]:
    """Short names of the adapted layers."""
    return {n.split("model.")[-1] for n in layers_of(model)}


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def saved_original(llama_original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(llama_original), config())
    wander(model)
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture
def saved(saved_original, tmp_path):
    """A trained adapter on disk, and what its model answers."""
    folder, answer = saved_original
    return Path(shutil.copytree(folder, tmp_path, dirs_exist_ok=True)), answer


# Entrances


@every_method
def test_get_peft_model_and_from_pretrained(name, llama_original, tmp_path):
    base = logits(llama_original)
    model = get_peft_model(copy.deepcopy(llama_original), config(name, "all-linear", task_type="CAUSAL_LM"))
    assert difference(logits(model), base) == 0
    wander(model)
    trained = logits(model)
    assert difference(trained, base) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(loaded), trained)
    assert not trainable(loaded)
    assert adapted_names(loaded) == adapted_names(model)


def test_the_two_spellings_of_a_config_are_the_same():
    by_name = InlayConfig(method="lora", args={"r": 4, "alpha": 8.0, "dropout": 0.1}, target_modules=["q_proj"])
    by_instance = InlayConfig(method=LoRA(r=4, alpha=8.0, dropout=0.1), target_modules=["q_proj"])
    assert by_name.to_dict() == by_instance.to_dict()
    assert by_name.build() == LoRA(r=4, alpha=8.0, dropout=0.1)
    with pytest.raises(ValueError, match="not in both"):
        InlayConfig(method=LoRA(r=4), args={"alpha": 2}, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="given twice"):
        InlayConfig(method="lora", args={"scale": 2.0}, scale=3.0, target_modules=["q_proj"])


def test_auto_peft_model(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(task_type="CAUSAL_LM"))
    wander(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@every_kind
def test_inject_adapter_in_model(name, llama):
    base = logits(llama)
    model = inject_adapter_in_model(config(name), llama)
    assert model is llama
    assert difference(logits(model), base) == 0
    wander(model)
    assert difference(logits(model), base) > 1e-3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_transformers_own_adapter_calls(llama_original, tmp_path):
    model, base = copy.deepcopy(llama_original), logits(llama_original)
    model.add_adapter(config("pissa"), "first")
    assert difference(logits(model), base) == 0
    wander(model)
    first = logits(model)
    model.add_adapter(config("bat"), "second")
    wander(model)
    second = logits(model)
    assert difference(first, second) > 1e-3
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    model.delete_adapter("first")
    assert torch.equal(logits(model), second)
    loaded = copy.deepcopy(llama_original)
    loaded.load_adapter(str(tmp_path), adapter_name="back")
    assert torch.equal(logits(loaded), first)


def test_auto_model_finds_the_adapter_in_a_folder(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config("milora"))
    wander(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


# Trainers


def arguments(tmp_path, cls=TrainingArguments, **more):
    return cls(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        bf16=False,
        **more,
    )


def check_trained(model: nn.Module, base: Tensor) -> None:
    assert all(PREFIX in n for n in trainable(model))
    assert difference(logits(model), base) > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(120))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("name", ["pissa", "bat_col"])
def test_trainer(name, llama_original, tmp_path):
    base = logits(llama_original)
    data = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(4)]
    model = get_peft_model(copy.deepcopy(llama_original), config(name, task_type="CAUSAL_LM"))
    Trainer(model, arguments(tmp_path), train_dataset=data).train()
    check_trained(model, base)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_takes_the_config(checkpointing, llama_original, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    base = logits(llama_original)
    data = Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7", "w8 w9 w10", "w11 w12"]})
    trainer = SFTTrainer(
        model=copy.deepcopy(llama_original),
        args=arguments(tmp_path, SFTConfig, gradient_checkpointing=checkpointing, max_length=16),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config("bone"),
    )
    trainer.train()
    check_trained(trainer.model, base)
    trainer.save_model(str(tmp_path / "out"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trainer.model))


@pytest.mark.parametrize("name", ["milora", "bat"])
def test_dpo_trainer_takes_the_config(name, llama_original, tokenizer, tmp_path):
    """DPO leaves `disable_adapter` at every step, which turns gradients on for all that PEFT calls an adapter."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base = logits(llama_original)
    data = Dataset.from_dict(
        {"prompt": ["w1 w2", "w3"] * 2, "chosen": [" w4 w5", " w6"] * 2, "rejected": [" w7", " w8 w9"] * 2}
    )
    trainer = DPOTrainer(
        model=copy.deepcopy(llama_original),
        args=arguments(tmp_path, DPOConfig, max_length=16),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config(name),
    )
    trainer.train()
    check_trained(trainer.model, base)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are the same model at the start


def test_a_checkpoint_of_the_trainer_resumes(llama_original, tmp_path):
    data = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(8)]
    results = []
    for resume in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(llama_original), config("pissa", task_type="CAUSAL_LM"))
        args = arguments(tmp_path)
        args.max_steps, args.save_strategy, args.save_steps = 4, "steps", 2
        trainer = Trainer(model, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        results.append(logits(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# Which modules


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"target_modules": {"q_proj"}}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*\.(up|down)_proj"}, {"layers.1.mlp.up_proj", "layers.1.mlp.down_proj"}),
        ({"target_modules": ["model.layers.0.mlp.up_proj"]}, {"layers.0.mlp.up_proj"}),
        (
            {"target_modules": ["up_proj", "v_proj"], "layers_to_transform": 1},
            {"layers.1.self_attn.v_proj", "layers.1.mlp.up_proj"},
        ),
        (
            {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            {"layers.0.self_attn.v_proj"},
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, {"layers.1.self_attn.q_proj"}),
        ({"target_modules": ["lm_head"]}, {"lm_head"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_target_modules(more, expected, llama):
    model = get_peft_model(llama, InlayConfig(**more))
    assert adapted_names(model) == expected


def test_all_linear_is_every_linear_layer_but_the_head(llama):
    model = get_peft_model(llama, config("bone", "all-linear"))
    assert {n.rpartition(".")[2] for n in layers_of(model)} == set(LINEARS)
    assert len(layers_of(model)) == 14


def test_defaults_for_a_known_model(llama):
    """Without target_modules PEFT's table for the model type is used."""
    model = get_peft_model(llama, InlayConfig())
    assert {n.rpartition(".")[2] for n in layers_of(model)} == {"q_proj", "v_proj"}


def test_the_defaults_work_on_a_small_layer():
    net, x = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 2)), torch.randn(3, 10)
    before = net(x)
    model = get_peft_model(net, InlayConfig(target_modules=["0"]))
    assert torch.equal(model(x), before)


@every_method
def test_init_weights_false_starts_away_from_the_base(name, llama):
    base = logits(llama)
    assert difference(logits(get_peft_model(llama, config(name, init_weights=False))), base) > 1e-4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"target_modules": ["q_poj"]}, "q_poj"),
        ({"target_modules": ["q_proj", "q_poj"]}, "q_poj"),
        ({"target_modules": r".*\.q_poj"}, "q_poj"),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["q_proj"]}, "'q_proj' matches no module"),
        ({"target_modules": ["q_proj"], "patterns": {"k_proj": {"r": 4}}}, "k_proj"),
        ({"target_modules": ["q_proj"], "patterns": {"(": {"r": 4}}}, "regular expression"),
        ({"target_modules": ["q_proj"], "patterns": {"q_proj": {"rank": 4}}}, "rank"),
        ({"target_modules": ["q_proj"], "bias": "some"}, "'some' is not one of none, all, inlay_only"),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts"]}, "target_parameters"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "q_proj"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_the_model_is_left_alone(more, words, llama):
    modules = dict(llama.named_modules())
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        get_peft_model(llama, InlayConfig(method="bone", args={"r": 8}, **more))
    assert dict(llama.named_modules()) == modules


def test_patterns_give_modules_their_own_hyperparameters(llama, tmp_path):
    base = copy.deepcopy(llama)
    patterns = {r"layers\.1\.self_attn\.q_proj": {"r": 2}, "q_proj": {"r": 4, "scale": 0.5}, "mlp.*": {"dropout": 0.1}}
    model = get_peft_model(llama, config("lora", LINEARS, patterns=patterns))
    found = {n.split("layers.")[-1]: layer.cuts["default"].method for n, layer in layers_of(model).items()}
    assert found["0.self_attn.q_proj"] == LoRA(r=4, scale=0.5)
    assert found["1.self_attn.q_proj"] == LoRA(r=2)
    assert found["0.self_attn.k_proj"] == LoRA(r=8)
    assert found["1.mlp.up_proj"] == LoRA(r=8, dropout=0.1)
    wander(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    again = {n.split("layers.")[-1]: layer.cuts["default"].method for n, layer in layers_of(loaded).items()}
    assert again == found


def test_modules_to_save(llama_original, tmp_path):
    model = get_peft_model(copy.deepcopy(llama_original), config("pissa", ["q_proj"], modules_to_save=["lm_head"]))
    head = {n for n in trainable(model) if PREFIX not in n}
    assert len(head) == 1
    assert "lm_head.modules_to_save" in next(iter(head))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    wander(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("bias", "expected"), [("none", set()), ("inlay_only", {"0"}), ("all", {"0", "1"})])
def test_bias_options(bias, expected, tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    fresh, x = copy.deepcopy(net), torch.randn(3, 16)
    model = get_peft_model(net, config("bone", ["0"], bias=bias))
    trained = {n for n in trainable(model) if "bias" in n}
    assert {n.split("model.")[-1][0] for n in trained} == expected
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trained:
                p.add_(1.0)
    wander(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_trainable_token_indices(llama_original, tmp_path):
    model = get_peft_model(copy.deepcopy(llama_original), config("bone", ["q_proj"], trainable_token_indices=[3, 5]))
    assert any("token_adapter" in n for n in trainable(model))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    untouched = torch.full((1, 4), 9)
    assert difference(logits(model), logits(llama_original)) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, untouched), logits(llama_original, untouched))


# Layers that are not nn.Linear


@every_method
def test_gpt2_with_conv1d(name, gpt2_original, tmp_path):
    targets = ["c_attn", "c_fc", "c_proj"]
    base, model = logits(gpt2_original), get_peft_model(copy.deepcopy(gpt2_original), config(name, targets))
    assert difference(logits(model), base) == 0
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        adam.step()
    trained = logits(model)
    assert difference(trained, base) > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(gpt2_original), tmp_path)), trained)
    model.merge_adapter()
    assert difference(logits(model), trained) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    assert difference(logits(model.merge_and_unload()), trained) < 1e-4


class Mixed(nn.Module):
    """Layers we adapt between layers we do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.embed, self.last = (
            nn.Linear(16, 16), nn.Conv2d(1, 1, 3), nn.Embedding(8, 16), nn.Linear(16, 16)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize(("target", "kind"), [("conv", "Conv2d"), ("embed", "Embedding")])
def test_an_unsupported_module_is_refused_and_the_model_left_unwrapped(target, kind):
    net = Mixed()
    with pytest.raises(ValueError, match=f"{target} is a {kind}, which Inlay does not adapt"):
        get_peft_model(net, config("bone", ["first", target, "last"]))
    assert [type(m) for m in net.children()] == [nn.Linear, nn.Conv2d, nn.Embedding, nn.Linear]


@pytest.mark.parametrize(
    "broken",
    [
        config("bone", ["last", "first", "conv"]),
        config("bone", ["last", "first", "nothing"]),
        config("bat", ["last", "first"], r=5),
        config("lora", ["last", "first"], patterns={"first": {"r": 17}}),
    ],
    ids=["unsupported", "no match", "no fit", "no fit by pattern"],
)
def test_a_second_adapter_that_fails_leaves_the_first_as_it_was(broken):
    model, x = get_peft_model(Mixed(), config("pissa", ["first", "last"])), torch.randn(3, 16)
    wander(model)
    before, names, trained = model(x), set(model.state_dict()), trainable(model)
    with pytest.raises(ValueError, match=r"."):
        model.add_adapter("second", broken)
    assert set(model.state_dict()) == names
    assert trainable(model) == trained
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x), before)
    model.add_adapter("second", config("bone", ["first", "last"]))
    model.set_adapter("default")
    assert torch.equal(model(x), before)


# The type and its config


def test_the_type_is_a_real_member_of_pefts_enum():
    member = PeftType.INLAY
    assert PeftType("INLAY") is PeftType["INLAY"] is member
    assert isinstance(member, PeftType)
    assert (member.value, member.name, str.__str__(member)) == ("INLAY", "INLAY", "INLAY")
    assert member in list(PeftType)
    assert member == "INLAY"
    assert InlayConfig().peft_type is member


def test_reloading_the_module_changes_nothing():
    code = """
import importlib, inlay, peft, torch
member, count = peft.PeftType.INLAY, len(peft.PeftType)
module = importlib.reload(inlay.host.tuner)
importlib.reload(inlay)
assert peft.PeftType.INLAY is member and len(peft.PeftType) == count
net = torch.nn.Sequential(torch.nn.Linear(16, 16))
model = peft.get_peft_model(net, module.InlayConfig(method="bone", args={"r": 8}, target_modules=["0"]))
assert type(model.base_model) is module.InlayModel
print("fine")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr[-2000:]


def test_a_config_survives_json(tmp_path):
    original = InlayConfig(
        method=MiLoRA(r=4, side="middle", scale=0.5, dropout=0.1),
        patterns={"k_proj": {"r": 2}},
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["lm_head"],
        layers_to_transform=[0],
        task_type="CAUSAL_LM",
    )
    original.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "INLAY"
    assert (stored["method"], stored["args"], stored["format_version"]) == ("milora", {"r": 4, "side": "middle"}, 1)
    for cls in (PeftConfig, InlayConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is InlayConfig
        same = {"format_version": None, "inference_mode": None, "peft_version": None, "auto_mapping": None}
        assert {**loaded.to_dict(), **same} == {**original.to_dict(), **same}
        assert loaded.build("k_proj") == MiLoRA(r=2, side="middle", scale=0.5, dropout=0.1)


@every_kind
def test_a_config_from_a_checkpoint_starts_a_fresh_adapter(name, llama_original, tmp_path):
    """The config says that it was loaded, but no tensors follow: the start must be computed, not left empty."""
    model = get_peft_model(copy.deepcopy(llama_original), config(name))
    wander(model)
    model.save_pretrained(tmp_path)
    reused = InlayConfig.from_pretrained(tmp_path)
    reused.inference_mode = False
    fresh, base = get_peft_model(copy.deepcopy(llama_original), reused), logits(llama_original)
    assert difference(logits(fresh), base) == 0
    adam = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-2)
    fresh(TOKENS, labels=TOKENS).loss.backward()
    adam.step()
    assert all(v.isfinite().all() for v in fresh.state_dict().values())
    assert difference(logits(fresh), base) > 1e-4


@every_kind
def test_a_fresh_adapter_of_a_loaded_config_can_be_saved_or_merged_at_once(name, llama_original, tmp_path):
    get_peft_model(copy.deepcopy(llama_original), config(name)).save_pretrained(tmp_path / "one")
    reused = InlayConfig.from_pretrained(tmp_path / "one")
    fresh = get_peft_model(copy.deepcopy(llama_original), reused)
    fresh.save_pretrained(tmp_path / "two")
    stored = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert all(v.isfinite().all() for v in stored.values())
    merged = get_peft_model(copy.deepcopy(llama_original), InlayConfig.from_pretrained(tmp_path / "one"))
    assert torch.equal(logits(merged.merge_and_unload()), logits(llama_original))


# What must not be trained


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """ΔW = diag(d) C with a constant C: the smallest method with a symbol that is kept and never trained."""

    name = "toy"
    title = equation = paper = trains = "a toy"
    frozen = frozenset({"C"})
    zero_init = True

    def start(self, W, stats=None):
        return {"C": torch.randn_like(W), "d": torch.zeros(W.shape[0], device=W.device)}

    def delta(self, p, W):
        return p["d"][:, None] * p["C"]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Toy))
    return InlayConfig(method="toy", target_modules=LINEARS)


def test_constant_symbols_stay_constant_whatever_peft_switches(toy, llama):
    base = logits(llama)
    model = get_peft_model(llama, toy)
    model.add_adapter("other", config("pissa"))
    model.set_adapter("other")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.base_model.set_requires_grad("default", True)
    assert {n.split(PREFIX)[1] for n in trainable(model)} == {"d.default.weight"}
    constant = {n: b.clone() for n, b in model.named_buffers() if ".inlay_C." in n or START in n}
    assert len(constant) == 14 * 3
    assert not any(".inlay_C." in n for n, _ in model.named_parameters())
    assert difference(logits(model), base) == 0
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        adam.step()
    assert difference(logits(model), base) > 1e-4
    assert all(torch.equal(b, constant[n]) for n, b in model.named_buffers() if n in constant)


def test_constant_symbols_are_saved_and_loaded(toy, llama_original, tmp_path):
    model = get_peft_model(copy.deepcopy(llama_original), toy)
    wander(model)
    assert sum(".inlay_C." in n for n in model.state_dict()) == 14
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_the_stored_start_is_a_buffer_that_is_saved(llama):
    model = get_peft_model(llama, config("pissa"))
    buffers = {n for n, _ in model.named_buffers() if START in n}
    assert len(buffers) == 14 * 2
    assert buffers <= set(model.state_dict())
    assert len([n for n in peft.get_peft_model_state_dict(model) if START in n]) == 14 * 2


# Hot swap


@pytest.mark.parametrize("left", [["down_proj"], ["layers.0.mlp.down_proj"], r".*layers\.0\..*"])
def test_what_is_left_out_of_all_linear_layers_is_left_out_again(left, llama_original, tmp_path):
    config = InlayConfig(args={"r": 4}, target_modules="all-linear", exclude_modules=left)
    model = get_peft_model(copy.deepcopy(llama_original), config)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_original), str(tmp_path))
    names = [{n for n, m in each.named_modules() if isinstance(m, InlayLinear)} for each in (model, loaded)]
    assert names[0] == names[1]
    assert not any("layers.0.mlp.down_proj" in name for name in names[0])


def test_hotswap_of_adapters_with_the_same_hyperparameters(llama_original, tmp_path):
    answers = []
    for i in range(2):
        model = get_peft_model(copy.deepcopy(llama_original), config("milora"))
        wander(model)
        model.save_pretrained(tmp_path / str(i))
        answers.append(logits(model))
    model = PeftModel.from_pretrained(copy.deepcopy(llama_original), tmp_path / "0")
    assert torch.equal(logits(model), answers[0])
    for i in (1, 0):
        hotswap_adapter(model, str(tmp_path / str(i)), adapter_name="default")
        assert torch.equal(logits(model), answers[i])


@pytest.mark.parametrize(
    "other",
    [
        config("lora"),
        config("pissa", r=4),
        config("pissa", scale=0.5),
        config("pissa", patterns={"q_proj": {"r": 2}}),
    ],
    ids=["method", "args", "scale", "patterns"],
)
def test_hotswap_refuses_other_hyperparameters(other, llama_original, saved, tmp_path):
    path, answer = saved
    get_peft_model(copy.deepcopy(llama_original), other).save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(copy.deepcopy(llama_original), path)
    with pytest.raises(ValueError, match="incompatible"):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default")
    assert torch.equal(logits(model), answer)


# Broken checkpoints


def drop_one(state, _):
    del state[min(state)]
    return r"is missing"


def drop_half(state, _):
    for key in sorted(state)[::2]:
        del state[key]
    return r"is missing.*and \d+ more"


def drop_every_start(state, _):
    for key in list(state):
        if START in key:
            del state[key]
    return r"inlay_start_A.*is missing"


def drop_all(state, _):
    keep_one = max(state)
    for key in list(state):
        if key != keep_one:
            del state[key]
    return r"is missing"


def add_one(state, _):
    state["base_model.model.model.layers.7.mlp.up_proj.inlay_A.weight"] = torch.zeros(8, 64)
    return r"layers\.7.*belongs to no module"


def misshape(state, _):
    key = min(k for k in state if "inlay_A" in k)
    state[key] = state[key][:4].contiguous()
    return r"has shape \(4, \d+\), not \(8, \d+\)"


def transpose(state, _):
    key = min(k for k in state if "q_proj.inlay_A" in k)
    state[key] = state[key].T.contiguous()
    return r"has shape \(64, 8\), not \(8, 64\)"


def put_nan(state, _):
    state[min(state)].view(-1)[0] = float("nan")
    return r"NaN or Inf"


def put_inf(state, _):
    state[max(state)].view(-1)[-1] = float("inf")
    return r"NaN or Inf"


def newer_format(_, settings):
    settings["format_version"] = 2
    return r"format 2.*up to 1.*upgrade"


def other_rank(_, settings):
    settings.pop("hyperparameters", None)  # the digest that would notice the edit first
    settings["args"]["r"] = 4
    return r"has shape"


def other_method(_, settings):
    settings.pop("hyperparameters", None)
    settings["method"], settings["args"] = "bone", {"r": 8}
    return r"missing|belongs to no module"


def unknown_method(_, settings):
    settings.pop("hyperparameters", None)
    settings["method"] = "pizza"
    return r"unknown method 'pizza'; choose one of lora, pissa"


def edited_scale(_, settings):
    settings["scale"] = 2.0
    return r"edited"


def flipped_bit(state, _):
    state[min(state)].view(torch.int32).view(-1)[3] ^= 1
    return r"."


both_ways = pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": True}], ids=["plain", "low memory"])


@both_ways
def test_a_whole_checkpoint_is_not_refused(how, saved, llama_original):
    path, answer = saved
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(llama_original), path, **how)), answer)


@both_ways
@pytest.mark.parametrize(
    "damage",
    [
        drop_one, drop_half, drop_every_start, drop_all, add_one, misshape, transpose, put_nan, put_inf, newer_format,
        other_rank, other_method, unknown_method, edited_scale, flipped_bit,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(damage, how, saved, llama_original):
    path, _ = saved
    weights, settings_file = path / "adapter_model.safetensors", path / "adapter_config.json"
    state, settings = load_file(weights), json.loads(settings_file.read_text())
    message = damage(state, settings)
    save_file(state, weights)
    settings_file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(copy.deepcopy(llama_original), path, **how)


def test_an_adapter_of_another_model_is_refused(saved, gpt2):
    with pytest.raises(ValueError, match="q_proj"):
        PeftModel.from_pretrained(gpt2, saved[0])


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(saved, llama_original):
    other = copy.deepcopy(llama_original)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="up_proj"):
        PeftModel.from_pretrained(other, saved[0])


def test_a_damaged_second_adapter_leaves_the_first_as_it_was(saved, llama_original):
    path, answer = saved
    model = PeftModel.from_pretrained(copy.deepcopy(llama_original), path)
    state = load_file(path / "adapter_model.safetensors")
    del state[min(state)]
    save_file(state, path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is missing"):
        model.load_adapter(path, adapter_name="second")
    assert torch.equal(logits(model), answer)


# Dtypes


@every_method
def test_the_start_survives_a_cast_of_the_parameters(name, llama):
    """TRL casts trainable parameters to bf16 on a quantised base; the stored start stays fp32."""
    base = logits(llama)
    model = get_peft_model(llama, config(name))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    assert difference(logits(model), base) == 0
    model(TOKENS, labels=TOKENS).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@every_kind
def test_autocast_adapter_dtype_false(name, llama_original, tmp_path):
    """ZeRO-3 asks for one dtype; the default keeps fp32 parameters on a bf16 base."""
    base = copy.deepcopy(llama_original).to(torch.bfloat16)
    before = logits(base)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(copy.deepcopy(base), config(name), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert difference(logits(model), before) == 0
        wander(model)
        folder = tmp_path / str(autocast)
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=autocast)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["pissa", "bone", "bat", "bat_col"])
def test_no_layer_keeps_a_copy_of_its_input(name):
    """PEFT casts x to fp32 in every adapted layer of a bf16 model."""
    net = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    model = get_peft_model(net, config(name, ["0"]))
    x = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    copies = {t.data_ptr() for t in kept if t.numel() >= x.numel() and t.data_ptr() != x.data_ptr()}
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert len(copies) <= (name == "bat")  # Bat hands x + t to the base, which may keep it


# Merge, unload, delete


@every_method
def test_merge_and_unload_and_unload(name, llama_original):
    base = logits(llama_original)
    model = get_peft_model(copy.deepcopy(llama_original), config(name))
    wander(model)
    trained = logits(model)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert difference(logits(merged), trained) < 1e-4
    assert set(merged.state_dict()) == set(llama_original.state_dict())
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert all(torch.equal(v, llama_original.state_dict()[k]) for k, v in plain.state_dict().items())


def test_merging_several_adapters_at_once(llama):
    model = get_peft_model(llama, config("pissa"), adapter_name="first")
    model.add_adapter("second", config("bat"))
    model.base_model.set_adapter(["first", "second"])
    wander(model)
    both = logits(model)
    model.merge_adapter(["first", "second"])
    assert difference(logits(model), both) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)


def test_disabling_a_merged_adapter_gives_the_base_back(llama):
    base = logits(llama)
    model = get_peft_model(llama, config("pissa"))
    wander(model)
    trained = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert difference(logits(model), trained) < 1e-4


@every_kind
def test_safe_merge_refuses_nan_and_leaves_the_base_alone(name, llama):
    model = get_peft_model(llama, config(name))
    layer = next(iter(layers_of(model).values()))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        next(p for n, p in layer.named_parameters() if PREFIX in n).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"default.*NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_a_merged_adapter_cannot_be_deleted(llama):
    base = logits(llama)
    model = get_peft_model(llama, config("pissa"), adapter_name="first")
    model.add_adapter("second", config("bone"))
    wander(model)
    model.merge_adapter(["first"])
    with pytest.raises(ValueError, match="first"):
        model.delete_adapter("first")
    model.unmerge_adapter()
    model.set_adapter("second")
    model.delete_adapter("first")
    assert difference(logits(model), base) == 0


def test_an_empty_adapter_says_so():
    """Reading slots that nothing has filled is an error, never NaN."""
    model, x = get_peft_model(Mixed(), config("pissa", ["first"])), torch.randn(3, 16)
    layer = next(iter(layers_of(model).values()))
    with torch.no_grad():
        layer.inlay_A["default"].weight.fill_(float("nan"))
    layer.cuts["default"].pending = True
    with pytest.raises(ValueError, match=r"not loaded whole.*inlay_A\.default"):
        model(x)


def test_a_deep_copy_and_a_pickle_are_independent(llama, tmp_path):
    model = get_peft_model(llama, config("pissa"))
    twin = copy.deepcopy(model)
    before = logits(model)
    wander(twin)
    assert torch.equal(logits(model), before)
    assert difference(logits(twin), before) > 1e-3
    torch.save(twin, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(twin))


def test_extra_positional_and_keyword_arguments_reach_the_base():
    class Scaled(nn.Linear):
        def forward(self, x, factor=1.0, *, shift=0.0):
            return factor * super().forward(x) + shift

    net = nn.Sequential(Scaled(16, 16))
    model, x = get_peft_model(net, config("bone", ["0"])), torch.randn(3, 16)
    layer = model.base_model.model[0]
    assert torch.equal(layer(x, 2.0, shift=1.0), 2 * F.linear(x, net[0].base_layer.weight, net[0].base_layer.bias) + 1)


# The model that comes with the library


@pytest.fixture(scope="module")
def text(real_tokenizer) -> Tensor:
    words = "The weight of a pretrained layer is cut again, and the piece that was taken out is trained."
    return torch.tensor([real_tokenizer(words)["input_ids"]])


@pytest.fixture(scope="module")
def real_bases(real_model, text):
    """The model by dtype, and its logits. Who adapts it unloads it, and finds what others left of it."""
    made = {torch.float32: copy.deepcopy(real_model), torch.bfloat16: copy.deepcopy(real_model).to(torch.bfloat16)}
    return {dtype: (model, logits(model, text)) for dtype, model in made.items()}


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_real_model_starts_exactly(name, dtype, real_bases, text):
    base, before = real_bases[dtype]
    model = get_peft_model(base, InlayConfig(method=name, target_modules=LINEARS, layers_to_transform=[0, 29]))
    assert len(layers_of(model)) == 14
    assert difference(logits(model, text), before) == 0
    model.unload()


@in_fast_suite(FIRST)
def test_a_real_model_merges(name, real_bases, text):
    base, before = real_bases[torch.float32]
    model = get_peft_model(base, InlayConfig(method=name, target_modules=LINEARS, layers_to_transform=[15]))
    wander(model, {"svfit": 0.1, "deep_lora": 0.03}.get(name, 1e-3))
    trained = logits(model, text)
    assert difference(trained, before) > 1e-3
    model.merge_adapter()
    assert difference(logits(model, text), trained) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model, text), trained)
    model.unload()


def test_a_real_model_reloads_bit_equal_in_another_process(real_model, text, tmp_path):
    """All methods on one model, read back by a process with another seed."""
    model = None
    for name in NAMES:
        settings = InlayConfig(method=name, target_modules=LINEARS, layers_to_transform=[15])
        if model is None:
            model = get_peft_model(copy.deepcopy(real_model), settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
        model.set_adapter(name)
        wander(model, 1e-2)
        torch.save((text, logits(model, text)), tmp_path / f"{name}.pt")
    model.save_pretrained(tmp_path)
    code = """
import sys, torch
from peft import PeftModel
from inlay.models.builtin import load_builtin_model
torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(1234)
folder, names = sys.argv[2], sys.argv[3:]
model = load_builtin_model(dtype=torch.float32).eval()
for name in names:
    if name == names[0]:
        model = PeftModel.from_pretrained(model, f"{folder}/{name}", adapter_name=name)
    else:
        model.load_adapter(f"{folder}/{name}", adapter_name=name)
    model.set_adapter(name)
    text, expected = torch.load(f"{folder}/{name}.pt")
    with torch.no_grad():
        print(name, torch.equal(model.eval()(text).logits, expected))
"""
    call = [sys.executable, "-c", code, str(torch.get_num_threads()), str(tmp_path), *NAMES]
    run = subprocess.run(call, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [word for name in NAMES for word in (name, "True")]


# -- what a review found ----------------------------------------------------------------------------------------------


def test_a_tied_head_is_not_merged(llama):
    llama.lm_head.weight = llama.model.embed_tokens.weight
    before = llama.model.embed_tokens.weight.clone()
    model = get_peft_model(llama, InlayConfig(args={"r": 4}, target_modules=["lm_head"]))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="shares its weight with another module"):
            merge()
    assert torch.equal(llama.model.embed_tokens.weight, before)


def test_multihead_attention_is_refused():
    net = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="reads this weight past its layer"):
        get_peft_model(net, InlayConfig(args={"r": 2}, target_modules=["out_proj"]))
    assert type(net[0].out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_a_merge_survives_a_change_of_dtype(llama):
    model = get_peft_model(llama, InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"]))
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert model(torch.arange(8)[None]).logits.dtype == torch.float64


def test_an_unmerged_adapter_counts_beside_a_merged_one(llama):
    def config():
        return InlayConfig(args={"r": 4}, target_modules=["q_proj"], init_weights=False)

    model = get_peft_model(llama, config(), adapter_name="one")
    model.add_adapter("two", config())
    model.base_model.set_adapter(["one", "two"])
    both = model(torch.arange(8)[None]).logits
    model.merge_adapter(adapter_names=["one"])
    torch.testing.assert_close(model(torch.arange(8)[None]).logits, both)


def test_a_name_used_twice_replaces_the_adapter(llama):
    get_peft_model(llama, InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="second time|peft_config"):
        model = get_peft_model(llama, InlayConfig(method="bone", args={"r": 4}, target_modules=["q_proj"]))
    assert all("inlay_D" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not [name for name in model.state_dict() if "inlay_A" in name or "inlay_start" in name]


@pytest.mark.parametrize("name", ["a.b", "keys", "items"])
def test_impossible_adapter_names_are_refused(llama, name):
    with pytest.raises(ValueError, match="cannot be called"):
        get_peft_model(llama, InlayConfig(args={"r": 4}, target_modules=["q_proj"]), adapter_name=name)


def test_a_reference_adapter_of_a_reused_config_is_filled(llama, tmp_path):
    """trl's DPO adds a second adapter under the config of the first, which may not have run yet."""
    first = InlayConfig(method="pissa", args={"r": 4}, target_modules=["q_proj"])
    get_peft_model(copy.deepcopy(llama), first).save_pretrained(str(tmp_path))
    model = get_peft_model(llama, InlayConfig.from_pretrained(str(tmp_path)))
    model.add_adapter("ref", model.peft_config["default"])
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


def test_every_hyperparameter_is_stored(llama, tmp_path):
    config = InlayConfig(method="milora", target_modules=["q_proj"])
    get_peft_model(llama, config).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["args"] == {"r": 8, "side": "minor"}


def test_trained_tokens_merge_and_unload(llama):
    config = InlayConfig(method="bone", args={"r": 4}, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = get_peft_model(llama, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected)
