"""The private methods of transformers' Trainer that ours replace or call: it still calls them, in the same way."""

import inspect

import pytest
import torch
import transformers
from torch import nn
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer

from inlay.training.launch import launch

REPLACED = """_save_checkpoint _save_optimizer_and_scheduler _load_from_checkpoint _load_optimizer_and_scheduler
_prepare_for_training _load_callback_state _load_scaler _load_rng_state _load_best_model _get_train_sampler
_get_eval_sampler""".split()
CALLED = {
    "_save": ["output_dir", "state_dict"],
    "_prepare_inputs": ["inputs"],
    "save_model": ["output_dir", "_internal_call"],
}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


def listening(calls: list[str]) -> type[transformers.Trainer]:
    """A trainer that notes which of its private methods are called."""

    def noted(name):
        def method(self, *args, **kwargs):
            calls.append(name)
            return getattr(transformers.Trainer, name)(self, *args, **kwargs)

        return method

    return type("Listening", (transformers.Trainer,), {name: noted(name) for name in (*REPLACED, *CALLED)})


def test_transformers_calls_what_our_trainers_replace(tmp_path):
    calls, rows = [], [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_steps=1, eval_steps=1, eval_strategy="steps",
        load_best_model_at_end=True, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    for resume in (None, str(tmp_path / "checkpoint-1")):
        trainer = listening(calls)(Regression(), arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
    assert {*calls} == {*REPLACED, *CALLED}


@pytest.mark.parametrize("name", CALLED)
def test_transformers_takes_what_our_trainers_pass(name):
    assert list(inspect.signature(getattr(transformers.Trainer, name)).parameters) == ["self", *CALLED[name]]


def test_trl_prepares_preferences_where_our_trainer_leaves_them():
    assert list(inspect.signature(DPOTrainer._prepare_dataset).parameters)[:2] == ["self", "dataset"]


@pytest.mark.parametrize("trainer", [KTOTrainer, RewardTrainer])
def test_trl_prepares_pairs_and_labelled_answers_likewise(trainer):
    names = ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert list(inspect.signature(trainer._prepare_dataset).parameters) == names


@pytest.mark.parametrize(
    ("name", "takes"), [("_tokenize_prompts", "prompts"), ("_generate_and_score_completions", "inputs")]
)
def test_trl_asks_our_trainer_for_the_tokens_of_prompts(name, takes):
    """That the tokens are ours shows in a run's rewards: prompts come without what the chat template gets beside."""
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == ["self", takes]


def test_trl_has_trainers_without_a_reference():
    from inlay.training.trainers.experimental import ORPOTrainer, SimPOTrainer

    for trainer in (ORPOTrainer, SimPOTrainer):
        assert {"padding_value", "device"} <= inspect.signature(trainer.concatenated_inputs).parameters.keys()
        of_trl = next(cls for cls in trainer.__mro__ if cls.__module__.startswith("trl.experimental"))
        assert "map(self.tokenize_row" in inspect.getsource(of_trl.__init__)


def test_accelerate_reads_the_flags_of_a_launch(monkeypatch):
    asked = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("accelerate.commands.launch.launch_command", asked.append)
    assert launch(["train", "--num-processes", "2", "--seed", "3"], 2, None) == 0
    (found,) = asked
    assert (found.module, found.training_script) == (True, "inlay")
    assert found.training_script_args == ["train", "--seed", "3"]
    assert (found.num_processes, found.main_process_port) == (2, 0)
    assert found.config_file.endswith("ddp.yaml")
