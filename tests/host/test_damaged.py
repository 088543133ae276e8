"""Checkpoints that are damaged, or of another model, are refused when they are loaded."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import (
    logits,
)

from inlay.host.layer import START

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


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
    return r"unknown method 'pizza'; did you mean 'pissa'\? Or choose one of lora, pissa"


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
