"""What is compared with our methods: every adapter PEFT has, by its type's name, and full fine-tuning.

`method: peft:dora` in a recipe is a config of PEFT's, `args` are that config's own fields.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, initialize_lora_eva_weights
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import TrainerCallback

from inlay.host.config import check_where

FULL = "full"
PREFIX = "peft:"
ADALORA = "peft:adalora"
# Methods that PEFT has as a field of LoRA's config.
OF_LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
}
OWN_STEPS = ("lora_ga", "corda", "loftq")  # starts that need more from their user than a config
SIZES = {"adalora": "init_r", "fourierft": "n_frequency", "oft": "oft_block_size"}  # others: r


def is_ours(method: str) -> bool:
    """Whether a recipe's method is one of Inlay's."""
    return method != FULL and not method.startswith(PREFIX)


def names() -> list[str]:
    """What may follow `peft:`."""
    return sorted({kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"inlay"} | set(OF_LORA))


def config(
    method: str, args: Mapping[str, Any], where: Mapping[str, Any], steps: int, task_type: str = "CAUSAL_LM"
) -> PeftConfig:
    """A config of PEFT's from `peft:NAME`, its own fields, and where it applies; alpha is r unless it is given, so that
    another rank is no other scale.

    Args:
        where: target_modules and the like; what this type has no field for is left out.
        steps: of the whole run, which AdaLoRA must know.

    Raises:
        ValueError: an unknown name, an unknown field, or a value PEFT refuses.
    """
    name, cls = method.removeprefix(PREFIX), config_class(method)
    have = {f.name for f in fields(cls)}
    for key in args:
        if key not in have:
            raise ValueError(f"{method}: {cls.__name__} has no {key!r}; {instead(key, have)}")
    values = {**{k: v for k, v in where.items() if k in have}, **OF_LORA.get(name, {}), **args}
    if (start := values.get("init_lora_weights")) in OWN_STEPS:
        raise ValueError(f"{method}: init_lora_weights={start!r} needs a pass of its own before the adapter is made")
    if issubclass(cls, AdaLoraConfig):
        r = values.setdefault("init_r", AdaLoraConfig.init_r)
        values = {"total_step": steps, "target_r": max(1, 2 * r // 3), "lora_alpha": r, **values}
    elif issubclass(cls, LoraConfig):
        values.setdefault("lora_alpha", values.get("r", LoraConfig.r))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about defaults that were not chosen here
            made = cls(task_type=task_type, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{method}: {' '.join(str(error).split())}") from None
    check_where(made)
    return made


def config_class(method: str) -> type[PeftConfig]:
    """The config of `peft:NAME`.

    Raises:
        ValueError: PEFT has none of that name.
    """
    name = method.removeprefix(PREFIX)
    if name not in names():
        raise ValueError(f"PEFT has no method {name!r}; {instead(name, names())}")
    kind = "lora" if name in OF_LORA else name
    return next(cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value.lower() == kind)


def instead(name: str, choices: Iterable[str]) -> str:
    """The end of an error's line: the name that was meant, or all there are."""
    close = difflib.get_close_matches(name, choices := sorted(choices), 1)
    return f"did you mean {close[0]!r}?" if close else f"it has {', '.join(choices)}"


def size_field(method: str) -> str | None:
    """The field of a PEFT method that sets how much it trains, if there is one."""
    name = SIZES.get(method.removeprefix(PREFIX), "r")
    return name if name in [f.name for f in fields(config_class(method))] else None


def without_start(config: PeftConfig | None) -> PeftConfig | None:
    """The config for the meta device, where no start can be made from values."""
    return replace(config, init_lora_weights=True) if isinstance(config, LoraConfig) else config


def complete(trainer: Any) -> None:
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
