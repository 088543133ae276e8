"""Quantise a model to 4 bits while it loads, after a method took its piece out of each weight.

transformers loads and quantises one tensor after another; a quantiser of our own, registered with it, computes θ₀ just
before each weight is packed. So the full model is never in memory, and what is saved is an ordinary 4-bit checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from inlay.host.config import FORMAT_VERSION, InlayConfig
from inlay.host.layer import adapted
from inlay.method import Method, Params
from inlay.models.quantized import quantization_config, unpack_weight

NAME = "inlay_fold"


@dataclass(frozen=True)
class FoldError:
    """Hold one weight's relative errors ‖W' − W‖ / ‖W‖, in plain NF4 and in the folded base with its adapter.

    Both are weighted where the method weighs errors.
    """

    module: str
    plain: float
    folded: float
    round: int  # which one was kept, from 1


@dataclass
class FoldPlan:
    """Hold which piece is taken out of which weight, and the errors and starts that result."""

    methods: dict[str, Method]
    rounds: int
    done: Callable[[str], object]
    stats: dict[str, Params] = field(default_factory=dict)  # what methods needed to see
    starts: dict[str, Params] = field(default_factory=dict)
    errors: list[FoldError] = field(default_factory=list)
    failure: Exception | None = None

    def __deepcopy__(self, memo: Any) -> FoldPlan:
        """Return the plan itself: transformers copies its settings, and the results must be found in this object."""
        return self


def unmarked(config: InlayConfig) -> InlayConfig:
    """Copy a config without what a checkpoint holds of its own base and tensors."""
    return replace(config, hyperparameters=None, seals=None, base_model_name_or_path=None)


def methods_of(blank: PreTrainedModel, config: InlayConfig) -> dict[str, Method]:
    """Return the method for every weight that a config targets in a model without memory."""
    fresh = unmarked(config)
    cuts = [layer.cuts["default"] for layer in adapted(get_peft_model(blank, fresh), "default").values()]
    return {cut.module: cut.method for cut in cuts}


def save_adapter(base: Any, config: InlayConfig, starts: dict[str, Params], folder: Path, name: str) -> None:
    """Save the adapter at its start, on the base it was cut out of, which will be at `name`."""
    fresh = replace(unmarked(config), folded=True, format_version=FORMAT_VERSION)
    model = get_peft_model(base, fresh)
    for layer in adapted(model, "default").values():
        layer.fill("default", starts[layer.cuts["default"].module])
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(str(folder), save_embedding_layers=False)  # it would look for a base that is not there yet


def folding_config(plan: FoldPlan, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return settings for `from_pretrained` under which `plan` is carried out."""
    settings = quantization_config("nf4", dtype)
    settings.quant_method, settings.plan = NAME, plan  # type: ignore[assignment, attr-defined]
    return settings


def finish_fold(model: Any) -> None:
    """Remove the plan from a folded model, which is then a 4-bit model like any other."""
    model.hf_quantizer.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
    del model.hf_quantizer.quantization_config.plan
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES


@register_quantizer(NAME)
class FoldingQuantizer(Bnb4BitHfQuantizer):
    """Apply bitsandbytes' 4-bit quantiser to what a method leaves of each weight."""

    def get_quantize_ops(self) -> Any:
        from transformers.integrations import Bnb4bitQuantize  # it needs bitsandbytes, which is optional

        quantizer: Any = self
        plan: FoldPlan = quantizer.quantization_config.plan

        class Fold(Bnb4bitQuantize):
            def convert(self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **kwargs: Any) -> Any:
                def pack(value: Tensor) -> Any:
                    packed: Any = Bnb4bitQuantize.convert(self, {name: [value]}, full_layer_name, model, **kwargs)[name]
                    packed.quant_state.dtype = stored.dtype  # what it is dequantised to; it is packed from fp32
                    return packed

                ((name, value),) = input_dict.items()
                stored = value[0] if isinstance(value, list) else value
                module = name.removesuffix(".weight")
                if plan.failure or module not in plan.methods:
                    return super().convert(input_dict, full_layer_name, model, **kwargs)
                transposed = model.get_submodule(module).source_cls.__name__ == "Conv1D"
                try:
                    return {name: cut_residual(plan, module, stored.T if transposed else stored, pack, transposed)}
                except Exception as error:  # transformers would bury it in its report
                    plan.failure = error
                    raise

        return Fold(self)


@torch.no_grad()
def cut_residual(plan: FoldPlan, module: str, W: Tensor, pack: Callable[[Tensor], Any], transposed: bool) -> Any:
    """Return the packed residual of W (out × in), the best of the plan's rounds; θ₀ and errors go into the plan."""
    method, stats = plan.methods[module], plan.stats.get(module)
    W, best = W.float(), None
    assert method.stores_no_start or not method.shared  # whose start is that of its first weight
    if not W.isfinite().all():
        raise ValueError(f"the weight of {module} holds NaN or Inf; repair it or leave that module out")
    whole = method.weigh(W, stats)
    plain = relative_error(method.weigh(unpack_weight(pack(W.T if transposed else W)) - W, stats), whole)
    what = W
    for turn in range(1, 2 if method.stores_no_start else plan.rounds + 1):
        start = method.start(what, stats)
        D = torch.zeros_like(W) if method.departs else method.s * method.delta(start, W)
        packed = pack((W - D).T if transposed else W - D)
        rest = W - unpack_weight(packed)
        error = relative_error(method.weigh(D - rest, stats), whole)
        if best is None or error < best[0]:
            best = error, packed, start, turn
        what = rest  # of which the next round takes its piece
    assert best is not None
    error, packed, plan.starts[module], turn = best
    plan.errors.append(FoldError(module, plain, error, turn))
    plan.done(module)
    return packed


def relative_error(difference: Tensor, W: Tensor) -> float:
    """Return the norm of a difference over that of W; 0 for a weight of zeros that came back as it was."""
    return (difference.norm() / W.norm().clamp(min=torch.finfo(W.dtype).tiny)).item()
