"""A user's own measure of a model, named in a recipe as "module:function": (model, tokenizer) -> a number."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any, cast

Metric = Callable[[Any, Any], float]


def load(name: str) -> Metric:
    """The function that `name` says, in a module of the working folder or an installed one. Its code is run: it is the
    user who names it.

    Raises:
        ValueError: it is not written as module:function, or there is no such function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"metric: {name!r} is not written as module:function, as in my_metric:exact_match")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's fails in its own ways
        raise ValueError(f"metric: {name} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ValueError(f"metric: {name} is no function of (model, tokenizer)")
    return cast(Metric, found)


def score(name: str, model: Any, tokenizer: Any) -> float:
    """What the metric says of a model, which is in evaluation mode meanwhile.

    Raises:
        ValueError: it is no finite number.
    """
    measure, was_training = load(name), model.training
    model.eval()
    value = measure(model, tokenizer)
    model.train(was_training)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"metric: {name} gave {value!r}, which is no finite number")
    return float(value)
