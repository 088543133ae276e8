"""One paper, one file. `METHODS` is the list; a new method is one line here."""

from inlay.method import Method
from inlay.methods.bat import Bat
from inlay.methods.bat_col import BatCol
from inlay.methods.bone import Bone
from inlay.methods.dota import DoTA
from inlay.methods.lamda import LaMDA
from inlay.methods.lora import LoRA
from inlay.methods.milora import MiLoRA
from inlay.methods.pissa import PiSSA

METHODS: tuple[type[Method], ...] = (LoRA, PiSSA, MiLoRA, LaMDA, DoTA, Bone, Bat, BatCol)

__all__ = ["METHODS", "Bat", "BatCol", "Bone", "DoTA", "LaMDA", "LoRA", "MiLoRA", "PiSSA", "find"]


def _descendants(cls: type[Method]) -> list[type[Method]]:
    return [d for child in cls.__subclasses__() for d in (child, *_descendants(child))]


def find(name: str) -> type[Method]:
    """The method of that name: one of `METHODS`, or any other subclass of `Method` that has been imported.

    Raises:
        ValueError: there is none; the message lists all.
    """
    for method in (*METHODS, *_descendants(Method)):
        if method.__dict__.get("name") == name:
            return method
    raise ValueError(f"unknown method {name!r}; choose one of {', '.join(m.name for m in METHODS)}")
