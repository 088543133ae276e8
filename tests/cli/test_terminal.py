"""What a person meets at the terminal: help that fits, flags that are guessed, nothing that steers the screen."""

import ast
import io
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import fails
from rich.table import Table

import inlay
from inlay.cli import main
from inlay.cli.entry import parser
from inlay.cli.flags import ELSEWHERE, recipe_flags
from inlay.cli.parser import SEVERAL, flag_help
from inlay.evaluation.evaluate_model import evaluate_model
from inlay.messages import PACKAGES, Terminal, one_line, printable, show_text
from inlay.recipe.recipe import Recipe
from inlay.training.arguments import check_means
from inlay.training.base_model import load_training_model

PACKAGE = Path(inlay.__file__).parent
STEERING = "\x1b[2J\x1b]0;name\x07 \r\x08\x9b31m \u202eback\u2066 \u2028\x7f\ud800"
VERBS = "train compare tune ui methods eval generate serve fold export import merge inspect plan schema env".split()


# -- nothing steers the terminal --------------------------------------------------------------------------------------


def test_what_steers_is_written_out():
    assert printable("\x1b[31mred") == r"\x1b[31mred"
    assert printable("a\rb\x9b\u202ec\ud800") == r"a\rb\x9b\u202ec\ud800"
    assert printable("tab\tand\nline\r\nend") == "tab\tand\nline\nend"
    whole = "naïve 日本語 \u200d👩‍🚀 \xa0⟦ΔW⟧ می‌خواهم"
    assert printable(whole) == whole
    assert one_line("two\nlines\t\x1b") == r"two lines \x1b"


def test_nothing_that_is_printed_steers(capsys):
    show_text(STEERING)
    show_text(STEERING, to_stderr=True)
    file = io.StringIO()
    console = Terminal(file=file, width=200, color_system=None)
    table = Table("a" + STEERING, title=STEERING)
    table.add_row(STEERING)
    console.print(STEERING, table)
    console.print(STEERING, style="yellow", soft_wrap=True)
    caught = capsys.readouterr()
    for text in (caught.out, caught.err, file.getvalue()):
        assert text
        assert not set(text) & set(STEERING) - set("[]2J0;name 31mback")
        assert r"\x1b[2J" in text


def test_names_are_no_markup():
    file = io.StringIO()
    Terminal(file=file, width=80).print("runs/[red]x[/red] :smile: [/]")
    assert file.getvalue() == "runs/[red]x[/red] :smile: [/]\n"


def test_everything_is_printed_through_one_file():
    calls = {
        f"{path.relative_to(PACKAGE).as_posix()}: {node.func.id}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console")
    }
    assert calls == {
        "messages.py: print",
        "evaluation/evaluate.py: Console",
        "training/train.py: Console",
    }  # both quiet


def test_errors_are_one_line_without_control_characters(capsys, tmp_path):
    said = fails(capsys, "train", "--data", str(tmp_path / "a\x1b[2J\n\rb.jsonl"))
    assert r"\x1b[2J" in said
    assert "\x1b" not in said


# -- help -------------------------------------------------------------------------------------------------------------


