"""Files that somebody else made: a slice of `make fuzz`, and what it cannot come upon by chance."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model

from inlay.cli import main
from inlay.data import columnar
from inlay.data.formats import convert_records
from inlay.data.readers import read_records
from inlay.files import untrusted
from inlay.files.untrusted import DamagedFileError, from_yaml
from inlay.host.config import InlayConfig
from inlay.messages import loading
from inlay.models import builtin
from inlay.models.base import BaseModel
from inlay.models.loading import resolve
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe

BOMB = "a: &a [1]\n" + "".join(f"{n}: &{n} [{', '.join(['*' + chr(ord(n) - 1)] * 9)}]\n" for n in "bcdefghijkl")
FUZZ = Path(__file__).parents[2] / "checks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


@pytest.mark.filterwarnings("ignore")  # a damaged config may name fields that PEFT warns of
def test_a_slice_of_the_fuzzing(fuzz, tmp_path, monkeypatch, capsys):
    """The same cases at every run; make fuzz goes through 100,000."""
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    assert fuzz.run(532, 7, [""], tmp_path) == 0
    assert capsys.readouterr().out.count(" 0 unhandled") == 31


@pytest.mark.filterwarnings("ignore")
def test_the_fuzzing_sees_what_goes_wrong(fuzz, tmp_path, monkeypatch):
    """A reader that fails otherwise, one that runs a pickle, and one that writes beside its folder are each counted."""
    for broken in (
        lambda p: {}["no such key"],
        lambda p: fuzz.Path(fuzz.tempfile.gettempdir(), fuzz.RAN).touch(),
        lambda p: (p.parent / "beside").touch(),
    ):
        monkeypatch.setattr(fuzz, "targets", lambda scratch, b=broken: {"one": fuzz.Target(b, {"f": b"x" * 50})})
        assert fuzz.run(3, 0, [""], tmp_path) > 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 2000 + "]" * 2000, "nested more than 50"),
        ("a: " + "{b: " * 2000 + "1" + "}" * 2000, "nested more than 50"),
        (BOMB, "100,000 values"),
        ("a: &a [*a]", "100,000 values"),
        ("model: !!python/object/apply:os.system [touch x]", "could not determine a constructor"),
        ("model: 2001-99-99", "month must be"),
        ("true: 1", "not the name of a field"),
        ("args: 5", "args: 5 is not a mapping"),
        ("model: a\0b", "not YAML"),
        ("a: &a {x: 1}\nargs: {<<: [*a, *a]}", "merge key"),
        ("model: " + "x" * 1_000_000, "longer than 1,000,000"),
        ("seed: 1\nsteps: 2\nseed: 3", r"the key 'seed' twice in one mapping \(again in line 3\)"),
        ("columns: {prompt: a, prompt: b}", "the key 'prompt' twice"),
        ("patterns: {a: {r: 1, r: 2}}", "the key 'r' twice"),
        ("steps: 010", "'010' is not a whole number"),
        ("steps: 1:30", "'1:30' is not a whole number"),
    ],
    ids=["list", "mapping", "bomb", "ring", "code", "date", "key", "args", "NUL", "merge", "long",
         "twice", "twice in a flow", "twice within", "octal", "base 60"],
)  # fmt: skip
def test_a_recipe_that_is_none(text, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    with pytest.raises(ValueError, match=why) as told:
        load_recipe("r.yaml", {})
    assert len(str(told.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("text", [
    f"learning_rate: 1{'0' * 400}", f"learning_rate: 0x{'f' * 300}", "learning_rate: 1e38", "epochs: 1.0e308",
    f"batch_size: 1{'0' * 30}", "target_modules: '('", "exclude_modules: '(*'", "target_modules: [[a]]",
    "modules_to_save: [1]", "patterns: {1: {r: 2}}", "{method: peft:lora, target_modules: '('}",
    "{method: peft:lora, args: {1: 2}}", "trainer: {1: 2}", "trainer: {run_name: 2001-01-01}",
    "optimizer_args: {betas: 2001-01-01}", "optimizer_args: {foo: 2}", "columns: {5: a}",
])  # fmt: skip
def test_values_that_libraries_would_trip_over_are_refused(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    said = refused(capsys, "train", "r.yaml", "--dry-run")
    assert any(f"{word}:" in said for word in re.findall(r"\w+", text)), said
    assert len(said) < 300


@pytest.mark.parametrize(("arguments", "why"), [
    (["train", "--args", "[" * 3000], "args: '[[["), (["train", "--epochs", "1e400"], "epochs: "),
    (["plan", "--csv", "/nonexistent/x.csv"], "no folder /nonexistent"),
    (["plan", "--length", "9" * 400], "whole number"),
    (["plan", "--r", "9" * 5000], "whole number"), (["merge", "\x1b[2J", "o"], "\\x1b[2J"),
    (["train", "--args", "r=8"], "args: 'r=8' is not a mapping; write --args '{r: 8}'"),
    (["train", "--columns", "{prompt: a, prompt: b}"], "the key 'prompt' twice"),
    (["train", "--r", ""], "r: nothing is given"), (["train", "--epochs="], "epochs: nothing is given; give a number"),
    (["train", "--seed", str(2**32)], "seed: 4294967296 is beyond 4,294,967,295"),
    (["train", "--trainer", "{learning_rate: 1}", "--dry-run"], "'learning_rate' is set from fields of the recipe"),
    (["train", "--scheduler", "", "--dry-run"], "scheduler: '' is not one of linear, cosine"),
    (["plan", "--fits", "nan"], "'nan' is not a number above 0"), (["plan", "--labelled", "-1"], "a number above 0"),
    (["compare", "--data", "x", "--minutes", "inf"], "'inf' is not a number above 0"),
])  # fmt: skip
def test_flags_that_libraries_would_trip_over_are_refused(arguments, why, capsys):
    assert why in refused(capsys, *arguments)


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 0.001), ("2E5", 2e5), ("-.5", -0.5), ("1_000", 1000), ("0x10", 16), ("0", 0), (".inf", math.inf),
    ("010", "010"), ("1:30", "1:30"), ("0b11", "0b11"), ("1.0.0", "1.0.0"),
])  # fmt: skip
def test_numbers_are_those_that_a_reader_sees(text, value):
    read = from_yaml(text)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("words", [
    ["eval", "--task", "exact", "--data", "facts.jsonl"], ["inspect"], ["fold"], ["train", "--dry-run", "--model"],
], ids=lambda words: words[0])  # fmt: skip
@pytest.mark.parametrize("where", ["facts.jsonl/out", "/proc/nowhere/out"])
def test_an_output_that_cannot_be_is_refused_before_work_begins(words, where, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("facts.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    monkeypatch.setattr(BaseModel, "load", lambda *_, **__: pytest.fail("it was loaded"))
    out = [where] if words[0] == "fold" else ["--output", where]
    assert f"{where} cannot be written" in refused(capsys, *words, tiny, *out)
    assert [path.name for path in tmp_path.iterdir()] == ["facts.jsonl"]


def test_values_are_counted_while_they_are_read(monkeypatch):
    monkeypatch.setattr(untrusted, "SIZE", 100)
    with pytest.raises(yaml.YAMLError, match=r"holds more than 100 values$"):
        from_yaml(f"[{'1,' * 101}]")


def test_a_models_own_code_runs_only_if_asked_for():
    assert Recipe().trust_remote_code is False
    root = FUZZ.parents[1]
    sources = [*(root / "src").rglob("*.py"), *(root / "recipes").rglob("*.yaml")]
    assert len(sources) > 50
    for path in sources:
        assert not re.search(r"trust_remote_code\s*[=:]\s*[Tt]rue", path.read_text(encoding="utf-8")), path


def test_own_recipes_with_shared_values_are_read(tmp_path):
    """What is written with an anchor, because one list stands in it twice."""
    (tmp_path / "r.yaml").write_text("target_modules: &t [q_proj]\nexclude_modules: *t\n")
    assert load_recipe(str(tmp_path / "r.yaml"), {}).exclude_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", "[" * 100_000),
        ("d.json", '{"a":' * 100_000),
        ("d.jsonl", '{"prompt": ' + "9" * 10_000 + "}"),
        ("d.jsonl", '{"prompt": "' + "x" * 10_000_000),
        ("d.csv", "a,b\n" + '"' + "x" * 1_000_000),
        ("d.parquet", "PAR1" + "\0" * 100 + "PAR1"),
        ("d.txt", "\xff".encode("latin-1")),
    ],
    ids=["deep", "deep object", "digits", "10 MB line", "open quotation", "parquet", "not UTF-8"],
)
def test_data_that_is_none(name, content, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DamagedFileError, match=name) as told:
        read_records(str(tmp_path / name))
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize("column", [
    pyarrow.array([2**62, 1], pyarrow.timestamp("us")), pyarrow.array([2**62, 1], pyarrow.duration("s")),
    pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Nowhere/City")),
    pyarrow.array([b"\xff", b"b"], pyarrow.binary()).view(pyarrow.string()), pyarrow.array(["x"] * 101),
], ids=["timestamp", "duration", "zone", "not UTF-8", "too many"])  # fmt: skip
def test_parquet_that_cannot_be_had(column, tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "VALUES", 100)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "d.parquet")
    with pytest.raises(DamagedFileError, match=r"d\.parquet: found"):
        read_records(str(tmp_path / "d.parquet"))


def test_data_is_in_files(tmp_path):
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        make(tmp_path / "d.jsonl")
        with pytest.raises(DamagedFileError, match="found a device, a pipe"):
            read_records(str(tmp_path))
        (tmp_path / "d.jsonl").unlink()


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match=r"row 1: answer is 'a\\ud800', with half of a surrogate pair"):
        convert_records([{"question": "b", "answer": "a\ud800"}])


def test_a_gguf_file_is_no_model_to_train(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"m\.gguf is packed for llama\.cpp; give the folder or hub id"):
        resolve(str(tmp_path / "m.gguf"))


def test_a_damaged_gguf_file_is_said(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(DamagedFileError, match=r"m\.gguf cannot be read as GGUF"):
        builtin.load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["llama", "unheard_of"])
def test_a_models_own_code_does_not_run(kind, tiny, tmp_path):
    """A model of a kind that transformers knows is loaded without it; another one, or its tokenizer, is refused."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    about = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Words", None]}
    for name, values in (("config.json", {**about, "model_type": kind}), ("tokenizer_config.json", {})):
        (folder / name).write_text(json.dumps({**values, "auto_map": own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for load in (BaseModel.tokenizer, BaseModel.config, lambda base: base.load(torch.float32)):
        known = kind == "llama" and load is not BaseModel.tokenizer
        with contextlib.nullcontext() if known else pytest.raises(ValueError, match="cannot be loaded"):
            load(BaseModel(str(folder)))
    assert not (tmp_path / "ran").exists()


def spoil(path, change):
    """Cut a file in half, replace it, or change fields of the JSON that it holds."""
    if change is None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))


def refused(capsys, *arguments):
    """What a verb says that refuses, on one line."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", None),
        ("config.json", {"hidden_size": 32}),
        ("config.json", {"hidden_size": -64}),
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", "[]"),
        ("config.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "{% for x in %}"),
        ("chat_template.jinja", "{{ 1/0 }}"),
    ],
)  # fmt: skip
def test_a_damaged_model_folder_is_said(name, change, tiny, records, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "m")
    spoil(Path("m", name), change)
    what = "chat template does not take" if name.endswith("jinja") else "'m' cannot be loaded"
    for verb in (["generate", "--prompt", "hi"], ["train", "--data", records, "--output", "o", "--samples", "0"]):
        assert what in refused(capsys, *verb, "--model", "m")


def test_out_of_memory_is_no_damaged_file():
    for full in (MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")):
        with pytest.raises(type(full)), loading("m"):
            raise full


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = InlayConfig(method="lora", args={"r": 2}, target_modules=["q_proj"])
    base = BaseModel(tiny).load(torch.float32)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change", [
    "[" * 100_000, "[]", '{"base_model_name_or_path": "m", "peft_type": "NOPE"}', {"peft_type": 5}, {"patterns": 5},
    {"args": [1]}, {"format_version": "x"}, {"seals": {"q_proj": 5}}, {"seals": 5}, {"target_modules": [["a"]]},
    {"exclude_modules": "("},
])  # fmt: skip
def test_a_damaged_adapter_config_is_said(change, adapter, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "a")
    spoil(Path("a", "adapter_config.json"), change)
    for verb in ("generate a --prompt hi --model", "merge a o --model", "export a o --model", "inspect a --base"):
        assert "a/adapter_config.json" in refused(capsys, *verb.split(), tiny)
    if isinstance(change, dict) and "peft_type" not in change:  # in Python too, which PEFT leads to our config
        with pytest.raises(ValueError, match=next(iter(change))):
            PeftModel.from_pretrained(BaseModel(tiny).load(torch.float32), "a")
