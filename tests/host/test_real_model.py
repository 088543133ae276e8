"""The built-in model: exact starts, merges, and a reload in another process."""

import copy
import subprocess
import sys

import pytest
import torch
from contract import BY_NAME
from peft import get_peft_model
from sizes import DEPARTS
from small_models import (
    FIRST,
    KINDS,
    LINEARS,
    NAMES,
    difference,
    in_fast_suite,
    layers_of,
    logits,
    wander,
)
from torch import Tensor

from inlay.host.config import InlayConfig

pytestmark = pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of these small weights it is large


@pytest.fixture(scope="module")
def text(real_tokenizer) -> Tensor:
    words = "The weight of a pretrained layer is cut again, and the piece that was taken out is trained."
    return torch.tensor([real_tokenizer(words)["input_ids"]])


@pytest.fixture(scope="module")
def real_bases(real_model, text):
    """The model by dtype, and its logits. Who adapts it unloads it, and finds what others left of it."""
    made = {torch.float32: copy.deepcopy(real_model), torch.bfloat16: copy.deepcopy(real_model).to(torch.bfloat16)}
    return {dtype: (model, logits(model, text)) for dtype, model in made.items()}


@in_fast_suite(FIRST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_real_model_starts_exactly(name, dtype, real_bases, text):
    base, before = real_bases[dtype]
    model = get_peft_model(base, InlayConfig(method=name, target_modules=LINEARS, layers_to_transform=[0, 29]))
    assert len(layers_of(model)) == 14
    assert (difference(logits(model, text), before) == 0) != (name in DEPARTS)
    model.unload()


@in_fast_suite(FIRST)
def test_a_real_model_merges(name, real_bases, text):
    base, before = real_bases[torch.float32]
    model = get_peft_model(base, InlayConfig(method=name, target_modules=LINEARS, layers_to_transform=[15]))
    wander(model, BY_NAME[name].stride)
    trained = logits(model, text)
    assert difference(trained, before) > 1e-3
    model.merge_adapter()
    assert difference(logits(model, text), trained) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model, text), trained)
    model.unload()


@pytest.mark.parametrize("names", [KINDS, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["kinds", "all"])
def test_a_real_model_reloads_bit_equal_in_another_process(names, real_model, text, tmp_path):
    """Many methods on one model, read back by a process with another seed."""
    model = None
    for name in names:
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
    call = [sys.executable, "-c", code, str(torch.get_num_threads()), str(tmp_path), *names]
    run = subprocess.run(call, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [word for name in names for word in (name, "True")]
