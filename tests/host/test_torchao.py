"""torchao's quantised layers as a base: the offset form is exact on them, whatever they store."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from sizes import DEPARTS, sized
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TorchAoConfig

from inlay.host.config import InlayConfig
from inlay.methods import METHODS

quantization = pytest.importorskip("torchao.quantization")

ARGS = {m.name: sized(m.name, 16) for m in METHODS if not m.needs}
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def folder(llama_original, tmp_path_factory) -> str:
    there = tmp_path_factory.mktemp("llama")
    llama_original.save_pretrained(there)
    return str(there)


def load(folder: str) -> LlamaForCausalLM:
    kind = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=kind).eval()


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("method", sorted(ARGS))
def test_a_base_in_torchaos_int8(method, folder, tmp_path):
    """Exact start, training, exact disable, reload to the same model."""
    config = InlayConfig(method=method, args=ARGS[method], target_modules=["q_proj", "down_proj"])
    if method.startswith("bat"):
        config.target_modules = {"q_proj"}
    before = load(folder)(IDS).logits
    model = get_peft_model(load(folder), config)
    assert torch.equal(model(IDS).logits, before) != (method in DEPARTS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model.eval()(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(PeftModel.from_pretrained(load(folder), str(tmp_path)).eval()(IDS).logits, trained)
