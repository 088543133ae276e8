"""Methods that are not in the package: installed ones, modules that a person names, adapters whose method is gone."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from helpers import fails
from peft import get_peft_model
from torch import nn

from inlay import methods, outside
from inlay.cli import flags, main
from inlay.experiments.compare.spec import load_comparison
from inlay.host.config import InlayConfig
from inlay.methods import Bone
from inlay.models.adapters import Adapter
from inlay.recipe.rates import UNKNOWN
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.testing import check_method

ROOT = Path(__file__).parents[2]
GAINS = """
from dataclasses import dataclass, field
import torch
from inlay.method import Method

@dataclass(frozen=True, kw_only=True)
class Gains(Method):
    name = "gains"
    title = "Gains: one to an output"
    equation = "ΔW = lift diag(d) W"
    paper = "these tests"
    trains = "d (out)"
    zero_init = True
    reads_weight = True

    lift: float = field(default=1.0, metadata={"help": "factor on the gains", "above": 0})

    def start(self, W, stats=None):
        return {"d": torch.zeros(W.shape[0], device=W.device)}

    def delta(self, p, W):
        return self.lift * p["d"][:, None] * W.to(p["d"].dtype)
"""
SMALL = ["--steps", "1", "--batch-size", "4", "--samples", "0", "--eval-size", "4", "--learning-rate", "0.1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a module of one's own, after which nothing of it is left."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "_added", {})
    monkeypatch.setattr(methods, "_imports", {})
    monkeypatch.setattr(flags, "_learned", {})
    outside.installed_methods.cache_clear()
    (tmp_path / "my_gains.py").write_text(GAINS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    outside.installed_methods.cache_clear()


def install(folder: Path, monkeypatch, name: str, code: str, points: str) -> None:
    """Install a distribution `name` with one module, as pip would leave it."""
    about = folder / "site" / f"{name.replace('-', '_')}-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(f"[inlay.methods]\n{points}\n")
    (folder / "site" / f"{name.replace('-', '_')}.py").write_text(code)
    monkeypatch.syspath_prepend(folder / "site")
    outside.installed_methods.cache_clear()


def trained(place, tiny, records, *words: str) -> Path:
    main(["train", "--model", tiny, "--data", records, *SMALL, *words, "--output", str(place / "run")])
    return place / "run"


# -- a module of one's own --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_verb_takes_a_module_of_ones_own(place, tiny, records, capsys):
    """Its hyperparameter is a flag, it is listed and planned, and its adapter is used by all verbs that take one."""
    own = ["--import", "my_gains"]
    run = trained(place, tiny, records, *own, "--method", "gains", "--lift", "2")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["import"] == ["my_gains"]
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (about["args"], about["defined_in"]) == ({"lift": 2}, {"module": "my_gains"})
    assert "import my_gains  # defines the method" in (run / "adapter" / "README.md").read_text()
    capsys.readouterr()
    main(["methods", "--model", tiny, *own])
    told = capsys.readouterr().out
    assert "gains is from module my_gains" in told
    assert "│ gains " in told
    main(["plan", tiny, "--method", "gains", "--lift", "3", "--length", "16", "--device", "cpu", *own])
    assert "gains" in capsys.readouterr().out
    main(["schema", *own])
    properties = json.loads(capsys.readouterr().out)["properties"]
    assert "gains" in properties["method"]["examples"]
    assert {"lift"} <= properties["args"]["properties"].keys()
    main(["generate", str(run), "--prompt", "hi", "--tokens", "2", *own])
    main(["eval", str(run), "--task", "perplexity", "--data", records, "--limit", "2", *own])
    main(["inspect", str(run), *own])
    main(["merge", str(run), "merged", *own])
    main(["export", str(run), "lora", "--rank", "8", *own])
    assert (place / "merged" / "model.safetensors").exists()
    assert (place / "lora" / "adapter_model.safetensors").exists()
    main(["train", "--resume", str(run), *own])
    assert "is finished" in capsys.readouterr().out


def test_a_run_records_it_and_its_adapter_is_used(place, tiny, records):
    own = ["--import", "my_gains"]
    run = trained(place, tiny, records, *own, "--method", "gains", "--lift", "2")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["import"] == ["my_gains"]
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (about["args"], about["defined_in"]) == ({"lift": 2}, {"module": "my_gains"})
    main(["export", str(run), "lora", "--rank", "8", *own])
    assert (place / "lora" / "adapter_model.safetensors").exists()


def test_the_method_of_contributing_runs_in_any_folder(place, tiny, records, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    (place / "rows.py").write_text(code)
    main(["train", "--import", "rows", "--method", "rows", "--model", tiny, "--data", records, "--dry-run"])
    assert "method: rows" in capsys.readouterr().out
    check_method(methods.find("rows")(), lambda p, W: torch.diag(p["d"]) @ W)


def test_the_commands_of_the_page_run(place, tiny, records, capsys):
    """docs/add_a_method.md, but for its comparison, whose recipe is read."""
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    (place / "rows.py").write_text(code)
    (place / "compare.yaml").write_text(re.search(r"```yaml compare.yaml\n(.*?)```", page, re.DOTALL)[1])
    lines = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert [line.split()[1] for line in lines] == ["methods", "train", "compare", "merge"]
    for line in lines:
        words = line.split()[1:]
        if words[0] == "compare":
            assert [entry.name for entry in load_comparison(words[1]).entries] == ["lora", "rows"]
        else:
            main([*words, *(["--model", tiny, "--data", records, *SMALL] if words[0] == "train" else [])])
    assert (place / "merged" / "model.safetensors").exists()


def test_a_change_that_does_not_fit_a_weight_is_one_line(place, tiny, records, capsys):
    """A Kronecker product of sides that do not divide the weight's."""
    code = GAINS.replace("reads_weight = True", "").replace("d (out)", "B (out/r × in/r)").replace('"gains"', '"kron"')
    code = code.replace("lift: float = field(default=1.0", "r: int = field(default=8").replace('"above": 0', '"min": 1')
    code = code.replace('"d": torch.zeros(W.shape[0]', '"B": torch.zeros(W.shape[0] // self.r, W.shape[1] // self.r')
    code = code.replace('self.lift * p["d"][:, None] * W.to(p["d"].dtype)', 'torch.kron(torch.eye(self.r), p["B"])')
    (place / "kron.py").write_text(code)
    train = ["train", "--import", "kron", "--method", "kron", "--model", tiny, "--data", records, *SMALL]
    said = fails(capsys, *train, "--r", "7", "--output", "runs/seven")
    assert re.search(r"kron: ΔW is \(\d+, \d+\), and W is \(\d+, \d+\); choose hyperparameters that fit", said)
    main([*train, "--r", "8", "--output", "runs/eight"])


