"""The adapter's configuration, and the one place where PEFT's closed list of types gets a member."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from peft import PeftConfig, PeftType

from inlay import methods, outside
from inlay.files.untrusted import from_json, read_regular
from inlay.host import seal
from inlay.method import Method
from inlay.numerics.ops import SAVERS

FORMAT_VERSION = 1
BIAS = ("none", "all", "inlay_only")
NAMES, SEALED = (list, set, tuple), {"tensors", "base"}


def check_imports(config: PeftConfig | SimpleNamespace) -> None:
    """Raise a ValueError where PEFT would import a module, or run code, because a config of any type names it.

    So it is with the configs of the adapters that one of X-LoRA's names.
    """
    core = vars(config).get("megatron_core")
    if vars(config).get("megatron_config") or core not in (None, "megatron.core"):
        raise ValueError(
            f"megatron_config, megatron_core={core!r}: PEFT imports the module that is named there, which is not done "
            "here; remove both from the configuration"
        )
    options = vars(config).get("tokenizer_kwargs")
    if isinstance(options, dict) and "trust_remote_code" in options:
        raise ValueError(
            "tokenizer_kwargs: trust_remote_code would run code of the repository that the configuration names; "
            "remove it from the configuration"
        )
    adapters = vars(config).get("adapters") or {}  # X-LoRA's, which PEFT opens in their turn
    if not isinstance(adapters, dict):
        raise ValueError(f"adapters: {adapters!r:.100} is not a mapping of names to the folders of adapters")
    for where in adapters.values():
        file = Path(str(where)) / "adapter_config.json"
        try:
            inner = from_json(read_regular(file))
        except (OSError, ValueError):
            raise ValueError(
                f"adapters: {str(where)!r:.100} is not the folder of an adapter on this machine, and none is fetched "
                "because a configuration names it; download it, and name its folder"
            ) from None
        if isinstance(inner, dict):  # PEFT takes it for a LoRA, whatever more it names
            check_imports(SimpleNamespace(**{**inner, "adapters": None}))


def check_where(config: PeftConfig) -> None:
    """Raise a ValueError for what PEFT would trip over where it looks for the modules that `config` names."""
    check_imports(config)
    for what in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = getattr(config, what, None)
        if isinstance(value, str):
            check_regex(what, value)
        elif value is not None and not (isinstance(value, NAMES) and all(isinstance(name, str) for name in value)):
            raise ValueError(f"{what}: {value!r} is not a name or a list of names")


def check_regex(what: str, pattern: Any) -> None:
    """Raise a ValueError unless `pattern`, the value of `what`, is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{what}: {pattern!r} is not a regular expression ({error})") from None


def matches_end(pattern: str, name: str) -> bool:
    """Return whether a regular expression matches a module's name, or what follows one of its dots.

    It stays as it was written: within another one, (?i) would be an error, and \\1 another group.
    """
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    return any(re.compile(pattern).fullmatch(name, start) for start in starts)


