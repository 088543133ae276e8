"""A run's data out of several sources: what each contributes, what is held out, and what is said of it."""

import io
import json
from collections import Counter

import pytest
from rich.console import Console

from inlay.data.formats import convert_records
from inlay.data.readers import Reading
from inlay.data.streaming import open_stream
from inlay.recipe.reading import from_flag, load_recipe
from inlay.recipe.recipe import Recipe
from inlay.recipe.sources import Source, source_names, sources
from inlay.training.mixture import rules_of, streamed, train_and_heldout, weighted
from inlay.training.tasks import TASKS


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
        return name

    return write


def pairs(name, count, prompt="prompt", answer="completion"):
    return [{prompt: f"{name} {i}", answer: f"say {i}"} for i in range(count)]


def parts_of(recipe):
    """A recipe's training and held-out questions, and what was said of them."""
    said = io.StringIO()
    console = Console(file=said, width=300)
    if recipe.streaming:
        train, held, _ = streamed(recipe, console)
    else:
        train, held = train_and_heldout(recipe, lambda records, rules: convert_records(records, rules=rules), console)
    return [question(row) for row in train], [question(row) for row in held], said.getvalue().splitlines()


def question(row):
    return row["prompt"][-1]["content"]


def fault(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the message
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_source_contributes_by_its_weight_with_its_own_columns_and_system(write):
    write("a.jsonl", pairs("a", 20))
    write("b.jsonl", pairs("b", 20, "frage", "antwort"))
    write("c.jsonl", pairs("c", 20))
    own = {"path": "b.jsonl", "weight": 2.5, "columns": {"prompt": "frage", "answer": "antwort"}, "system": "B."}
    recipe = Recipe(data=["a.jsonl", own, {"path": "c.jsonl", "weight": 0.5}], system="A.", eval_size=6)
    train, held, said = parts_of(recipe)
    counts, rows = Counter(train), Counter(name.split()[0] for name in {*train, *held})
    assert len(held) == 6
    assert not set(train) & set(held)
    kept = {letter: 20 - sum(name.startswith(letter) for name in held) for letter in "abc"}
    assert all(counts[f"a {i}"] == 1 for i in range(20) if f"a {i}" not in held)
    assert sorted(counts[f"b {i}"] for i in range(20) if f"b {i}" not in held) == [2] * (
        kept["b"] - round(kept["b"] / 2)
    ) + [3] * round(kept["b"] / 2)
    assert sum(counts[f"c {i}"] for i in range(20)) == round(kept["c"] / 2)
    assert rows["a"] == rows["b"] == 20
    assert [line.partition(":")[0] for line in said] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    total, own = len(train), round(2.5 * kept["b"])
    assert said[1] == f"b.jsonl: {kept['b']} examples, weight 2.5: {own} of {total} an epoch ({own / total:.0%})"
    assert parts_of(recipe) == (train, held, said)
    given = {one.path: one.system for one in sources(recipe)}
    assert given == {"a.jsonl": "A.", "b.jsonl": "B.", "c.jsonl": "A."}
    assert parts_of(Recipe(**{**vars(recipe), "seed": 1}))[0] != train


def test_a_weight_draws_by_seed():
    rows = [{"n": i} for i in range(10)]
    assert weighted(rows, 2, 0, 0) == rows * 2
    assert weighted(rows, 0.3, 0, 0) == weighted(rows, 0.3, 0, 0)
    assert len(weighted(rows, 0.3, 0, 0)) == 3
    assert len({str(weighted(rows, 0.5, seed, 0)) for seed in range(5)}) > 1
    assert len({str(weighted(rows, 0.5, 0, source)) for source in range(5)}) > 1


def test_a_mixture_is_read_from_yaml_and_from_a_flag(tmp_path):
    mixture = [{"path": "a.jsonl", "weight": 2}, "b.jsonl"]
    (tmp_path / "r.yaml").write_text(json.dumps({"data": mixture}))
    assert load_recipe(str(tmp_path / "r.yaml"), {}).data == mixture
    assert from_flag("data", "[{path: a.jsonl, weight: 2}, b.jsonl]") == mixture
    assert from_flag("data", "a.jsonl") == "a.jsonl"
    assert from_flag("data", "a,b.jsonl") == "a,b.jsonl"
    assert from_flag("target_modules", "q_proj,k_proj") == ["q_proj", "k_proj"]
    assert source_names(Recipe(data=mixture)) == "a.jsonl ×2, b.jsonl"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "data: an empty list"), ([3], "data: 3 is not a path"), ([{"weight": 1}], "path is missing"),
        ([{"path": "a", "wight": 1}], "no 'wight'; did you mean 'weight'?"),
        ([{"path": "a", "weight": 0}], "weight: 0"),
        ([{"path": "a", "weight": "x"}], "weight: 'x' is not a number"),
        ([{"path": "a", "weight": float("inf")}], "is not a number"),
    ],
)  # fmt: skip
def test_mistakes_in_a_mixture(data, said):
    assert said in fault(Recipe, data=data)


