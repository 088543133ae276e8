"""Inlay: fine-tune a large language model by re-cutting its own weights.

Importing it registers the adapter type with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained`, the Trainer
and TRL's trainers take an `InlayConfig` like any of PEFT's own.
"""

from inlay import methods
from inlay._version import __version__
from inlay.export import export_lora, merge
from inlay.folding import fold
from inlay.host.calibrate import calibrate
from inlay.host.flat import Flat, flat_noise
from inlay.host.groups import parameter_groups
from inlay.host.peft import InlayConfig
from inlay.host.schedule import Schedule, step
from inlay.importing import import_adapter
from inlay.workbench.inspect import inspect
from inlay.workbench.inspect_adapter import inspect_adapter

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
    "step",
]
