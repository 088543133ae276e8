"""Reading answers, asking in batches, and how sure a figure is."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from inlay.cli import main
from inlay.data.render import render
from inlay.evaluation.ask_model import likeliest, token_losses
from inlay.evaluation.eval_tasks import Question, choice, find_eval_task, last_number, questions_for, strict_number
from inlay.evaluation.evaluate import evaluate
from inlay.evaluation.generate import answer
from inlay.evaluation.metric import less_is_better, load_metric, metric_score, metric_title
from inlay.evaluation.scores import Score, overlap_scores, resampled_score, score_difference, share_score
from inlay.evaluation.text_overlap import MEASURES, installed_measures
from inlay.models.base import BaseModel

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("read", "text", "found"),
    [
        (choice, "the correct answer is answer3", "answer3"),
        (choice, "It is not false but true", "false"),
        (choice, "option2 or option1", "option2"),
        (choice, "I do not know", ""),
        (strict_number, "so 4 + 5 = 9 #### 1,234.50", "1234.5"),
        (strict_number, "so it is 9", ""),
        (strict_number, "#### $-7", "-7"),
        (last_number, "4 and then 1,000 apples.", "1000"),
        (last_number, "she pays $10.50", "10.5"),
        (last_number, "none", ""),
        (last_number, "100", "100"),
        (last_number, "the probability is .5", "0.5"),
        (last_number, "version 1.2.3", "3"),
        (last_number, "he owes -$5", "-5"),
        (last_number, "it takes 10-12 days", "12"),
        (last_number, "down by 7, to -7.", "-7"),
        (strict_number, "#### -$7", "-7"),
        (strict_number, "#### .50", "0.5"),
        (lambda text: choice(text, ("solution1", "solution2")), "It is true that solution2 fits", "solution2"),
    ],
)
def test_reading_answers(read, text, found):
    assert read(text) == found


def test_the_share_has_wilsons_interval():
    """7 of 10: .397 to .892 (Wilson 1927); nothing right has an interval above 0 as well."""
    found = share_score("accuracy", [True] * 7 + [False] * 3)
    assert (found.value, round(found.low, 3), round(found.high, 3), found.count) == (0.7, 0.397, 0.892, 10)
    none = share_score("accuracy", [False] * 10)
    assert none.low == pytest.approx(0)
    assert 0.2 < none.high < 0.3


def test_a_difference_is_paired():
    def difference(first, second):
        figures = (share_score("accuracy", own) for own in (first, second))
        return score_difference(*figures, *([{"accuracy": ok} for ok in own] for own in (first, second)))

    one, two = [False] * 50 + [True] * 50, [True] * 100
    assert difference(one, two).endswith("better")
    assert difference(one, one).endswith("no difference beyond noise")
    assert difference(two, one).startswith("-0.500")
    assert difference([False, False, True], [True] * 3) == "+0.667 (-0.768 to +2.101), no difference beyond noise"
    for count in (1, 2):
        assert "noise is not known" in difference([False] * count, [True] * count)


def test_a_difference_of_what_all_examples_say_together():
    """Both bootstraps draw the same examples, so that what they have in common is no noise."""
    gen = torch.Generator().manual_seed(0)
    one = torch.randn(40, generator=gen, dtype=torch.float64)
    two = one - 0.1 + 0.01 * torch.randn(40, generator=gen, dtype=torch.float64)
    was, now = (
        resampled_score("perplexity", 40, lambda places, own=own: math.exp(own[places].mean())) for own in (one, two)
    )
    found = score_difference(was, now, [], [])
    assert found.endswith("better")  # less is
    assert found.startswith(f"{now.value - was.value:+.3f}")
    assert was.low < now.value  # each by itself says nothing
    assert score_difference(now, was, [], []).endswith("worse")
    assert score_difference(was, was, [], []).endswith("no difference beyond noise")
    few = [resampled_score("perplexity", 1, lambda places, own=own: own) for own in (1.0, 2.0)]
    assert "noise is not known" in score_difference(*few, [], [])
    assert score_difference(Score("mine", 1.0), Score("mine", 2.0), [], []) == ""


def test_losses_in_batches_are_those_one_by_one(tiny):
    """And those written down token by token; a text of several lengths is padded and does not see it."""
    model, tokenizer = BaseModel(tiny).load(torch.float32), BaseModel(tiny).tokenizer()
    model.eval()
    pairs = [("", "a short text"), ("What is it? ", "nothing"), ("", "a text that goes on for rather longer than that")]
    found = token_losses(model, tokenizer, pairs, 3, QUIET)
    for pair, one in zip(pairs, found, strict=True):
        assert token_losses(model, tokenizer, [pair], 1, QUIET)[0] == pytest.approx(one, rel=1e-5)
    before, own = (tokenizer(text=t, add_special_tokens=False)["input_ids"] for t in pairs[1])
    with torch.no_grad():
        logits = log_softmax(model(torch.tensor([before + own])).logits[0], -1)
    known = -sum(logits[len(before) + k - 1, token].item() for k, token in enumerate(own))
    assert found[1] == (pytest.approx(known, rel=1e-5), len(own))


@pytest.mark.parametrize("templated", [False, True])
@pytest.mark.parametrize("around", ["{b} $A", "{b} $A {e}", "$A"])
def test_what_is_asked_begins_with_the_tokens_of_training(around, templated, tiny):
    """With what the tokenizer puts before a text and without its end, which comes after the answer."""
    model, tokenizer = BaseModel(tiny).load(torch.float32), BaseModel(tiny).tokenizer()
    first, end = (tokenizer.convert_ids_to_tokens(i) for i in (1, tokenizer.eos_token_id))
    special = [(first, 1), (end, tokenizer.eos_token_id)]
    made = TemplateProcessing(single=around.format(b=first, e=end), special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = made
    if not templated:
        tokenizer.chat_template = None
    chat, passes = [{"role": "user", "content": "hi"}], []
    example = {"prompt": chat, "completion": [{"role": "assistant", "content": "yo"}]}
    wanted = render(example, tokenizer, None).prompt_ids
    assert (wanted[0] == 1) == (templated or "{b}" in around)
    hook = model.register_forward_pre_hook(lambda *given: passes.append(given[2]["input_ids"]), with_kwargs=True)
    answer(model, tokenizer, [chat], 1)
    token_losses(model, tokenizer, [(chat, "yo"), ("", "yo and more")], 1, QUIET)
    hook.remove()
    whole = [ids[0].tolist() for ids in passes]
    assert whole[0] == wanted
    assert all(any(ids[: len(start)] == start for ids in whole[1:]) for start in (wanted, [1] if "b" in around else []))


def test_the_likeliest_option(tiny):
    model, tokenizer = BaseModel(tiny).load(torch.float32), BaseModel(tiny).tokenizer()
    model.eval()
    asked = [Question([{"role": "user", "content": f"question {i}"}], ["true"], ("true", "false")) for i in range(3)]
    said = likeliest(model, tokenizer, asked, 4, QUIET)
    for question, one in zip(asked, said, strict=True):
        losses = {}
        for option in question.options:
            pair = (question.chat, f"the correct answer is {option}")
            total, count = token_losses(model, tokenizer, [pair], 1, QUIET)[0]
            losses[option] = total / count
        assert one == min(losses, key=losses.get)
    passes = []
    hook = model.register_forward_pre_hook(lambda *given: passes.append(given[2]["input_ids"].shape), with_kwargs=True)
    same = [Question(asked[0].chat, ["answer1"], ("answer1", "answer2", "answer3"))]
    likeliest(model, tokenizer, same, 4, QUIET)
    hook.remove()
    assert [shape[0] for shape in passes] == [1]  # they differ in their last token


def test_options_are_looked_for_before_anything_is_asked():
    with pytest.raises(ValueError, match="row 1 names no options"):
        questions_for(find_eval_task("commonsense"), [{"instruction": "Is it?", "answer": "true"}], "likelihood")


def test_overlaps_with_several_references():
    asked = [
        Question([], ["the cat sat on the mat today", "a cat was on a mat"]),
        Question([], ["hello there my friend"]),
    ]
    bleu, chrf, *_ = overlap_scores(["the cat sat on the mat today", "hello there my friend"], asked)
    assert [bleu.value, chrf.value] == pytest.approx([100, 100])
    assert overlap_scores(["nothing at all like it here", "hello there"], asked)[0].value < 50


def test_rouge_and_nist_by_hand():
    """ROUGE's F = 2PR / (P + R) of the better reference, after stemming; NIST of a text that is its own reference is
    the information of its words, log2 of their number where all differ, for no longer n-gram brings any."""
    pytest.importorskip("rouge_score", reason="inlay[eval] is not installed")
    said, wanted = ["the cats sat"], [["the cat ran away", "dogs"]]
    assert MEASURES["ROUGE-1"][1](said, wanted)([0]) == pytest.approx(100 * 4 / 7)
    assert MEASURES["ROUGE-2"][1](said, wanted)([0]) == pytest.approx(100 * 2 / 5)
    assert MEASURES["ROUGE-L"][1](["sat the cat"], wanted)([0]) == pytest.approx(100 * 4 / 7)
    text = ["The cat sat on a mat."]
    assert MEASURES["NIST"][1](text, [text])([0]) == pytest.approx(math.log2(7))
    assert MEASURES["NIST"][1](["a"], [["a b"]])([0]) == 0


def test_what_is_not_installed(monkeypatch):
    """sacrebleu is needed, the others are left out; the harness is named with its extra."""
    for package in ("nltk", "rouge_score"):
        monkeypatch.setitem(sys.modules, package, None)
    assert list(installed_measures()) == ["BLEU", "chrF"]
    with pytest.raises(ValueError, match=r"metric: NIST needs nltk; pip install 'inlay\[eval\]'"):
        load_metric({"task": "text", "data": "builtin", "limit": 2, "figure": "NIST"})
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"needs sacrebleu; pip install 'inlay\[eval\]'"):
        load_metric({"task": "text", "data": "builtin", "limit": 2, "figure": "BLEU"})
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'inlay\[harness\]'"):
        load_metric({"task": "lm-eval:arc_easy"})


def test_a_metric_of_ones_own_on_the_command_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "one_for_eval.py").write_text("def size(model, tokenizer):\n    return model.num_parameters()\n")
    main(["eval", tiny, "--metric", "one_for_eval:size"])
    told = json.loads((tmp_path / "eval" / "one_for_eval-size.json").read_text())["figures"]
    assert told == [{"name": "one_for_eval:size", "value": BaseModel(tiny).load(torch.float32).num_parameters(),
                     "low": None, "high": None, "count": None}]  # fmt: skip
    assert "one_for_eval:size: " in capsys.readouterr().out


HARNESS = """
task: inlay_capitals
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" Paris", " Rome"]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_yaml_task_of_the_harness_without_a_network(tiny, tmp_path, monkeypatch, capsys):
    """Its accuracy is that of the option whose words have the least loss."""
    pytest.importorskip("lm_eval", reason="inlay[harness] is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = [{"question": f"The capital of {name} is", "label": label} for name, label in (("France", 0), ("Italy", 1))]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "capitals.yaml").write_text(HARNESS.format(data=tmp_path / "d.json"))
    monkeypatch.chdir(tmp_path)
    for path in ("capitals.yaml", "."):
        main(["eval", tiny, "--task", f"lm-eval:{path}", "--dtype", "float32", "--output", "out"])
    assert "inlay_capitals, acc: " in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "lm-eval-capitals-yaml.json").read_text())["figures"]
    model, tokenizer = BaseModel(tiny).load(torch.float32), BaseModel(tiny).tokenizer()
    right = []
    for row in rows:
        losses = token_losses(model.eval(), tokenizer, [(row["question"], o) for o in (" Paris", " Rome")], 2, QUIET)
        right.append(losses[row["label"]][0] == min(losses)[0])
    assert told[0]["value"] == sum(right) / 2
    assert metric_score({"task": "lm-eval:capitals.yaml"}, model, tokenizer) == sum(right) / 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "lm-eval-capitals-yaml.jsonl").read_text().splitlines()]
    assert [bool(row["inlay_capitals, acc"]) for row in rows] == right
    capsys.readouterr()  # the harness's progress
    for name in ("no_such_task", "no/such.yaml"):
        with pytest.raises(SystemExit):
            main(["eval", tiny, "--task", f"lm-eval:{name}"])
        assert capsys.readouterr().err.strip().count("\n") == 0


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
    told = json.loads((tmp_path / "eval" / f"{task}-d.json").read_text())
    assert told["tokens"] == 4
    assert all(math.isfinite(f["value"]) and f["low"] <= f["value"] + 1e-9 for f in told["figures"])
    rows = [json.loads(line) for line in (tmp_path / "eval" / f"{task}-d.jsonl").read_text().splitlines()]
    assert len(rows) == (2 if task == "text" else 3)
    assert "written to eval" in capsys.readouterr().out


