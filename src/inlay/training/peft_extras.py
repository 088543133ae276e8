"""Complete those of PEFT's methods that leave work to their user."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, initialize_lora_eva_weights
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def complete_peft_method(trainer: Any) -> None:
    """Do what PEFT leaves to the user of a method: EVA's pass over the data; AdaLoRA's part in every step."""
    config = trainer.model.peft_config["default"]
    if isinstance(config, AdaLoraConfig):
        trainer.add_callback(Allocation())
    elif isinstance(config, LoraConfig) and config.init_lora_weights == "eva":
        initialize_lora_eva_weights(trainer.model, trainer.get_train_dataloader(), show_progress_bar=False)


class Allocation(TrainerCallback):
    """Apply AdaLoRA's penalty and ranks in every step; PEFT adds the penalty to a loss that trl does not read.

    A step that is passed over has no gradients, or NaN, and neither moves anything nor counts for the ranks.
    """

    moves = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: object
    ) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.moves = bool(grads) and all(bool(grad.isfinite().all()) for grad in grads)
        if not self.moves:
            return
        defects = [
            torch.linalg.matrix_norm(
                (p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(min(p.shape), device=p.device)
            )
            for name, p in model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]
        (model.peft_config["default"].orth_reg_weight * torch.stack(defects).mean()).backward()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: object
    ) -> None:
        if self.moves:
            model.base_model.update_and_allocate(state.global_step + 1)
