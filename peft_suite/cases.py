"""Our configs in the shapes in which PEFT's test modules list theirs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
from sizes import fitting  # of our tests: run.py puts their folder on the path

from inlay import methods
from inlay.host.config import InlayConfig

NAMES = os.environ.get("PEFT_SUITE_METHODS", " ".join(method.name for method in methods.METHODS)).split()


# The layers of PEFT's test models, out × in.
LIN0, LIN1, CONV1D, CONVOLVED = (20, 10), (2, 20), (1, 5), (2, 10)
BOTH = LIN0, LIN1
TOKENS = {"emb": [0, 10]}
# Of a tenth of 40 entries, all may meet inputs that are 0; PEFT's tests ask that outputs change. The gradient of each
# factor of Deep LoRA is ε² of what it is at ε = 1: from 0.001 three steps of PEFT's tests move not all of them by 1e-4.
MORE: dict[str, dict[str, Any]] = {"snell": {"sparsity": 0.5}, "deep_lora": {"epsilon": 0.5}}
# In transformers' models; 2 elsewhere. Two of SVFit's numbers or four of LoRA-XS's move outputs by less than 1e-4.
SIZES = {"svfit": 16, "lora_xs": 8}


def kwargs(name: str, size: int = 2, shapes: tuple[tuple[int, int], ...] = (LIN0,), **more: Any) -> dict[str, Any]:
    """An InlayConfig's arguments, for layers of these shapes."""
    args = fitting(name, size, *shapes)
    return {"method": name, "args": None if args is None else {**args, **MORE.get(name, {})}, **more}


def subclass(name: str) -> type[InlayConfig]:
    """For tests that want a class whose defaults will do: our config with another default method."""
    return dataclass(type(f"{name}InlayConfig", (InlayConfig,), {"method": name, "__annotations__": {"method": str}}))


def custom(name: str) -> list[tuple]:
    """What PEFT tries every linear method of its own with, and Conv1D, whose weight lies the other way round."""
    cases = [
        (f"{name} {what}", model, InlayConfig, kwargs(name, 2, shapes, **more))
        for what, model, shapes, more in [
            ("one layer by name", "MLP", (LIN0,), {"target_modules": "lin0"}),
            ("one layer in a list", "MLP", (LIN0,), {"target_modules": ["lin0"]}),
            ("the other layer", "MLP", (LIN1,), {"target_modules": ["lin1"]}),
            ("both layers", "MLP", BOTH, {"target_modules": ["lin0", "lin1"]}),
            ("modules_to_save", "MLP", (LIN0,), {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ("modules_to_save twice", "MLP", BOTH, {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
            ("dropout", "MLP", (LIN0,), {"target_modules": ["lin0"], "dropout": 0.1}),
            ("scale", "MLP", (LIN0,), {"target_modules": ["lin0"], "scale": 2.0}),
            ("layer norm", "MLP_LayerNorm", BOTH, {"target_modules": ["lin0", "lin1"]}),
            ("Conv1D", "EmbConv1D", (CONV1D,), {"target_modules": ["conv1d"]}),
            ("tokens", "EmbConv1D", (CONV1D,), {"target_modules": ["conv1d"], "trainable_token_indices": TOKENS}),
            ("beside a convolution", "Conv2d", (CONVOLVED,), {"target_modules": ["lin0"]}),
        ]
    ]  # fmt: skip
    fits = [case for case in cases if case[3]["args"] is not None]  # a method may have no size that fits 1 × 5
    return [case for case in fits if methods.find(name).scales or "scale" not in case[3]]


def together(name: str) -> list[tuple]:
    """Two adapters, on the same layer and on different ones."""
    one, other = (
        kwargs(name, 2, (shape,), target_modules=[layer], init_weights=False)
        for layer, shape in (("lin0", LIN0), ("lin1", LIN1))
    )
    cases = [(f"{name} same", "Inlay", InlayConfig, one, one), (f"{name} different", "Inlay", InlayConfig, one, other)]
    return [case for case in cases if case[4]["args"] is not None]


def mixed(name: str, one: dict[str, Any], other: dict[str, Any]) -> tuple:
    return f"{name} mixed", *(InlayConfig(**kwargs(name, **more), init_weights=False) for more in (one, other))


def models(task: str) -> list:
    """For transformers' models, on the layers PEFT adapts by default."""
    return [pytest.param(InlayConfig, kwargs(name, SIZES.get(name, 2), task_type=task), id=name) for name in NAMES]


# The parameters of PEFT's tests that we replace, by file, by the name of the module's list.
LISTS: dict[str, dict[str, list]] = {
    "test_custom_models.py": {
        "TEST_CASES": [case for name in NAMES for case in custom(name)],
        "ALL_PEFT_CONFIG_CLASSES": [InlayConfig, *map(subclass, NAMES)],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [case for name in NAMES for case in together(name)],
        "MIXED_ADAPTER_TEST_CASES": [
            mixed(name, {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "size": 1}) for name in NAMES
        ],
    },
    "test_decoder_models.py": {"ALL_CONFIGS": models("CAUSAL_LM")},
    "test_encoder_decoder_models.py": {"ALL_CONFIGS": models("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models.py": {"ALL_CONFIGS": models("FEATURE_EXTRACTION")},
    "test_seq_classifier.py": {"ALL_CONFIGS": models("SEQ_CLS")},
    "test_token_classification_qa.py": {
        "TOKEN_CLS_CONFIGS": models("TOKEN_CLS"),
        "QA_CONFIGS": models("QUESTION_ANS"),
    },
    "test_config.py": {
        "ALL_CONFIG_CLASSES": [(InlayConfig, {}), *((InlayConfig, kwargs(name)) for name in NAMES)],
        "LAYER_INDEXING_CONFIG_CLASSES": [(InlayConfig, kwargs(name)) for name in NAMES],
    },
    "test_quantization.py": {"TEST_CASES": [(InlayConfig, kwargs(name)) for name in NAMES]},
}


class InPlaceOfLora(InlayConfig):
    """For files that write out a LoraConfig in each test: ours, from the arguments of PEFT's."""

    def __init__(self, init_lora_weights: bool = True, lora_dropout: float = 0.0, **more: Any) -> None:
        asked = {k: v for k, v in more.items() if k not in ("r", "lora_alpha")}
        asked |= {"bias": "inlay_only"} if asked.get("bias") == "lora_only" else {}
        args = {"args": {"r": 2}} if "method" not in asked else {}
        super().__init__(
            **{"method": "pissa", **args, "init_weights": init_lora_weights, "dropout": lora_dropout, **asked}
        )


# Of these files only the tests that ask nothing of LoRA itself; all else in them is about one of PEFT's methods.
WRITTEN_OUT = {
    "test_low_level_api.py": "TestInjectAdapterFromStateDict|TestPeftStateDict|test_modules_to_save",
    "test_initialization.py": "Deepspeed|CustomModelConfigWarning|LowCpuMemUsage|NamingConflictWarning",
}
