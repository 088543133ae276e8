"""The trainers of trl and transformers with a run's safety: whole checkpoints, a stop that keeps them, and no step on
NaN or Inf."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOTrainer, SFTTrainer

from inlay.workbench import checkpoints
from inlay.workbench.checkpoints import Checkpoint
from inlay.workbench.models import first_line

Base = transformers.Trainer if TYPE_CHECKING else object  # the trainers below have it after `Safe`
FOR_LOSS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")  # what DPO's batches hold beside inputs


class Stop(TrainerCallback):
    """In its block, Ctrl-C and SIGTERM end a run after the step it is in, with a checkpoint; a second one at once."""

    asked = False

    def __enter__(self) -> Stop:
        here = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
        self.before = {s: signal.signal(s, self._hear) for s in (signal.SIGINT, signal.SIGTERM) if here}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_global_step:  # the run folder may have moved
            state.best_model_checkpoint = str(checkpoints.path_of(Path(args.output_dir), state.best_global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.asked
        control.should_log = control.should_log or control.should_save  # so that no mean over steps is cut in two

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt


class Safe(Base):
    """A trainer of transformers' kind, with `checkpoints.staged` around its saving. `run`: what a checkpoint says of
    its run; `skips`: how many steps with NaN or Inf are passed over before one ends the run."""

    def __init__(self, *args: Any, skips: int = 0, callbacks: list | None = None, **kwargs: Any) -> None:
        self.stop, self.skips, self.run = Stop(), skips, {}
        self.fault: str | None = None
        self.passed: dict[int, str] = {}  # steps that were passed over, and why
        super().__init__(*args, callbacks=[*(callbacks or []), self.stop], **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        named = cast(nn.Module, self.model).named_parameters()
        if broken := [name for name, p in named if p.requires_grad and not p.isfinite().all()]:
            raise ValueError(f"step {step}: {broken[0]} holds NaN or Inf; the checkpoints before it are untouched")
        over = self.control.should_training_stop or step >= self.state.max_steps
        with checkpoints.staged(folder, step, over, self.run) as part:
            self.args.output_dir = str(part)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(checkpoints.path_of(folder, best)) if best else None
        checkpoints.rotate(folder, step, self.args.save_total_limit, best)

    def go_on(self, found: Checkpoint | None) -> None:
        """Train, from a checkpoint if there is one; what was over already is only loaded."""
        with self.stop:
            if found is None or not found.over or not isinstance(self.model, PeftModel):
                try:
                    self.train(resume_from_checkpoint=str(found.path) if found else None)
                except UnpicklingError as error:  # it would run code, in a checkpoint that somebody else sealed
                    raise ValueError(f"{found and found.path} is not read: {first_line(error)}") from None
                return
        self.state = TrainerState.load_from_json(str(found.path / TRAINER_STATE_NAME))
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        path = checkpoints.path_of(found.path.parent, best) if best else found.path
        cast(PeftModel, self.model).load_adapter(str(path), "default", is_trainable=True)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """As trl's; a step in which the loss or a gradient is not finite moves nothing.

        Raises:
            ValueError: there is such a step, and as many as `skips` were passed over already.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        last = self.accelerator.sync_gradients  # of the micro-batches of a step
        if self.fault is None:
            self.fault = self._find_fault(model, inputs, loss, last)
        if self.fault and last:
            self._pass_over(model)
        return loss

    def _find_fault(self, model: nn.Module, inputs: dict[str, Any], loss: Tensor, last: bool) -> str | None:
        if not loss.isfinite():
            given = {key: value for key, value in inputs.items() if key not in FOR_LOSS}
            place = first_bad_output(model, self._prepare_inputs(given))
            return f"the loss is {loss.item()}" + (f", first in the output of {place}" if place else "")
        if last and not self.args.fp16:  # whose loss scaling tries for infinite gradients, and passes over them itself
            bad = bad_gradients(model)
            return f"the gradient of {bad[-1]} is not finite" if bad else None
        return None

    def _pass_over(self, model: nn.Module) -> None:
        step = self.state.global_step + 1
        if len(self.passed) >= self.skips:
            raise ValueError(
                f"step {step}: {self.fault}. Nothing was changed by it; try a lower learning_rate, or "
                f"--skip-nan {self.skips + 1} to pass over such a step"
            )
        model.zero_grad()  # to None: the optimiser moves nothing
        self.passed[step], self.fault = str(self.fault), None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As trl's; a step that was passed over has no loss, but a reason."""
        why = self.passed.get(self.state.global_step) if "loss" in logs else None
        super().log({"passed_over": why} if why else logs, start_time)  # type: ignore[arg-type]


class Trainer(Safe, SFTTrainer):
    """trl's, for instructions, plain text and images."""


class PreferenceTrainer(Safe, DPOTrainer):
    """trl's, for preferences."""


class PlainTrainer(Safe, transformers.Trainer):
    """transformers' own, which takes an adapter as trl's do."""

    def __init__(self, model: Any, *args: Any, peft_config: PeftConfig | None = None, **kwargs: Any) -> None:
        model = get_peft_model(model, peft_config) if peft_config is not None else model
        if isinstance(model, PeftModel) and kwargs["args"].gradient_checkpointing:
            cast(Any, model).enable_input_require_grads()
        super().__init__(model, *args, **kwargs)


def bad_gradients(model: nn.Module) -> list[str]:
    """The parameters whose gradient holds NaN or Inf. The last one is nearest to where they come from: they spread
    backwards."""
    own = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not own:
        return []
    fine = torch.stack([grad.isfinite().all().to(own[0][1].device) for _, grad in own]).tolist()  # one wait for a GPU
    return [name for (name, _), good in zip(own, fine, strict=True) if not good]


@torch.no_grad()
def first_bad_output(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """The first module, innermost, whose output on a batch holds NaN or Inf."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
