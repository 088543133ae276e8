"""What only a GPU can show. `make test-gpu` runs these, and the tests of the mathematics with all tensors on it."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sizes import sized

from inlay.host.config import InlayConfig
from inlay.methods import METHODS
from inlay.methods.dota import DoTA

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning"),  # of these small weights it is large
    pytest.mark.filterwarnings("ignore:inner dimension:UserWarning"),  # bitsandbytes says that it is slow for them
]
every_method = pytest.mark.parametrize("name", [method.name for method in METHODS])
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def config(name: str, **more) -> InlayConfig:
    return InlayConfig(method=name, args=sized(name, 8), target_modules=LINEARS, **more)


def losses(model, ids: torch.Tensor, steps: int = 4) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, found = torch.optim.AdamW(trained, lr=2e-3), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), device="cpu")


@every_method
def test_training_on_a_gpu_is_training_on_a_cpu(name, llama, ids, tmp_path):
    """From one saved start, with the same losses; and what a GPU saved, a CPU loads bit for bit."""
    llama = llama.cpu()
    get_peft_model(copy.deepcopy(llama), config(name)).save_pretrained(str(tmp_path / "start"))
    runs = {}
    for device in ("cpu", "cuda"):
        model = PeftModel.from_pretrained(
            copy.deepcopy(llama).to(device), str(tmp_path / "start"), is_trainable=True, torch_device=device
        )
        runs[device] = losses(model, ids.to(device)), model
    known, found = runs["cpu"][0], runs["cuda"][0]
    assert found == pytest.approx(known, rel=2e-4)
    assert known[0] - known[-1] > 10 * max(abs(a - b) for a, b in zip(known, found, strict=True))
    trained = runs["cuda"][1]
    trained.save_pretrained(str(tmp_path / "end"))
    again = PeftModel.from_pretrained(copy.deepcopy(llama), str(tmp_path / "end"), torch_device="cpu")
    again.save_pretrained(str(tmp_path / "again"))
    both = [load_file(str(tmp_path / folder / "adapter_model.safetensors")) for folder in ("end", "again")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][k], both[1][k]) for k in both[0])
    with torch.no_grad():
        ours, theirs = trained(input_ids=ids.cuda()).logits.cpu(), again(input_ids=ids).logits
        assert torch.allclose(ours, theirs, atol=2e-4)
        merged = trained.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids.cuda()).logits.cpu(), theirs, atol=2e-4)


@every_method
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_narrow_bases(base, name, llama, ids):
    """They start at the model exactly, and learn."""
    if base == "nf4":
        bnb = pytest.importorskip("bitsandbytes")
        for path, module in list(llama.named_modules()):
            if path.endswith(tuple(LINEARS)):
                narrow = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                narrow.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                llama.set_submodule(path, narrow)
        llama.is_loaded_in_4bit = True
    model, ids = llama.to(torch.bfloat16).cuda(), ids.cuda()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model = get_peft_model(model, config(name))
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    found = losses(model, ids, 8)
    assert found[-1] < found[0]
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_the_kernel_changes_nothing(llama, ids, monkeypatch):
    llama, ids = llama.to(torch.bfloat16).cuda(), ids.cuda()
    found = []
    for switch in ("0", "1"):
        monkeypatch.setenv("INLAY_TRITON", switch)
        torch.manual_seed(0)
        found.append(
            losses(
                get_peft_model(copy.deepcopy(llama), InlayConfig(method=DoTA(bond=8), target_modules=LINEARS)),
                ids,
            )
        )
    assert found[0] == pytest.approx(found[1], rel=2e-3)


@every_method
def test_no_second_copy_of_the_weight_stays(name, llama, ids):
    """After a step, beside the model, its adapter and its moments, nothing is left."""
    model, ids = get_peft_model(llama.cuda(), config(name)), ids.cuda()
    losses(model, ids, 1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    losses(model, ids, 3)
    assert torch.cuda.memory_allocated() == before