def test_scores_of_other_settings_are_never_replaced(tiny, tmp_path, monkeypatch, capsys):
    """Whatever changes the figure: nine evaluations leave eight files, and each repeated leaves no ninth."""
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(map(json.dumps, ROWS["perplexity"]))
    other = tmp_path / "other"
    BaseModel(tiny).load(torch.float32).save_pretrained(other)
    BaseModel(tiny).tokenizer().save_pretrained(other)
    for name in ("d.jsonl", "a/x/d.jsonl", "b/x/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(rows)
    asked = [
        [tiny, "d.jsonl"],
        [tiny, "d.jsonl", "--limit", "2"],
        [tiny, "d.jsonl", "--dtype", "float32"],
        [tiny, "d.jsonl", "--dtype", "bfloat16"],
        [tiny, "d.jsonl", "--batch-size", "1"],
        [tiny, "d.jsonl", "--tokens", "3"],
        [str(other), "d.jsonl"],
        [tiny, "a/x/d.jsonl"],
        [tiny, "b/x/d.jsonl"],  # in a folder of the same name
    ]
    for _ in range(2):
        for model, data, *more in asked:
            main(["eval", model, "--task", "perplexity", "--data", data, *more])
            said = capsys.readouterr().out
            file = Path(said.partition("written to ")[2].strip())
            told = json.loads(file.read_text())
            assert (told["model"], told["data"]) == (model, data)
    files = len(asked) - 1  # one of both dtypes is what is computed in anyway
    assert len([*(tmp_path / "eval").glob("*.json")]) == len([*(tmp_path / "eval").glob("*.jsonl")]) == files
    (tmp_path / "eval" / "perplexity-d.json").write_text("not ours")
    main(["eval", tiny, "--task", "perplexity", "--data", "d.jsonl"])
    assert (tmp_path / "eval" / "perplexity-d.json").read_text() == "not ours"


def test_a_task_as_a_metric_is_its_figure(tiny, tmp_path):
    model, tokenizer = BaseModel(tiny).load(torch.float32), BaseModel(tiny).tokenizer()
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS["gsm8k"] + ROWS["exact"])))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, ROWS["perplexity"])))
    asked = {"task": "perplexity", "data": str(tmp_path / "p.jsonl"), "limit": 2}
    found, _ = evaluate(model, tokenizer, find_eval_task("perplexity"), ROWS["perplexity"][:2])
    assert metric_score(asked, model, tokenizer) == found[0].value
    assert (metric_title(asked), less_is_better(asked)) == ("perplexity", True)
    asked = {"task": "gsm8k", "data": str(tmp_path / "d.jsonl"), "limit": 3, "figure": "flexible", "tokens": 2}
    assert (metric_title(asked), less_is_better(asked)) == ("flexible", False)
    assert 0 <= metric_score(asked, model, tokenizer) <= 1
    for more, why in (
        ({"limit": 4}, "metric: row 4: gsm8k needs"),
        ({"figure": "BLEU"}, "'BLEU' of task gsm8k is not one of strict, flexible"),
        ({"task": "quiz"}, "metric: task 'quiz' is not one of"),
        ({"by": "guess"}, "one of generation, likelihood"),
        ({"taks": "gsm8k"}, "metric has no 'taks'; did you mean 'task'"),
        ({"by": "likelihood"}, "for questions with options"),
    ):
        with pytest.raises(ValueError, match=why):
            load_metric({**asked, **more})
    with pytest.raises(ValueError, match="has no data"):
        load_metric({"task": "gsm8k"})


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
    assert (folder / "commonsense-d-likelihood-base.json").exists()
    first = (folder / "commonsense-d-likelihood.jsonl").read_text()
    main([*ask, "--merged"])
    assert (folder / "commonsense-d-likelihood-merged.jsonl").read_text() == first
    main(["eval", run, "--task", "perplexity", "--data", records, "--base", "--limit", "5", "--dtype", "float32"])
    assert "the adapter, perplexity: " in capsys.readouterr().out
    where = folder / f"perplexity-{Path(records).parent.name}-facts.json"
    about = json.loads(where.read_text())
    told = [about[key] for key in ("limit", "merged", "dtype", "adapter", "model")]
    assert told == [5, False, "float32", str(tmp_path / "run" / "adapter"), run]


