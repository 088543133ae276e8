"""Task grpo: rewards, what is trusted of them, and runs on a tiny model."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sizes import SIZES
from trl.trainer.utils import RepeatSampler

from inlay.cli import main
from inlay.data.prompts import prompt_examples
from inlay.methods import METHODS
from inlay.recipe import rewards
from inlay.recipe.reading import load_recipe
from inlay.recipe.recipe import Recipe
from inlay.training import checkpoints
from inlay.training.mixture import rules_of
from inlay.training.tasks import TASKS
from inlay.training.tasks.grpo import judges
from inlay.training.train import train
from inlay.training.trainers.trainer import ByEpoch

SILENT = Console(quiet=True)
OWN = "def letters(completions, **kwargs):\n    return [float(len(one[0]['content'])) for one in completions]\n"
OF_RUN = {
    "task": "grpo", "max_length": 96, "max_new_tokens": 6, "num_generations": 2, "batch_size": 4, "eval_size": 3,
    "samples": 1, "dtype": "float32", "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(autouse=True)
def nothing_imported(monkeypatch):
    monkeypatch.setattr(rewards, "_functions", {})
    monkeypatch.setattr(rewards, "_places", {})


def rewarded(given, texts: list[str], answers: list[str | None]) -> list[list[float | None]]:
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    found = judges(Recipe(task="grpo", data="x.jsonl", reward=given))
    return [one(prompts=[[]] * len(texts), completions=chats, answer=answers) for one in found]


def test_built_in_rewards():
    """By hand: text as it is, GSM8K's numbers as numbers, a format wherever it stands."""
    given = ["exact_match", {"format": "<a>.*</a>", "weight": 0.5}]
    texts = [" yes\n", "No.", "It is $1,002.0 <a>\n</a>", "1003"]
    answers = ["yes", "no", "Because.\n#### 1,002", "#### 1002"]
    assert rewarded(given, texts, answers) == [[1, 0, 1, 0], [0, 0, 1, 0]]