def shown(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_help_breaks_no_word_and_cuts_no_sentence(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    top = parser()
    for name in ("", *VERBS):
        said = shown(capsys, *filter(None, [name]), "--help")
        verb = top.verbs[name] if name else top
        assert max(map(len, said.splitlines())) <= min(100, int(columns)), name
        words = " ".join(said.replace("\\\n", " ").split())
        assert all(" ".join(text.split()) in words for text in ((verb.description or "").split("\n\n"))), name
        assert " ".join(verb.example.split()) in words, name
        assert all(flag in words for flag in verb.flags() if flag in recipe_flags()) or name == "train"
    assert "(TensorBoard on 127.0.0.1)." in " ".join(shown(capsys, "--help").split())


@pytest.mark.parametrize("columns", ["0", "1", "10", "-5", "many"])
def test_help_is_shown_on_a_screen_of_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert "--output" in shown(capsys, "train", "--help")


def test_help_of_train_shows_the_defaults_on_one_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    said = shown(capsys, "train", "--help")
    assert len(said.splitlines()) <= 50
    words = " ".join(said.split())
    for name in ("learning_rate", "batch_size", "epochs", "max_length", "method", "seed", "eval_size", "output"):
        assert flag_help(name) in words
    assert "examples per device and micro-batch, or auto: the largest that fits (default 8)" in words
    every = " ".join(shown(capsys, "train", "--help-all").split())
    assert all(f"--{name.replace('_', '-')} " in every and flag_help(name) in every for name in recipe_flags())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train --lr 1e-3", "unknown flag --lr; did you mean --learning-rate?"),
        ("train --bs 4", "did you mean --batch-size?"),
        ("train --rank 8", "did you mean --r?"),
        ("train --lora_r 8", "did you mean --r?"),
        ("train --stesp 3", "did you mean --steps?"),
        ("train --epoch 3", "did you mean --epochs?"),
        ("train --max_steps=3", "did you mean --steps?"),
        ("train --learning-rte 1", "did you mean --learning-rate?"),
        ("train --zzz 1", "unknown flag --zzz; see inlay train --help"),
        ("plan --seq-len 9", "did you mean --length?"),
        ("generate --max-new-tokens 9", "did you mean --tokens?"),
        ("eval x --lr 9", "unknown flag --lr; it is for inlay train, tune; see inlay eval --help"),
        ("eval --model x", "MODEL needs no flag, as in inlay eval runs/mine --task"),
        ("eval x --seed 1", "answers are greedy here; inlay generate draws"),
        ("generate --adapter x", "ADAPTER needs no flag, as in inlay generate runs/"),
        ("generate x --data y", "--prompts FILE --output FILE answers the prompts of a file"),
        ("merge x --output y", "OUT needs no flag, as in inlay merge runs/"),
        ("export x --base y", "did you mean --model?"),
        ("inspect --adapter x", "MODEL needs no flag, as in inlay inspect builtin"),
        ("serve --adapter x", "needs no flag, as in inlay serve runs/mine"),
        ("ui --logdir x", "RUNS needs no flag, as in inlay ui runs"),
        ("ui x --host 0.0.0.0", "it answers on 127.0.0.1 alone"),
        ("plan x --output y", "--json FILE and --csv FILE write the rows"),
        ("train --config x", "RECIPE needs no flag, as in inlay train --data"),
        ("train --device cpu", "CUDA_VISIBLE_DEVICES says which GPUs are used"),
        ("train --jobs 2", "--num-processes trains on several GPUs"),
        ("tune x --resume", "the same command resumes what was stopped"),
        ("tune x --system y", "write it in the recipe, as in system: VALUE"),
        ("tune x --lr 1", "did you mean --learning-rate?"),
        ("compare x --lr 1", "write it in the recipe, as in compare: {learning_rates: [1e-4, 3e-4, 1e-3]}"),
        ("compare x --seed 1", "write it in the recipe, as in compare: {seeds: [0, 1, 2]}"),
        ("compare x --rank 8", "write it in the recipe, as in compare: {methods: [{method: lora, args: {r: 8}}]}"),
        ("compare x --minutes 5 --overwriet", "did you mean --overwrite?"),
        ("trane", "invalid choice 'trane': did you mean 'train'?"),
        ("train \u2013\u2013steps 3", "begins with a dash that is no hyphen; did you mean --steps?"),
        ("train \u2014max_length=3", "did you mean --max-length?"),
        ("train --data a --data b", "--data is given twice, as 'a' and 'b'; one --data takes all of it"),
        ("plan --target_modules a --target-modules b", "--target-modules is given twice"),
        ("methods PiSSA", "unknown method 'PiSSA'; did you mean 'pissa'?"),
        ("methods bat-col", "did you mean 'bat_col'?"),
    ],
)
def test_an_unknown_flag_gets_a_suggestion(arguments, says, capsys):
    assert says in fails(capsys, *arguments.split())


def test_flags_have_two_spellings():
    for spelling in (["--learning_rate", "1e-3"], ["--learning-rate", "1e-3"], ["--learning_rate=1e-3"]):
        assert parser().parse_arguments(["train", *spelling]).learning_rate == "1e-3"
    given = parser().parse_arguments(["generate", "run", "--prompt", "a_b", "--temperature", "-1"])
    assert (given.prompt, given.temperature) == ("a_b", -1.0)


def test_flags_that_hold_one_thing_may_be_given_again():
    given = parser().parse_arguments(["train", "--steps", "1", "--steps", "2", "--data", "a", "--data", "a"])
    assert (given.steps, given.data) == ("2", "a")
    assert parser().parse_arguments(["generate", "run", "--system", "\u2014 hi"]).system == "\u2014 hi"
    hints = typing.get_type_hints(Recipe)
    holds = {n for n, hint in hints.items() if {list, dict} & {hint, *typing.get_args(hint)}}
    assert set(SEVERAL) == holds


