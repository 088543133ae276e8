"""A pipe, a device or a socket in the place of a file: refused at once by whatever reads one, since some never end."""

import ast
import os
import shutil
import signal
import socket
from itertools import chain
from pathlib import Path

import pytest
from helpers import fails
from rich.console import Console

import inlay
from inlay.data.readers import read_records
from inlay.files.untrusted import DamagedFileError, read_regular, regular_file
from inlay.recipe.recipe import Recipe
from inlay.training.train import train

SILENT = Console(quiet=True)
SAYS = "is a pipe, a device or a socket"


@pytest.fixture(autouse=True)
def no_hanging():
    """Fail where a pipe would be waited for."""

    def ring(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path) -> Path:
    os.mkfifo(tmp_path / "pipe.yaml")
    return tmp_path / "pipe.yaml"


@pytest.fixture(scope="module")
def run(tiny, records, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    short = {"steps": 2, "save_every": 1, "eval_size": 4, "samples": 0, "method": "peft:lora"}
    train(Recipe(model=tiny, data=records, output=str(folder), **short), SILENT)
    return folder


def in_place_of(file: Path) -> Path:
    file.unlink()
    os.mkfifo(file)
    return file


@pytest.mark.parametrize("flag", ["--data", "--eval-data", "--chat-template"])
def test_a_name_longer_than_a_file_system_takes(flag, tiny, records, capsys):
    flags = {"--model": tiny, "--data": records, flag: "a" * 5000}
    assert "File name too long" in fails(capsys, "train", *chain(*flags.items()), "--dry-run")


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "file").write_text("π")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "device", "socket"):
            with pytest.raises(DamagedFileError, match=f"{name} {SAYS}, which are not read; give a regular file"):
                regular_file(tmp_path / name)
    for name in ("file", "missing", "\0", ""):
        assert regular_file(tmp_path / name) == tmp_path / name
    assert read_regular(tmp_path / "file", 5) == "π"


@pytest.mark.parametrize("words", [
    ["train", "PIPE"], ["compare", "PIPE"], ["tune", "PIPE"],
    ["train", "--num-processes", "2", "--launch-config", "PIPE"],
    ["train", "--model", "TINY", "--data", "RECORDS", "--chat-template", "PIPE", "--output", "OUT"],
    ["train", "--model", "TINY", "--data", "PIPE", "--output", "OUT"],
    ["train", "--model", "TINY", "--data", "PIPE", "--streaming", "--steps", "1", "--output", "OUT"],
    ["eval", "TINY", "--task", "exact", "--data", "PIPE"],
])  # fmt: skip
def test_a_pipe_in_the_place_of_an_argument(words, pipe, tiny, records, tmp_path, capsys):
    names = {"PIPE": str(pipe), "TINY": tiny, "RECORDS": records, "OUT": str(tmp_path / "out")}
    assert f"{pipe} {SAYS}" in fails(capsys, *(names.get(word, word) for word in words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"])
@pytest.mark.parametrize("words", [
    ["generate", "IT", "--prompt", "a"],
    ["eval", "IT", "--task", "exact", "--data", "RECORDS"], ["export", "IT", "OUT"],
    ["merge", "IT", "OUT"], ["import", "IT", "OUT"], ["inspect", "IT"],
], ids=lambda words: words[0])  # fmt: skip
def test_a_pipe_in_the_place_of_an_adapters_file(words, name, run, records, tmp_path, capsys):
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    (folder / name).touch()
    file = in_place_of(folder / name)
    names = {"IT": str(folder), "RECORDS": records, "OUT": str(tmp_path / "out")}
    assert f"{file} {SAYS}" in fails(capsys, *(names.get(word, word) for word in words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pipe_in_the_place_of_a_models_file(name, tiny, records, tmp_path, capsys):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    file = in_place_of(model / name)
    words = ("train", "--model", str(model), "--data", records, "--output", str(tmp_path / "out"))
    assert f"{file} {SAYS}" in fails(capsys, *words)
    assert f"{file} {SAYS}" in fails(capsys, "generate", "--model", str(model), "--prompt", "a")


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "checkpoints/checkpoint-2/optimizer.pt"])
def test_a_pipe_in_the_place_of_a_runs_file(name, run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    file = in_place_of(folder / name)
    assert f"{file} {SAYS}" in fails(capsys, "train", "--resume", str(folder))


def test_a_pipe_among_the_shards_and_the_pictures(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(DamagedFileError, match="found a device, a pipe"):
        read_records(str(tmp_path))


OPENERS = {"safe_open", "load_file", "open", ".open", ".read_text", ".read_bytes", ".memory_map"}


def readers(tree: ast.AST) -> list[str]:
    """The calls that open a file to read it, but for those that ask `regular_file`."""
    found = []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        writes = any(isinstance(arg, ast.Constant) and arg.value in ("a", "x", "w") for arg in node.args)
        if name in OPENERS and not writes:
            found.append(ast.unparse(node))
    return [text for text in found if not text.startswith(("Adapter.open", "cls.open")) and "regular_file(" not in text]


def test_every_reader_of_files_asks():
    """What opens a user's file says `regular_file`; libraries are given folders that were asked."""
    assert readers(ast.parse("p.open('rb'); open(p, 'a'); safe_open(regular_file(p)); p.read_text()")) == [
        "p.open('rb')", "p.read_text()",
    ]  # fmt: skip
    package = Path(inlay.__file__).parent
    trees = {path.relative_to(package).as_posix(): ast.parse(path.read_text()) for path in package.rglob("*.py")}
    found = {name: readers(tree) for name, tree in trees.items() if not name.startswith("files/")}
    assert {name: calls for name, calls in found.items() if calls} == {
        "cli/flags.py": ["FILE.read_text(encoding='utf-8')"],  # of the package
        "cli/streams.py": ["open(os.devnull, mode, encoding='utf-8')", "os.open(os.devnull, os.O_WRONLY)",
                           "os.open(os.devnull, os.O_RDWR)"],
        "experiments/trial.py": ["os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 420)"],
        "serving/endpoint.py": ["build_opener(ProxyHandler({})).open(request)"],  # an address
        "serving/packed.py": ["build_opener(ProxyHandler({})).open(request)"],  # an address
        "training/live_page.py": ["os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)"],  # then looked at
    }  # fmt: skip