@pytest.mark.parametrize("how", ["peft:pissa", "fold"])
def test_the_base_of_an_adapter_that_cut_it_is_loaded_afresh(how, tiny, records, tmp_path, monkeypatch, capsys):
    """With the adapter switched off, what is left of it is a residual, which nobody asks about."""
    monkeypatch.chdir(tmp_path)
    if how == "fold":
        pytest.importorskip("bitsandbytes")
        main(["fold", tiny, "made", "--method", "pissa", "--r", "4"])
    else:
        made = ["train", "--model", tiny, "--data", records, "--method", how, "--args", "{r: 8}", "--steps", "1"]
        main([*made, "--samples", "0", "--learning-rate", "0.01", "--dtype", "float32", "--output", "made"])
    ask = ["--task", "perplexity", "--data", records, "--dtype", "float32", "--output"]
    main(["eval", tiny, *ask, "alone"])
    main(["eval", "made", *ask, "both", "--base"])
    alone, base = (next((tmp_path / name).glob(end)) for name, end in (("alone", "*s.json"), ("both", "*-base.json")))
    assert json.loads(alone.read_text())["figures"] == json.loads(base.read_text())["figures"]
    if how == "fold":
        (tmp_path / "made" / "base" / "folded.json").write_text("{}")
        with pytest.raises(SystemExit):
            main(["eval", "made", *ask, "both", "--base"])
        assert "does not say which model was folded" in capsys.readouterr().err


