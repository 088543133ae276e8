"""What is compared with our methods: every adapter PEFT has, by its type's name, and full fine-tuning.

`method: peft:dora` in a recipe is a config of PEFT's, `args` are that config's own fields.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, AdaLoraConfig, LoraConfig, PeftConfig

from inlay.host.config import check_where
from inlay.messages import did_you_mean

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


def is_inlay(method: str) -> bool:
    """Whether a recipe's method is one of Inlay's."""
    return method != FULL and not method.startswith(PREFIX)


def peft_method_names() -> list[str]:
    """What may follow `peft:`."""
    return sorted({kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"inlay"} | set(OF_LORA))


def peft_config(
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
    name, cls = method.removeprefix(PREFIX), peft_config_class(method)
    have = {f.name for f in fields(cls)}
    for key in args:
        if key not in have:
            raise ValueError(f"{method}: {cls.__name__} has no {key!r}; {did_you_mean(key, have)}")
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


def peft_config_class(method: str) -> type[PeftConfig]:
    """The config of `peft:NAME`.

    Raises:
        ValueError: PEFT has none of that name.
    """
    name = method.removeprefix(PREFIX)
    if name not in peft_method_names():
        raise ValueError(f"PEFT has no method {name!r}; {did_you_mean(name, peft_method_names())}")
    kind = "lora" if name in OF_LORA else name
    return next(cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value.lower() == kind)


def peft_size_field(method: str) -> str | None:
    """The field of a PEFT method that sets how much it trains, if there is one."""
    name = SIZES.get(method.removeprefix(PREFIX), "r")
    return name if name in [f.name for f in fields(peft_config_class(method))] else None


def without_start(config: PeftConfig | None) -> PeftConfig | None:
    """The config for the meta device, where no start can be made from values."""
    return replace(config, init_lora_weights=True) if isinstance(config, LoraConfig) else config
