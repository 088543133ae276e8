"""Which examples make a batch, and how many steps a run has of them."""

import json
from itertools import combinations, pairwise

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from inlay.models.base import BaseModel
from inlay.recipe.recipe import Recipe
from inlay.training.arguments import optimizer_steps
from inlay.training.base_model import load_training_model
from inlay.training.fit import build_trainer
from inlay.training.prepared import Prepared
from inlay.training.tasks import TASKS
from inlay.training.trainers import batch_parts
from inlay.training.trainers.batch_parts import PASS, cut_by_length, parts_of
from inlay.training.trainers.length_groups import LengthGroups, padded_tokens, token_counts, tokens_spared

SILENT = Console(quiet=True)


def test_lengths_are_of_all_ids_of_an_example():
    rows = [{"prompt_ids": [1] * n, "chosen_ids": [2] * (n + 1), "text": "x"} for n in range(5)]
    kept = Dataset.from_list(rows).filter(lambda row: len(row["prompt_ids"]) != 2)
    assert token_counts(kept) == [1, 3, 7, 9]
    assert token_counts(Dataset.from_list([{"text": "x"}])) == []


def test_groups_are_of_similar_length_and_of_an_epoch():
    lengths = torch.randint(5, 500, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler, orders = LengthGroups(lengths, 8, seed=3), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(203)) == sorted(orders[0])
    assert orders[0] != list(LengthGroups(lengths, 8, seed=4))

    def padded(order):
        return sum(8 * max(lengths[i] for i in order[k : k + 8]) for k in range(0, 203, 8))

    assert padded(orders[0]) < 1.2 * sum(lengths) < padded(range(203))
    means = [sum(lengths[i] for i in orders[0][k : k + 8]) for k in range(0, 200, 8)]
    assert means != sorted(means, reverse=True)  # as transformers' sampler has them: first long ones, then short ones


def test_what_groups_spare_is_the_share_of_padding():
    assert padded_tokens([5, 1, 3], [2, 0, 1], 2) == 5 + 5 + 1
    assert tokens_spared([7] * 40, 4, 8, seed=0) == 0
    lengths = [10, 100] * 40
    spared = tokens_spared(lengths, 4, 4, seed=0)
    assert 1 - 80 * 55 / (80 * 100) > spared > 0.3  # random batches are nearly all 100 long


@pytest.mark.parametrize(("words", "grouped"), [(1, False), (60, True)])
def test_groups_are_chosen_where_they_spare_a_twentieth(words, grouped, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q {i}", "completion": "a " * (1 + i * (words - 1) // 39)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    values = {"eval_size": 4, "batch_size": 4, "dtype": "float32", "group_by_length": "auto"}
    recipe = Recipe(model=tiny, data=str(path), **values)
    trainer = settled(recipe, tmp_path)
    assert trainer.args.train_sampling_strategy == ("group_by_length" if grouped else "random")


def settled(recipe: Recipe, folder, dtype=torch.float32):
    """The trainer of a recipe."""
    task, tokenizer = TASKS[recipe.task], BaseModel(recipe.model).tokenizer()
    rows = task.examples(recipe, tokenizer, SILENT)
    prepared = Prepared(recipe, recipe.base_model, dtype, folder, tokenizer, rows, SILENT)
    return build_trainer(prepared, load_training_model(prepared))


def test_groups_are_drawn_by_our_sampler(short, tiny, tmp_path):
    """Of a step's batches, in an order that follows the epoch; held-out rows too."""
    values = {"batch_size": 2, "accumulation": 3, "eval_size": 4, "dtype": "float32", "group_by_length": True}
    trainer = settled(Recipe(model=tiny, data=short, seed=5, **values), tmp_path)
    loader = trainer.get_train_dataloader()
    sampler = loader.batch_sampler.sampler
    assert isinstance(sampler, LengthGroups)
    assert (len(sampler), sampler.size, sampler.seed) == (60, 6, 5)
    loader.set_epoch(1)
    assert sampler.epoch == 1
    assert isinstance(trainer.get_eval_dataloader().batch_sampler.sampler, LengthGroups)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7))
def test_parts_of_a_batch_cost_least(lengths):
    """Beside every way to cut the rows, in the order of their lengths."""
    parts = cut_by_length(lengths)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    ordered, n = sorted(lengths), len(lengths)
    ways = [(0, *inner, n) for k in range(n) for inner in combinations(range(1, n), k)]
    least = min(sum((b - a) * ordered[b - 1] + PASS for a, b in pairwise(way)) for way in ways)
    assert sum(len(part) * max(lengths[i] for i in part) + PASS for part in parts) == least