def test_fold_takes_it_too(place, tiny):
    main(["fold", tiny, "folded", "--import", "my_gains", "--method", "gains", "--lift=2"])
    about = json.loads((place / "folded" / "adapter" / "adapter_config.json").read_text())
    assert about["args"] == {"lift": 2}


def test_all_flags_are_shown_with_its_own(place, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--import=my_gains", "--help-all"])
    assert stop.value.code == 0
    assert "--lift" in capsys.readouterr().out
    assert "did you mean --lift?" in fails(capsys, "train", "--import", "my_gains", "--lifft", "2")


@pytest.mark.parametrize("named", ["my_gains", ["my_gains"], ["sub/../my_gains.py"]], ids=str)
def test_a_recipe_names_the_module_beside_it(place, named, capsys, monkeypatch):
    (place / "sub").mkdir()
    (place / "r.yaml").write_text(yaml.safe_dump({"import": named, "method": "gains", "args": {"lift": 3}}))
    if named == "my_gains":
        monkeypatch.chdir(place / "sub")
    recipe = load_recipe("../r.yaml" if named == "my_gains" else "r.yaml", {})
    assert recipe.config().build().lift == 3
    assert yaml.safe_load(recipe.to_yaml())["import"] == ([named] if named == "my_gains" else named)
    again = place / "again.yaml"
    again.write_text(recipe.differences())
    assert yaml.safe_load(again.read_text())["import"] == recipe.imports
    assert str(place) not in sys.path  # it could hide an installed package that is imported later


def test_its_flags_are_known_where_the_recipe_names_it(place, tiny, records, capsys):
    (place / "r.yaml").write_text("import: my_gains\nmethod: gains\n")
    main(["train", "--lift", "4", "r.yaml", "--model", tiny, "--data", records, "--dry-run"])
    assert "lift: 4" in capsys.readouterr().out


def test_the_class_names_its_default_rate(place, tiny, capsys):
    (place / "fast_gains.py").write_text(GAINS.replace("    zero_init", "    learning_rate = 0.07\n    zero_init"))
    main(["methods", "gains", "--model", tiny, "--import", "fast_gains"])
    said = " ".join(capsys.readouterr().out.split())
    assert "0.07 unless you give another (as its class says)" in said
    assert "defined in module fast_gains" in said
    assert Recipe(method="gains").rate == 0.07
    assert Recipe(method="gains", learning_rate=0.01).rate == 0.01
    assert Recipe(method="gains", optimizer="muon").rate == UNKNOWN.value


def test_a_class_that_is_imported_in_python_is_found(place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    import my_gains

    config = InlayConfig(method=my_gains.Gains(lift=2.0), target_modules=["0"])
    assert config.to_dict()["defined_in"] == {"module": "my_gains"}
    assert get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).active_adapter == "default"
    assert InlayConfig(method="bone", target_modules=["0"]).to_dict()["defined_in"] is None


def test_a_class_with_the_name_of_a_built_in_is_refused(place, capsys, monkeypatch):
    (place / "mine.py").write_text(GAINS.replace('"gains"', '"lora"'))
    line = fails(capsys, "methods", "--import", "mine")
    assert "mine.Gains is called 'lora', which is the name of inlay.methods.lora.LoRA; give it another name" in line
    (place / "whole.py").write_text(GAINS.replace('"gains"', '"full"'))
    assert "the name of full fine-tuning" in fails(capsys, "methods", "--import", "whole")
    (place / "twin.py").write_text(GAINS)
    assert "the name of my_gains.Gains" in fails(capsys, "methods", "--import", "my_gains", "--import", "twin")
    monkeypatch.syspath_prepend(place)
    import mine

    with pytest.raises(ValueError, match=r"mine\.Gains is called 'lora'"):
        InlayConfig(method=mine.Gains(), target_modules=["0"])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "gains"', "", "broken defines no method: no subclass of inlay.method.Method with a name"),
        ('name = "gains"', 'name = "my gains"', "name = 'my gains' is no name of a method"),
        ("@dataclass(frozen=True, kw_only=True)\n", "", "is no dataclass; write @dataclass(frozen=True, kw_only=True)"),
        ('paper = "these tests"', "", "broken.Gains has no paper"),
        ("zero_init = True", "learning_rate = -1", "learning_rate = -1 is no number above 0; write one, as in"),
        ("def start(", "def begin(", "broken.Gains does not define start"),
        ("default=1.0, ", "", "the hyperparameter 'lift' has no default"),
        (', metadata={"help": "factor on the gains", "above": 0}', "", "the hyperparameter 'lift' has no help"),
        ("import torch", "import torch, no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import torch", "1 / 0", "broken.py, line 3)"),
        ("import torch", "raise SystemExit", "import: broken cannot be imported: SystemExit"),
    ],
)
def test_what_is_wrong_with_a_module_is_one_line(place, capsys, old, new, says):
    assert old in GAINS
    (place / "broken.py").write_text(GAINS.replace(old, new))
    assert says in fails(capsys, "methods", "--import", "broken")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_gain", "there is no module 'my_gain' in {place} or installed; give the path of its file"),
        ("a/my_gains.py", "there is no Python file a/my_gains.py"),
        ("my-gains", "'my-gains' is no name of a Python module"),
        ("json.py", "another module is called 'json'"),
        ("torch", "torch defines no method"),
    ],
)
def test_a_module_that_is_none_is_one_line(place, capsys, name, says):
    (place / "json.py").write_text(GAINS)
    assert says.format(place=place) in fails(capsys, "methods", "--import", name)


