"""Name the methods that Inlay's are compared with: every adapter of PEFT's, and full fine-tuning.

`method: peft:dora` in a recipe stands for a PEFT config, and `args` are that config's fields.
"""

from __future__ import annotations

import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, cast

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, AdaLoraConfig, LoraConfig, PeftConfig

from inlay.host.config import check_where
from inlay.messages import did_you_mean
from inlay.recipe.schema import describe_type

FULL = "full"
PREFIX = "peft:"
ADALORA = "peft:adalora"

# Methods that PEFT offers as a field of LoRA's config.
OF_LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
}
OWN_STEPS = ("lora_ga", "corda", "loftq")  # starts that need more than a config
SIZE_FIELDS = {"adalora": "init_r", "fourierft": "n_frequency", "oft": "oft_block_size"}  # else r


def is_inlay(method: str) -> bool:
    """Return whether a recipe's `method` is one of Inlay's."""
    return method != FULL and not method.startswith(PREFIX)


def peft_method_names() -> list[str]:
    """Return the names that may follow `peft:`."""
    return sorted({kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"inlay"} | set(OF_LORA))


def peft_config(
    method: str, args: Mapping[str, Any], where: Mapping[str, Any], steps: int, task_type: str = "CAUSAL_LM"
) -> PeftConfig:
    """Return the PEFT config of `peft:NAME`; alpha defaults to r, so that another rank keeps the scale.

    Args:
        method: peft:NAME.
        args: fields of the config.
        where: target_modules and the like; fields that this config lacks are left out.
        steps: optimiser steps of the whole run, which AdaLoRA needs.
        task_type: PEFT's name of the task.

    Raises:
        ValueError: an unknown name, an unknown field, or a value that PEFT refuses.
    """
    name, cls = method.removeprefix(PREFIX), peft_config_class(method)
    names = {f.name for f in fields(cls)}
    for key in args:
        if key not in names:
            raise ValueError(f"{method}: {cls.__name__} has no {key!r}; {did_you_mean(key, names)}")
    for key, hint in hints_of(cls).items():
        if key in args and not is_of_type(hint, args[key]):
            raise ValueError(f"{method}: {key}: {args[key]!r:.100} is not {kinds(hint)}")
    values = {**{k: v for k, v in where.items() if k in names}, **OF_LORA.get(name, {}), **args}
    if (start := values.get("init_lora_weights")) in OWN_STEPS:
        raise ValueError(f"{method}: init_lora_weights={start!r} needs a pass over data before the adapter is created")
    if issubclass(cls, AdaLoraConfig):
        r = values.setdefault("init_r", AdaLoraConfig.init_r)
        values = {"total_step": steps, "target_r": max(1, 2 * r // 3), "lora_alpha": r, **values}
    elif issubclass(cls, LoraConfig):
        values.setdefault("lora_alpha", values.get("r", LoraConfig.r))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about defaults that were not chosen here
            config = cls(task_type=task_type, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{method}: {' '.join(str(error).split())}") from None
    check_where(config)
    return config


def hints_of(cls: type) -> dict[str, object]:
    """Return the types of a config's fields; none where they name what is not imported."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def kinds(hint: object) -> str:
    """Describe a type of a field of PEFT's in words."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(kinds, inner))
    return f"a list of entries, each {kinds(inner[0])}" if typing.get_origin(hint) is list else describe_type(hint)


def is_of_type(hint: object, value: object) -> bool:
    """Return whether a `value` of YAML is of the type of a field of PEFT's, as far as that type is plain."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_of_type(option, value) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(is_of_type(inner[0], one) for one in value)
    if hint in (int, float):  # PEFT takes fractions for some that it declares as whole, such as lora_alpha
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is dict or hint in (str, bool, list, dict, type(None)):
        return isinstance(value, cast(type, origin or hint))
    return True


def peft_config_class(method: str) -> type[PeftConfig]:
    """Return the config class of `peft:NAME`.

    Raises:
        ValueError: PEFT has no method of that name.
    """
    name = method.removeprefix(PREFIX)
    if name not in peft_method_names():
        raise ValueError(f"PEFT has no method {name!r}; {did_you_mean(name, peft_method_names())}")
    kind = "lora" if name in OF_LORA else name
    return next(cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k.value.lower() == kind)


def peft_size_field(method: str) -> str | None:
    """Return the field of a PEFT method that sets how many parameters it trains; None if it has none."""
    name = SIZE_FIELDS.get(method.removeprefix(PREFIX), "r")
    return name if name in [f.name for f in fields(peft_config_class(method))] else None


def without_start(config: PeftConfig | None) -> PeftConfig | None:
    """Return `config` for the meta device, where no start can be computed from values."""
    return replace(config, init_lora_weights=True) if isinstance(config, LoraConfig) else config
