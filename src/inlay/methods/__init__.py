"""List the methods, one paper per file; a new method is one line here.

Methods of other packages (entry points of the group `inlay.methods`), and of a user's own modules once they are
imported, are found by their names as well (`inlay.outside` loads them).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from inlay import outside
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

_added: dict[str, type[Method]] = {}  # those outside the package that are loaded, by their names
_imports: dict[str, tuple[Path, ...]] = {}  # the modules that a person named, with the folders they were searched in


def find(name: str) -> type[Method]:
    """Return the method called `name`.

    It is one of `METHODS`, one of a module that `import_methods` imported, one of an installed distribution (whose
    entry point is then loaded), or the newest other subclass of `Method` that has been imported.

    Raises:
        UnknownMethodError: there is none; the message lists all.
        ValueError: its distribution cannot be imported.
    """
    for method in (*METHODS, *_added.values()):
        if method.__dict__.get("name") == name:
            return method
    installed = outside.installed_methods()
    if name in installed:
        return _add(outside.load_installed(installed[name]))
    for method in reversed(outside.descendants(Method)):
        if method.__dict__.get("name") == name:
            return method
    names = [method.name for method in (*METHODS, *_added.values())]
    names += [other for other in installed if other not in names]
    raise outside.unknown_method(name, names)


def every() -> tuple[type[Method], ...]:
    """Return `METHODS`, then those of imported modules and of installed distributions.

    A distribution that cannot be imported is left out, with a warning that names it.
    """
    for name, entry in outside.installed_methods().items():
        if name not in _added:
            try:
                _add(outside.load_installed(entry))
            except ValueError as error:
                warnings.warn(str(error), stacklevel=2)
    return (*METHODS, *_added.values())


def import_methods(module: str, folders: Sequence[Path] = ()) -> None:
    """Import a module of a person's own, so that the methods that it defines are listed and found.

    Args:
        module: a name, as my_method or my_package.rows, or the path of a Python file.
        folders: where it is looked for before what is installed; the working folder is the last of them.

    Raises:
        ValueError: it cannot be imported, defines no method, or one whose name another one has.
    """
    where = tuple(dict.fromkeys([*(folder.resolve() for folder in folders), Path.cwd()]))
    for method in outside.defined_methods(outside.import_module(module, where)):
        _add(method)
    _imports.setdefault(module, where)


def imports() -> dict[str, tuple[Path, ...]]:
    """Return the modules that `import_methods` imported, in order, for another process to import them again."""
    return dict(_imports)


def _add(method: type[Method]) -> type[Method]:
    same = next((other for other in (*METHODS, *_added.values()) if other.name == method.name), None)
    if method.name == "full" or (same is not None and not outside.redefines(method, same)):
        who, other = outside.title_of(method), "full fine-tuning" if same is None else outside.title_of(same)
        raise ValueError(f"{who} is called {method.name!r}, which is the name of {other}; give it another name")
    _added[method.name] = method
    return method