def test_bad_imports_of_a_recipe_are_one_line(place, capsys):
    (place / "r.yaml").write_text("import: {a: 1}\n")
    assert "import: {'a': 1} is not the name of a module" in fails(capsys, "train", "r.yaml")


# -- nothing is imported because a file names it ----------------------------------------------------------------------


def test_an_adapter_whose_method_is_missing_says_how_to_get_it(place, tiny, records, capsys):
    """And the module that it names is not imported, although it lies there."""
    run = trained(place, tiny, records, "--method", "bone", "--r", "4")
    (place / "gone.py").write_text("open('imported', 'w').close()\n" + GAINS.replace('"gains"', '"gone"'))
    file = run / "adapter" / "adapter_config.json"
    about = json.loads(file.read_text()) | {"method": "gone", "args": {}, "defined_in": {"module": "gone"}}
    file.write_text(json.dumps(about))
    (run / "report.html").unlink()  # as of a run that is not finished
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"method": "gone", "args": {}, "import": ["gone"]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for words in (
        ["generate", str(run), "--prompt", "x"], ["inspect", str(run)], ["merge", str(run), "m"],
        ["export", str(run), "l"], ["eval", str(run), "--task", "perplexity", "--data", records],
    ):  # fmt: skip
        line = fails(capsys, *words)
        assert "unknown method 'gone'; the module gone defines it: add --import gone (from Python: import gone)" in line
    line = fails(capsys, "train", "--resume", str(run))
    assert "unknown method 'gone': its recipe imports gone" in line
    assert "add --import gone (or the path" in line
    assert not (place / "imported").exists()
    about["defined_in"] = {"module": "gone", "distribution": "inlay-gone"}
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"inlay-gone defines it .module gone.: if you trust it, pip install"):
        _ = Adapter.open(run).config
    about["defined_in"] = {"module": "gone; rm -r .", "distribution": "x"}
    file.write_text(json.dumps(about))
    assert "rm -r" not in fails(capsys, "generate", str(run), "--prompt", "x")
    assert outside.where_from({"module": "gone", "distribution": "a b"}).startswith("the module gone")
    assert "script or a notebook" in outside.where_from({"module": "__main__"})
    with pytest.raises(ValueError, match="defined_in='gone' is not a mapping"):
        InlayConfig(method="bone", defined_in="gone")
    assert not (place / "imported").exists()


