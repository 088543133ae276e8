"""A base model: its name, how it is found, and everything that is read of it."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inlay.files.untrusted import regular_files
from inlay.host import distributed
from inlay.host.bitsandbytes_guard import readable
from inlay.messages import loading
from inlay.models.folded import FOLDED
from inlay.models.hub import check_hub_model
from inlay.models.loading import DTYPES, match_compute_dtype, resolve
from inlay.models.model_classes import SEQ2SEQ, SEQUENCE, auto_class
from inlay.models.stored_weights import Weights


@dataclass(frozen=True)
class BaseModel:
    """Name a base model, and open its configuration and its tokenizer once each.

    Attributes:
        name: a hub id, a folder, or builtin.
        revision: which revision of a hub model is taken; None takes the newest.
        trust_remote_code: whether the model's repository may run its own code.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    _configs: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def resolved(self) -> str:
        """Return the model's folder or hub id (see `resolve`).

        Raises:
            ValueError: nothing is there, and a hub cannot be asked.
        """
        found = resolve(self.name)
        if not Path(found).exists():
            check_hub_model(found, self.revision)
        return found

    def config(self, **settings: Any) -> Any:
        """Return a copy of the model's configuration, with `settings` in place of its own values.

        Raises:
            ValueError: the model is not there, or its configuration cannot be read.
        """
        key = repr(sorted(settings.items()))
        if key not in self._configs:
            with loading(f"model {self.name!r}"):
                self._configs[key] = AutoConfig.from_pretrained(self.resolved, **self._hub, **settings)
        return copy.deepcopy(self._configs[key])

    def _any_config(self) -> Any:
        """Return the configuration with whatever settings it was read before, for what no setting changes."""
        return copy.deepcopy(next(iter(self._configs.values()))) if self._configs else self.config()

    @property
    def _hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """Return the dtype that the checkpoint is stored in."""
        dtype = self._any_config().get_text_config().dtype
        return dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype), torch.float32)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """Return the model's own generation settings; those of transformers where it has none."""
        try:
            return GenerationConfig.from_pretrained(self.resolved, revision=self.revision or "main")
        except (OSError, ValueError):
            return GenerationConfig()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer; every call returns the same object.

        Raises:
            ValueError: the tokenizer cannot be loaded.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        where = self.name if (Path(self.name) / "tokenizer.json").exists() else self.resolved
        config = None
        with suppress(ValueError):  # transformers may know a tokenizer where it does not know the model
            config = self._any_config()
        return read_tokenizer(where, config, self.name, **self._hub)

    def auto_class(self, task_type: str | None = None, **settings: Any) -> Any:
        """Return the transformers class that loads this model for a task of PEFT's (see `model_classes.auto_class`)."""
        return auto_class(self.config(**settings), task_type)

    def evaluated_auto_class(self) -> Any:
        """Return the class that loads this model for evaluation.

        It is a classifier or an encoder-decoder where the configuration says so.
        """
        config = self.config()
        if any(str(head).endswith("ForSequenceClassification") for head in config.architectures or []):
            return auto_class(config, SEQUENCE)
        return auto_class(config, SEQ2SEQ if config.is_encoder_decoder else None)

    def weights(self, auto: Any = AutoModelForCausalLM, **settings: Any) -> Weights:
        """Open the stored weights; `auto` and `settings` build the model that gives them its own names (see `meta`).

        Raises:
            ValueError: the model has no safetensors files, or they cannot be read.
        """
        return Weights(self.name, self.resolved, self.revision, lambda: self.meta(torch.float32, auto=auto, **settings))

    def meta(
        self, dtype: torch.dtype, layers: int | None = None, auto: Any = AutoModelForCausalLM, **settings: Any
    ) -> PreTrainedModel:
        """Build the model on the meta device, where it has no memory; `get_peft_model` adapts it like the real one.

        Args:
            dtype: of its tensors.
            layers: build only so many of the first layers.
            auto: the transformers class that builds it.
            settings: values in place of those of its configuration.
        """
        config = self.config(**settings)
        if layers is not None:
            config = with_first_layers(config, layers)
        with loading(f"model {self.name!r}"), torch.device("meta"):
            return auto.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)

    @cached_property
    def outline(self) -> PreTrainedModel:
        """Return the model on the meta device, built once, to be read and never changed."""
        return self.meta(torch.float32)

    def load(
        self,
        dtype: torch.dtype,
        quantization: Any = None,
        folded: bool = False,
        auto: Any = AutoModelForCausalLM,
        **settings: Any,
    ) -> PreTrainedModel:
        """Load the model onto the GPU, if there is one and the model is not sharded, else onto the CPU.

        Args:
            dtype: to load and compute in.
            quantization: a configuration of transformers by which the model is quantised while it loads.
            folded: load the base of a fold too, which is no model without its adapter.
            auto: the transformers class that loads it.
            settings: values in place of those of its configuration.

        Raises:
            ValueError: it cannot be loaded, is quantised already and `quantization` is given, or is half of a fold.
        """
        if (Path(self.resolved) / FOLDED).exists() and not folded:
            raise ValueError(f"{self.name} is a folded base, no model without its adapter; give the folder of both")
        config, options = self.config(**settings), self._hub
        if quantization is not None:
            if getattr(config, "quantization_config", None):
                raise ValueError(f"model {self.name!r} is quantised already; adapt it as it is, with quantize: none")
            options["quantization_config"] = quantization
        with loading(f"model {self.name!r}"):
            model = auto.from_pretrained(self.resolved, config=config, dtype=dtype, **options)
        for module in model.modules():
            readable(module)
        match_compute_dtype(model, dtype)
        device = torch.device("cuda" if torch.cuda.is_available() and not distributed.sharded() else "cpu")
        return cast(Any, model).to(device)


def read_tokenizer(where: str, config: Any, name: str, **hub: Any) -> PreTrainedTokenizerBase:
    """Read a tokenizer from a folder or a hub.

    Args:
        where: the folder or hub id.
        config: the model's configuration; None: transformers looks for one.
        name: of the model, for error messages.
        hub: revision and trust_remote_code.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    regular_files(Path(where))
    with loading(f"the tokenizer of {name!r}"):
        return AutoTokenizer.from_pretrained(where, config=config, **hub)


def with_first_layers(config: Any, layers: int) -> Any:
    """Return a copy of a model's configuration that has only its first `layers` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return config
