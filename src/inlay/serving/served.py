"""Which models an endpoint serves: names, and one base in memory for all adapters that can share it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.evaluation.answering import Answering, check_answers
from inlay.evaluation.run_settings import KEPT, ChatSettings, chat_settings
from inlay.files.atomic import find_again
from inlay.files.untrusted import user_path
from inlay.models import builtin
from inlay.models.adapters import CONFIG, Adapter
from inlay.models.base import BaseModel
from inlay.models.vocabulary import fit_vocabulary

NAME = r"\w[\w.:-]*"  # a part of a name in a request; a hub id has two


@dataclass(frozen=True, eq=False)
class Served:
    """Hold one name of the endpoint: a model, and which adapter in it answers.

    Attributes:
        name: in requests.
        source: how it is asked; its model may be shared with other names.
        adapter: PEFT's name of the adapter; None: the base, or a model without adapters.
    """

    name: str
    source: Answering
    adapter: str | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the model answer as this name in the block, which nothing else may use meanwhile."""
        model = self.source.model
        if not isinstance(model, PeftModel):
            yield
        elif self.adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(self.adapter, inference_mode=True)
            yield


def named(text: str) -> tuple[str, str]:
    """Return the name and the place of a model, from NAME=PLACE or its place alone, whose last part is the name.

    Raises:
        ValueError: the name cannot stand in a request.
    """
    name, equals, place = text.partition("=")
    if not equals or Path(text).exists():
        name, place = default_name(text), text
    if not re.fullmatch(rf"{NAME}(/{NAME})?", name) or not place:
        raise ValueError(f"{text}: {name!r} is no name for a model; give one, as in mine={place or 'runs/mine'}")
    return name, place


def default_name(place: str) -> str:
    """Return the name of a model that was given none: its hub id, or the name of its folder or of its run."""
    path = user_path(place)
    if not path.exists():
        return place if re.fullmatch(rf"{NAME}(/{NAME})?", place) else path.name
    path = path.resolve()
    if path.suffix == ".gguf":
        return path.stem
    return path.parent.name if path.name in KEPT else path.name


def name_of_base(base: BaseModel) -> str:
    """Return the name of a base that came with an adapter."""
    own = Path(base.resolved).name.startswith(builtin.FOLDER)
    return builtin.MODEL if own else default_name(base.name)


def load_served(places: Sequence[str], model: str | None, dtype: torch.dtype) -> dict[str, Served]:
    """Load models and adapters, each base once for all adapters that leave it as it is.

    Args:
        places: hub ids, folders, run folders, adapter folders, or builtin; each may be NAME=PLACE.
        model: the base of the adapters; None: the one that each names.
        dtype: to compute in.

    Returns:
        What answers, by its name; a base that adapters share is there too.

    Raises:
        ValueError: two have one name, one cannot be loaded, or is a classifier.
    """
    pairs = list(map(named, places))
    if twice := [name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])]:
        raise ValueError(
            f"two models are named {twice[0]!r}; name them, as in first={pairs[0][1]} second={pairs[-1][1]}"
        )
    adapters = {name: Adapter.open(place, model) for name, place in pairs if holds_adapter(place)}
    bases = {name: BaseModel(place) for name, place in pairs if name not in adapters}
    for name, opened in adapters.items():  # before the first of them is loaded
        check_answers(opened.auto_class, name)
    for name, base in bases.items():
        check_answers(base.evaluated_auto_class(), name)
    served: dict[str, Served] = {}
    shared: dict[str, PeftModel] = {}
    for number, (name, opened) in enumerate(adapters.items()):
        inner, key = f"served_{number}", f"{opened.base.resolved} {opened.base.revision}"
        together = leaves_base(opened)
        if together and key in shared:
            loaded, tokenizer = shared[key], opened.base_tokenizer()
            opened.attach_beside(loaded, inner)
        else:
            loaded, tokenizer = opened.load(dtype, name=inner)
        if together:
            shared.setdefault(key, loaded)
        settings = chat_settings(dict(pairs)[name])
        served[name] = Served(name, answering(loaded, tokenizer, settings), inner)
        if together and name_of_base(opened.base) not in {*served, *adapters, *bases}:
            bases[name_of_base(opened.base)] = opened.base
    for name, base in bases.items():
        loaded = shared.get(f"{base.resolved} {base.revision}") or base.load(dtype, auto=base.evaluated_auto_class())
        served[name] = Served(name, answering(loaded, base.tokenizer(), chat_settings(base.name)))
    order = [name for name, _ in pairs]
    return {name: served[name] for name in [*order, *(name for name in served if name not in order)]}


def answering(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings
) -> Answering:
    """Return a source of answers with a tokenizer of its own: each may have another chat template."""
    return Answering(model.eval(), copy.deepcopy(tokenizer), settings)


def holds_adapter(place: str) -> bool:
    """Return whether a folder is an adapter's, or a run's that trained one."""
    return (find_again(Path(place)) / CONFIG).exists() or (Path(place) / "adapter" / CONFIG).exists()


def leaves_base(opened: Adapter) -> bool:
    """Return whether an adapter leaves its base's weights, modules and vocabulary as they are."""
    whole = [name for name in ("modules_to_save", "trainable_token_indices") if opened.raw.get(name)]
    if opened.may_modify_base or whole or opened.raw.get("bias", "none") != "none":
        return False
    return not fit_vocabulary(opened.base.meta(torch.float32, auto=opened.auto_class), opened.folder)