def test_an_adapter_is_judged_on_the_revision_it_names(tiny, records, tmp_path, monkeypatch):
    main(["train", "--model", tiny, "--data", records, "--r", "4", "--steps", "1", "--samples", "0",
          "--learning-rate", "0.01", "--output", str(tmp_path / "run")])  # fmt: skip
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "revision": "v1"}))
    asked, real = [], AutoModelForCausalLM.from_pretrained

    def noted(*given, **more):
        asked.append((more["revision"], more["trust_remote_code"]))
        return real(*given, **more)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    ask = ["eval", str(tmp_path / "run"), "--task", "perplexity", "--data", records, "--limit", "2"]
    main(ask)
    main([*ask, "--revision", "v2", "--trust-remote-code"])
    assert asked == [("v1", False), ("v2", True)]


def test_a_run_of_full_fine_tuning_is_judged_and_inspected_by_its_folder(tiny, records, tmp_path, capsys):
    run = str(tmp_path / "run")
    made = ["train", "--model", tiny, "--data", records, "--method", "full", "--steps", "1", "--samples", "0"]
    main([*made, "--learning-rate", "0.01", "--output", run])
    main(["eval", run, "--task", "perplexity", "--data", records])
    assert f"written to {run}/eval" in capsys.readouterr().out
    main(["inspect", run, "--r", "4", "--layers", "0", "--target-modules", "q_proj"])
    assert "suggested" in capsys.readouterr().out


def test_texts_of_a_token_have_no_perplexity(tiny, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}')
    with pytest.raises(SystemExit):
        main(["eval", tiny, "--task", "perplexity", "--data", str(tmp_path / "d.jsonl")])
    assert "the texts have a token each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            ["--task", "quiz"],
            "'quiz' is not one of commonsense, gsm8k, exact, text, classification, reward, perplexity",
        ),
        (["--task", "gsm8k"], "row 1: gsm8k needs question"),
        (["--task", "commonsense"], "row 1: commonsense needs instruction and answer"),
        (["--task", "exact", "--by", "likelihood"], "for questions with options"),
        (["--task", "exact", "--base"], "is no adapter"),
        ([], "--task or --metric says what is asked"),
        (["--task", "lm-eval:x"], "brings its own data"),
        (["--task", "exact", "--dtype", "foo"], "invalid choice: 'foo'"),
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
