"""Inlay: fine-tune a large language model by re-cutting its own weights.

Importing it registers the adapter type with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained`, the Trainer
and TRL's trainers take an `InlayConfig` like any of PEFT's own.
"""

from inlay import methods
from inlay.host.peft import InlayConfig

__version__ = "0.1.0"
__all__ = ["InlayConfig", "methods"]
