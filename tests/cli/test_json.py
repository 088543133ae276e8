"""`--json`: one document on stdout, whatever else is said on stderr; and recipes from an address."""

import hashlib
import io
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import fails
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from inlay import InlayConfig, methods
from inlay.cli import main
from inlay.files.untrusted import LENGTH


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = InlayConfig(method=methods.LoRA(r=2), target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("adapter") / "a"
    model.save_pretrained(folder)
    return str(folder)


def document(capsys, *arguments: str):
    """What a command prints on stdout, which is one JSON document, and what on stderr."""
    main([*arguments, "--json"])
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_methods_as_json(tiny, capsys):
    found, _ = document(capsys, "methods", "--model", tiny, "--r", "4")
    rows = {row["name"]: row for row in found["methods"]}
    assert list(rows) == [method.name for method in methods.METHODS]
    assert rows["lora"]["parameters"] == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert rows["pissa"]["paper"] == methods.PiSSA.paper


def test_inspect_as_json(tiny, adapter, tmp_path, capsys):
    found, said = document(capsys, "inspect", adapter, "--output", str(tmp_path / "changes"))
    assert "written to" in said
    assert found == json.loads((tmp_path / "changes" / "changes.json").read_text())
    found, _ = document(capsys, "inspect", tiny, "--r", "2", "--target-modules", "q_proj")
    assert (found["model"], found["r"]) == (tiny, 2)
    found, _ = document(capsys, "inspect", tiny, "--joint")
    assert found["model"] == tiny


def test_eval_as_json(tiny, adapter, records, tmp_path, capsys):
    output = ["--output", str(tmp_path / "eval"), "--limit", "2", "--tokens", "2"]
    found, said = document(capsys, "eval", adapter, "--task", "exact", "--data", records, *output)
    assert found["folder"] == str(tmp_path / "eval")
    assert "written to" in said
    assert (found["base"], found["differences"]) == ([], {})
    assert [score["name"] for score in found["scores"]] == ["exact match"]
    (written,) = (tmp_path / "eval").glob("*.json")
    assert found["scores"] == json.loads(written.read_text())["figures"]


def test_plan_as_json(tiny, capsys):
    found, _ = document(capsys, "plan", tiny, "--method", "lora", "--r", "2", "--length", "16", "--device", "cpu")
    assert {row["method"] for row in found} >= {"lora"}


ADDRESS = "https://example.org/recipes/mine.yaml"


def answering(monkeypatch, content: bytes, url: str = ADDRESS) -> None:
    def urlopen(asked, timeout):
        answer = io.BytesIO(content)
        answer.url = url  # type: ignore[attr-defined]
        return answer

    monkeypatch.setattr("inlay.files.fetched.urlopen", urlopen)


def test_a_recipe_from_an_address_is_read_when_the_user_says_so(monkeypatch, capsys):
    content = b"steps: 7\nmethod: bone\n"
    answering(monkeypatch, content)
    seen = SimpleNamespace(recipe=None)
    monkeypatch.setattr("inlay.training.train.train", lambda recipe, *_, **__: setattr(seen, "recipe", recipe))
    assert "--from-url" in fails(capsys, "train", ADDRESS)
    main(["train", ADDRESS, "--from-url", "--steps", "9"])
    assert (seen.recipe.method, seen.recipe.steps) == ("bone", 9)
    assert f"sha256 {hashlib.sha256(content).hexdigest()}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "content", "leads_to", "says"),
    [
        ("http://example.org/r.yaml", b"", ADDRESS, "https addresses alone"),
        ("file:///etc/passwd", b"", ADDRESS, "https addresses alone"),
        ("recipe.yaml", b"", ADDRESS, "https addresses alone"),
        (ADDRESS, b"steps: 1", "http://example.org/r.yaml", "which is not https"),
        (ADDRESS, b"#" * (LENGTH + 1), ADDRESS, "more than 1,000,000 bytes"),
        (ADDRESS, b"\xff\xfe", ADDRESS, "no text in UTF-8"),
        (ADDRESS, b"- a list", ADDRESS, "must be a mapping"),
    ],
)
def test_what_is_no_recipe_at_an_address(address, content, leads_to, says, monkeypatch, capsys):
    answering(monkeypatch, content, leads_to)
    assert says in fails(capsys, "train", address, "--from-url")
