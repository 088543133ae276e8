"""The weights of a model as its checkpoint stores them, one tensor at a time: no model is built, nothing held twice."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from inlay.files.untrusted import DamagedFileError, regular_file
from inlay.messages import first_line

ONE, MANY = "model.safetensors", "model.safetensors.index.json"


class Weights:
    """Read the stored tensors of a model by name; `BaseModel.weights` opens them.

    Args:
        model: the model's name, for error messages.
        where: its folder or hub id.
        revision: of a hub model.
        blank: builds the model on the meta device, for the names that it gives to its tensors.

    Raises:
        ValueError: the model has no safetensors files, or they cannot be read.
    """

    def __init__(self, model: str, where: str, revision: str | None, blank: Callable[[], PreTrainedModel]) -> None:
        self.model, self.blank = model, blank
        try:
            one = cached_file(where, ONE, revision=revision, _raise_exceptions_for_missing_entries=False)
            index = None if one else cached_file(where, MANY, revision=revision)
            paths = [one] if one else get_checkpoint_shard_files(where, index, revision=revision)[0] or []
            self._files: dict[str, Path] = {}
            for path in map(Path, paths):
                with safe_open(regular_file(path), "pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError, json.JSONDecodeError, TypeError) as error:
            hint = "" if isinstance(error, SafetensorError) else " (safetensors only; save the model again)"
            raise DamagedFileError(f"the weights of {model!r} cannot be read{hint}: {first_line(error)}") from None

    def names(self) -> list[str]:
        """Return the stored names of all tensors, sorted."""
        return sorted(self._files)

    @functools.cached_property
    def stored(self) -> dict[str, str]:
        """Return the stored name of every tensor that is stored as the model holds it, by the model's own name.

        Checkpoints leave out a leading module, or keep the names of an older release.
        """
        return {name: key for key, name, converted in self._places if not converted}

    @functools.cached_property
    def converted(self) -> dict[str, list[str]]:
        """Return the stored names of what makes up a tensor that the model holds in another layout, by its own name."""
        parts: dict[str, list[str]] = {}
        for key, name, converted in self._places:
            if converted:
                parts.setdefault(name, []).append(key)
        return parts

    @functools.cached_property
    def _places(self) -> list[tuple[str, str, bool]]:
        """Return each stored name with the model's name of its tensor, and whether that has another layout."""
        blank = self.blank()
        conversions = get_model_conversion_mapping(blank)
        names = [c for c in conversions if isinstance(c, WeightRenaming)]
        layouts: Any = [c for c in conversions if not isinstance(c, WeightRenaming)]
        state = blank.state_dict()
        places = []
        for key in self._files:
            name, converted = rename_source_key(key, names, layouts, blank.base_model_prefix, state)
            places.append((key, name, converted is not None))
        return places

    def key(self, name: str) -> str | None:
        """Return the stored name of a tensor of the model; None where it is not stored."""
        return name if name in self._files else self.stored.get(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor onto the CPU, in the dtype it is stored in.

        Raises:
            ValueError: the checkpoint does not store it (under another name, or not at all: tied weights).
        """
        key = self.key(name)
        if key is None:
            raise ValueError(
                f"the checkpoint of {self.model!r} stores no tensor {name} (tied to another, new in this model, or "
                "under another name); leave that module out (exclude_modules)"
            )
        try:
            with safe_open(regular_file(self._files[key]), "pt") as file:
                return file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise DamagedFileError(f"{self._files[key]} cannot be read: {first_line(error)}") from None

    def beside(self, name: str) -> dict[str, str]:
        """Return the stored names of what a quantiser put beside a weight, by their ends; none if it is not packed."""
        weight = self.key(name) or name
        module = weight.removesuffix("weight")
        return {k.removeprefix(module).removeprefix("weight."): k for k in self._beside.get(weight, [])}

    @functools.cached_property
    def _beside(self) -> dict[str, list[str]]:
        owned: dict[str, list[str]] = {}
        for key in self._files:
            if owner := self.owner(key):
                owned.setdefault(owner, []).append(key)
        return owned

    def owner(self, key: str) -> str | None:
        """Return the stored name of the weight that a tensor belongs to as its scales or codes; None for any other."""
        module, _, end = key.partition(".weight.")
        module = module if end else key.removesuffix(".SCB").removesuffix(".weight_format")
        return f"{module}.weight" if module != key and f"{module}.weight" in self._files else None
