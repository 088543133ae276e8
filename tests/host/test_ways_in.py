"""Adapters enter a model through PEFT, transformers and trl, and train there."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from sizes import DEPARTS
from small_models import (
    TOKENS,
    adapted_names,
    config,
    difference,
    every_kind,
    every_method,
    logits,
    trainable,
    wander,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from inlay.host.config import InlayConfig
from inlay.host.layer import PREFIX
from inlay.methods.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


@every_method
def test_get_peft_model_and_from_pretrained(name, llama_original, tmp_path):
    base = logits(llama_original)
    model = get_peft_model(copy.deepcopy(llama_original), config(name, "all-linear", task_type="CAUSAL_LM"))
    assert (difference(logits(model), base) == 0) != (name in DEPARTS)
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
