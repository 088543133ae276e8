"""The tensors of an adapter in a model's state dict: complete when they are saved, exactly the adapter when loaded.

PEFT selects them by parts of their names. That loses tensors where another adapter is called like a module ("mlp"),
and where a wrapper puts a prefix in the names; both are undone here, and what is missing all the same is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from inlay.host import distributed, seal
from inlay.host.layer import PREFIX, UNSEALED, InlayLinear, adapted
from inlay.host.module_names import without_wrappers

ROOT = "base_model.model."
BESIDE = "*"  # the seal of what an adapter holds beside θ


def plain_key(key: str) -> str:
    """Return a key or a module's name without the prefixes of torch.compile, DDP, FSDP and activation checkpointing."""
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return without_wrappers(key)


def saved_key(key: str, adapter_name: str) -> str:
    """Return the key under which a file holds a tensor of the model: without wrappers, and without `adapter_name`.

    What a module that is trained whole holds under `modules_to_save` has the key that it had before it was wrapped.
    """
    key, name = plain_key(key), re.escape(adapter_name)
    if slot := re.fullmatch(rf"(.*\.{PREFIX}[^.]+)\.{name}\.weight", f".{key}"):
        return f"{slot[1]}.weight".removeprefix(".")
    key = re.sub(rf"\.modules_to_save\.{name}\.", ".", key)
    return re.sub(rf"(\.token_adapter\.trainable_tokens_delta)\.{name}$", r"\1", key)


def slot_keys(layers: dict[str, InlayLinear], adapter_name: str) -> Iterable[str]:
    """Yield the keys of all slots of `adapter_name` on `layers`, as the names of the modules spell them."""
    for name, layer in layers.items():
        for path in layer.slots(adapter_name):
            yield f"{name}.{path}"


def wrapped_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the keys, saved key -> `model`'s key, of what `adapter_name` trains whole or by its tokens."""
    keys = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for short, path in module.adapter_state_dict_load_map(adapter_name).items():
                keys[f"{name}.{short}"] = f"{name}.{path}"
    return keys


def complete_state(
    model: nn.Module, layers: dict[str, InlayLinear], adapter_name: str, state: dict[str, Tensor], bias: str
) -> None:
    """Put into `state` each tensor of `adapter_name` under the key that PEFT looks for, in place.

    A tensor that PEFT dropped for its name is taken from the model, if `state` is the model's own.

    Raises:
        ValueError: a tensor of the adapter is missing.
    """
    own = model.state_dict()
    given, shared = ({plain_key(key): tensor for key, tensor in tensors.items()} for tensors in (state, own))
    if not is_of_model(state, own):
        shared = {}
    for key in own:  # where only the spelling differs
        if key not in state and plain_key(key) in given:
            state[key] = given[plain_key(key)]
    needed = [*slot_keys(layers, adapter_name), *wrapped_keys(model, adapter_name).values()]
    if bias == "inlay_only":
        needed += [f"{name}.base_layer.bias" for name, layer in layers.items() if layer.has_bias()]
    missing = []
    for key in needed:
        tensor = given.get(plain_key(key), shared.get(plain_key(key)))
        if tensor is None:
            missing.append(key)
        else:
            state[key] = tensor
    if missing and distributed.is_first():  # the other processes of a run write nothing
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"the adapter {adapter_name!r} would not be saved whole: the state dict has no {missing[0]}{more}; save "
            "without state_dict, or give one of the whole model, and name no other adapter like a module"
        )