def test_a_function_is_found_beside_the_recipe_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "mine_a.py").write_text(OWN)
    (tmp_path / "r.yaml").write_text("task: grpo\ndata: x.jsonl\nreward: mine_a.py:letters\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), {})
    assert judges(recipe)[0](prompts=[[]], completions=[[{"role": "assistant", "content": "abc"}]], answer=[None]) == [
        3
    ]
    monkeypatch.setattr(rewards, "_functions", {})
    unread = load_recipe(str(tmp_path / "r.yaml"), {}, follow=False)
    with pytest.raises(ValueError, match="nothing is imported because a file of a run"):
        judges(unread)
    monkeypatch.chdir(tmp_path)
    judges(load_recipe(str(tmp_path / "r.yaml"), {"reward": "mine_a.py:letters"}, follow=False))  # named by a flag


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def f(x): return 1\n", "cannot be called with prompts, completions"),
        ("f = 3\n", "has no function 'f'"),
        ("async def f(**_): return []\n", "has no function 'f' that returns a list"),
        ("import nowhere_at_all\n", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_is_none_is_refused(body, says, tmp_path, monkeypatch):
    (tmp_path / f"mine_{abs(hash(body))}.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        rewards.import_reward(f"mine_{abs(hash(body))}.py:f")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 1 / 0", "reward: mine.py:f failed: ZeroDivisionError"),
        ("return [1.0]", "for 2 answers; accepted: a number for each"),
        ("return [float('nan'), 1]", "accepted: a number for each"),
    ],
)
def test_what_a_function_gives_is_checked(body, says, monkeypatch):
    scope: dict = {}
    exec(f"def f(**_): {body}", scope)
    monkeypatch.setitem(rewards._functions, "mine.py:f", scope["f"])
    with pytest.raises(ValueError, match=says):
        rewarded("mine.py:f", ["a", "b"], [None, None])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"reward": None}, "reward: task grpo needs one; accepted: exact_match"),
        ({"reward": "format"}, "format needs its regular expression"),
        ({"reward": "os"}, "'os' is no reward"),
        ({"reward": {"format": "("}}, "is no regular expression"),
        ({"reward": [{"format": "a", "weigh": 2}]}, "reward: no 'weigh'; did you mean 'weight'"),
        ({"batch_size": 6, "num_generations": 4}, "num_generations: 4 does not divide the 6 answers of a step"),
        ({"temperature": 0.0}, "temperature: 0.0 draws the same answer"),
        ({"max_new_tokens": 512}, "max_new_tokens: 512 leaves no room"),
        ({"step": "mezo"}, "task grpo learns from gradients"),
        ({"trainer": {"num_iterations": 2}}, "could not be resumed exactly"),
        ({"trainer": {"use_vllm": True}}, "generates with transformers alone"),
        ({"optimizer": "muon"}, "takes only transformers' optimisers"),
        ({"task": "kto"}, "reward is for task grpo, not kto"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(values, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**{"task": "grpo", "data": "x.jsonl", "reward": "exact_match", **values})


def test_prompts_and_their_references():
    rules = rules_of(Recipe(task="grpo", data="x.jsonl", reward={"format": "."}))
    assert prompt_examples([{"question": "a?", "answer": "b"}], rules) == [
        {"prompt": [{"role": "user", "content": "a?"}], "answer": "b"}
    ]
    chat = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert prompt_examples([{"messages": chat}], rules) == [{"prompt": chat[:1], "answer": "b"}]
    for prompt in ("a?", chat[:1]):
        assert prompt_examples([{"prompt": prompt}], rules) == [{"prompt": chat[:1], "answer": None}]


def test_prompts_of_an_epoch_come_in_an_order_of_its_own():
    """Whatever epochs came before; and differently in each."""

    def order(*epochs: int) -> list[int]:
        sampler = ByEpoch(RepeatSampler(range(9), mini_repeat_count=2, batch_size=3, seed=0), 0)
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found = list(sampler)
        assert len(found) == len(sampler)
        return found

    assert order(0, 1, 2) == order(2) != order(1)


def test_exact_match_and_starts_from_data_need_references(tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}?"}) for i in range(12)))
    for more, says in (
        ({"reward": "exact_match"}, "exact_match compares with"),
        ({"method": "eva"}, "eva starts from"),
    ):
        recipe = Recipe(
            **{**OF_RUN, "model": tiny, "data": str(tmp_path / "p.jsonl"), "reward": {"format": "a"}, **more}
        )
        with pytest.raises(ValueError, match=says):
            TASKS["grpo"].examples(recipe, TASKS["grpo"].processor(recipe), SILENT)


def run(tiny: str, data: str, output: Path, **more):
    given = {"method": "pissa", "args": {"r": 4}, "reward": {"format": "e"}, "steps": 2, "save_every": 0, **more}
    return train(Recipe(**{**OF_RUN, "model": tiny, "data": data, "output": str(output), **given}), SILENT)


def test_a_run_and_its_figures(tiny, data, tmp_path):
    """The held-out loss is the negative mean reward of greedy answers, which are those of the samples."""
    result = run(tiny, data, tmp_path / "run", samples=3)
    before, after = result.scores["reward"]
    assert (result.before, result.after) == (-before, -after)
    assert after == pytest.approx(sum("e" in one["after"] for one in result.samples) / 3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2
    assert all(0 <= row["reward"] <= 1 and row["completions/mean_length"] <= 6 for row in steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dota. the train of:UserWarning")
@pytest.mark.parametrize("method", [method.name for method in METHODS])
def test_every_method_learns_from_rewards(method, tiny, data, tmp_path):
    result = run(tiny, data, tmp_path / "run", method=method, args=SIZES[method], calibration=2, samples=0)
    assert math.isfinite(result.after)


@pytest.mark.slow
def test_rewards_rise(tiny, data, tmp_path):
    """Longer answers are rewarded, which a random model can learn."""
    (tmp_path / "own.py").write_text(OWN)
    reward = f"{tmp_path / 'own.py'}:letters"
    rewards.import_reward(reward)
    asked = {"reward": reward, "steps": 40, "num_generations": 8, "batch_size": 16}
    result = run(tiny, data, tmp_path / "run", **asked, samples=0)
    before, after = result.scores["reward"]
    assert after > before + 0.3


@pytest.mark.slow
def test_a_stopped_run_of_rewards_goes_on_to_the_same_end(tiny, data, tmp_path, monkeypatch):
    """Beyond the first epoch, whose order a sampler of trl's does not find again; its function is named again."""
    (tmp_path / "mine_b.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    base = ["--model", tiny, "--data", data, "--method", "pissa", "--r", "4", "--save-every", "6", "--steps", "12"]
    flags = [text for key, value in OF_RUN.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    command = ["train", *base, *flags, "--reward", "mine_b.py:letters", "--output"]
    main([*command, "whole"])

    def die(*_):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "rotate", die)
        with pytest.raises(SystemExit):
            main([*command, "broken"])
    monkeypatch.setattr(rewards, "_functions", {})
    with pytest.raises(SystemExit):
        main(["train", "--resume", "broken"])  # nobody named the function
    main(["train", "--resume", "broken", "--reward", "mine_b.py:letters"])
    files = [Path(folder) / "adapter" / "adapter_model.safetensors" for folder in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_step_with_nan_is_passed_over(tiny, data, tmp_path, monkeypatch):
    trainer, seen = TASKS["grpo"].trainer, []
    compute = trainer.compute_loss

    def broken(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        seen.append(1)
        return loss * torch.nan if len(seen) == 1 else loss

    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        run(tiny, data, tmp_path / "a")
    seen.clear()
    assert math.isfinite(run(tiny, data, tmp_path / "b", skip_nan=1).after)
