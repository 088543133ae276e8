"""List the methods, one paper per file; a new method is one line here.

Methods of other packages, and of a user's own modules, are found by their names once they are imported.
"""

from inlay.method import Method

# isort: off
from inlay.methods.lora import LoRA as LoRA
from inlay.methods.pissa import PiSSA as PiSSA
from inlay.methods.milora import MiLoRA as MiLoRA
from inlay.methods.olora import OLoRA as OLoRA
from inlay.methods.mica import MiCA as MiCA
from inlay.methods.kasa import KaSA as KaSA
from inlay.methods.oplora import OPLoRA as OPLoRA
from inlay.methods.lora_xs import LoRAXS as LoRAXS
from inlay.methods.psoft import PSOFT as PSOFT
from inlay.methods.svfit import SVFit as SVFit
from inlay.methods.loldu import LoLDU as LoLDU
from inlay.methods.lamda import LaMDA as LaMDA
from inlay.methods.dota import DoTA as DoTA
from inlay.methods.bone import Bone as Bone
from inlay.methods.bat import Bat as Bat
from inlay.methods.bat_col import BatCol as BatCol
from inlay.methods.mora import MoRA as MoRA
from inlay.methods.mora_rope import MoRARope as MoRARope
from inlay.methods.randlora import RandLoRA as RandLoRA
from inlay.methods.peanut import PEANuT as PEANuT
from inlay.methods.hira import HiRA as HiRA
from inlay.methods.deep_lora import DeepLoRA as DeepLoRA
from inlay.methods.snell import SNELL as SNELL
from inlay.methods.lorta import LoRTA as LoRTA
from inlay.methods.xgblora import XGBLoRA as XGBLoRA
from inlay.methods.spiel import SpIEL as SpIEL
from inlay.methods.eva import EVA as EVA
from inlay.methods.corda import CorDA as CorDA
from inlay.methods.lora_null import LoRANull as LoRANull
from inlay.methods.lora_ga import LoRAGA as LoRAGA
from inlay.methods.lora_one import LoRAOne as LoRAOne
from inlay.methods.lq_lora import LQLoRA as LQLoRA
from inlay.methods.smt import SMT as SMT
# isort: on

METHODS = tuple(
    value for value in vars().values() if isinstance(value, type) and issubclass(value, Method) and value is not Method
)  # in the order above, in which people are shown them


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
