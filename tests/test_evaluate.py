"""Reading answers, asking in batches, and how sure a figure is."""

import json
import math

import pytest
import torch
from rich.console import Console
from torch.nn.functional import log_softmax

from inlay.cli import main
from inlay.workbench import evaluate, models
from inlay.workbench.evaluate import Question
from inlay.workbench.generate import prompt_text

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("read", "text", "found"),
    [
        (evaluate.choice, "the correct answer is answer3", "answer3"),
        (evaluate.choice, "It is not false but true", "false"),
        (evaluate.choice, "option2 or option1", "option2"),
        (evaluate.choice, "I do not know", ""),
        (evaluate.strict_number, "so 4 + 5 = 9 #### 1,234.50", "1234.5"),
        (evaluate.strict_number, "so it is 9", ""),
        (evaluate.strict_number, "#### $-7", "-7"),
        (evaluate.last_number, "4 and then 1,000 apples.", "1000"),
        (evaluate.last_number, "she pays $10.50", "10.5"),
        (evaluate.last_number, "none", ""),
        (evaluate.last_number, "100", "100"),
    ],
)
def test_reading_answers(read, text, found):
    assert read(text) == found


def test_the_share_has_wilsons_interval():
    """7 of 10: .397 to .892 (Wilson 1927); nothing right has an interval above 0 as well."""
    found = evaluate.share("accuracy", [True] * 7 + [False] * 3)
    assert (found.value, round(found.low, 3), round(found.high, 3), found.count) == (0.7, 0.397, 0.892, 10)
    none = evaluate.share("accuracy", [False] * 10)
    assert none.low == pytest.approx(0)
    assert 0.2 < none.high < 0.3


def test_a_difference_is_paired():
    one, two = [False] * 50 + [True] * 50, [True] * 100
    assert evaluate.difference("accuracy", one, two).endswith("better")
    assert evaluate.difference("accuracy", one, one).endswith("no difference beyond noise")
    assert evaluate.difference("accuracy", two, one).startswith("accuracy: -0.500")


def test_losses_in_batches_are_those_one_by_one(tiny):
    """And those written down token by token; a text of several lengths is padded and does not see it."""
    model, tokenizer = models.load_base(tiny, torch.float32)
    model.eval()
    pairs = [("", "a short text"), ("What is it? ", "nothing"), ("", "a text that goes on for rather longer than that")]
    found = evaluate.losses(model, tokenizer, pairs, 3, QUIET)
    for pair, one in zip(pairs, found, strict=True):
        assert evaluate.losses(model, tokenizer, [pair], 1, QUIET)[0] == pytest.approx(one, rel=1e-5)
    before, own = (tokenizer(text=t, add_special_tokens=False)["input_ids"] for t in pairs[1])
    with torch.no_grad():
        logits = log_softmax(model(torch.tensor([before + own])).logits[0], -1)
    known = -sum(logits[len(before) + k - 1, token].item() for k, token in enumerate(own))
    assert found[1] == (pytest.approx(known, rel=1e-5), len(own))


def test_the_likeliest_option(tiny):
    model, tokenizer = models.load_base(tiny, torch.float32)
    model.eval()
    asked = [Question([{"role": "user", "content": f"question {i}"}], ["true"], ("true", "false")) for i in range(3)]
    said = evaluate.likeliest(model, tokenizer, asked, 4, QUIET)
    for question, one in zip(asked, said, strict=True):
        losses = {}
        for option in question.options:
            pair = (prompt_text(tokenizer, question.chat), f"the correct answer is {option}")
            total, count = evaluate.losses(model, tokenizer, [pair], 1, QUIET)[0]
            losses[option] = total / count
        assert one == min(losses, key=losses.get)
    with pytest.raises(ValueError, match="row 1 names no options"):
        evaluate.likeliest(model, tokenizer, [Question(asked[0].chat, [])], 1, QUIET)


def test_overlaps_with_several_references():
    asked = [
        Question([], ["the cat sat on the mat today", "a cat was on a mat"]),
        Question([], ["hello there my friend"]),
    ]
    bleu, chrf = evaluate.overlaps(["the cat sat on the mat today", "hello there my friend"], asked)
    assert [bleu.value, chrf.value] == pytest.approx([100, 100])
    assert evaluate.overlaps(["nothing at all like it here", "hello there"], asked)[0].value < 50


ROWS = {
    "commonsense": [
        {"instruction": "Is it? Answer format: true/false", "answer": a} for a in ("true", "false", "true")
    ],
    "gsm8k": [{"question": "1 + 1?", "answer": "It is 2. #### 2"}] * 3,
    "exact": [{"prompt": f"say {i}", "completion": str(i)} for i in range(3)],
    "text": [
        {"mr": "name[A]", "ref": "A is a place."},
        {"mr": "name[A]", "ref": "There is A."},
        {"mr": "name[B]", "ref": "B"},
    ],
    "perplexity": [{"text": "To be, or not to be."}, {"text": "x"}, {"text": "that is the question"}],
}


@pytest.mark.parametrize("task", ROWS)
def test_every_task_on_the_command_line(task, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS[task])))
    main(["eval", tiny, "--task", task, "--data", "d.jsonl", "--tokens", "4", "--batch-size", "2"])
    told = json.loads((tmp_path / "eval" / f"{task}.json").read_text())
    assert all(math.isfinite(f["value"]) and f["low"] <= f["value"] + 1e-9 for f in told["figures"])
    rows = [json.loads(line) for line in (tmp_path / "eval" / f"{task}.jsonl").read_text().splitlines()]
    assert len(rows) == (2 if task == "text" else 3)
    assert "written to eval" in capsys.readouterr().out


def test_an_adapter_its_base_and_both_merged(tiny, records, tmp_path, monkeypatch, capsys):
    """The merged model says what the adapter says; the base is compared with it on the same examples."""
    monkeypatch.chdir(tmp_path)
    run = str(tmp_path / "run")
    made = ["train", "--model", tiny, "--data", records, "--method", "bone", "--steps", "2", "--samples", "0"]
    main([*made, "--learning-rate", "0.02", "--dtype", "float32", "--output", run])
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS["commonsense"])))
    ask = ["eval", run, "--task", "commonsense", "--data", "d.jsonl", "--by", "likelihood", "--dtype", "float32"]
    main([*ask, "--base"])
    assert "the adapter, accuracy" in capsys.readouterr().out
    folder = tmp_path / "run" / "eval"
    assert (folder / "commonsense-base.json").exists()
    first = (folder / "commonsense.jsonl").read_text()
    main([*ask, "--merged", "--output", "m"])
    assert (tmp_path / "m" / "commonsense.jsonl").read_text() == first


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--task", "quiz"], "'quiz' is not one of commonsense, gsm8k, exact, text, perplexity"),
        (["--task", "gsm8k"], "row 1: gsm8k needs question"),
        (["--task", "commonsense"], "row 1: commonsense needs instruction and answer"),
        (["--task", "exact", "--by", "likelihood"], "for questions with options"),
        (["--task", "exact", "--base"], "is no adapter"),
    ],
)
def test_bad_requests_are_one_line(more, why, tiny, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(SystemExit) as ended:
        main(["eval", tiny, "--data", str(tmp_path / "d.jsonl"), *more])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert why in said
    assert "\n" not in said
