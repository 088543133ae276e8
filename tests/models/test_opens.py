"""A command opens each file of an adapter, and of a base's configuration, once."""

import builtins
import io
import os
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForSequenceClassification

import inlay
from inlay.evaluation.evaluate_model import evaluate_model
from inlay.host.config import InlayConfig
from inlay.inspection.joint_factors import joint_groups
from inlay.models.base import BaseModel
from inlay.recipe.recipe import Recipe
from inlay.training.dry_run import dry_run
from inlay.training.train import train

# What a library opens by itself each time, and cannot be handed: the most often in one command, and why.
LIBRARIES = {
    "adapter/adapter_model.safetensors": (3, "PEFT reads it whenever it puts an adapter on a model: blank, then real"),
    "base/generation_config.json": (2, "transformers reads it whenever it loads a model that generates"),
    "base/tokenizer_config.json": (
        3,
        "AutoTokenizer reads it to choose a class, and that class reads it twice",
    ),
}


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, Path]:
    """A LoRA of Inlay's, one of PEFT's and a classifier, all of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    where = {"target_modules": ["q_proj", "down_proj"]}
    inlays = InlayConfig(method="pissa", args={"r": 2}, task_type="CAUSAL_LM", **where)
    labels = InlayConfig(method="lora", args={"r": 2}, task_type="SEQ_CLS", modules_to_save=["score"], **where)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    bases = {
        "inlay": (BaseModel(tiny).load(torch.float32), inlays),
        "peft": (BaseModel(tiny).load(torch.float32), LoraConfig(r=2, task_type="CAUSAL_LM", **where)),
        "classifier": (classifier, labels),
    }
    for name, (base, config) in bases.items():
        get_peft_model(base, config).save_pretrained(str(folder / name))
    classifier.config.save_pretrained(str(folder / "classifier"))
    return {name: folder / name for name in bases}


@pytest.fixture
def opened(tiny, folders, monkeypatch) -> Counter:
    """How often each file of the base and of the adapters was opened, by Python or by safetensors."""
    counts: Counter[str] = Counter()

    def watch(real):
        def opening(path, *arguments, **options):
            if isinstance(path, str | os.PathLike):
                for folder, name in ((Path(tiny), "base"), *((folder, "adapter") for folder in folders.values())):
                    if Path(path).resolve().parent == folder.resolve():
                        counts[f"{name}/{Path(path).name}"] += 1
            return real(path, *arguments, **options)

        return opening

    monkeypatch.setattr(builtins, "open", watch(builtins.open))
    monkeypatch.setattr(io, "open", watch(io.open))
    monkeypatch.setattr(safetensors.torch, "safe_open", watch(safetensors.torch.safe_open))
    return counts


COMMANDS = {
    "merge": ("inlay", lambda a, out, data: inlay.merge(a, out)),
    "merge to gguf": ("inlay", lambda a, out, data: inlay.merge(a, out, to="gguf")),
    "merge a classifier": ("classifier", lambda a, out, data: inlay.merge(a, out)),
    "export": ("inlay", lambda a, out, data: inlay.export_lora(a, out)),
    "export to gguf": ("inlay", lambda a, out, data: inlay.export_lora(a, out, to="gguf")),
    "import": ("peft", lambda a, out, data: inlay.import_adapter(a, out)),
    "inspect": ("inlay", lambda a, out, data: inlay.inspect_adapter(a)),
    "inspect PEFT's": ("peft", lambda a, out, data: inlay.inspect_adapter(a)),
    "eval": (
        "inlay",
        lambda a, out, data: evaluate_model(
            str(a), task="perplexity", data=data, limit=2, output=out, base=True, dtype="float32"
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_each_file_of_an_adapter_and_of_its_base_is_opened_once(command, folders, opened, records, tmp_path):
    kind, run = COMMANDS[command]
    run(folders[kind], tmp_path / "out", records)
    known = {"adapter/adapter_config.json", "base/config.json"}
    if kind == "classifier":
        known.add("adapter/config.json")
    assert {name: opened[name] for name in known} == dict.fromkeys(known, 1)
    for name, count in opened.items():
        assert count <= LIBRARIES.get(name, (1,))[0], name


@pytest.mark.parametrize(("run", "saves"), [(dry_run, 0), (train, 2)])
def test_training_opens_the_configuration_of_its_base_once(run, saves, tiny, opened, records, tmp_path):
    recipe = Recipe(
        model=tiny, data=records, method="pissa", args={"r": 2}, steps=1, batch_size=2,
        max_length=64, dtype="float32", output=str(tmp_path / "run"),
    )  # fmt: skip
    run(recipe, Console(quiet=True))
    assert opened["base/config.json"] == 1 + saves  # PEFT reads it whenever it saves: the checkpoint, the adapter
    assert opened["base/tokenizer.json"] == 1


def test_the_spectra_of_a_model_open_its_configuration_once(tiny, opened):
    inlay.inspect(tiny, "lora", 2)
    joint_groups(BaseModel(tiny))
    assert opened["base/config.json"] == 2  # once each


def test_a_base_gives_copies_of_what_it_read(tiny):
    base = BaseModel(tiny)
    base.config().vocab_size = 5
    assert base.config().vocab_size > 5
    assert base.config(num_labels=3).num_labels == 3
    assert base.config().num_labels == 2
    assert base.tokenizer() is base.tokenizer()
