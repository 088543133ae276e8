"""Inlay: fine-tune a large language model by re-cutting its own weights.

Importing it registers the adapter type with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained`, the Trainer
and TRL's trainers take an `InlayConfig` like any of PEFT's own. Names load when they are used, and the command
registers when a verb runs: help and mistakes in flags would wait seconds for torch and PEFT.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from inlay._version import __version__

if TYPE_CHECKING:
    from inlay import methods
    from inlay.conversion.export_lora import export_lora
    from inlay.conversion.fold import fold
    from inlay.conversion.import_adapter import import_adapter
    from inlay.conversion.merge import merge
    from inlay.host.calibrate import calibrate
    from inlay.host.config import InlayConfig
    from inlay.host.flat_lora import Flat, flat_noise
    from inlay.host.lora_plus import parameter_groups
    from inlay.host.penalty import penalty
    from inlay.host.schedule import Schedule, step
    from inlay.host.strength import scaled, set_scale
    from inlay.inspection.inspect_adapter import inspect_adapter
    from inlay.inspection.inspect_model import inspect
    from inlay.numerics.ops import second_derivatives
    from inlay.recipe.rewards import import_reward

_HOMES = {
    "Flat": "inlay.host.flat_lora",
    "InlayConfig": "inlay.host.config",
    "Schedule": "inlay.host.schedule",
    "calibrate": "inlay.host.calibrate",
    "export_lora": "inlay.conversion.export_lora",
    "flat_noise": "inlay.host.flat_lora",
    "fold": "inlay.conversion.fold",
    "import_adapter": "inlay.conversion.import_adapter",
    "import_reward": "inlay.recipe.rewards",
    "inspect": "inlay.inspection.inspect_model",
    "inspect_adapter": "inlay.inspection.inspect_adapter",
    "merge": "inlay.conversion.merge",
    "parameter_groups": "inlay.host.lora_plus",
    "penalty": "inlay.host.penalty",
    "scaled": "inlay.host.strength",
    "second_derivatives": "inlay.numerics.ops",
    "set_scale": "inlay.host.strength",
    "step": "inlay.host.schedule",
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
    "import_reward",
    "inspect",
    "inspect_adapter",
    "merge",
    "methods",
    "parameter_groups",
    "penalty",
    "scaled",
    "second_derivatives",
    "set_scale",
    "step",
]


def __getattr__(name: str) -> object:
    """Load a public name from its home (PEP 562)."""
    if name == "methods":
        return import_module("inlay.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_the_command() -> bool:
    """Return whether this process runs `inlay` or `python -m inlay`, and is about to read its flags."""
    as_module = sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)] == "inlay"
    return as_module or (Path(sys.argv[0]).name == "inlay" and "inlay.cli" not in sys.modules)


if not _is_the_command():
    import_module("inlay.host")