# -- installed methods ------------------------------------------------------------------------------------------------


def test_an_installed_method_is_found_by_its_name_and_listed(place, monkeypatch, tiny, records, capsys):
    install(place, monkeypatch, "inlay-gains", GAINS, "gains = inlay_gains:Gains")
    run = trained(place, tiny, records, "--method", "gains", "--lift", "2")
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert about["defined_in"] == {"module": "inlay_gains", "distribution": "inlay-gains"}
    assert "import" in yaml.safe_load((run / "recipe.yaml").read_text())  # an empty list
    capsys.readouterr()
    main(["methods", "--model", tiny])
    told = capsys.readouterr().out
    assert "gains is from inlay-gains, module inlay_gains" in told
    assert InlayConfig(method="gains", args={"lift": 2.0}).build().lift == 2
    assert [m.name for m in methods.every()][-1] == "gains"


def test_an_installed_method_is_not_imported_for_others(place, monkeypatch, tiny, records):
    install(place, monkeypatch, "inlay-bad", "raise TypeError('of tomorrow')", "bad = inlay_bad:Bad")
    trained(place, tiny, records, "--method", "bone", "--r", "4")
    assert "inlay_bad" not in sys.modules


def test_an_installed_method_that_fails_is_named_with_its_distribution(place, monkeypatch, tiny, capsys):
    install(place, monkeypatch, "inlay-bad", "raise TypeError('of tomorrow')", "bad = inlay_bad:Bad")
    line = fails(capsys, "train", "--model", tiny, "--method", "bad")
    assert "inlay-bad 1.2 offers the method 'bad' (inlay_bad:Bad), which cannot be imported: TypeError: of tom" in line
    with pytest.warns(UserWarning, match="inlay-bad 1.2 offers the method 'bad'"):
        main(["methods", "--model", tiny])
    assert "bone" in capsys.readouterr().out
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--lifft", "2"])
    line = capsys.readouterr().err.splitlines()
    assert [text.split()[0] for text in line] == ["note:", "inlay:"]
    assert "unknown flag --lifft" in line[1]


