"""Every method on the built-in model, from the command line: it trains, reloads bit for bit, merges, takes a 4-bit
base."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sizes import sized

from inlay.cli import main
from inlay.host.layer import PREFIX
from inlay.methods import METHODS
from inlay.models.adapters import Adapter

LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
ONE_LAYER = f"--target-modules {LINEARS} --layers-to-transform 29 --batch-size 1 --max-length 128 --eval-size 1"
SHORT = "--samples 0 --save-every 0 --steps 3 --warmup 0"
every_method = pytest.mark.parametrize("method", [m.name for m in METHODS])


def trained(method: str, out: Path, *more: str) -> Path:
    size = [word for key, value in sized(method, 8).items() for word in (f"--{key}", str(value))]
    flags = [
        *ONE_LAYER.split(),
        *SHORT.split(),
        *size,
        "--calibration",
        "2",
        "--dtype",
        "float32",
        "--learning-rate",
        "1e-3",
    ]
    main(["train", "--method", method, "--output", str(out), *flags, *more])
    losses = [
        row["eval_loss"]
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in row
    ]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    return out / "adapter"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@every_method
def test_the_built_in_model_is_trained_reloaded_and_merged(method, real_model, tmp_path, capsys):
    folder, ids = trained(method, tmp_path / "run"), torch.arange(300, 324)[None]
    said = capsys.readouterr().out
    assert "held-out loss after" in said
    model = Adapter.open(folder).attach(copy.deepcopy(real_model)).eval()
    stored = load_file(folder / "adapter_model.safetensors")
    held = {name.replace(".default", ""): t for name, t in model.state_dict().items() if PREFIX in name}
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], stored[name]) for name in stored)
    with torch.no_grad():
        adapted, base = model(ids).logits, real_model(ids).logits
        assert not torch.equal(adapted, base)
        merged = model.merge_and_unload()(ids).logits
    assert (merged - adapted).abs().max() < 1e-3 * max(1.0, (adapted - base).abs().max().item())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning", "ignore:bitsandbytes misreads:UserWarning")
@every_method
def test_the_built_in_model_is_trained_in_4_bits(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = trained(method, tmp_path / "run", "--quantize", "nf4_offset", "--target-modules", "q_proj,down_proj")
    assert all(t.isfinite().all() for t in load_file(folder / "adapter_model.safetensors").values())
