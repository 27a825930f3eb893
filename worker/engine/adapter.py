"""A LoRA adapter folder -> checked weights. PEFT's `LoraConfig` says what the folder means.

Nothing is skipped: a tensor that no module takes, a module that should have a tensor and has none,
a setting whose effect is not built, each refuses the adapter and says which.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from worker.engine.adapter_config import CONFIG_FILE, read_config
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

WEIGHTS_FILE = "adapter_model.safetensors"


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
    _refuse_links(key, folder)
    try:
        config = read_config(folder / CONFIG_FILE, targets)
        ranks = _expected_ranks(config, targets, max_lora_rank)
        tensors = _read_tensors(folder / WEIGHTS_FILE)
        pairs = {
            name: _pair(name, tensors, targets[name], config, rank, dtype) for name, rank in ranks.items()
        }
        _refuse_left_over(tensors)
    except (OSError, MemoryError):
        raise
    except Exception as exc:  # an upload finds ways to make a library raise that nobody listed
        reason = str(exc) if isinstance(exc, AdapterInvalid) else repr(exc)
        raise AdapterInvalid(f"Adapter {key.name} is invalid: {reason}") from exc
    return LoRAWeights(key, pairs)


def _refuse_links(key: AdapterKey, folder: Path) -> None:
    """A version is the digest of what a folder holds; a file outside may change without it."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_symlink():
            raise AdapterInvalid(f"Adapter {key.name} is invalid: {name} is a link, a file is needed")


def _refuse_left_over(tensors: dict[str, torch.Tensor]) -> None:
    if tensors:
        raise AdapterInvalid(f"tensor {min(tensors)} belongs to no module that target_modules names")


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
    # Copies: what was read is a mapping of the file, and would change with it.
    pair = LoRAPair(a.to(dtype, copy=True).contiguous(), (b.float() * scaling).to(dtype).contiguous())
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
