"""An adapter in its folder: its configuration, its base model, and both loaded together."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from inlay.files.atomic import find_again, siblings
from inlay.files.untrusted import LENGTH, DamagedFileError, from_json, read_regular, regular_file, regular_files
from inlay.host.config import INLAY, check_imports
from inlay.host.strength import check_config_scalable, set_scale
from inlay.messages import first_line, loading, similar_paths
from inlay.models.base import BaseModel, read_tokenizer
from inlay.models.folded import FOLDED
from inlay.models.model_classes import SEQUENCE
from inlay.models.peft_sizes import check_sizes
from inlay.models.stored_weights import Weights
from inlay.models.vocabulary import fit_vocabulary

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(path: str | Path) -> Path:
    """Return the adapter's folder in a run folder, or `path` itself where that is one.

    Raises:
        ValueError: there is no adapter.
    """
    for folder in (find_again(Path(path)), Path(path) / "adapter"):
        if regular_file(folder / CONFIG).is_file():
            return folder
    replaced = siblings(Path(path), "old")
    if not replaced and not Path(path).exists():
        near = similar_paths(Path(path))
        raise ValueError(f"{path} does not exist{near}; give a run's folder, or an adapter's, as runs/mine")
    hint = f"; what it is to replace is in {replaced[-1]} until it is finished" if replaced else ""
    raise ValueError(f"{path} holds no adapter: neither {path}/{CONFIG} nor {path}/adapter/ is there{hint}")


@dataclass(frozen=True, eq=False)
class Adapter:
    """Open an adapter in its folder, Inlay's or PEFT's, and its base model; each file is read once, when needed.

    Attributes:
        folder: the adapter's folder.
        raw: what its adapter_config.json says.
        base: the base model, in the revision that the adapter was trained on unless another one was given.
    """

    folder: Path
    raw: dict[str, Any]
    base: BaseModel

    @classmethod
    def open(
        cls,
        path: str | Path,
        base: str | BaseModel | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Adapter:
        """Open the adapter in a run folder or an adapter folder.

        Args:
            path: the folder.
            base: the base model, if not the one that the adapter names. A `BaseModel` brings its own revision.
            revision: of the base on a hub; None: the one the adapter was trained on, if no other base is given.
            trust_remote_code: let the base's repository run its own code.

        Raises:
            ValueError: there is no adapter, its adapter_config.json is damaged, or no base is given or named.
        """
        folder = regular_files(adapter_folder(path))
        try:
            raw = from_json(read_regular(folder / CONFIG))
            if not isinstance(raw, dict):
                raise TypeError("it holds no mapping")
            name = base or raw["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{folder}/{CONFIG} is not an adapter's configuration: {error!r}") from None
        if isinstance(name, BaseModel):
            return cls(folder, raw, name)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{folder} does not name its base model; give it with --model")
        revision = revision or (None if base else raw.get("revision"))
        beside = folder.resolve().parent / "base"
        if not base and raw.get("folded") and (beside / FOLDED).exists():  # wherever the two were moved
            name = str(beside)
        return cls(folder, raw, BaseModel(name, revision, trust_remote_code))

    @cached_property
    def config(self) -> PeftConfig:
        """Return PEFT's configuration of the adapter.

        Raises:
            ValueError: adapter_config.json does not describe an adapter of a known type.
        """
        with loading(f"{self.folder}/{CONFIG}", DamagedFileError):
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[self.raw["peft_type"]]
            values = {k: v for k, v in self.raw.items() if k != "runtime_config"}  # which PEFT never saves
            config = kind.from_peft_type(**kind.check_kwargs(**copy.deepcopy(values)))
        check_imports(config)
        return config

    @property
    def is_inlay(self) -> bool:
        """Return whether the adapter is one of Inlay's, not of PEFT's."""
        return self.config.peft_type == INLAY

    def check_own(self) -> None:
        """Raise a ValueError where the adapter is one of PEFT's, which `inlay import` makes one of Inlay's."""
        if not self.is_inlay:
            kind = self.raw["peft_type"]
            raise ValueError(
                f"{self.folder} is a {kind} of PEFT's; first make it Inlay's: inlay import {self.folder} imported"
            )

    @property
    def folded(self) -> bool:
        """Return whether the adapter was cut out of its base by a fold."""
        return bool(self.raw.get("folded"))

    @property
    def may_modify_base(self) -> bool:
        """Return whether loading this adapter may modify the base weights (folds, and PEFT starts such as PiSSA)."""
        return not self.is_inlay or self.folded

    @cached_property
    def saved_config(self) -> PretrainedConfig | None:
        """Return the model configuration beside a classification's adapter (it holds the labels); None for other tasks.

        Raises:
            ValueError: the adapter is of a classification and its labels are missing or damaged.
        """
        if self.config.task_type != SEQUENCE:
            return None
        if not (self.folder / "config.json").is_file():
            raise ValueError(
                f"{self.folder} classifies and does not say its labels; put the config.json of its model beside it "
                "(model.config.save_pretrained), as inlay train does"
            )
        with loading(f"{self.folder}/config.json", DamagedFileError):
            return AutoConfig.from_pretrained(str(self.folder / "config.json"))

    @property
    def settings(self) -> dict[str, Any]:
        """Return the values of the base's configuration that the adapter sets: the labels of a classification."""
        if self.saved_config is None:
            return {}
        names = ("num_labels", "id2label", "label2id", "problem_type")
        return {name: getattr(self.saved_config, name) for name in names}

    @property
    def auto_class(self) -> Any:
        """Return the transformers class that loads the base for the adapter's task.

        Raises:
            ValueError: the task is not handled here, or a configuration cannot be read.
        """
        return self.base.auto_class(self.config.task_type, **self.settings)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Return the saved tensors by name; treat them as read-only.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            return load_file(regular_file(self.folder / WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise DamagedFileError(f"{self.folder / WEIGHTS} cannot be read: {first_line(error)}") from None

    def base_weights(self) -> Weights:
        """Open the stored weights of the base.

        Raises:
            ValueError: the base has no safetensors files, or they cannot be read.
        """
        return self.base.weights(self.auto_class, **self.settings)

    def load(
        self,
        dtype: torch.dtype | None = None,
        trainable: bool = False,
        scale: float = 1.0,
        name: str = "default",
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """Load the adapter on its base, and the base's tokenizer with the adapter's chat template, if it has one.

        Without a dtype, the base is loaded in the one it is stored in. `scale` is the adapter's strength (see
        `inlay.set_scale`), and `name` what PEFT calls it.
        """
        check_config_scalable(self.config, str(self.folder), scale)
        auto = self.auto_class
        dtype = dtype or self.base.stored_dtype
        tokenizer = self.base_tokenizer()
        base = self.base.load(dtype, folded=True, auto=auto, **self.settings)
        model = self.attach(base, trainable, name=name)
        model.peft_config[name].base_model_name_or_path = self.base.resolved
        if scale != 1:
            set_scale(model, scale)
        return model, tokenizer

    def base_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer, a copy of it where the adapter brings a chat template of its own."""
        tokenizer = self.base.tokenizer()
        if (template := self.folder / "chat_template.jinja").is_file():
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = read_regular(template, LENGTH)
        return tokenizer

    def attach_beside(self, model: PeftModel, name: str) -> None:
        """Put the adapter beside others on a base that is loaded already; `name` is what PEFT calls it.

        Raises:
            ValueError: a file is missing or damaged, or the tensors do not fit the model.
        """
        if not (self.folder / WEIGHTS).is_file():
            raise ValueError(f"{self.folder} has no {WEIGHTS}")
        check_imports(self.config)
        with loading(f"adapter {self.folder}", DamagedFileError):
            model.load_adapter(str(self.folder), adapter_name=name)

    def load_blank(self) -> PeftModel:
        """Load the adapter on its base without the base's memory: θ is there, W is not.

        Raises:
            ValueError: the adapter's task is not handled here, or the adapter cannot be loaded.
        """
        auto = self.auto_class
        return self.attach(self.base.meta(torch.float32, auto=auto, **self.settings), light=True)

    def attach(
        self, model: PreTrainedModel, trainable: bool = False, light: bool = False, name: str = "default"
    ) -> PeftModel:
        """Put the adapter on its loaded base and check that it fits.

        With `light`, the base has no memory and θ alone is filled. `name` is what PEFT calls the adapter.

        Raises:
            ValueError: a file is missing or damaged, or the tensors do not fit the model.
        """
        if not (self.folder / WEIGHTS).is_file():
            raise ValueError(f"{self.folder} has no {WEIGHTS}")
        config = copy.deepcopy(self.config)  # PEFT writes what it finds into it
        fit_vocabulary(model, self.folder)
        if not self.is_inlay and not light:
            check_sizes(config, model, self.tensors, str(self.folder))
        with loading(f"adapter {self.folder}", DamagedFileError):
            return PeftModel.from_pretrained(
                model,
                str(self.folder),
                adapter_name=name,
                is_trainable=trainable,
                config=config,
                low_cpu_mem_usage=light,
            )

    def load_unadapted_base(self, dtype: torch.dtype) -> PreTrainedModel:
        """Load the base as it is without the adapter; a fold's is the model that was folded.

        Raises:
            ValueError: it cannot be loaded, or a fold does not say what it was made of.
        """
        base = self.base
        if self.folded:
            try:
                name = from_json(read_regular(Path(base.name) / FOLDED))["model"]
            except (OSError, ValueError, KeyError, TypeError):
                raise ValueError(f"{base.name} does not say which model was folded into it; leave out --base") from None
            base = replace(base, name=name)
        auto = base.auto_class(self.config.task_type, **self.settings)
        return base.load(dtype, auto=auto, **self.settings)

    def saved_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer saved beside the adapter, or else the base's.

        Raises:
            ValueError: the tokenizer cannot be loaded.
        """
        if not (self.folder / "tokenizer.json").exists():
            return self.base.tokenizer()
        where, trust = str(self.folder), self.base.trust_remote_code
        return read_tokenizer(where, self.saved_config, where, trust_remote_code=trust)
