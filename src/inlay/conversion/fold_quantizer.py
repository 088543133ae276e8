"""Quantising a model to 4 bits while it loads, after a method took its piece out of each weight.

transformers loads and quantises one tensor after another; a quantiser of our own, registered with it, computes θ₀ just
before each weight is packed. So the full model is never in memory, and what is saved is an ordinary 4-bit checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import QuantizationMethod

from inlay.host import seal
from inlay.host.config import FORMAT_VERSION, InlayConfig
from inlay.host.peft import adapted
from inlay.method import Method, Params
from inlay.workbench.weights import Weights

NAME = "inlay_fold"


@dataclass(frozen=True)
class Error:
    """Relative errors of one weight, ‖W' − W‖ / ‖W‖: plain NF4, and the folded base with its piece put back. Both are
    weighted where the method weighs errors."""

    module: str
    plain: float
    folded: float
    round: int  # which one was kept, from 1


@dataclass
class Plan:
    """What to take out of which weight, and what came of it."""

    methods: dict[str, Method]
    rounds: int
    done: Callable[[str], object]
    stats: dict[str, Params] = field(default_factory=dict)  # what methods needed to see
    starts: dict[str, Params] = field(default_factory=dict)
    errors: list[Error] = field(default_factory=list)
    failure: Exception | None = None

    def __deepcopy__(self, memo: Any) -> Plan:
        """transformers copies the settings it is given; what it finds out must be found here."""
        return self


def unmarked(config: InlayConfig) -> InlayConfig:
    """A copy of a config, without what a checkpoint may have said of its own base and tensors."""
    return replace(config, hyperparameters=None, seals=None, base_model_name_or_path=None)


def methods_of(blank: PreTrainedModel, config: InlayConfig) -> dict[str, Method]:
    """The method for every weight that a config targets in a model without memory."""
    fresh = unmarked(config)
    cuts = [layer.cuts["default"] for layer in adapted(get_peft_model(blank, fresh), "default").values()]
    return {cut.module: cut.method for cut in cuts}


def save_adapter(base: Any, config: InlayConfig, starts: dict[str, Params], folder: Path, name: str) -> None:
    """The adapter at its start, on the base it was folded into, which will be at `name`."""
    fresh = replace(unmarked(config), folded=True, format_version=FORMAT_VERSION)
    model = get_peft_model(base, fresh)
    for layer in adapted(model, "default").values():
        layer.fill("default", starts[layer.cuts["default"].module])
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(str(folder), save_embedding_layers=False)  # it would look for a base that is not there yet


def settings(kind: str, dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """bitsandbytes' settings: "nf4" (blocks of 64, double quantisation; products in `dtype`) or "int8".

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ValueError("quantised bases need bitsandbytes; pip install 'bitsandbytes>=0.46'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def pack(blank: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    """Pack the linear layers of a model without memory, as a checkpoint quantised by `settings` has them.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    asked = settings(kind, dtype)
    from bitsandbytes.functional import create_dynamic_map, int8_vectorwise_quant, name2qmap
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    name2qmap.setdefault("dynamic", create_dynamic_map())  # else it keeps the table it makes here, on meta, for good
    replace_with_bnb_linear(blank, get_keys_to_not_convert(blank), asked)
    for module in blank.modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            for p in module.parameters():
                p.data = p.data.to(dtype)  # which a weight is then dequantised to
        if isinstance(module, Linear4bit):
            module.weight = cast(Any, module.weight)._quantize("meta")
        elif isinstance(module, Linear8bitLt):
            values, scales, _ = int8_vectorwise_quant(module.weight.data.half())
            module.weight = cast(Any, Int8Params)(values, CB=values, SCB=scales, requires_grad=False)
            module.state.threshold = 0.0  # which inputs are outliers is a matter of values


def folding(plan: Plan, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Settings for `from_pretrained` under which `plan` is carried out."""
    made = settings("nf4", dtype)
    made.quant_method, made.plan = NAME, plan  # type: ignore[assignment, attr-defined]
    return made


def finish(model: Any) -> None:
    """Leave no trace of the plan: from here on it is a 4-bit model like any other."""
    model.hf_quantizer.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
    del model.hf_quantizer.quantization_config.plan
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES


@register_quantizer(NAME)
class FoldingQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit quantiser, on residuals."""

    def get_quantize_ops(self) -> Any:
        from transformers.integrations.bitsandbytes import Bnb4bitQuantize

        quantizer: Any = self
        plan: Plan = quantizer.quantization_config.plan

        class Fold(Bnb4bitQuantize):
            def convert(self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **kwargs: Any) -> Any:
                def pack(value: Tensor) -> Any:
                    made: Any = Bnb4bitQuantize.convert(self, {name: [value]}, full_layer_name, model, **kwargs)[name]
                    made.quant_state.dtype = stored.dtype  # what it is dequantised to; it is packed from fp32
                    return made

                ((name, value),) = input_dict.items()
                stored = value[0] if isinstance(value, list) else value
                module = name.removesuffix(".weight")
                if plan.failure or module not in plan.methods:
                    return super().convert(input_dict, full_layer_name, model, **kwargs)
                transposed = model.get_submodule(module).source_cls.__name__ == "Conv1D"
                try:
                    return {name: cut(plan, module, stored.T if transposed else stored, pack, transposed)}
                except Exception as error:  # transformers would bury it in its report
                    plan.failure = error
                    raise

        return Fold(self)


@torch.no_grad()
def cut(plan: Plan, module: str, W: Tensor, pack: Callable[[Tensor], Any], transposed: bool) -> Any:
    """The packed residual of W (out × in), the best of the plan's rounds; its θ₀ and errors go into the plan."""
    method, W, best, stats = plan.methods[module], W.float(), None, plan.stats.get(module)
    assert method.zero_init or not method.shared  # whose start is that of its first weight
    if not W.isfinite().all():
        raise ValueError(f"the weight of {module} holds NaN or Inf; repair it or leave that module out")
    whole = method.weigh(W, stats)
    plain = error_of(method.weigh(unpack(pack(W.T if transposed else W)) - W, stats), whole)
    what = W
    for turn in range(1, 2 if method.zero_init else plan.rounds + 1):
        start = method.start(what, stats)
        D = method.s * method.delta(start, W)
        packed = pack((W - D).T if transposed else W - D)
        rest = W - unpack(packed)
        error = error_of(method.weigh(D - rest, stats), whole)
        if best is None or error < best[0]:
            best = error, packed, start, turn
        what = rest  # of which the next round takes its piece
    assert best is not None
    error, packed, plan.starts[module], turn = best
    plan.errors.append(Error(module, plain, error, turn))
    plan.done(module)
    return packed


def dense(weights: Weights, name: str) -> tuple[Tensor, str | None]:
    """A weight that bitsandbytes packed, out of a checkpoint: its numbers (out × in) in fp32, and its mark.

    Raises:
        ValueError: something else packed it.
    """
    W, beside = weights.read(name), {end: weights.read(key) for end, key in weights.beside(name).items()}
    if any(end.startswith("quant_state.") for end in beside):
        from bitsandbytes.nn import Params4bit

        packed = Params4bit.from_prequantized(W, beside, device="cpu")
        packed.quant_state.dtype = torch.float32
        return unpack(packed), seal.of_packed(packed)
    if W.dtype == torch.int8 and "SCB" in beside:
        return W.float() * (beside["SCB"].float() / 127)[:, None], None
    raise ValueError(f"{name} is stored as {W.dtype} which is not read here; name the base in full precision")


def unpack(packed: Any) -> Tensor:
    """The numbers of a packed weight, (out × in), in fp32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, packed.quant_state).float()


def error_of(difference: Tensor, W: Tensor) -> float:
    """A difference relative to W; 0 for a weight of zeros that came back as it was."""
    return (difference.norm() / W.norm().clamp(min=torch.finfo(W.dtype).tiny)).item()