def test_what_others_call_a_flag_names_one_of_ours():
    top = parser()
    flags = {flag for verb in (top, *top.verbs.values()) for flag in verb.flags()}
    assert ELSEWHERE.keys() <= flags
    names = [name for key in ELSEWHERE.keys() - {"length", "max-length"} for name in ELSEWHERE[key].split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [("--version", 0), ("--help", 0), ("train --help", 0), ("plan --help", 0), ("trane", 2), ("train --lr 1", 2)],
)
def test_help_and_mistakes_import_neither_torch_nor_peft(arguments, code):
    command = [sys.executable, "-X", "importtime", "-m", "inlay", *arguments.split()]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "inlay.cli.entry" in imported
    assert not imported & {"torch", "peft", "transformers", "numpy", "datasets"}


# -- packages ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_said_before_work_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"^task text needs sacrebleu; pip install 'inlay\[eval\]'$"):
        evaluate_model("nowhere/at-all", task="text", data="nowhere.jsonl")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^quantize: int8 needs bitsandbytes; pip install 'inlay\[quantized\]'$"):
        check_means(Recipe(quantize="int8"))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"^trainer: use_liger_kernel needs liger_kernel; pip install liger-kernel$"):
        check_means(Recipe(trainer={"use_liger_kernel": True}))


def test_what_only_a_gpu_can_is_refused_without_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="activation_offloading is for a GPU, and this machine has none"):
        check_means(Recipe(trainer={"activation_offloading": True}))
    with pytest.raises(ValueError, match="padding_free has no effect; use packing: true"):
        Recipe(trainer={"padding_free": True})
    with pytest.raises(ValueError, match="model_init_kwargs has no effect; the recipe loads the model"):
        Recipe(trainer={"model_init_kwargs": {"attn_implementation": "flash_attention_2"}})


def test_an_attention_that_cannot_be_is_refused_before_the_model_loads(tiny, monkeypatch):
    with pytest.raises(ValueError, match=r"^attention: flash_attention_2 computes in 16 bits, not in dtype: float32$"):
        Recipe(attention="flash_attention_2", dtype="float32")
    with pytest.raises(ValueError, match="batch_size: auto does not plan; give a number"):
        Recipe(attention="eager", batch_size="auto")
    with pytest.raises(ValueError, match="attention: sdpa is not for quantize: nf4"):
        Recipe(attention="sdpa", quantize="nf4", method="pissa")
    check_means(Recipe(model=tiny, attention="eager"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="flex_attention is for a GPU, and this machine has none"):
        check_means(Recipe(model=tiny, attention="flex_attention"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^attention: flash_attention_2: .* FlashAttention2"):  # is not installed
        check_means(Recipe(model=tiny, attention="flash_attention_2"))


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_the_attention_is_that_of_the_recipe(attention, tiny):
    recipe = Recipe(model=tiny, attention=attention, dtype="float32")
    prepared = SimpleNamespace(
        recipe=recipe, dtype=torch.float32, folder=None, console=None, rows=([], None), base=recipe.base_model
    )
    model = load_training_model(prepared)
    assert model.config._attn_implementation == {"auto": "sdpa"}.get(attention, attention)


def test_liger_kernels_that_do_not_know_the_model_are_refused(tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("inlay.training.arguments.check_installed", lambda *_: None)
    patches = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen2": None})
    for name, module in {"": None, ".transformers": None, ".transformers.monkey_patch": patches}.items():
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", module or SimpleNamespace(__path__=[]))
    with pytest.raises(ValueError, match="use_liger_kernel has no kernels for llama models; leave it out"):
        check_means(Recipe(model=tiny, trainer={"use_liger_kernel": True}))
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"] = None
    check_means(Recipe(model=tiny, trainer={"use_liger_kernel": True}))


def test_each_package_says_how_it_is_installed():
    text = (PACKAGE.parents[1] / "pyproject.toml").read_text()
    extras = {line.split(" = ")[0] for line in text.splitlines() if " = [" in line}
    for requirement in PACKAGES.values():
        if "[" in requirement:
            assert requirement.split("[")[1].rstrip("]'") in extras


@pytest.mark.slow
def test_a_mistake_is_one_line_whatever_the_installed_libraries_log(tmp_path):
    """torchao, bitsandbytes and torch log while they are imported, before anything can be said."""
    command = [sys.executable, "-m", "inlay", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("inlay: ")]
    assert done.stderr.count("\n") == 1
