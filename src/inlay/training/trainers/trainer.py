"""The trainers of trl and transformers, with a run's safety and more ways to take a step.

A checkpoint is whole or not there, a stop leaves one, and no step is taken on NaN or Inf.
"""

from __future__ import annotations

import json
import math
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from trl import DPOTrainer, KTOConfig, SFTTrainer

from inlay.data.formats import Row
from inlay.data.render import IGNORED, prompt_ids
from inlay.evaluation.generate import answer
from inlay.files.untrusted import DamagedFileError
from inlay.host import distributed
from inlay.host.batched_queries import spread_queries
from inlay.host.lora_plus import raised
from inlay.host.penalty import add_penalty, penalised
from inlay.messages import first_line, loading
from inlay.models.scored_positions import base_model_of
from inlay.numerics.zeroth_order import ZerothOrder
from inlay.training import checkpoints
from inlay.training.checkpoints import Checkpoint
from inlay.training.trainers.batch_parts import InParts
from inlay.training.trainers.deepspeed_zero3 import for_all, for_own, gather_state, hold, load_state
from inlay.training.trainers.faults import bad_gradients, first_bad_output
from inlay.training.trainers.held_out import HeldOutTokens
from inlay.training.trainers.labelled_head import score_labelled_positions
from inlay.training.trainers.length_groups import LengthGroups, token_counts
from inlay.training.trainers.stop import Stop
from inlay.training.trainers.token_weights import WEIGHTS, WithWeights, scale_to_mean_one

if TYPE_CHECKING:
    from trl.trainer.utils import RepeatSampler

Base = transformers.Trainer if TYPE_CHECKING else object  # the trainers below have it after `Safe`
Inputs = dict[str, Any]  # a batch: of tensors, and what else a loss needs
Means = dict[str, list[float]]  # of metrics, one for each batch
LOADERS = """_load_from_checkpoint _load_callback_state _load_optimizer_and_scheduler _load_scaler _load_rng_state
_load_best_model""".split()
FOR_LOSS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", WEIGHTS, "label", "ref_logps", "ref_KL_logps",
            "KL_input_ids", "KL_attention_mask", "KL_completion_mask")  # in batches, beside inputs  # fmt: skip


