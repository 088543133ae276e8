"""What PEFT leaves to the user of some of its methods."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, initialize_lora_eva_weights
from transformers import TrainerCallback


def complete_peft_method(trainer: Any) -> None:
    """What PEFT leaves to the user of a method: EVA's pass over the data; AdaLoRA's part in every step."""
    chosen = trainer.model.peft_config["default"]
    if isinstance(chosen, AdaLoraConfig):
        trainer.add_callback(Allocation())
    elif isinstance(chosen, LoraConfig) and chosen.init_lora_weights == "eva":
        initialize_lora_eva_weights(trainer.model, trainer.get_train_dataloader(), show_progress_bar=False)


class Allocation(TrainerCallback):
    """AdaLoRA's penalty and ranks. PEFT adds the penalty to the model's own loss, which trl does not read."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        defects = [
            torch.linalg.matrix_norm(
                (p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(min(p.shape), device=p.device)
            )
            for name, p in model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]
        (model.peft_config["default"].orth_reg_weight * torch.stack(defects).mean()).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)