def add_peft_type(name: str) -> PeftType:
    """Add the member `name` to PEFT's closed enum of types.

    `register_peft_method` refuses names that are not members and PEFT offers no entry point; a plain string in its
    place breaks wherever transformers reads `.value`.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


INLAY = add_peft_type("INLAY")


@dataclass
class InlayConfig(PeftConfig):
    """Say which method adapts which modules, with which hyperparameters.

    `InlayConfig(method="pissa", args={"r": 16}, target_modules="all-linear")` and
    `InlayConfig(method=methods.PiSSA(r=16), ...)` are the same.

    Args:
        method: a method's name (`inlay methods` lists them) or an instance.
        args: its hyperparameters.
        scale: s in y = Wx + s (ΔW(θ) − ΔW(θ₀)) x.
        dropout: dropout on the change only.
        patterns: hyperparameters per module: a regex on the end of the module's name -> args that differ there, as
            `{"k_proj": {"r": 4}, r"layers\\.[01]\\..*": {"r": 32}}`. The first that matches counts.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, trainable_token_indices:
            as in `LoraConfig`, "all-linear" included.
        experts: whether the fused experts of a mixture-of-experts model are adapted too: each of them, in every layer
            that `exclude_modules` and `layers_to_transform` leave. `patterns` name them by their parameters, as in
            `{"experts.down_proj": {"r": 4}}`, or one of them, `experts.down_proj.3`. With `target_modules=[]` they are
            adapted alone. `{"layers.0.mlp.experts": [0, 3]}` takes in these of one layer, and none of layers that are
            not named.
        bias: "none", "all" or "inlay_only": which biases of the model are trained.
        saver: "none", "velora" or "wta_crs": in training, what is kept of a layer's input for the gradient of an inner
            factor (A): less than all of it, for an estimate of the gradient (`inlay.numerics.ops.savers.SAVERS`).
        seed: of what starts draw (SNELL, SpIEL, DoTA's and LaMDA's random ones, ...), the same on every machine and
            whatever was drawn before: checkpoints of the trained parameters alone are then whole. None: torch's
            generator draws.
        init_weights: False starts away from the identity, for tests only.
        defined_in: the module (and distribution) of a method that is not Inlay's; written when an adapter is saved, to
            say what is missing where it is loaded. Nothing is imported because of it.
        folded: the base is W − s ΔW(θ₀), quantised, as `inlay.fold` makes it; set in what it writes, never by hand.

    Raises:
        ValueError: an unknown method, hyperparameter or value; the message names the choices.
    """

    method: str | Method = "bone"
    args: dict[str, Any] = field(default_factory=dict)
    scale: float | None = None
    dropout: float = 0.0
    patterns: dict[str, dict[str, Any]] = field(default_factory=dict)
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    experts: bool | dict[str, list[int]] = False
    bias: str = "none"
    saver: str = "none"
    seed: int | None = None
    init_weights: bool = True
    defined_in: dict[str, str] | None = None
    folded: bool = False
    folded_base: str | None = None  # a digest of what it was folded into
    format_version: int | None = None  # None: not read from a checkpoint
    hyperparameters: str | None = None  # a digest of them, against edits of a checkpoint's config
    seals: dict[str, dict[str, Any]] | None = None  # per module, what a checkpoint held and was cut from

    # Hot swap reads these of any config; 1 / 1 leaves our factor, which is part of the method, alone.
    r: ClassVar = 1
    lora_alpha: ClassVar = 1
    rank_pattern: ClassVar = {}
    alpha_pattern: ClassVar = {}
    use_rslora: ClassVar = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = INLAY
        if isinstance(self.method, Method):
            self._take(self.method)
        kinds = (("args", dict), ("patterns", dict), ("seals", dict), ("format_version", int), ("seed", int))
        for name, kind in (*kinds, ("defined_in", dict)):
            if not isinstance(value := getattr(self, name), kind | None):
                raise ValueError(f"{name}={value!r} is not {'a mapping' if kind is dict else 'a whole number'}")
        self._check_chosen_experts()
        for mark in (self.seals or {}).values():
            if not (isinstance(mark, dict) and mark.keys() >= SEALED):
                raise ValueError(f"seals: {mark!r} is no seal; set config.seals = None to load without")
        check_where(self)
        self.args = dict(self.args or {})
        self.patterns = dict(self.patterns or {})
        self._adopt_host_args()
        self.target_modules = set(t) if isinstance(t := self.target_modules, list) else t
        self.exclude_modules = set(e) if isinstance(e := self.exclude_modules, list) else e
        self._check()

    def _check_chosen_experts(self) -> None:
        chosen = self.experts.values() if isinstance(self.experts, dict) else ()
        whole = all(isinstance(own, list) and own and all(type(e) is int for e in own) for own in chosen)
        if not isinstance(self.experts, bool | dict) or self.experts == {} or not whole:
            raise ValueError(
                f"experts={self.experts!r} is not true or false, nor numbers of experts as "
                '{"layers.0.mlp.experts": [0, 3]}'
            )

    def _take(self, method: Method) -> None:
        """Read a method instance as a name and the hyperparameters that differ from its defaults."""
        if self.args or self.scale is not None or self.dropout:
            raise ValueError("give hyperparameters in the method instance or in args, scale and dropout, not in both")
        if (same := methods.find(method.name)) is not type(method):
            raise ValueError(
                f"{outside.title_of(type(method))} is called {method.name!r}, which is the name of "
                f"{outside.title_of(same)}; give it another name"
            )
        values = {f.name: getattr(method, f.name) for f in fields(method)}
        self.args = {f.name: values[f.name] for f in fields(method) if values[f.name] != f.default}
        self.method = method.name

    def _adopt_host_args(self) -> None:
        for key, unset in (("scale", None), ("dropout", 0.0)):
            if key in self.args:
                if getattr(self, key) not in (unset, self.args[key]):
                    raise ValueError(f"{key} is given twice: {getattr(self, key)} and args[{key!r}]={self.args[key]}")
                setattr(self, key, self.args.pop(key))

    def _check(self) -> None:
        if self.format_version is not None and self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this adapter has format {self.format_version}, this Inlay reads up to {FORMAT_VERSION}; upgrade Inlay"
            )
        if self.bias not in BIAS:
            raise ValueError(f"bias={self.bias!r} is not one of {', '.join(BIAS)}")
        if self.saver not in ("none", *SAVERS):
            raise ValueError(f"saver={self.saver!r} is not one of none, {', '.join(SAVERS)}")
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters} is PEFT's, for LoRA; adapt the fused experts of a model "
                "with experts=True, and linear layers through target_modules"
            )
        for what in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, what) is not None:
                raise ValueError(f"{what} needs target_modules as a list of names, not {self.target_modules!r}")
        for pattern, overrides in self.patterns.items():
            if not isinstance(overrides, dict):
                raise ValueError(f"patterns: {pattern!r} needs hyperparameters as {{name: value}}, not {overrides!r}")
            check_regex("patterns", pattern)
        for overrides in ({}, *self.patterns.values()):
            self._build(overrides)
        known = (None, self._digest(), self._digest(self.args))  # a method may have got more of them since it was saved
        if self.format_version is not None and self.hyperparameters not in known:
            raise ValueError(
                f"the hyperparameters of this {self.method} adapter were edited after it was saved; restore them, or "
                "remove 'hyperparameters' from adapter_config.json to insist"
            )

    def _build(self, overrides: dict[str, Any]) -> Method:
        try:
            cls = methods.find(str(self.method))
        except outside.UnknownMethodError as error:
            if hint := outside.where_from(self.defined_in):
                raise outside.UnknownMethodError(f"unknown method {self.method!r}; {hint}") from None
            raise error
        values = {"scale": self.scale, "dropout": self.dropout, **self.args, **overrides}
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(f"{self.method} has no hyperparameter {key!r}; it has {', '.join(names)}")
        return cls(**values)

    def pattern_of(self, module_name: str) -> str | None:
        """Return the first of `patterns` that matches the end of `module_name`."""
        return next((p for p in self.patterns if matches_end(p, module_name)), None)

    def build(self, module_name: str = "") -> Method:
        """Return the method with the hyperparameters of one module."""
        pattern = self.pattern_of(module_name)
        return self._build({} if pattern is None else self.patterns[pattern])

    def build_expert(self, module_name: str, expert: int) -> Method:
        """Return the method of one expert of the parameter `module_name`: by its own name, or by the parameter's."""
        name = f"{module_name}.{expert}"
        return self.build(name if self.pattern_of(name) is not None else module_name)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, as PEFT does once it has written the tensors.

        Raises:
            ValueError: PEFT wrote them as a pickle, which nobody of ours reads. An adapter in the folder stays.
        """
        pickled, tensors = (Path(save_directory, f"adapter_model.{end}") for end in ("bin", "safetensors"))
        if pickled.is_file() and not (tensors.is_file() and tensors.stat().st_mtime_ns >= pickled.stat().st_mtime_ns):
            raise ValueError(
                f"{pickled} is a pickle, from which no adapter of Inlay's is loaded; remove it, and save without "
                "safe_serialization=False"
            )
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict:
        """Return the configuration as it is saved, with every hyperparameter: a later default changes no adapter.

        Sets are in order, or the file would depend on how often it was loaded.
        """
        more = {"args": self._all_args(), "format_version": FORMAT_VERSION, "hyperparameters": self._digest()}
        more["defined_in"] = outside.origin_of(methods.find(str(self.method)))
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in asdict(self).items()}
        return {**plain, **more}

    def _all_args(self) -> dict[str, Any]:
        method = self.build()
        return {f.name: getattr(method, f.name) for f in fields(method) if f.name not in ("scale", "dropout")}

    def _digest(self, args: dict[str, Any] | None = None) -> str:
        values = [self.method, self._all_args() if args is None else args, self.scale, self.dropout, self.patterns]
        return seal.of_values([*values, "folded"] if self.folded else values)
