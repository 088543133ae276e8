"""A trained adapter on disk."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from small_models import (
    config,
    logits,
    wander,
)


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