@pytest.mark.parametrize(
    ("code", "point", "says"),
    [
        (GAINS, "gain = inlay_odd:Gains", "which is called 'gains'; its entry point has to have the method's name"),
        (GAINS, "gains = inlay_odd:torch", "which is no subclass of inlay.method.Method"),
        (GAINS, "gains = inlay_odd:Gone", "which cannot be imported: AttributeError"),
        (GAINS.replace('"gains"', '"bone"'), "bone = inlay_odd:Gains", "which is the name of inlay.methods.bone.Bone"),
    ],
)
def test_an_odd_entry_point_is_refused_where_it_is_used(place, monkeypatch, code, point, says):
    install(place, monkeypatch, "inlay-odd", code, point)
    name = point.partition(" ")[0]
    if name == "bone":
        assert methods.find(name) is Bone
        with pytest.warns(UserWarning, match=says):
            methods.every()
        return
    with pytest.raises(ValueError, match=says):
        methods.find(name)


def test_two_distributions_with_one_name_are_told_apart(place, monkeypatch):
    install(place, monkeypatch, "inlay-one", GAINS, "gains = inlay_one:Gains")
    install(place, monkeypatch, "inlay-two", GAINS, "gains = inlay_two:Gains")
    with pytest.raises(ValueError, match=r"inlay-(one|two) 1.2 .*offers too; uninstall one of the two"):
        methods.find("gains")


def test_help_imports_no_torch_with_an_installed_method(place, monkeypatch):
    install(place, monkeypatch, "inlay-gains", GAINS, "gains = inlay_gains:Gains")
    for words in (["--help"], ["train", "--help"], ["train", "--method"]):
        code = textwrap.dedent(f"""
            import sys
            sys.argv = ["inlay", *{words!r}]
            from inlay.cli import main
            try:
                main()
            except SystemExit:
                assert not {{"torch", "inlay_gains", "peft"}} & set(sys.modules)
                print("done")
        """)
        path = os.pathsep.join([str(place / "site"), str(ROOT / "src")])
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.stdout.endswith("done\n"), done.stderr


# -- other processes --------------------------------------------------------------------------------------------------

COMPARISON = """
import: my_gains
model: {model}
data: {data}
steps: 1
batch_size: 4
eval_size: 4
compare: {{methods: [lora, {{method: gains, args: {{lift: 2}}}}], learning_rates: [1e-2], seeds: [0], selection: 4}}
"""
SEARCH = """
import: my_gains
model: {model}
data: {data}
method: gains
steps: 1
batch_size: 4
eval_size: 4
tune: {{space: {{args.lift: {{low: 1.0, high: 2.0}}}}, trials: 1, selection: 4, rescore: {{top: 0}}}}
"""


@pytest.mark.slow
def test_trials_import_it_in_their_processes(place, tiny, records, monkeypatch):
    """It lies beside the recipe, and the command runs elsewhere."""
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    for verb, text in (("compare", COMPARISON), ("tune", SEARCH)):
        (place / f"{verb}.yaml").write_text(text.format(model=tiny, data=records))
        main([verb, str(place / f"{verb}.yaml"), "--output", verb])
        assert yaml.safe_load((place / "elsewhere" / verb / "best.yaml").read_text())["import"] == ["my_gains"]


@pytest.mark.slow
def test_processes_of_one_run_import_it(place, tiny, records):
    words = ["train", "--model", tiny, "--data", records, *SMALL, "--import", "my_gains", "--method", "gains"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "inlay", *words, "--lift", "2", "--num-processes", "2", "--output", "run"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((place / "run" / "adapter" / "adapter_config.json").read_text())["args"] == {"lift": 2}