def is_of_model(state: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Return whether `state` holds the model's own tensors (`own`), and not copies or averages of them."""
    pairs = [(tensor, own[key]) for key, tensor in state.items() if key in own]
    pairs = [(one, other) for one, other in pairs if seal.is_plain_tensor(one) and seal.is_plain_tensor(other)]
    return bool(pairs) and all(one.data_ptr() == other.data_ptr() for one, other in pairs)


def model_keys(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, `state`, under the keys of `model`, with `adapter_name` in them.

    PEFT saves some tensors twice, where the vocabulary grew: the second copy is left out. Unknown keys stay.
    """
    own = model.state_dict()
    there = {plain_key(key): key for key in own}
    root = ROOT if any(key.startswith(ROOT) for key in there) else ""
    slots = (plain_key(key) for key in slot_keys(adapted(model, adapter_name), adapter_name))
    keys = {**{key: there.get(key, key) for key in there}, **{saved_key(k, adapter_name): there[k] for k in slots}}
    wrappers = tuple(f"{plain_key(n)}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    tensors = {}
    for key, tensor in state.items():
        plain = root + plain_key(key).removeprefix(ROOT)
        if plain in keys:
            if plain.endswith(".token_adapter.base_layer.weight") and own[keys[plain]].is_meta:
                continue  # a base without memory gets θ alone
            tensors[keys[plain]] = tensor
        elif not (plain.startswith(wrappers) and re.search(COPIES, plain)):  # those that are there are known
            tensors[key] = tensor
    return tensors


COPIES = r"\.modules_to_save\.|\.original_module\.|\.token_adapter\.trainable_tokens_delta$"  # saved twice by PEFT


def saved_with_adapter(
    model: nn.Module, biases: dict[str, Tensor], adapter_name: str, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what of `state` an adapter holds beside θ, as it is saved: `biases`, modules and tokens trained whole."""
    given = {plain_key(key): tensor for key, tensor in state.items()}
    paths = {plain_key(key): plain_key(path) for key, path in wrapped_keys(model, adapter_name).items()}
    tensors = {plain_key(key): bias for key, bias in biases.items()}
    tensors |= {key: given[path] for key, path in paths.items() if path in given}
    return {key.removeprefix(ROOT): tensor for key, tensor in tensors.items()}


def check_state(
    model: nn.Module, adapter_name: str, state: dict[str, Tensor], rest: dict[str, Tensor], digest: str | None
) -> None:
    """Raise a ValueError unless `state` is exactly this adapter: nothing missing, extra, misshapen or non-finite.

    Args:
        model: adapted.
        adapter_name: the adapter that is loaded.
        state: the tensors by the keys of the model's state dict.
        rest: those beside θ, as they are saved (`saved_with_adapter`).
        digest: the digest that `rest` must have, if any is known.
    """
    layers, there = adapted(model, adapter_name), model.state_dict()
    spelled = {plain_key(key): key for key in there}
    expected = {spelled[plain_key(key)] for key in slot_keys(layers, adapter_name)}
    sized = {*map(id, rest.values())}
    faults = [f"{key} is missing" for key in sorted(expected - state.keys())]
    for key, value in state.items():
        if key not in there:
            faults.append(f"{key} belongs to no module of this model")
        elif value.shape != there[key].shape:
            beside = key not in expected and (id(value) not in sized or value.shape[1:] == there[key].shape[1:])
            fix = f" (first model.resize_token_embeddings({len(value)})?)" if beside and value.ndim == 2 else ""
            faults.append(f"{key} has shape {tuple(value.shape)}, not {tuple(there[key].shape)}{fix}")
        elif not value.isfinite().all():
            faults.append(f"{key} holds NaN or Inf")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ValueError(f"this adapter cannot be loaded here: {'; '.join(faults[:3])}{more}")
    pending = any(layer.cuts[adapter_name].pending for layer in layers.values())
    if digest is not None and pending and seal.of_tensors(rest) != digest:
        raise ValueError(f"{', '.join(rest)[:200] or 'biases'}: {UNSEALED}")
    for name, layer in layers.items():
        tensors = {path: state[spelled[plain_key(f"{name}.{path}")]] for path in layer.slots(adapter_name)}
        layer.check_seal(adapter_name, tensors, state.get(f"{name}.base_layer.weight"))
        layer.cuts[adapter_name].pending = False
