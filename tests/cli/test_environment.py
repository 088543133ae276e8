"""`inlay schema` and `inlay env`."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from helpers import fails

from inlay.cli import main
from inlay.cli.json_schema import json_schema
from inlay.methods import METHODS
from inlay.recipe.reading import from_values

RECIPES = Path(__file__).parents[2] / "recipes"
PLACE = {"compare": "compare", "tune": "tune"}


def kind_of(values: dict) -> str:
    return next((kind for kind in PLACE if kind in values), "recipe")


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema.Draft202012Validator]:
    schemas = {kind: json_schema(kind) for kind in ("recipe", "compare", "tune")}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in schemas.items()}


RUNS = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name != "distributed"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_recipe_is_valid_by_its_schema(path, validators):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    validators[kind_of(values)].validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rat": 1e-3}, {"task": "poetry"}, {"epochs": "many"}, {"batch_size": 0}, {"batch_size": "some"},
        {"columns": ["a"]}, {"packing": 1}, {"steps": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_recipe_refuses_its_schema_refuses(values, validators):
    with pytest.raises(ValueError, match=next(iter(values))):
        from_values(values, {}, "recipe.yaml")
    assert not validators["recipe"].is_valid(values)


@pytest.mark.parametrize("values", [{"learning_rate": "5e-4"}, {"batch_size": "auto"}, {"steps": None}], ids=str)
def test_what_a_recipe_takes_its_schema_takes(values, validators):
    from_values(values, {}, "recipe.yaml")
    validators["recipe"].validate(values)


def test_a_comparison_needs_its_block(validators):
    assert not validators["compare"].is_valid({"model": "builtin"})
    assert not validators["compare"].is_valid({"compare": {"methds": ["lora"]}})
    assert not validators["tune"].is_valid({"tune": {"space": {}, "rescore": {"topp": 3}}})


def test_the_schema_is_printed_with_all_methods(capsys):
    main(["schema"])
    schema = json.loads(capsys.readouterr().out)
    assert {m.name for m in METHODS} < set(schema["properties"]["method"]["examples"])
    with pytest.raises(SystemExit, match="2"):
        main(["schema", "recipes"])
    assert capsys.readouterr().err == "inlay: schema 'recipes' is not one of recipe, compare, tune\n"


def test_the_environment_says_what_a_bug_report_needs(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "a").write_bytes(bytes(1 << 24))
    main(["env", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["cache"] == str(tmp_path)
    assert facts["cache size (GiB)"] == 0.02
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["packages"]["lm-eval"] == "not installed"
    assert facts["variables"]["INLAY_CACHE"] == str(tmp_path)
    main(["env"])
    text = capsys.readouterr().out
    assert f"cache                   {tmp_path}\n" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("verb", "variables", "says"),
    [
        ("methods", {"RANK": "abc"}, "RANK='abc' in the environment is not a whole number; unset RANK"),
        ("eval", {"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ("train", {"LOCAL_RANK": "1.5"}, "LOCAL_RANK='1.5'"),
        ("train", {"MASTER_PORT": "tcp"}, "MASTER_PORT='tcp'"),
        ("train", {"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x'"),
        ("train", {"INLAY_LAUNCHER": "x" * 500}, "INLAY_LAUNCHER='xxx"),
        ("plan", {"HF_HUB_ETAG_TIMEOUT": "10s"}, "HF_HUB_ETAG_TIMEOUT='10s'"),
        ("plan", {"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS='abc'"),
        ("plan", {"INLAY_TRITON": "off"}, "INLAY_TRITON='off' in the environment is not one of 0 (off) and 1 (on)"),
        ("train", {"WORLD_SIZE": "2"}, "no RANK is set; inlay train --num-processes 2 starts all of them"),
        ("compare", {"WORLD_SIZE": "2", "RANK": "0"}, "no MASTER_ADDR is set"),
        ("tune", {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "no MASTER_PORT is set"),
        ("train", {"LOCAL_RANK": "99"}, "LOCAL_RANK=99 in the environment is not below WORLD_SIZE=1; unset LOCAL_RANK"),
        ("train", {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=2 in the"),
    ],
)
def test_a_variable_that_would_end_a_command_is_refused_first(verb, variables, says, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert says in fails(capsys, verb, "--no-such-flag")


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "", "WORLD_SIZE": " "}, {"LOCAL_RANK": "-1"}, {"OMP_NUM_THREADS": "4,2"}, {"OMP_NUM_THREADS": ""},
     {"INLAY_TRITON": "0"}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}],
    ids=str,
)  # fmt: skip
def test_what_a_launcher_or_a_shell_sets_is_taken(variables, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "unknown flag --no-such-flag" in fails(capsys, "train", "--no-such-flag")


@pytest.mark.parametrize("where", [["--data", "d\udce4ta.jsonl"], ["--output=l\udcffuf"], ["\ud800.yaml"]], ids=ascii)
def test_a_name_that_is_no_text_is_refused_before_training(where, capsys):
    """It is refused by safetensors too, when everything is trained."""
    assert "is not UTF-8, or was read as" in fails(capsys, "train", *where, "--no-such-flag")
