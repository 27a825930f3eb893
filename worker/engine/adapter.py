"""A LoRA adapter folder -> checked weights. PEFT's `LoraConfig` says what the folder means.

Nothing is skipped: a tensor that no module takes, a module that should have a tensor and has none,
a setting whose effect is not built, each refuses the adapter and says which.
"""

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_CHECKED = frozenset({"init_lora_weights", "peft_type", "task_type"})
_APPLIED = frozenset({
    "alpha_pattern", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
    "lora_alpha", "r", "rank_pattern", "target_modules", "use_rslora",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({  # on the output of a trained adapter
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
})  # fmt: skip
_KEEPS_BASE_WEIGHTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights alone. PiSSA, OLoRA, CorDA and their
kin train against a changed base, which an adapter file alone does not carry."""


class Target(NamedTuple):
    """A module of the base model that LoRA can be applied to."""

    in_features: int
    out_features: int
    refused: str = ""
    """Why an adapter may not use it after all."""
    is_head: bool = False


class LoRAPair(NamedTuple):
    """One module's part of an adapter: `y += (x @ a.T) @ b.T`."""

    a: torch.Tensor
    """[r, in_features]"""
    b: torch.Tensor
    """[out_features, r], the scaling folded in."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoRAWeights(NamedTuple):
    """A whole adapter on the host, checked against the base model."""

    key: AdapterKey
    pairs: dict[str, LoRAPair]
    """By the module's name in the base model."""

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)


def load_adapter(
    key: AdapterKey,
    folder: Path,
    targets: Mapping[str, Target],
    *,
    max_lora_rank: int,
    dtype: torch.dtype,
) -> LoRAWeights:
    """Read, check and scale the adapter in `folder`; tensors are of `dtype`, on the CPU.

    `targets` are the base model's modules by name. Raises AdapterInvalid with the reason, and OSError when
    the folder is gone or the disk fails, which says nothing about the adapter.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there")
    try:
        config = read_config(folder / CONFIG_FILE)
        ranks = _expected_ranks(config, targets, max_lora_rank)
        tensors = _read_tensors(folder / WEIGHTS_FILE)
        pairs = {
            name: _pair(name, tensors, targets[name], config, rank, dtype) for name, rank in ranks.items()
        }
        _refuse_left_over(tensors)
    except AdapterInvalid as exc:
        raise AdapterInvalid(f"Adapter {key.name} is invalid: {exc}") from exc
    return LoRAWeights(key, pairs)


def _refuse_left_over(tensors: dict[str, torch.Tensor]) -> None:
    if tensors:
        raise AdapterInvalid(f"tensor {min(tensors)} belongs to no module that target_modules names")


def read_config(path: Path) -> LoraConfig:
    """The adapter's LoraConfig, refused if any of it would not be honoured."""
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, UnicodeDecodeError, msgspec.MsgspecError, RecursionError) as exc:
        raise AdapterInvalid(f"{path.name} cannot be read: {exc}") from exc
    if raw.get("peft_type") != "LORA":
        raise AdapterInvalid(f"peft_type is {raw.get('peft_type')!r}, only 'LORA' is supported")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterInvalid(f"task_type is {raw['task_type']!r}, only 'CAUSAL_LM' is supported")
    if raw.get("init_lora_weights", True) not in _KEEPS_BASE_WEIGHTS:
        raise AdapterInvalid(
            f"init_lora_weights is {raw['init_lora_weights']!r}, which changes the base weights: save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for name, value in raw.items():
        if name not in _APPLIED | _WITHOUT_EFFECT | _CHECKED and value and value != "none":
            raise AdapterInvalid(f"{name} is {value!r}, which is not supported")
    _check_types(raw)
    try:
        return LoraConfig(**{name: value for name, value in raw.items() if name in _APPLIED})
    except (TypeError, ValueError) as exc:
        raise AdapterInvalid(f"{path.name}: {exc}") from exc


class _Types(msgspec.Struct):
    """What PEFT itself does not check, and trips over later."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


def _check_types(raw: dict[str, Any]) -> None:
    try:
        types = msgspec.convert(raw, _Types)
    except msgspec.ValidationError as exc:
        raise AdapterInvalid(f"{CONFIG_FILE}: {exc}") from exc
    if not types.target_modules:
        raise AdapterInvalid("target_modules is missing or empty")
    layers = [types.layers_pattern] if isinstance(types.layers_pattern, str) else types.layers_pattern
    # In the form in which PEFT compiles them.
    regexes = [p for p in (types.target_modules, types.exclude_modules) if isinstance(p, str)]
    regexes += [rf"(.*\.)?({p})$" for p in [*(types.rank_pattern or ()), *(types.alpha_pattern or ())]]
    regexes += [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in layers or ()]
    for regex in regexes:
        try:
            re.compile(regex)
        except re.error as exc:
            raise AdapterInvalid(f"{regex!r} is not a regular expression: {exc}") from exc


def _expected_ranks(config: LoraConfig, targets: Mapping[str, Target], max_lora_rank: int) -> dict[str, int]:
    """The modules the configuration targets, with the rank it gives each."""
    names = [name for name in targets if _is_targeted(config, name, targets[name])]
    if not names:
        raise AdapterInvalid(f"target_modules {config.target_modules!r} matches no module of the base model")
    ranks = {}
    for name in names:
        if targets[name].refused:
            raise AdapterInvalid(f"module {name} cannot take LoRA here: {targets[name].refused}")
        rank = _from_pattern(config.rank_pattern, name, config.r)
        if not 1 <= rank <= max_lora_rank:
            raise AdapterInvalid(
                f"rank {rank} of module {name} is not between 1 and max_lora_rank {max_lora_rank}"
            )
        ranks[name] = rank
    return ranks


def _from_pattern(pattern: dict[str, float] | None, module: str, default: float) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)


def _is_targeted(config: LoraConfig, name: str, target: Target) -> bool:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        if target.in_features == 0 or target.is_head:
            return False
        config = copy.copy(config)
        config.target_modules = [name]  # what is left to ask are exclusions and layers
    return bool(check_target_module_exists(config, name))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError) as exc:
        raise AdapterInvalid(f"{path.name} cannot be read: {exc}") from exc


def _pair(  # noqa: PLR0917
    name: str,
    tensors: dict[str, torch.Tensor],
    target: Target,
    config: LoraConfig,
    rank: int,
    dtype: torch.dtype,
) -> LoRAPair:
    """Take the two tensors of one module out of `tensors`, check and scale them."""
    a = _take(tensors, name, "A", (rank, target.in_features))
    b = _take(tensors, name, "B", (target.out_features, rank))
    alpha = _from_pattern(config.alpha_pattern, name, config.lora_alpha)
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    pair = LoRAPair(a.to(dtype).contiguous(), (b.float() * scaling).to(dtype).contiguous())
    if not all(torch.isfinite(tensor).all() for tensor in pair):
        raise AdapterInvalid(f"module {name} has weights that are not finite in {dtype}")
    return pair


def _take(tensors: dict[str, torch.Tensor], module: str, side: str, shape: tuple[int, int]) -> torch.Tensor:
    name = f"base_model.model.{module}.lora_{side}.weight"
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise AdapterInvalid(f"tensor {name} is missing, though target_modules names its module")
    if tuple(tensor.shape) != shape:
        raise AdapterInvalid(
            f"tensor {name} has shape {list(tensor.shape)}, the base model needs {list(shape)}"
        )
    if not tensor.is_floating_point():
        raise AdapterInvalid(f"tensor {name} is of {tensor.dtype}, not of a floating-point type")
    return tensor
