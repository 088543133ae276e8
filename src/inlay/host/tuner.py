"""The tuner of the one PEFT type, what is checked when an adapter is loaded, and the registration of both with PEFT."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Conv1D

from inlay.host import adapter_state, seal
from inlay.host.compute_starts import run_jobs
from inlay.host.config import INLAY, InlayConfig, matches_end
from inlay.host.experts import (
    AdaptedExperts,
    ExpertWeight,
    InlayExperts,
    check_experts,
    count_of,
    expert_weights,
    fused_experts,
    report_frozen_experts,
    some_experts,
    taken_experts,
)
from inlay.host.first_pass import FirstPass
from inlay.host.hotswap import replace_peft_hotswap
from inlay.host.layer import PREFIX, InlayLinear, adapted, own_weight
from inlay.host.module_names import without_wrappers
from inlay.host.place import places


class InlayModel(BaseTuner):
    """Find the modules to adapt, wrap them, decompose one weight at a time, and check what is loaded."""

    prefix = PREFIX
    tuner_layer_cls = InlayLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Inject an adapter as PEFT does; starts are computed when all layers are there, a failure changes nothing."""
        config = cast(InlayConfig, cast(dict, self.peft_config)[adapter_name])
        if state_dict is not None and (shared := config.build().shared):
            raise ValueError(
                f"{config.method}: {', '.join(sorted(shared))} belong to all layers, of which a state dict alone tells "
                "one; inject the adapter by its target_modules and load the tensors afterwards"
            )
        # trl copies an adapter by adding another under the same config object, then copying parameters alone.
        twin = next((n for n, c in cast(dict, self.peft_config).items() if c is config and n != adapter_name), None)
        fresh = config.format_version is None and not config.folded
        fill = twin or (fresh and state_dict is None and not low_cpu_mem_usage)
        self._request, self._light = (
            (config, config.target_modules, adapter_name, (adapter_name, twin) if fill else None),
            low_cpu_mem_usage,
        )
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(f"an adapter cannot be called {adapter_name!r}; use letters, digits and underscores")
        check_tokens(model, config)
        self._touched: list[tuple[str, nn.Module, str, nn.Module]] = []
        self._wrapped: list[tuple[nn.Module, str, nn.Module]] = []
        alone = config.experts and config.target_modules in ([], set(), ())
        if config.target_modules == "all-linear" and not config.experts and fresh:
            report_frozen_experts(model)
        try:
            config.target_modules = DUMMY_TARGET_MODULES if alone else config.target_modules
            with warnings.catch_warnings():
                if config.experts or listed(config.exclude_modules):  # `_check_patterns` sees all of them
                    warnings.filterwarnings("ignore", "You have passed exclude_modules")
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception as error:
            for parent, child, module in self._wrapped:
                setattr(parent, child, module)
            for _, parent, child, module in self._touched:
                if isinstance(module, InlayLinear):
                    module.delete_adapter(adapter_name)
                setattr(parent, child, module)
            if isinstance(error, ValueError) and re.match(r"Target modules|No `target_modules`", str(error)):  # PEFT's
                raise ValueError(f"{str(error).removesuffix('.')}; {self._kinds()}") from None
            raise
        finally:
            self._touched = []
            config.target_modules = set() if alone else config.target_modules
        if (before := vars(self).get("first_pass")) is not None:
            before.remove()
        self.first_pass = FirstPass(model)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Check and fill the new adapter: PEFT calls this when all layers are wrapped and nothing else is changed."""
        config, targets, adapter_name, fill = self._request
        if config.experts:
            self._take_experts(model, config, adapter_name)
        self._check_patterns(model, config, targets)
        self._settle_places(model, config, adapter_name)
        if fill:
            self._decompose(*fill, config)
        super()._mark_only_adapters_as_trainable(model)

    def _take_experts(self, model: nn.Module, config: InlayConfig, adapter_name: str) -> None:
        """Adapt the parameters of fused experts, as `_create_and_replace` does linear layers.

        Raises:
            ValueError: the model has none, or they cannot be adapted.
        """
        experts = some_experts(model)
        if isinstance(config.experts, dict):
            for module, chosen in config.experts.items():
                found = [m for n, m in experts.items() if is_named(module, [n])]
                if not found:
                    raise ValueError(f"experts: {module!r} is none of {', '.join(experts)}")
                count = count_of(found[0])
                if wrong := [e for e in chosen if not 0 <= e < count]:
                    raise ValueError(f"experts: {module} has no expert {wrong[0]}; it has 0 to {count - 1}")
        for name, module in experts.items():
            weights = [w for w in expert_weights(module) if taken_experts(config, f"{name}.{w}", module)]
            for weight in weights:
                check_experts(name, module, config.build(without_wrappers(f"{name}.{weight}")))
            if weights and is_offloaded(model, module):
                raise ValueError(
                    f"experts: the device map keeps {name} off the device that computes, where its weights are loaded "
                    "past an adapter; give it a device in the map, or leave it out (exclude_modules)"
                )
            parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            wrapper = parent.get_submodule(child)
            if weights and not isinstance(wrapper, AdaptedExperts):
                self._wrapped.append((parent, child, module))
                wrapper = AdaptedExperts(module)
                setattr(parent, child, wrapper)
            for weight in weights:
                if weight not in cast(AdaptedExperts, wrapper).layers():
                    wrapper.add_module(weight, InlayExperts(ExpertWeight(module, weight)))
                layer, key = cast(InlayExperts, wrapper.get_submodule(weight)), f"{name}.{weight}"
                taken = taken_experts(config, key, module)
                layer.share(adapter_name, [
                    config.build_expert(without_wrappers(key), e) if e in taken else None for e in range(layer.shape[0])
                ])  # fmt: skip
                self._add(layer, key, config, adapter_name)
                self._touched.append((key, wrapper, weight, layer))
                self.targeted_module_names.append(key)

    def _settle_places(self, model: nn.Module, config: InlayConfig, adapter_name: str) -> None:
        layers = {name: cast(InlayLinear, parent.get_submodule(child)) for name, parent, child, _ in self._touched}
        shapes = {n: (m.out_features, m.in_features, m.cuts[adapter_name].method) for n, m in layers.items()}
        for group in places(shapes, getattr(model, "config", None)):
            first = layers[next(iter(group))]
            for name, place in group.items():
                owner = None if layers[name] is first else first
                layers[name].settle_at(adapter_name, place, owner, self._light, config.inference_mode)

    def _check_patterns(self, model: nn.Module, config: InlayConfig, targets) -> None:
        """Raise a ValueError for a name or pattern that matched nothing: a typo would train less than requested."""
        names = [name for name, *_ in self._touched]
        everything = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
        everything += [f"{name}.{weight}" for name, m in fused_experts(model).items() for weight in expert_weights(m)]
        whole = [
            n for n in everything if any(is_named(t, [n]) for t in config.modules_to_save or ())
        ]  # not cut as well
        loaded = left_out(config) if config.format_version is not None else []
        left = [n for n in everything if any(matches_end(t, n) for t in loaded)]
        for target in listed(targets):
            if not is_named(target, names + whole + left):
                raise ValueError(f"target_modules: {target!r} matches no module that can be adapted; {self._kinds()}")
        heads = HEADS if config.task_type in TASKS else ()  # PEFT adds all of these, whether a model has them or not
        for what in ("exclude_modules", "modules_to_save"):
            for target in listed(getattr(config, what)):
                if not is_named(target, everything) and target not in heads:
                    raise ValueError(f"{what}: {target!r} matches no module of this model; {self._kinds()}")
        named = [without_wrappers(name) for name in names]
        if config.patterns:
            named += [
                f"{n}.{e}" for n, _, _, m in self._touched if isinstance(m, InlayExperts) for e in range(m.shape[0])
            ]
        used = {config.pattern_of(name) for name in named}
        for pattern in config.patterns:
            if pattern not in used:
                raise ValueError(f"patterns: {pattern!r} matches no adapted module (or an earlier one takes them all)")

        for target in config.modules_to_save or ():
            for name, module in model.named_modules():
                if is_named(target, [name]) and resolve_quantization_backend(module) is not None:
                    raise ValueError(f"modules_to_save: {name} is quantised and cannot be trained whole; leave it out")

    def _kinds(self) -> str:
        linear = [name for name, m in self.model.named_modules() if isinstance(m, LINEAR)]
        kinds = {name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}
        return f"linear modules here: {', '.join(sorted(kinds)) or 'none'}{self._fused()}"

    def _fused(self) -> str:
        """Return what to report of experts that one parameter holds together."""
        fused = {n.rpartition(".")[2] for n, p in self.model.named_parameters() if p.ndim == 3 and "expert" in n}
        names = ", ".join(sorted(fused))
        return f" ({names} hold all experts in one tensor; experts=True takes them in)" if fused else ""

    def _decompose(self, adapter_name: str, twin: str | None, config: InlayConfig) -> None:
        layers = [cast(InlayLinear, parent.get_submodule(child)) for _, parent, child, _ in self._touched]
        for layer in layers:
            if twin in layer.cuts and layer.cuts[twin].pending:
                layer.settle(twin)
        bar = tqdm(layers, desc=f"Cutting {config.method}", unit="layer", disable=None, delay=1)
        run_jobs(job for layer in bar for job in layer.jobs(adapter_name, like=twin))

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        if not isinstance(target, InlayLinear):
            check_layer(target, current_key)
        check_parent(parent, target_name, current_key)
        layer = target
        if not isinstance(layer, InlayLinear):
            layer = InlayLinear(target, home_of(self.model, target), **get_quantization_kwargs(self))
        self._add(layer, current_key, config, adapter_name)
        self._touched.append((current_key, parent, target_name, target))
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _add(self, layer: InlayLinear, key: str, config: InlayConfig, adapter_name: str) -> None:
        module = without_wrappers(key)
        sealed = (config.seals or {}).get(module)
        if config.seals is not None and config.format_version is not None:  # else they are of another place
            sealed = sealed or {}
        try:
            layer.update_layer(
                adapter_name,
                config.build(module),
                config.inference_mode,
                self._light,
                perturb=not config.init_weights,
                module=module,
                seal=sealed,
                folded=config.folded,
                saver=config.saver,
                seed=config.seed,
            )
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module without what PEFT does beside it.

        A layer is whole when it is unloaded, and an adapter's tensors are where its layer computes (PEFT moves them to
        where the weight lies, and what goes to the meta device is lost).
        """
        setattr(parent, child_name, new_module)

    def _check_target_module_compatiblity(self, peft_config, model: nn.Module, target_name: str) -> None:
        """Raise a ValueError, as PEFT for its LoRA, for weights that Mamba's kernels read past their layers."""
        kind = str(self.get_model_config(model).get("model_type"))
        if ("mamba" in kind or kind in ("falcon_h1", "nemotron_h")) and target_name in ("out_proj", "conv1d"):
            raise ValueError(f"{target_name} of a {kind} model is read past its layer; put it in exclude_modules")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per request of a batch ("__base__": none), to every layer that knows adapters.

        Raises:
            ValueError: in training, with an adapter that is not there or not on its own, or with a merged one.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        layers = [m for m in self.modules() if isinstance(m, (InlayLinear, AuxiliaryTrainingWrapper))]
        available = set(cast(dict, self.peft_config)) | {"__base__"}
        # In PEFT's words, which who catches them knows.
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"adapter_names={names!r} is no list with one of {', '.join(sorted(available))} for each row"
            )
        if unknown := sorted(set(names) - available):
            choices = ", ".join(sorted(available))
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {choices}")
        if any(isinstance(m, InlayExperts) for m in layers):
            raise ValueError("adapter_names: the rows of experts are not told apart; set_adapter for the whole batch")
        if any(m.merged_adapters for m in layers if isinstance(m, InlayLinear)):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if any(config.bias != "none" for config in cast(dict, self.peft_config).values()):
            raise ValueError("adapter_names needs adapters with bias='none': trained biases are part of every row")
        generation = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        kinds = ("num_beams", "num_return_sequences")
        each = max(kwargs.get(k) or getattr(generation, k, None) or 1 for k in kinds)
        hook = partial(for_rows, names=list(names), each=each)
        hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what PEFT's LoRA has: a sum of adapters of any methods is a LoRA, which `export_lora` makes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_weighted_adapter is PEFT's, for LoRA: activate the adapters together with "
            "model.base_model.set_adapter([...]) and inlay.set_scale(model, {name: weight}), or write their weighted "
            "sum as a LoRA with inlay.export_lora({folder: weight}, out)"
        )

    def _check_merge_allowed(self) -> None:
        """Raise a ValueError for what would go wrong half-way or silently, before any weight changes.

        Raises:
            ValueError: an adapter holds NaN or Inf, leaves the range of float16, or is on a weight that another module
                shares or that is on disk.
        """
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, InlayLinear)}
        places = weight_places(self.model)
        for name, layer in layers.items():
            if layer.home is not None:
                raise ValueError(f"{name} is kept on the disk; inlay.merge merges from file to file instead")
            for adapter in (a for a in layer.active_adapters if a in layer.cuts):
                if layer.cuts[adapter].pending:
                    layer.settle(adapter)
                if not all(slot.weight.isfinite().all() for slot in layer.slots(adapter).values()):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: it holds NaN "
                        f"or Inf in {name}; the base is untouched"
                    )
            layer.check_plain_weight()
            names = [a for a in layer.active_adapters if a in layer.cuts and a not in layer.merged_adapters]
            if names and own_dtype(layer) == torch.float16:  # the one that a merge can leave by far
                layer.check_range(layer.merged_weight(names), torch.float16)
            if not isinstance(layer, InlayExperts) and places[id(own_weight(layer.base_layer))] > 1:
                raise ValueError(
                    f"{name} shares its weight with another module (tied embeddings), which merging would change too; "
                    "load the base with tie_word_embeddings=False, or leave it out of target_modules"
                )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast θ to the base's dtype only on request (ZeRO-3 wants one dtype for all parameters); it is fp32."""
        for layer in self.model.modules():
            if not isinstance(layer, InlayLinear) or adapter_name not in layer.cuts or autocast_adapter_dtype:
                continue
            dtype = layer._get_base_layer_device_and_dtype(layer.base_layer)[1]
            if dtype is not None and dtype.is_floating_point:
                for slot in layer.slots(adapter_name).values():
                    slot.exact = None
                    for weight in slot.parameters():
                        weight.data = weight.data.to(dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select the adapter's tensors by its slots, all of them, and give the config the seals of what is saved."""
        layers = adapted(model, adapter_name)
        for layer in layers.values():
            blank = any(slot.weight.is_meta for slot in layer.slots(adapter_name).values())  # shapes are all there is
            if layer.cuts[adapter_name].pending and not blank:
                layer.settle(adapter_name)  # fills the tensors that `state_dict` refers to
        adapter_state.complete_state(model, layers, adapter_name, state_dict, config.bias)
        keys = adapter_state.slot_keys(layers, adapter_name)
        saved = {key: state_dict[key] for key in keys if key in state_dict}
        biases = cls._get_learnable_bias_state_dict(model, state_dict, config)
        seals = {}
        for name, layer in layers.items():
            paths = {path: f"{name}.{path}" for path in layer.slots(adapter_name)}
            if all(key in saved and seal.is_plain_tensor(saved[key]) for key in paths.values()):  # not so when sharded
                tensors = {path: saved[key] for path, key in paths.items()}
                seals[layer.cuts[adapter_name].module] = layer.make_seal(adapter_name, tensors)
        config.folded_base = seal.of_values([s["base"] for s in seals.values()]) if config.folded else None
        config.seals = seals if len(seals) == len(layers) else None
        rest = adapter_state.saved_with_adapter(model, biases, adapter_name, state_dict)
        if seals and rest and all(map(seal.is_plain_tensor, rest.values())):
            seals[adapter_state.BESIDE] = {"tensors": seal.of_tensors(rest), "base": None}
        return saved | biases

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: Any
    ) -> dict[str, Tensor]:
        """Return the biases as PEFT does, less those of modules saved whole.

        These are saved already, and under keys that can be loaded.
        """
        biases = super()._get_learnable_bias_state_dict(model, state_dict, config)
        return {key: bias for key, bias in biases.items() if ".modules_to_save." not in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the key in a file for a `key` of the model, without `adapter_name`."""
        return adapter_state.saved_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors of a file under the keys of the model, checked whole."""
        mapped = adapter_state.model_keys(model, adapter_name, state_dict)
        biases = cls._get_learnable_bias_state_dict(model, mapped, config)
        rest = adapter_state.saved_with_adapter(model, biases, adapter_name, mapped)
        digest = (config.seals or {}).get(adapter_state.BESIDE, {}).get("tensors")
        adapter_state.check_state(model, adapter_name, mapped, rest, digest)
        return mapped


def check_tokens(model: nn.Module, config: InlayConfig) -> None:
    """Raise a ValueError for trained tokens that the embeddings of `model` do not have."""
    tokens = config.trainable_token_indices or {}
    if not isinstance(tokens, dict):
        embeddings = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
        tokens = {embeddings[0]: tokens} if embeddings else {}
    for target, indices in tokens.items():
        for name, module in model.named_modules():
            if is_named(target, [name]) and isinstance(module, (nn.Embedding, nn.Linear)):
                rows = len(module.weight)
                if beyond := [i for i in indices if i >= rows]:
                    raise ValueError(
                        f"trainable_token_indices: {beyond[0]} is beyond the {rows} tokens of {name}; "
                        f"first model.resize_token_embeddings({max(beyond) + 1}), or to the size it was trained with"
                    )


def own_dtype(layer: InlayLinear) -> torch.dtype | None:
    """Return the dtype of the weight under an adapted layer."""
    return layer._get_base_layer_device_and_dtype(layer.base_layer)[1]


def weight_places(model: nn.Module) -> Counter[int]:
    """Count, by the id of each weight of `model`, the places where a module with it stands.

    A block that stands in several places holds its layers once: what is adapted in it is adapted in all of them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {(id(modules[path.rpartition(".")[0]]), path.rpartition(".")[2]): m for path, m in modules.items() if path}
    return Counter(id(weight) for module in places.values() if (weight := own_weight(module)) is not None)


def listed(names: Any) -> list[str]:
    """Return the names of a list or set; a regular expression, or nothing, names none."""
    return list(names) if isinstance(names, (list, set)) else []


def left_out(config: InlayConfig) -> list[str]:
    """Return what a config excludes, as regular expressions: PEFT stores what it expanded, without taking these out."""
    excluded = config.exclude_modules
    return [excluded] if isinstance(excluded, str) else [re.escape(name) for name in excluded or ()]


def for_rows(module: nn.Module, args: tuple, kwargs: dict, names: list[str], each: int) -> tuple[tuple, dict]:
    """Tell a layer which adapter each row is for, as a forward hook; a decoder has a row for each beam or answer."""
    if isinstance(module, AuxiliaryTrainingWrapper):  # which not every adapter trains
        names = [name if name in module._adapters else "__base__" for name in names]
    rows = len(args[0] if args else next(iter(kwargs.values())))
    own = names if rows == len(names) else [name for name in names for _ in range(each)]
    if rows != len(own):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )
    return args, {**kwargs, "adapter_names": own}


LINEAR = (nn.Linear, Conv1D)
HEADS, TASKS = ("classifier", "score", "qa_outputs"), (None, "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def is_named(target: str, names: list[str]) -> bool:
    """Return whether one of the names is `target` or ends in it."""
    return any(name == target or name.endswith(f".{target}") for name in names)


def check_layer(module: nn.Module, name: str) -> None:
    """Raise a ValueError unless the module is a linear layer we know how to adapt."""
    if isinstance(module, BaseTunerLayer):
        kind = f"{type(module).__module__.split('.')[2]} {type(module).__name__}"
        raise ValueError(
            f"{name} carries an adapter of PEFT's already ({kind}), and Inlay's goes on a plain layer; merge or remove "
            "that one first (merge_and_unload, delete_adapter), or leave this layer out of target_modules"
        )
    backend = resolve_quantization_backend(module) if not isinstance(module, LINEAR) else None
    if not isinstance(module, LINEAR) and (backend is None or backend.layer_type != "linear"):
        raise ValueError(
            f"{name} is a {type(module).__name__}, which Inlay does not adapt; target nn.Linear, transformers' Conv1D "
            "or a quantised linear layer, and leave this one out of target_modules"
        )


READ_PAST = {  # by transformers' classes, whose weights they hand to a function
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
}


def check_parent(parent: nn.Module, child: str, name: str) -> None:
    """Raise a ValueError where the module `parent` is known to read the weight of its `child` past that layer."""
    kind = type(parent).__name__
    if isinstance(parent, nn.MultiheadAttention) or child in READ_PAST.get(kind, ()):
        raise ValueError(
            f"{name}: {kind} reads this weight past its layer, so an adapter has no effect; name it in exclude_modules"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"{name}: nn.TransformerEncoderLayer reads this weight past its layer in evaluation; leave it out, or call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )


def home_of(model: nn.Module, module: nn.Module) -> torch.device | None:
    """Return where a module computes whose weight accelerate keeps on the disk; None for all others."""
    devices = device_map_of(model)
    if "disk" not in devices.values() or not is_offloaded(model, module):
        return None
    return torch.device(next((d for d in devices.values() if d not in ("cpu", "disk")), "cpu"))


def is_offloaded(model: nn.Module, module: nn.Module) -> bool:
    """Return whether accelerate keeps the weights of a module elsewhere until they are used, by a map of devices."""
    return bool(device_map_of(model)) and any(p.is_meta for p in module.parameters())


def device_map_of(model: nn.Module) -> dict[str, Any]:
    """Return where accelerate keeps which module; empty where it has not placed the model."""
    return getattr(model, "hf_device_map", None) or {}


def register() -> None:
    """Make PEFT know the type; importing `inlay` does it, and doing it twice changes nothing."""
    if INLAY not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="inlay", config_cls=InlayConfig, model_cls=InlayModel)
    PEFT_TYPE_TO_CONFIG_MAPPING[INLAY], PEFT_TYPE_TO_TUNER_MAPPING[INLAY] = InlayConfig, InlayModel
    replace_peft_hotswap()
    CONFIG_KEYS_TO_CHECK[INLAY] = ["method", "args", "scale", "dropout", "patterns", "folded", "folded_base"]
