"""A LoRA adapter folder -> checked weights. PEFT's `LoraConfig` says what the folder means.

Nothing is skipped: a tensor that no module takes, a module that should have a tensor and has none,
a setting whose effect is not built, each refuses the adapter and says which.
"""

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from worker.engine.adapter import LoRAPair, LoRAWeights, Target
from worker.engine.adapter_config import CONFIG_FILE, read_config
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

WEIGHTS_FILE = "adapter_model.safetensors"
_ALIGNMENT_BYTES = 16
_REMEMBERED_CONFIGS = 64
"""Thousands of adapters are commonly made with few configurations."""


class _Part(NamedTuple):
    """What a configuration says about one module: its tensors in the file, and what B is multiplied by."""

    module: str
    a: str
    b: str
    scaling: float


class _Plan:
    """What all adapters with one configuration have in common."""

    def __init__(self, parts: Sequence[_Part], shapes: Mapping[str, tuple[int, int]], step: int) -> None:
        """Tensors lie in one piece of memory in the order of `shapes`, at multiples of `step` elements."""
        self.parts = tuple(parts)
        self.shapes = dict(shapes)
        self._sizes = [rows * columns for rows, columns in shapes.values()]
        self._padded = [-(-size // step) * step for size in self._sizes]

    def allocate(self, dtype: torch.dtype, *, pin: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Memory for all tensors, zeros between them, and the tensors by name."""
        whole = torch.empty(sum(self._padded), dtype=dtype, pin_memory=pin)
        tensors = {}
        places = torch.split(whole, self._padded)
        for (name, shape), size, place in zip(self.shapes.items(), self._sizes, places, strict=True):
            if len(place) > size:
                place[size:].zero_()
            tensors[name] = place[:size].view(shape)
        return whole, tensors


class AdapterLoader:
    """Reads, checks and scales adapters for one base model. From any thread."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        *,
        max_lora_rank: int,
        dtype: torch.dtype,
        pin: bool = False,
    ) -> None:
        """`targets` are the base model's modules by name, `dtype` is that of the weights.

        With `pin` they lie in memory that a GPU reads by itself.
        """
        self._targets = targets
        self._max_rank = max_lora_rank
        self._dtype = dtype
        self._pin = pin
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, _Plan] = OrderedDict()
        """By the content of the configuration file."""

    def __call__(self, key: AdapterKey, folder: Path) -> LoRAWeights:
        """The adapter in `folder`, on the CPU and in one piece.

        Raises AdapterInvalid with the reason, and OSError when the folder is gone or the disk fails, which
        says nothing about the adapter.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there")
        try:
            _refuse_links(folder)
            plan = self._plan(folder / CONFIG_FILE)
            tensors = _read_tensors(folder / WEIGHTS_FILE, plan.shapes)
            return LoRAWeights(key, _pairs(plan, tensors, self._dtype, pin=self._pin))
        except (OSError, MemoryError):
            raise
        except Exception as exc:  # an upload finds ways to make a library raise that nobody listed
            known = isinstance(exc, AdapterInvalid)
            reason = f"Adapter {key.name} is invalid: {exc if known else repr(exc)}"
            raise AdapterInvalid(reason, exc.kind if isinstance(exc, AdapterInvalid) else "config") from exc

    def _plan(self, path: Path) -> _Plan:
        """What a configuration asks for."""
        content = path.read_bytes() if path.is_file() else b""
        with self._lock:
            plan = self._known.get(content)
        if plan is None:
            config = read_config(path, self._targets)
            plan = _make_plan(config, self._targets, self._max_rank, _ALIGNMENT_BYTES // self._dtype.itemsize)
            with self._lock:
                self._known[content] = plan
                if len(self._known) > _REMEMBERED_CONFIGS:
                    self._known.popitem(last=False)
        return plan


def weights_bytes(folder: Path) -> int:
    """The size of the file with an adapter's weights; 0 if there is none."""
    try:
        return (folder / WEIGHTS_FILE).stat().st_size
    except OSError:
        return 0


def _refuse_links(folder: Path) -> None:
    """A version is the digest of what a folder holds; a file outside may change without it."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_symlink():
            raise AdapterInvalid(f"{name} is a link, a file is needed", "file")


def _make_plan(config: LoraConfig, targets: Mapping[str, Target], max_lora_rank: int, step: int) -> _Plan:
    names = [name for name in targets if _is_targeted(config, name, targets[name])]
    if not names:
        what = f"target_modules {config.target_modules!r}"
        raise AdapterInvalid(f"{what} matches no module of the base model", "modules")
    parts, shapes = [], {}
    for name in names:
        if targets[name].refused:
            raise AdapterInvalid(f"module {name} cannot take LoRA here: {targets[name].refused}", "modules")
        rank = _from_pattern(config.rank_pattern, name, config.r)
        if not 1 <= rank <= max_lora_rank:
            raise AdapterInvalid(
                f"rank {rank} of module {name} is not between 1 and max_lora_rank {max_lora_rank}", "rank"
            )
        alpha = _from_pattern(config.alpha_pattern, name, config.lora_alpha)
        scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        a, b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
        shapes[a], shapes[b] = (rank, targets[name].in_features), (targets[name].out_features, rank)
        parts.append(_Part(name, a, b, scaling))
    return _Plan(parts, shapes, step)


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


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """What the file holds: exactly the tensors that are wanted, in their shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            # Before any of it is read: a file may be far larger than what it should hold.
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if found != shapes:
            _refuse_shapes(found, shapes)
        return safetensors.torch.load(path.read_bytes())
    except (FileNotFoundError, SafetensorError) as exc:
        raise AdapterInvalid(f"{path.name} cannot be read: {exc}", "file") from exc


def _refuse_shapes(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, int]]) -> None:
    for name, shape in shapes.items():
        if name not in found:
            raise AdapterInvalid(
                f"tensor {name} is missing, though target_modules names its module", "tensors"
            )
        if found[name] != shape:
            raise AdapterInvalid(
                f"tensor {name} has shape {list(found[name])}, the base model needs {list(shape)}", "tensors"
            )
    left_over = min(found.keys() - shapes)
    raise AdapterInvalid(f"tensor {left_over} belongs to no module that target_modules names", "tensors")


def _pairs(
    plan: _Plan, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, pin: bool
) -> dict[str, LoRAPair]:
    """Scaled and cast, by module; all in one allocation, each matrix aligned in it."""
    whole, places = plan.allocate(dtype, pin=pin)
    pairs = {}
    for module, a, b, scaling in plan.parts:
        pair = pairs[module] = LoRAPair(places[a], places[b])
        pair.a.copy_(_floating(a, tensors))
        own = _floating(b, tensors)
        if own.dtype == dtype == torch.float32:
            torch.mul(own, scaling, out=pair.b)
        else:
            pair.b.copy_(own.float() * scaling)
    # A sum has no end if any of its terms has none: one pass where a look at each takes four.
    if not math.isfinite(whole.sum(dtype=torch.float32)):
        for module, pair in pairs.items():
            if not all(torch.isfinite(tensor).all() for tensor in pair):
                raise AdapterInvalid(f"module {module} has weights that are not finite in {dtype}", "values")
    return pairs


def _floating(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tensor = tensors[name]
    if not tensor.is_floating_point():
        raise AdapterInvalid(f"tensor {name} is of {tensor.dtype}, not of a floating-point type", "tensors")
    return tensor