def test_a_part_is_as_long_as_its_longest_row():
    """Padding on the left is kept, because it counts in the positions."""
    ids = torch.arange(4 * 200).view(4, 200)
    mask = torch.ones(4, 200, dtype=torch.long)
    mask[0, 10:] = mask[2, 12:] = mask[3, :150] = 0
    short_rows, long_rows = parts_of({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(short_rows["input_ids"], ids[[0, 2], :12])
    assert torch.equal(long_rows["attention_mask"], mask[[1, 3]])
    whole = {"input_ids": ids[[1, 1]], "attention_mask": mask[[1, 1]]}
    assert parts_of(whole)[0] is whole


@pytest.mark.parametrize("weighted", [False, True])
def test_parts_have_the_loss_and_the_gradients_of_the_batch(weighted, tiny, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    sizes = [1, 2, 90, 3, 100, 1, 5, 95, 2, 2, 4, 80]
    rows = [{"prompt": f"q {i}", "completion": "a " * size} for i, size in enumerate(sizes)]
    if weighted:
        user, assistant = {"role": "user"}, {"role": "assistant"}
        rows = [
            {
                "messages": [
                    {**user, "content": row["prompt"]},
                    {**assistant, "content": row["completion"], "weight": 1 + i % 3},
                ]
            }
            for i, row in enumerate(rows)
        ]
    path.write_text("\n".join(map(json.dumps, rows)))

    def step(cost: float):
        monkeypatch.setattr(batch_parts, "PASS", cost)
        values = {"eval_size": 2, "batch_size": 5, "accumulation": 2, "dtype": "float32", "max_length": 256}
        trainer = settled(Recipe(model=tiny, data=str(path), method="lora", args={"r": 2}, **values), tmp_path)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 2
        sizes = []
        trainer.model.register_forward_pre_hook(
            lambda *given: sizes.append(given[2]["input_ids"].shape), with_kwargs=True
        )
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
        losses = [trainer.training_step(trainer.model, batch, count) for batch in batches]
        named = trainer.model.named_parameters()
        noted = trainer._metrics["train"]
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        return losses, gradients, [noted[name] for name in ("entropy", "mean_token_accuracy", "num_tokens")], sizes

    losses, gradients, noted, shapes = step(48)
    whole, expected, means, padded = step(float("inf"))
    assert len(padded) == 2
    assert len(shapes) > 2
    assert sum(r * w for r, w in shapes) < 0.7 * sum(r * w for r, w in padded)
    torch.testing.assert_close(losses, whole)
    assert gradients.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=float(largest) * 1e-5)
    for own, mean in zip(noted, means, strict=True):
        assert own == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "divides"),
    [
        ({}, True),
        ({"dtype": "bfloat16"}, False),
        ({"trainer": {"neftune_noise_alpha": 5.0}}, False),
        ({"optimizer": "adalomo"}, False),
    ],
)
def test_batches_are_whole_where_parts_would_mean_something_else(more, divides, short, tiny, tmp_path):
    values = {"eval_size": 4, "dtype": "float32", **more}
    recipe = Recipe(model=tiny, data=short, **values)
    assert settled(recipe, tmp_path, getattr(torch, values["dtype"]))._divides() == divides


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> str:
    """Sixty-four questions and answers of a word."""
    path = tmp_path_factory.mktemp("short") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q {i}", "completion": f"a {i % 13}"}) for i in range(64)))
    return str(path)


@pytest.mark.parametrize("method", ["bone", "peft:adalora"])
@pytest.mark.parametrize("packing", [True, False])
def test_shares_of_a_run_are_of_the_steps_it_has(packing, method, short, tiny, tmp_path):
    """Not of the steps that examples would make before they are packed."""
    values = {"packing": packing, "method": method, "max_length": 256, "batch_size": 2, "epochs": 3.0, "warmup": 0.25}
    trainer = settled(Recipe(model=tiny, data=short, eval_size=4, dtype="float32", **values), tmp_path)
    steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert steps < 60 if packing else steps == 90
    assert trainer.args.warmup_steps == -(-steps // 4)
    if method == "bone":
        assert trainer.args.save_steps == -(-steps // 10)
    else:
        assert trainer.args.save_strategy == "no"
        assert trainer.model.base_model.rankallocator.peft_config.total_step == steps


@pytest.mark.parametrize(("more", "says"), [
    ({"packing": True}, "packing fills every sequence"),
    ({"streaming": True, "steps": 3}, "a stream is read in its own order"),
    ({"task": "language_modelling", "data": "a.txt"}, "all blocks"),
    ({"task": "vision", "data": "a.jsonl"}, "how long an image is"),
])  # fmt: skip
def test_groups_by_length_are_refused_where_there_are_none(more, says):
    with pytest.raises(ValueError, match=f"group_by_length: .*{says}.*; leave it out"):
        Recipe(group_by_length=True, **more)


def test_steps_are_those_of_whole_and_half_batches():
    recipe = Recipe(epochs=2.5, accumulation=2)
    assert optimizer_steps(recipe, examples=20, batch=4) == 8  # of five batches an epoch, the last alone
