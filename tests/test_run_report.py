"""What a run's page shows of its weights, against dense references; and the page in a real browser."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from rich.console import Console

from inlay.host.peft import adapted
from inlay.workbench import changes, train
from inlay.workbench.recipe import Recipe

SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tiny, records, painted, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "milora"
    values = {"steps": 3, "batch_size": 4, "eval_size": 4, "samples": 1, "learning_rate": 1e-2, "dtype": "float32"}
    made = {"method": "milora", "args": {"r": 4}, "patterns": {"k_proj": {"r": 2}}, "max_length": 64}
    with painted():
        train.train(Recipe(model=tiny, data=records, output=str(out), **made, **values), SILENT)
    return out


def test_what_changed_is_what_the_dense_weights_say(folder):
    """‖ΔW‖ / ‖W‖ and its shares in the first and last eighth, from fp64 SVDs of the weights themselves."""
    told = json.loads((folder / "changes.json").read_text())
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder / "adapter"))
    for layer in adapted(model, "default").values():
        found = told[layer.cuts["default"].module]
        W, D = layer.base_layer.weight.double(), layer.get_delta_weight("default").double()
        assert found["size"] == pytest.approx((D.norm() / W.norm()).item(), rel=1e-4)
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        basis, other = (U.T, D) if W.shape[0] <= W.shape[1] else (Vh, D.T)
        part = len(basis) // changes.PART
        for name, rows in (("principal", basis[:part]), ("minor", basis[-part:])):
            assert found[name] == pytest.approx(((rows @ other).norm() / D.norm()).item() ** 2, rel=1e-3)
        assert found["rank"] == (2 if "k_proj" in layer.cuts["default"].module else 4)


def test_a_random_change_has_an_eighth_in_either():
    W, D = torch.randn(64, 256), torch.randn(64, 256)
    assert changes.shares(D, W) == pytest.approx((1 / 8, 1 / 8), abs=0.01)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert changes.shares(U[:, :4] @ Vh[:4], W) == pytest.approx((1, 0), abs=1e-6)
    assert changes.shares((U[:, -4:] @ Vh[-4:]).T, W.T) == pytest.approx((0, 1), abs=1e-6)


def test_the_page_in_a_browser(folder):
    """Dark, on a phone: every picture is there, nothing is asked for or logged, nothing overflows."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 375, "height": 800}, color_scheme="dark")
        heard = []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda asked: heard.append(asked.url) if asked.url.startswith("http") else None)
        page.goto((folder / "report.html").as_uri())
        names = page.evaluate("[...document.images].map(i => i.alt)")
        assert len(names) == 6
        assert len({*names}) == 6
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 300)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        ink = page.evaluate("getComputedStyle(document.body).color")
        assert int(ink.removeprefix("rgb(").split(",")[0]) > 200
        assert heard == []
        chromium.close()


def test_their_runner_finds_our_experiment(tmp_path, monkeypatch, capsys):
    """PEFT's own loader reads what benchmarks/metamath.py writes, by the one type."""
    (tmp_path / "method_comparison" / "MetaMathQA").mkdir(parents=True)
    script = str(Path(__file__).parent.parent / "benchmarks" / "metamath.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "bone", "--write-only"])
    runpy.run_path(script, run_name="__main__")
    made = capsys.readouterr().out.strip()
    config = PeftConfig.from_pretrained(made)
    assert (config.peft_type.value.lower(), config.method, config.args["r"]) == ("inlay", "bone", 32)
    assert Path(made).parent.name == "inlay"
    assert json.loads((Path(made) / "training_params.json").read_text())["optimizer_kwargs"]["lr"] == 1e-4