def test_what_does_not_go_with_a_mixture():
    named = [{"path": "a.jsonl", "split": "dev"}]
    assert "streaming takes no split, as 'dev' of a.jsonl" in fault(Recipe, data=named, streaming=True, steps=1)
    assert "encoding: 'zip' is no text encoding" in fault(Recipe, encoding="zip")
    assert "encoding: 'none-such' is no text encoding" in fault(Recipe, encoding="none-such")
    assert Recipe(encoding="cp1252").encoding == "cp1252"


def test_plain_text_and_answers_are_not_mixed(write):
    write("a.jsonl", pairs("a", 4))
    write("b.jsonl", [{"text": "once"}] * 4)
    assert "a.jsonl (answers), b.jsonl (plain text)" in fault(parts_of, Recipe(data=["a.jsonl", "b.jsonl"]))


def test_a_folder_holds_out_its_validation(write):
    for name, count in (("train", 20), ("validation", 5), ("test", 5)):
        write(f"ds/{name}.jsonl", pairs(name, count))
    train, held, said = parts_of(Recipe(data="ds"))
    assert train == [f"train {i}" for i in range(20)]
    assert held == [f"validation {i}" for i in range(5)]
    assert said[0].startswith("ds: trained on train.jsonl, held out validation.jsonl, left test.jsonl")
    streaming = parts_of(Recipe(data="ds", streaming=True, steps=1))
    assert streaming == (train, held, said)
    assert parts_of(Recipe(data="ds", eval_size=2))[1] == held[:2]
    assert parts_of(Recipe(data="ds", eval_data="ds/test.jsonl"))[1] == [f"test {i}" for i in range(5)]
    assert set(parts_of(Recipe(data="ds", split="test", eval_size=1))[0]) < {f"test {i}" for i in range(5)}
    assert "one of their files, as ds/test.jsonl" in fault(parts_of, Recipe(data="ds/train.jsonl", eval_data="ds"))


@pytest.mark.parametrize("streaming", [False, True])
def test_heldout_rows_that_are_training_rows_are_counted(streaming, write):
    write("train.jsonl", pairs("q", 10))
    write("heldout.jsonl", [*pairs("q", 4), {"prompt": "q 5", "completion": "another"}, *pairs("new", 2)])
    steps = {"streaming": True, "steps": 1} if streaming else {}
    said = parts_of(Recipe(data="train.jsonl", eval_data="heldout.jsonl", **steps))[2]
    assert said == ["4 of 7 held-out examples are training examples too; their loss says less"]


def test_the_start_of_a_stream_that_comes_again_is_counted(write):
    write("s.jsonl", pairs("q", 10) + pairs("q", 2))
    said = parts_of(Recipe(data="s.jsonl", streaming=True, steps=1, eval_size=3))[2]
    assert said == ["2 of 3 held-out examples are training examples too; their loss says less"]


