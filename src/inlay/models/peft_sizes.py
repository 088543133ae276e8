"""Hold what an adapter of PEFT's own would build against what its file stores, before memory is taken for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from inlay.files.untrusted import DamagedFileError


def check_sizes(config: PeftConfig, model: PreTrainedModel, stored: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError where `config` asks PEFT for tensors that are missing in the file, or of other shapes there.

    All of it is built on a device without memory, where a rank of a billion costs nothing. A type that cannot be built
    there is not checked: what is wrong with it is said where it is loaded.

    Args:
        config: of the adapter.
        model: its base.
        stored: the tensors of its file.
        where: the folder, for the message.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again where it is loaded
            blank = type(model)(copy.deepcopy(model.config))
            built = get_peft_model(blank, copy.deepcopy(config), low_cpu_mem_usage=True)
            expected = get_peft_model_state_dict(built, save_embedding_layers=False)
    except Exception:
        return
    for key, tensor in sorted(expected.items()):
        if key not in stored:
            raise DamagedFileError(f"{where}: its configuration asks for {key}, which its file does not hold")
        if stored[key].shape != tensor.shape:
            asked, held = (" × ".join(map(str, shape)) for shape in (tensor.shape, stored[key].shape))
            raise DamagedFileError(f"{where}: its configuration asks for {key} of {asked} numbers; its file has {held}")
