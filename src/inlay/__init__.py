"""Inlay: fine-tune a large language model by re-cutting its own weights.

Importing it registers the adapter type with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained`, the Trainer
and TRL's trainers take an `InlayConfig` like any of PEFT's own. The names that need more than PEFT load when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from inlay import methods
from inlay._version import __version__
from inlay.host.calibrate import calibrate
from inlay.host.config import InlayConfig
from inlay.host.flat_lora import Flat, flat_noise
from inlay.host.lora_plus import parameter_groups
from inlay.host.schedule import Schedule, step
from inlay.host.strength import scaled, set_scale
from inlay.host.tuner import register
from inlay.numerics.ops import second_derivatives

if TYPE_CHECKING:
    from inlay.conversion.export_lora import export_lora
    from inlay.conversion.fold import fold
    from inlay.conversion.import_adapter import import_adapter
    from inlay.conversion.merge import merge
    from inlay.inspection.inspect_adapter import inspect_adapter
    from inlay.inspection.inspect_model import inspect

_HOMES = {  # the names that load when they are used
    "export_lora": "inlay.conversion.export_lora",
    "fold": "inlay.conversion.fold",
    "import_adapter": "inlay.conversion.import_adapter",
    "inspect": "inlay.inspection.inspect_model",
    "inspect_adapter": "inlay.inspection.inspect_adapter",
    "merge": "inlay.conversion.merge",
}

__all__ = [
    "Flat",
    "InlayConfig",
    "Schedule",
    "__version__",
    "calibrate",
    "export_lora",
    "flat_noise",
    "fold",
    "import_adapter",
    "inspect",
    "inspect_adapter",
    "merge",
    "methods",
    "parameter_groups",
    "scaled",
    "second_derivatives",
    "set_scale",
    "step",
]

register()


def __getattr__(name: str) -> object:
    """Load a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