def test_a_stream_knows_when_any_of_it_changes(write):
    write("s.jsonl", pairs("q", 2000))
    before = open_stream("s.jsonl", rules_of(Recipe(data="s.jsonl")), Reading())
    write("s.jsonl", [*pairs("q", 1999), {"prompt": "q 1999", "completion": "SAY 1999"[::-1]}])
    after = open_stream("s.jsonl", rules_of(Recipe(data="s.jsonl")), Reading())
    assert before.shards[0][:2] == after.shards[0][:2]
    assert before.shards != after.shards


def test_what_is_said_comes_with_every_task(write, small_tokenizer, tiny):
    """Unused columns, rows that are skipped, and the shares of sources."""
    rows = {
        "classification": [{"text": f"t {i}", "label": i % 2, "id": i} for i in range(8)]
        + [{"text": "u", "label": -1}],
        "seq2seq": [{"document": f"d {i}", "summary": "s", "id": i} for i in range(8)]
        + [{"document": "u", "summary": None}],
        "preference": [{"prompt": f"p {i}", "chosen": "a", "rejected": "b", "id": i} for i in range(8)]
        + [{"prompt": "u", "chosen": "", "rejected": "b"}],
    }
    for task, records in rows.items():
        write(f"{task}.jsonl", records)
        said = io.StringIO()
        recipe = Recipe(data=[f"{task}.jsonl", {"path": f"{task}.jsonl", "weight": 2}], task=task, eval_size=2,
                        empty_answers="skip", model=tiny)  # fmt: skip
        TASKS[task].examples(recipe, small_tokenizer, Console(file=said, width=200))
        assert said.getvalue().splitlines()[:2] == ["not used: columns id", "rows without an answer, skipped: 2"]
        assert "weight 2" in said.getvalue()


def label_lines(train, held, write, tokenizer):
    write("train.jsonl", [{"text": f"t {i}", "label": label} for i, label in enumerate(train)])
    write("held.jsonl", [{"text": f"h {i}", "label": label} for i, label in enumerate(held)])
    said = io.StringIO()
    recipe = Recipe(data="train.jsonl", eval_data="held.jsonl", task="classification")
    rows = TASKS["classification"].examples(recipe, tokenizer, Console(file=said, width=200))
    return rows.labels, [row["labels"] for row in (*rows.train, *rows.heldout)], said.getvalue()


def test_labels_are_the_same_in_all_files(write, small_tokenizer):
    assert label_lines([0, 1, 1.0], ["1", True, False], write, small_tokenizer)[:2] == (["0", "1"], [0, 1, 1, 1, 1, 0])
    names, _, said = label_lines(["a", "b"], ["c"], write, small_tokenizer)
    assert names == ["a", "b", "c"]
    assert "only held-out rows have the label c: it is not learned" in said
    assert "the labels A and a differ in capitals alone" in label_lines(["a", "A"], ["a"], write, small_tokenizer)[2]
    names, values, said = label_lines([0.5, 1], [2], write, small_tokenizer)
    assert (names, values) == (None, [0.5, 1.0, 2.0])
    assert "labels are scores from 0.5 to 1" in said


def test_a_source_is_a_path_with_defaults():
    assert Source("a.jsonl") == Source("a.jsonl", 1.0, None, {}, None)


def test_streams_are_mixed_with_what_each_source_says(write):
    write("a.jsonl", pairs("a", 6))
    write("b.jsonl", pairs("b", 4))
    write("held.jsonl", pairs("h", 3))
    data = ["a.jsonl", {"path": "b.jsonl", "weight": 0.5, "system": "B."}]
    values = {"data": data, "streaming": True, "steps": 1}
    out = io.StringIO()
    train, held, stream = streamed(Recipe(**values, eval_data="held.jsonl"), Console(file=out, width=200))
    asked = [(one["prompt"][0]["role"], one["prompt"][-1]["content"]) for one in stream.examples]
    assert Counter(role for role, _ in asked) == {"user": 6, "system": 2}
    assert [one["prompt"][-1]["content"] for one in train] == [question for _, question in asked]
    assert len(held) == 3
    assert "b.jsonl: 4 examples, weight 0.5: 2 of 8 an epoch (25%)" in out.getvalue()
    assert "holds nothing out itself; give eval_data" in fault(streamed, Recipe(**values), Console(quiet=True))