class Safe(Base):
    """Extend a trainer: its checkpoints are whole, and it takes no step on NaN or Inf.

    Args:
        skips: how many steps with NaN or Inf are passed over before one ends the run.
        ratios: learning rates of roles over that of all others (LoRA+), see `raised`.
        zeroth: what estimates gradients in place of a backward pass.

    `run` is what a checkpoint says of its run. In several processes one of them writes checkpoints: the adapter and the
    optimiser's state of a sharded model are gathered, so that a run resumes in another number of processes, sharded or
    not.
    """

    def __init__(
        self,
        *args: Any,
        skips: int = 0,
        callbacks: list | None = None,
        ratios: Mapping[str, float] | None = None,
        zeroth: ZerothOrder | None = None,
        **kwargs: Any,
    ) -> None:
        self.stop = Stop()
        self.skips = skips
        self.run = {}
        self.base: str | None = None  # a mark of all its weights before they were adapted
        self.ratios, self.zeroth = ratios or {}, zeroth
        self.fault: str | None = None
        self.row_sums: list[list[float]] = []
        self.passed: dict[int, str] = {}  # steps that were passed over, and why
        self.penalises: bool | None = None  # whether a method has a penalty; None: not looked yet
        self.penalties: list[float] = []  # of the steps since the last row of metrics
        super().__init__(*args, callbacks=[*(callbacks or []), self.stop], **kwargs)
        stage = cast(Any, self.accelerator.state).deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 3
        if stage != 3:
            raise ValueError(
                f"zero_stage: {stage} is not handled; 3 is, and recipes/distributed/ddp.yaml shards nothing"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = cast(Dataset, self.train_dataset if train_dataset is None else train_dataset)
        return LengthGroups(token_counts(dataset), self.get_total_train_batch_size(self.args), self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        lengths = token_counts(eval_dataset)
        groups = LengthGroups(lengths, self.args.eval_batch_size, self.args.seed)
        return groups if lengths else super()._get_eval_sampler(eval_dataset)

    @property
    def sharded(self) -> bool:
        """Return whether FSDP2 or ZeRO-3 holds what is trained."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        self.check_finite()
        over = self.control.should_training_stop or step >= self.state.max_steps
        with checkpoints.staged_checkpoint(folder, step, over, self.run) as part:
            self.args.output_dir = str(part)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(checkpoints.path_of(folder, best)) if best else None
        if distributed.is_first():
            checkpoints.rotate(folder, step, self.args.save_total_limit, best)

    def check_finite(self) -> None:
        """Raise a ValueError if what is trained holds NaN or Inf."""
        named = cast(nn.Module, self.model).named_parameters()
        broken = [
            name for name, p in named if p.requires_grad and not distributed.own_shard(p).detach().isfinite().all()
        ]
        if broken := [name for names in distributed.gather_values(broken) for name in names]:
            kept = checkpoints.checkpoint_steps(Path(str(self.args.output_dir)))
            last = f"the checkpoint of step {kept[0]} is untouched" if kept else "there is no checkpoint from before it"
            raise ValueError(
                f"step {self.state.global_step}: {broken[0]} holds NaN or Inf; {last}; try a lower learning_rate"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as trl does; of a sharded model what is trained is gathered, not the base."""
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        state = distributed.whole_state(cast(nn.Module, self.model))
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = cast(Any, self.optimizer)
        schedule = cast(Any, self.lr_scheduler).state_dict()
        if self.is_deepspeed_enabled:
            state = gather_state(optimizer.optimizer, self.given, self.groups)
            schedule = for_all(schedule, self.groups)
        else:
            state = optimizer.state_dict()
            state["state"] = {
                i: {k: distributed.whole_tensor(v) if isinstance(v, Tensor) else v for k, v in own.items()}
                for i, own in state["state"].items()
            }
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule, Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.sharded:  # else `go_on` did, before it was sharded
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(Any, self.optimizer)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if self.is_deepspeed_enabled:
            load_state(optimizer.optimizer, self.given, state)
        else:
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            for i, own in state["state"].items():
                own.update({k: distributed.as_lies(v, weights[i]) for k, v in own.items() if isinstance(v, Tensor)})
            optimizer.load_state_dict(state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        schedule = for_own(schedule, self.groups) if self.is_deepspeed_enabled else schedule
        cast(Any, self.lr_scheduler).load_state_dict(schedule)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        made = super()._prepare_for_training(max_steps, train_dataloader, None)  # or it asks for DeepSpeed's own
        hold(self.accelerator)
        if resume_from_checkpoint:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return made

    def go_on(self, found: Checkpoint | None) -> None:
        """Train, from a checkpoint if there is one; what was over already is only loaded.

        Raises:
            ValueError: the checkpoint is sealed and yet none (somebody else made it); nothing in it runs.
        """
        state = None
        if found is not None:
            state = state_of(found)
            for name in LOADERS:  # what they call is torch's and PEFT's; training itself may fail as it does
                setattr(self, name, loading(str(found.path), DamagedFileError)(getattr(self, name)))
        if (
            found is not None and distributed.is_first()
        ):  # what was passed over is no checkpoint, of those that are kept
            for step in (step for step in checkpoints.checkpoint_steps(found.path.parent) if step > found.step):
                shutil.rmtree(checkpoints.path_of(found.path.parent, step), ignore_errors=True)
            best = state.best_global_step if state else None  # a process that was killed may have kept one more
            checkpoints.rotate(found.path.parent, found.step, self.args.save_total_limit, best)
        with self.stop:
            if found is not None and self.sharded:
                cast(PeftModel, self.model).load_adapter(str(found.path), "default", is_trainable=True)
            if found is None or state is None or not found.over:
                self.train(resume_from_checkpoint=str(found.path) if found else None)
                if distributed.in_any(self.stop.requested):  # after the last step, which may write no checkpoint
                    raise KeyboardInterrupt
                return
        self.state = state
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        path = checkpoints.path_of(found.path.parent, best) if best else found.path
        if self.sharded:
            self._prepare_for_training(self.state.max_steps, None, None)
            return
        with loading(str(path), DamagedFileError):
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(path), "default", is_trainable=True)
            else:
                self._load_from_checkpoint(str(path))

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Take a step as trl does, but move nothing where the loss or a gradient is not finite.

        Raises:
            ValueError: there is such a step, and as many as `skips` were passed over already.
        """
        backward = super().training_step if self.zeroth is None else self._ask
        loss = backward(model, inputs, num_items_in_batch)
        last = self.accelerator.sync_gradients  # of the micro-batches of a step
        if last:
            self._add_penalty(model)
        if self.fault is None:
            self.fault = self._find_fault(model, inputs, loss, last)
        if self.fault and last:
            self._pass_over(model)
        elif self.is_deepspeed_enabled and last:
            cast(Any, self.accelerator).deepspeed_engine_wrapped.engine.step()
        return loss

    def _add_penalty(self, model: nn.Module) -> None:
        if self.penalises is None:
            self.penalises = bool(penalised(model))
        scaler = self.accelerator.scaler  # of fp16's gradients
        value = add_penalty(model, 1.0 if scaler is None else scaler.get_scale()) if self.penalises else None
        self.penalties += [] if value is None else [value]

    def _ask(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any) -> Tensor:
        """Estimate a micro-batch's part in the gradient from losses alone.

        All micro-batches of a step share their directions. Over several processes the losses are averaged, so that all
        take the same step.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is None else 1

        def loss() -> Tensor:
            with self.compute_loss_context_manager():
                value = cast(Tensor, self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch))
            return cast(Tensor, self.accelerator.reduce(value.mean() / parts, "mean"))

        trained = [p for p in model.parameters() if p.requires_grad]
        zeroth = cast(ZerothOrder, self.zeroth)
        together = partial(spread_queries, self.accelerator.unwrap_model(model)) if zeroth.batched else None
        return zeroth.estimate(loss, trained, self.state.global_step, together)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create transformers' optimizer, with a rate of its own for each role that has one.

        Raises:
            ValueError: a library is missing, or the optimiser cannot take its arguments or what is trained.
        """
        made = self.optimizer is None
        try:
            optimizer = super().create_optimizer(model)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"optimizer: {first_line(error)}") from None
        if made and self.ratios:
            optimizer.param_groups[:] = raised(optimizer.param_groups, cast(nn.Module, self.model), self.ratios)
        if self.is_deepspeed_enabled and made:  # it will put flat shards in their place
            self.given = [p for group in optimizer.param_groups for p in group["params"]]
            self.groups = optimizer.state_dict()["param_groups"]
        return optimizer

    def _find_fault(self, model: nn.Module, inputs: Inputs, loss: Tensor, last: bool) -> str | None:
        lost, fault = not loss.isfinite(), None
        # fp16's loss scaling tries for infinite gradients, and passes over them itself
        bad = bad_gradients(model) if last and not lost and not self.args.fp16 else []
        if not distributed.in_any(lost or bool(bad)):
            return None
        if distributed.in_any(lost):  # then all look for where, as a sharded model's forward pass needs all
            place = first_bad_output(model, self.model_inputs(inputs))
            fault = f"the loss is {loss.item()}" + (f", first in the output of {place}" if place else "")
        elif bad:
            fault = f"the gradient of {bad[-1]} is not finite"
        found = distributed.gather_values((lost, fault))
        return next(text for own, text in sorted(found, key=lambda pair: not pair[0]) if text)

    def model_inputs(self, inputs: Inputs) -> Inputs:
        """Return what of a batch the model itself takes."""
        return self._prepare_inputs({key: value for key, value in inputs.items() if key not in FOR_LOSS})

    def _pass_over(self, model: nn.Module) -> None:
        step = self.state.global_step + 1
        if len(self.passed) >= self.skips:
            raise ValueError(
                f"step {step}: {self.fault}. Nothing was changed by it; try a lower learning_rate, or "
                f"--skip-nan {self.skips + 1} to pass over such a step"
            )
        if self.accelerator.scaler is None:
            model.zero_grad()  # to None: the optimiser moves nothing
        else:  # fp16's loss scaling fails without gradients, and passes over those that are not finite
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad.fill_(math.nan)
        self.passed[step], self.fault = str(self.fault), None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as trl does, with the penalty beside the loss; a step that was passed over has no loss, but a reason."""
        if "loss" in logs and self.penalties:
            logs["penalty"] = sum(self.penalties) / len(self.penalties)
            self.penalties = []
        why = self.passed.get(self.state.global_step) if "loss" in logs else None
        super().log({"passed_over": why} if why else logs, start_time)  # type: ignore[arg-type]


class CausalTrainer(Safe):
    """Extend a trainer of trl's: its fused head sees labelled positions alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.args.torch_compile:  # it would compile anew for every number of labels
            score_labelled_positions(base_model_of(self.model))
        if isinstance(self, SFTTrainer):
            self.data_collator = WithWeights(cast(Any, self.data_collator))


class Trainer(HeldOutTokens, CausalTrainer, InParts, SFTTrainer):
    """Extend trl's SFTTrainer, for instructions, plain text and images."""

    token_metrics = ("loss", "mean_token_accuracy", "entropy")

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the micro-batches of a step as transformers does, with weights that are 1 on average."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and WEIGHTS in batches[0]:
            scale_to_mean_one(batches, lambda own: cast(Tensor, self.accelerator.reduce(own.to(self.args.device))))
        return batches, count

    def token_scores(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Return which tokens are labelled, and each one's loss, whether it is the likeliest, and the entropy."""
        given = {key: value for key, value in inputs.items() if key != WEIGHTS}  # each counts once
        found = model(**given, use_cache=False, fused_lm_head=True)
        return found.label_mask, [-found.log_probs, found.is_top1, found.entropy]


class HeldOutMeans(Base):
    """Evaluate trl's metrics as means over all held-out examples; trl averages the means of batches."""

    counts: tuple[list[float], ...] = ()  # how many examples of each kind the batches of an evaluation hold

    def kinds(self, inputs: Inputs) -> list[int]:
        """Return how many examples of each kind that has metrics of its own a batch holds: here of one, pairs."""
        return [len(inputs["input_ids"]) // 2]

    def held_out_metrics(self) -> Means:
        """Return the values of each metric, one for each batch of an evaluation."""
        return cast(Any, self)._metrics["eval"]

    def average(self, found: Means) -> None:
        """Put the mean over all examples in the place of each metric's values."""
        for name, values in found.items():
            if len(values) == len(self.counts):
                found[name] = [weighted_mean(values, [count for (count,) in self.counts])]

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute a batch's loss as trl does, and count its examples."""
        own = torch.tensor(self.kinds(inputs), dtype=torch.float, device=self.args.device)
        self.counts = (*self.counts, cast(Tensor, self.accelerator.reduce(own)).tolist())
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as trl does."""
        if self.counts:
            self.average(self.held_out_metrics())
            self.counts = ()
        super().log(logs, start_time)


def weighted_mean(values: list[float], weights: list[float]) -> float:
    """Return the mean of values, each as often as its weight says."""
    return sum(map(operator.mul, values, weights)) / sum(weights)


class AreTokens:
    """Leave a data set as it is: its examples are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *how: object) -> Dataset:
        return dataset


class PreferenceTrainer(AreTokens, HeldOutMeans, CausalTrainer, DPOTrainer):
    """Extend trl's DPOTrainer, for preferences."""


class RewardTrainer(AreTokens, HeldOutMeans, Safe, trl.RewardTrainer):
    """Extend trl's RewardTrainer, for pairs of conversations."""


class KTOTrainer(HeldOutMeans, CausalTrainer, trl.KTOTrainer):
    """Extend trl's KTOTrainer, for answers that are tokens already."""

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: object, args: KTOConfig, dataset_name: str
    ) -> Dataset:
        """Return examples in the order of the run, shuffled once, each with another one's answer of its batch.

        trl's estimate of the KL divergence needs these, and therefore every epoch in the same order.
        """
        if dataset_name == "train":
            dataset = dataset.shuffle(seed=args.seed, keep_in_memory=True)
        if not self.calculate_KL:
            return dataset
        answers, size = dataset["completion_ids"][:], args.per_device_train_batch_size
        batches = (answers[start : start + size] for start in range(0, len(answers), size))
        others = [answer for batch in batches for answer in (batch[-1], *batch[:-1])]
        return dataset.add_column("KL_completion_ids", others)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        return SequentialSampler(eval_dataset)  # in the batches of which the other answers are

    def kinds(self, inputs: Inputs) -> list[int]:
        """Return how many answers are desirable, and how many are not."""
        return [int(inputs["label"].sum()), int((~inputs["label"]).sum())]

    def average(self, found: Means) -> None:
        """Put the mean over all answers of a kind in the place of its rewards, and their difference in the margin's."""
        counts = dict(zip(("chosen", "rejected"), zip(*self.counts, strict=True), strict=True))
        for kind, own in counts.items():
            if any(own):
                found[f"rewards/{kind}"] = [weighted_mean(found[f"rewards/{kind}"], [n for n in own if n])]
        if all(map(any, counts.values())):
            found["rewards/margins"] = [found["rewards/chosen"][0] - found["rewards/rejected"][0]]


class GRPOTrainer(CausalTrainer, trl.GRPOTrainer):
    """Extend trl's GRPOTrainer: prompts have the tokens of all other tasks, and held-out ones are answered greedily."""

    asked: list[Row]  # of the newest batch
    answered: Inputs  # and its answers, as tokens

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        return ByEpoch(cast("RepeatSampler", super()._get_train_sampler(train_dataset)), self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        return SequentialSampler(eval_dataset)

    def _tokenize_prompts(self, prompts: list[Row]) -> tuple[list[list[int]], None, Inputs]:
        return [prompt_ids(json.loads(row["example"]), self.tokenizer) for row in self.asked], None, {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the run's tokenizer."""
        return cast(PreTrainedTokenizerBase, self.processing_class)

    def _generate_and_score_completions(self, inputs: list[Row]) -> Inputs:
        self.asked = inputs
        try:
            return super()._generate_and_score_completions(inputs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ValueError(
                f"step {self.state.global_step + 1}: no answer can be drawn, as probabilities are NaN or Inf; nothing "
                "was changed by it; try a lower learning_rate"
            ) from error

    def _prepare_inputs(self, generation_batch: Inputs) -> Inputs:
        self.answered = super()._prepare_inputs(generation_batch)
        return self.answered

    def model_inputs(self, inputs: Inputs) -> Inputs:
        """Return the prompts and answers of the newest batch."""
        pairs = {"input_ids": ("prompt_ids", "completion_ids"), "attention_mask": ("prompt_mask", "completion_mask")}
        return {name: torch.cat([self.answered[part] for part in parts], 1) for name, parts in pairs.items()}

    def prediction_step(
        self, model: nn.Module, inputs: list[Row], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, None]:
        """Return the rewards of greedy answers, (prompts, functions), which transformers gathers."""
        chats = [json.loads(row["example"]) for row in inputs]
        unwrapped = self.accelerator.unwrap_model(self.model)
        texts = answer(unwrapped, self.tokenizer, chats, cast(int, self.max_completion_length))  # the recipe gives it
        given = {
            "prompts": [row["prompt"] for row in inputs],
            "completions": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
            "answer": [row["answer"] for row in inputs],
            "trainer_state": self.state,
            "log_extra": nothing,
            "log_metric": nothing,
        }
        judges = cast(list[Callable[..., list[float | None]]], self.reward_funcs)
        columns = [[math.nan if one is None else one for one in judge(**given)] for judge in judges]
        return None, torch.tensor(columns, device=self.args.device).T.contiguous(), None

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        """Evaluate as transformers does, with mean rewards as metrics; the loss is the negative reward."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        each = torch.as_tensor(np.asarray(output.predictions, dtype=np.float64))
        rewards = (each * self.reward_weights.to(each)).nansum(1)
        self.row_sums = [[1.0, -reward] for reward in rewards.tolist()]
        found = {"loss": -rewards.mean().item(), "reward": rewards.mean().item()}
        names = [f"rewards/{name}/mean" for name in self.reward_func_names]
        found |= dict(zip(names, each.nanmean(0).tolist(), strict=True))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})


def nothing(*args: object) -> None:
    """Log nothing, where trl's rewards may log something."""


class ByEpoch(Sampler[int]):
    """Draw as trl's sampler does, in an order that the seed and the epoch give, so that runs resume."""

    def __init__(self, sampler: RepeatSampler, seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is of; transformers calls this."""
        if self.sampler.shuffle:
            self.sampler.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)


class PlainTrainer(Safe, transformers.Trainer):
    """Extend transformers' own trainer, so that it takes an adapter as trl's do, and the mean over a step's batches."""

    def __init__(self, model: Any, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any) -> None:
        model = get_peft_model(model, peft_config) if peft_config is not None else model
        if isinstance(model, PeftModel) and kwargs["args"].gradient_checkpointing:
            cast(Any, model).enable_input_require_grads()
        super().__init__(model, *args, **kwargs)
        # BERT, T5, every regression: the loss is a batch's mean although `forward` takes the count of a whole step, and
        # transformers would add these means up over micro-batches and processes.
        self.model_accepts_loss_kwargs = False
        if self.label_smoother is not None and isinstance(self.data_collator, DataCollatorForSeq2Seq):
            self.data_collator.model = self.model  # smoothing takes out the labels, of which a model makes its inputs


class TargetTrainer(HeldOutTokens, PlainTrainer):
    """Extend transformers' own trainer, for models whose every label is a token of a target text.

    The loss of a step is the mean over all its tokens, however they are divided into micro-batches and processes.
    """

    tokens: Tensor | None = None  # of targets in a micro-batch, on average over the step; None: it is not of a step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the micro-batches of a step as transformers does, and count their tokens."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            own = torch.stack([target_tokens(batch).float() for batch in batches]).mean()
            self.tokens = cast(Tensor, self.accelerator.reduce(own.to(self.args.device), "mean"))
        return batches, count

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean loss of a micro-batch, weighted by its share of the step's tokens."""
        own = target_tokens(inputs).to(self.args.device)
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[arg-type]
        return cast(Tensor, loss) if self.tokens is None else cast(Tensor, loss) * (own / self.tokens)

    def token_scores(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Return which tokens are no padding, and each one's loss."""
        logits, labels = model(**inputs).logits, inputs["labels"]
        losses = cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none", ignore_index=IGNORED)
        return labels != IGNORED, [losses]


def target_tokens(batch: Inputs) -> Tensor:
    """Return how many tokens of targets a batch holds."""
    return (batch["labels"] != IGNORED).sum()


def state_of(found: Checkpoint) -> TrainerState:
    """Return what transformers keeps of a run in its checkpoint.

    Raises:
        ValueError: it is none.
    """
    with loading(f"{found.path / TRAINER_STATE_NAME}", DamagedFileError):
        state = TrainerState.load_from_json(str(found.path / TRAINER_STATE_NAME))
        numbers = (state.num_input_tokens_seen, state.total_flos, state.best_metric or 0, state.best_global_step or 0)
        if state.global_step != found.step or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("it is of another run")
        state.log_history[:] = list(state.log_history)
    return state
