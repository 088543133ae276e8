"""The weights of a model as its checkpoint stores them, one tensor at a time: no model is built, nothing held twice."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from inlay.workbench import models

ONE, MANY = "model.safetensors", "model.safetensors.index.json"


class Weights:
    """The stored tensors of a model (hub id, folder or builtin), by name.

    Raises:
        ValueError: the model has no safetensors files, or they cannot be read.
    """

    def __init__(self, model: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
        self.model, where = model, models.resolve(model)
        try:
            one = cached_file(where, ONE, revision=revision, _raise_exceptions_for_missing_entries=False)
            index = None if one else cached_file(where, MANY, revision=revision)
            paths = [one] if one else get_checkpoint_shard_files(where, index, revision=revision)[0] or []
            self.prefix = _base_prefix(model, trust_remote_code)
            self._files: dict[str, Path] = {}
            for path in map(Path, paths):
                with safe_open(path, "pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"the weights of {model!r} cannot be read: {models.first_line(error)}") from None

    def names(self) -> list[str]:
        """The stored names of all tensors, sorted."""
        return sorted(self._files)

    def key(self, name: str) -> str | None:
        """The stored name of a tensor of the model: checkpoints of some base models leave out the leading module."""
        choices = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((key for key in choices if key in self._files), None)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in.

        Raises:
            ValueError: the checkpoint does not store it (under another name, or not at all: tied weights).
        """
        key = self.key(name)
        if key is None:
            raise ValueError(
                f"the checkpoint of {self.model!r} stores no tensor {name} (tied to another, or under another name); "
                "leave that module out"
            )
        try:
            with safe_open(self._files[key], "pt") as file:
                return file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self._files[key]} cannot be read: {models.first_line(error)}") from None


def _base_prefix(model: str, trust_remote_code: bool) -> str:
    """What the causal language model calls the model under its head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(models.load_config(model, trust_remote_code)), None)
    return getattr(cls, "base_model_prefix", "model")
