"""Weights of answers: a token of an answer with weight w counts w times, whatever the batches."""

import copy
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from inlay.data.formats import convert_records
from inlay.data.preferences import preference_examples
from inlay.recipe.recipe import Recipe
from inlay.training.examples import check_weights, is_weighted, token_dataset
from inlay.training.trainers.token_weights import WEIGHTS, WithWeights, scale_to_mean_one
from inlay.training.trainers.trainer import Trainer

ASK = {"role": "user", "content": "Say it."}


def chats(*weights):
    """Chats of two answers, of which each has a weight."""
    said = ["one", "two and three"]
    return convert_records(
        [
            {"messages": [m for text, weight in zip(said, pair, strict=True)
                          for m in (ASK, {"role": "assistant", "content": text, "weight": weight})]}
            for pair in weights
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(small_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(small_tokenizer), **sizes))


def trained(model, rows, tokenizer, folder, **values):
    """A model after two steps of plain descent, and the losses of these."""
    config = SFTConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=256, max_steps=2, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", remove_unused_columns=False, logging_steps=1,
        max_grad_norm=0.0, disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential", **values,
    )  # fmt: skip
    dataset = token_dataset(rows, tokenizer)
    made = Trainer(copy.deepcopy(model), args=config, train_dataset=dataset, eval_dataset=dataset,
                   processing_class=tokenizer)  # fmt: skip
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    return losses, torch.cat([p.detach().flatten() for p in made.model.parameters()]), made


def test_a_weight_of_two_is_an_answer_that_is_there_twice(model, small_tokenizer, tmp_path):
    """One micro-batch or two: the mean is over all tokens of a step."""
    weighted = chats((0, 2), (1, 0))
    repeated = chats((0, 1), (0, 1), (1, 0))
    losses, after, _ = trained(model, weighted, small_tokenizer, tmp_path, per_device_train_batch_size=2)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    again, in_parts, _ = trained(model, weighted, small_tokenizer, tmp_path, **parts)
    wanted, expected, _ = trained(model, repeated, small_tokenizer, tmp_path, per_device_train_batch_size=3)
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert again == pytest.approx(wanted, abs=1e-5)
    assert torch.allclose(after, expected, atol=1e-6)
    assert torch.allclose(in_parts, expected, atol=1e-6)


def test_only_the_ratio_of_weights_counts_and_held_out_tokens_count_once(model, small_tokenizer, tmp_path):
    plain, _, one = trained(model, chats((1, 1)), small_tokenizer, tmp_path, per_device_train_batch_size=1)
    for weights in ((0.01, 0.01), (7, 7)):
        losses, _, other = trained(model, chats(weights), small_tokenizer, tmp_path, per_device_train_batch_size=1)
        assert losses == pytest.approx(plain, abs=1e-5)
        assert other.evaluate()["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], abs=1e-5)


def test_weights_of_a_batch_stand_where_labels_do():
    rows = [{"labels": [-100, 5, 6], WEIGHTS: [1.0, 2.0, 2.0, 3.0]}, {"labels": [-100, 7], WEIGHTS: [1.0, 4.0]}]
    batch = WithWeights(lambda _: {"labels": torch.tensor([[-100, 5, 6], [-100, 7, -100]])})(rows)
    assert batch[WEIGHTS].tolist() == [[0, 2, 2], [0, 4, 0]]
    scale_to_mean_one([batch], lambda own: own)
    assert torch.allclose(batch[WEIGHTS], torch.tensor([[0, 0.75, 0.75], [0, 1.5, 0]]))


def test_what_does_not_go_with_weights_is_refused():
    assert [is_weighted(chats(pair)) for pair in ((1, 1), (0, 1), (0.5, 1))] == [False, False, True]
    check_weights(Recipe())
    for values, what in (
        ({"packing": True}, "packing"),
        ({"step": "mezo"}, "step: mezo"),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "trainer: label_smoothing_factor"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"do not go with {what}; leave it out, or --ignore weight")):
            check_weights(Recipe(**values))
    sides = {side: [ASK, {"role": "assistant", "content": side, "weight": 0.5}] for side in ("chosen", "rejected")}
    with pytest.raises(ValueError, match=r"chosen has an answer of weight 0\.5; a pair has none"):
        preference_examples([sides])
