"""List the methods, one paper per file; a new method is one line in `METHODS`."""

from inlay.method import Method
from inlay.methods.bat import Bat
from inlay.methods.bat_col import BatCol
from inlay.methods.bone import Bone
from inlay.methods.deep_lora import DeepLoRA
from inlay.methods.dota import DoTA
from inlay.methods.eva import EVA
from inlay.methods.lamda import LaMDA
from inlay.methods.loldu import LoLDU
from inlay.methods.lora import LoRA
from inlay.methods.lora_ga import LoRAGA
from inlay.methods.lorta import LoRTA
from inlay.methods.lq_lora import LQLoRA
from inlay.methods.milora import MiLoRA
from inlay.methods.mora import MoRA
from inlay.methods.mora_rope import MoRARope
from inlay.methods.olora import OLoRA
from inlay.methods.peanut import PEANuT
from inlay.methods.pissa import PiSSA
from inlay.methods.randlora import RandLoRA
from inlay.methods.smt import SMT
from inlay.methods.snell import SNELL
from inlay.methods.spiel import SpIEL
from inlay.methods.svfit import SVFit
from inlay.methods.xgblora import XGBLoRA

# fmt: off
METHODS: tuple[type[Method], ...] = (
    LoRA, PiSSA, MiLoRA, OLoRA, SVFit, LoLDU, LaMDA, DoTA, Bone, Bat, BatCol,
    MoRA, MoRARope, RandLoRA, PEANuT, DeepLoRA, SNELL, LoRTA, XGBLoRA, SpIEL,
    EVA, LoRAGA, LQLoRA, SMT,
)

__all__ = [
    "EVA",
    "METHODS",
    "SMT",
    "SNELL",
    "Bat",
    "BatCol",
    "Bone",
    "DeepLoRA",
    "DoTA",
    "LQLoRA",
    "LaMDA",
    "LoLDU",
    "LoRA",
    "LoRAGA",
    "LoRTA",
    "MiLoRA",
    "MoRA",
    "MoRARope",
    "OLoRA",
    "PEANuT",
    "PiSSA",
    "RandLoRA",
    "SVFit",
    "SpIEL",
    "XGBLoRA",
    "find",
]


def _descendants(cls: type[Method]) -> list[type[Method]]:
    return [d for child in cls.__subclasses__() for d in (child, *_descendants(child))]


def find(name: str) -> type[Method]:
    """Return the method called `name`: one of `METHODS`, or any other subclass of `Method` that has been imported.

    Raises:
        ValueError: there is none; the message lists all.
    """
    for method in (*METHODS, *_descendants(Method)):
        if method.__dict__.get("name") == name:
            return method
    raise ValueError(f"unknown method {name!r}; choose one of {', '.join(m.name for m in METHODS)}")
