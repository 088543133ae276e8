"""Answers as they grow, and `inlay generate`: pieces, stops, cuts, sampling, a file of prompts."""

import json

import pytest
import torch
from helpers import fails

from inlay.cli import main
from inlay.evaluation.answering import load_answering
from inlay.evaluation.generate import answer
from inlay.evaluation.growing import CANCELLED, CUT, END, STOP, Growing, grow
from inlay.evaluation.sampling import Sampling

CHATS = [[{"role": "user", "content": text}] for text in ("Hello", "What is 3 plus one?", "Tell me of a pub.")]


def pushed(answer: Growing, text: str, tokenizer, ends=()) -> list[str]:
    """The pieces in which a text is handed on, token by token; until the answer ends."""
    pieces: list[str] = []
    answer.written = pieces.append
    for token in tokenizer(text=text)["input_ids"]:
        if answer.push(token, frozenset(ends), tokenizer):
            break
    return pieces


def test_pieces_are_whole_characters_and_make_the_text(small_tokenizer):
    text = "\n Café £20 — 日本語 🍕👩‍🚀 end \n\n"
    one = Growing(1000)
    pieces = pushed(one, text, small_tokenizer)
    assert "".join(pieces) == one.text == text.strip()
    assert len(pieces) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert not one.ended


def test_a_cut_answer_keeps_what_it_has(small_tokenizer):
    ids = small_tokenizer(text="🍕")["input_ids"]
    assert len(ids) > 2
    one = Growing(len(ids) - 1)
    pushed(one, "🍕", small_tokenizer)
    assert (one.ended, one.cut, one.text) == (CUT, True, "\N{REPLACEMENT CHARACTER}")
    one = Growing(1000)
    pushed(one, "one two<|im_end|>three", small_tokenizer, [small_tokenizer.eos_token_id])
    assert (one.ended, one.text) == (END, "one two")
    one = Growing(1000, cancelled=lambda: True)
    pushed(one, "one two", small_tokenizer)
    assert (one.ended, len(one.ids)) == (CANCELLED, 1)


def test_not_even_the_beginning_of_a_stop_text_is_handed_on(small_tokenizer):
    one = Growing(1000, stop=("###", "\nQ:"))
    pieces = pushed(one, "A # b ## c ### d", small_tokenizer)
    assert "".join(pieces) == one.text == "A # b ## c"
    assert one.ended == STOP
    one = Growing(1000, stop=("###", "\nQ:"))
    assert "".join(pushed(one, "A\n\nQ: B", small_tokenizer)) == "A"


def test_a_batch_grows_to_the_answers_of_each_alone(tiny):
    source = load_answering(None, tiny, torch.float32)
    prompts = list(map(source.prompt, [{"prompt": chat} for chat in CHATS]))
    some = [Growing(most) for most in (5, 9, 2)]
    grow(source.model, source.tokenizer, prompts, some)
    for chat, one in zip(CHATS, some, strict=True):
        assert one.text == answer(source.model, source.tokenizer, [chat], one.most)[0]
        assert one.cut == (len(one.ids) == one.most)


def test_draws_repeat_with_their_seed(tiny):
    source = load_answering(None, tiny, torch.float32)

    def drawn(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=seed)
        sampling.start()
        return source.ask({"prompt": CHATS[0]}, 12, sampling).text

    assert drawn(1) == drawn(1) != drawn(2)
    assert Sampling(top_p=0.5, top_k=3, repetition_penalty=1.2).options == {
        "do_sample": False, "repetition_penalty": 1.2
    }  # fmt: skip


def test_generate_writes_as_it_goes_and_says_what_was_cut(tiny, capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr("inlay.cli.evaluate.show_piece", pieces.append)
    main(["generate", "--model", tiny, "--prompt", "Hello", "--tokens", "6", "--dtype", "float32"])
    source = load_answering(None, tiny, torch.float32)
    assert "".join(pieces) == answer(source.model, source.tokenizer, CHATS[:1], 6)[0]
    assert "cut after 6 tokens; --tokens" in capsys.readouterr().err


def test_a_file_of_prompts_becomes_a_file_of_answers(tiny, tmp_path, capsys):
    rows = [
        {"prompt": "Hello", "id": 7},
        {"messages": CHATS[1]},
        {"prompt": CHATS[2], "system": "Be short."},
    ]
    asked, out = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["generate", "--model", tiny, "--prompts", str(asked), "--output", str(out), "--tokens", "5",
                 "--dtype", "float32", "--batch-size", "2"]  # fmt: skip
    main(arguments)
    assert "3 answers" in capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    source = load_answering(None, tiny, torch.float32)
    chats = [CHATS[0], CHATS[1], [{"role": "system", "content": "Be short."}, *CHATS[2]]]
    for row, said, chat in zip(rows, found, chats, strict=True):
        assert said.items() >= row.items()
        assert said["answer"] == answer(source.model, source.tokenizer, [chat], 5)[0]
        assert said["cut"] is (said["tokens"] == 5)
    assert "--overwrite" in fails(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "asked.jsonl"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"question": "x"}', "accepted: prompt (text or messages), or messages"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "ends with an answer"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": "x"', "line 1"),
    ],
)
def test_a_row_that_asks_nothing_is_named(row, says, tiny, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(row)
    output = str(tmp_path / "out.jsonl")
    assert says in fails(capsys, "generate", "--model", tiny, "--prompts", str(asked), "--output", output)


def test_mistakes_of_generate_come_before_the_model(tmp_path, capsys):
    base = ["generate", "--model", str(tmp_path / "no-model")]
    asked = str(tmp_path / "asked.jsonl")
    cases = {
        ("--top-p", "0.9"): "nothing is drawn at temperature 0",
        ("--temperature", "-1"): "temperature is -1.0; accepted: 0 (greedy) to 100",
        ("--temperature", "nan"): "temperature is nan",
        ("--temperature", "1", "--top-p", "2"): "top_p is 2.0",
        ("--prompt", "x", "--prompts", asked): "one of the two",
        ("--prompts", asked): "go together",
        ("--prompts", asked, "--output", str(tmp_path / "no" / "out.jsonl")): "cannot be written",
        ("--prompts", asked, "--output", str(tmp_path / "out.jsonl")): "there is no such file",
    }
    for extra, says in cases.items():
        assert says in fails(capsys, *base, *extra), extra


def test_a_prompt_longer_than_the_model_reads_is_refused(tiny, capsys):
    assert "this model reads 256" in fails(capsys, "generate", "--model", tiny, "--prompt", "pub " * 300)
