"""A LoRA adapter folder -> checked weights. PEFT's `LoraConfig` says what the folder means.

Nothing is skipped: a tensor that no module takes, a module that should have a tensor and has none,
a setting whose effect is not built, each refuses the adapter and says which.
"""

import copy
import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from worker.engine.adapter import LoRAPair, LoRAWeights, Target
from worker.engine.adapter_config import CONFIG_FILE, AdapterConfig, read_bytes, read_config
from worker.engine.rope import RopeScaling
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

WEIGHTS_FILE = "adapter_model.safetensors"
_REMEMBERED = 64
"""Thousands of adapters are commonly made with few configurations."""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 16 << 20
"""Some hundred thousand tensors."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_T = TypeVar("_T")


class _Part(NamedTuple):
    """What a configuration says about one module: its tensors in the file, and what B is multiplied by."""

    module: str
    a: str
    b: str
    scaling: float


class _Layout(NamedTuple):
    """Where a file's tensors lie, one after the other from the end of its header, without a gap."""

    names: tuple[str, ...]
    """In the order of the file."""
    dtypes: tuple[torch.dtype, ...]
    sizes: list[int]
    """Elements of each."""

    @property
    def num_bytes(self) -> int:
        return sum(size * dtype.itemsize for size, dtype in zip(self.sizes, self.dtypes, strict=True))


class _Plan:
    """What all adapters with one configuration have in common."""

    def __init__(
        self, parts: Sequence[_Part], shapes: Mapping[str, tuple[int, int]], rope_factor: float
    ) -> None:
        self.parts = tuple(parts)
        self.rope_factor = rope_factor
        self.shapes = dict(shapes)
        self.scalings = [part.scaling for part in parts]
        self.layouts = _Remembered[_Layout]()
        """By the header of the file."""


class _Remembered(Generic[_T]):
    """The last few things of a kind, by the bytes that they were worked out from. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, _T] = OrderedDict()

    def get(self, content: bytes, make: Callable[[], _T]) -> _T:
        """What is known of `content`, or what `make` returns; more than one thread may come to make it."""
        digest = hashlib.sha256(content).digest()
        with self._lock:
            found = self._known.get(digest)
            if found is not None:
                self._known.move_to_end(digest)
        if found is None:
            found = make()
            with self._lock:
                self._known[digest] = found
                if len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return found


class AdapterLoader:
    """Reads, checks and scales adapters for one base model. From any thread."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        *,
        max_lora_rank: int,
        dtype: torch.dtype,
        pin: bool = False,
        rope: RopeScaling = RopeScaling(),  # noqa: B008 (it never changes)
    ) -> None:
        """`targets` are the base model's modules by name, `dtype` is that of the weights.

        With `pin` they lie in memory that a GPU reads by itself. `rope` is what adapters may ask for their
        positions.
        """
        self._rope = rope
        self._targets = targets
        self._max_rank = max_lora_rank
        self._dtype = dtype
        self._pin = pin
        self._plans = _Remembered[_Plan]()
        """By the content of the configuration file."""

    def __call__(self, key: AdapterKey, folder: Path) -> LoRAWeights:
        """The adapter in `folder`, on the CPU and in one piece.

        Raises AdapterInvalid with the reason; OSError when the folder is gone or the disk fails, and
        MemoryError, which say nothing about the adapter.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there")
        try:
            _refuse_links(folder)
            plan = self._plan(folder / CONFIG_FILE)
            layout, data = _read(folder / WEIGHTS_FILE, plan)
            with _memory_errors():
                pairs = _pairs(plan, layout, data, self._dtype, pin=self._pin)
                return LoRAWeights(key, pairs, plan.rope_factor)
        except (OSError, MemoryError):
            raise
        except Exception as exc:  # an upload finds ways to make a library raise that nobody listed
            known = isinstance(exc, AdapterInvalid)
            reason = f"Adapter {key.name} is invalid: {exc if known else repr(exc)}"
            raise AdapterInvalid(reason, exc.kind if isinstance(exc, AdapterInvalid) else "config") from exc

    def _plan(self, path: Path) -> _Plan:
        """What a configuration asks for."""
        content = read_bytes(path)

        def make() -> _Plan:
            config = read_config(content, self._targets, self._rope)
            return _make_plan(config, self._targets, self._max_rank)

        return self._plans.get(content, make)


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


def _make_plan(asked: AdapterConfig, targets: Mapping[str, Target], max_lora_rank: int) -> _Plan:
    config = asked.lora
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
    return _Plan(parts, shapes, asked.rope_factor)


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


def _read(path: Path, plan: _Plan) -> tuple[_Layout, torch.Tensor]:
    """What the file holds, as bytes [n] uint8: exactly the tensors that are wanted, in their shapes.

    The safetensors library judges every header that is new. Its own ways to read copy each tensor by itself.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _MAX_HEADER_BYTES:
                size = os.fstat(file.fileno()).st_size
                said = f"a header of {length} bytes in a file of {size}, the limit is {_MAX_HEADER_BYTES}"
                raise AdapterInvalid(f"{path.name} cannot be read: {said}", "file")
            header = file.read(length)
            layout = plan.layouts.get(header, lambda: _lay_out(path, file, plan.shapes))
            expected = _LENGTH_BYTES + len(header) + layout.num_bytes
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise AdapterInvalid(f"{path.name} has {size} bytes, its header asks for {expected}", "file")
            with _memory_errors():
                data = torch.empty(layout.num_bytes, dtype=torch.uint8)
            if file.readinto(data.numpy().data) != layout.num_bytes:
                raise OSError(f"{path} became shorter while it was read")
            return layout, data
    except (FileNotFoundError, IsADirectoryError, SafetensorError) as exc:
        raise AdapterInvalid(f"{path.name} cannot be read: {exc}", "file") from exc


def _lay_out(path: Path, opened: BinaryIO, shapes: Mapping[str, tuple[int, int]]) -> _Layout:
    """The layout of the file at `path`, which is `opened`, after a look at all that its header says."""
    own = {name: name for name in shapes}  # one text for each name, however many layouts there are
    with _memory_errors(), safe_open(path, framework="pt") as file:
        names = tuple(file.offset_keys())
        slices = [file.get_slice(name) for name in names]
        found = {name: tuple(one.get_shape()) for name, one in zip(names, slices, strict=True)}
        stored = [one.get_dtype() for one in slices]
    if _identity(path.stat()) != _identity(os.fstat(opened.fileno())):
        raise OSError(f"{path} was replaced while it was read")
    if found != shapes:
        _refuse_shapes(found, shapes)
    for name, dtype in zip(names, stored, strict=True):
        if dtype not in _DTYPES:
            raise AdapterInvalid(f"tensor {name} is of {dtype}, not of a floating-point type", "tensors")
    dtypes = tuple(_DTYPES[dtype] for dtype in stored)
    return _Layout(tuple(own[name] for name in names), dtypes, [math.prod(shapes[name]) for name in names])


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A RuntimeError is how torch says that memory cannot be had, pinned or mapped."""
    try:
        yield
    except RecursionError:
        raise
    except RuntimeError as error:
        raise MemoryError(str(error)) from error


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


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
    plan: _Plan, layout: _Layout, data: torch.Tensor, dtype: torch.dtype, *, pin: bool
) -> dict[str, LoRAPair]:
    """Scaled and cast, by module; all in one piece of memory, which is that of `data` where it can be."""
    whole = _as_one(layout, data)
    tensors = _views(plan, layout, whole)
    torch._foreach_mul_([tensors[part.b] for part in plan.parts], plan.scalings)  # as optimizers do
    if pin or dtype != whole.dtype:
        whole = whole.to(dtype)
        whole = whole.pin_memory() if pin else whole
        tensors = _views(plan, layout, whole)
    pairs = {part.module: LoRAPair(tensors[part.a], tensors[part.b]) for part in plan.parts}
    # A sum has no end if any of its terms has none: one pass where a look at each takes four.
    if not math.isfinite(whole.sum(dtype=torch.float32)):
        for module, pair in pairs.items():
            if not all(torch.isfinite(tensor).all() for tensor in pair):
                raise AdapterInvalid(f"module {module} has weights that are not finite in {dtype}", "values")
    return pairs


def _as_one(layout: _Layout, data: torch.Tensor) -> torch.Tensor:
    """All tensors one after the other, [elements] float32; a view of `data` if that is what it holds."""
    if len(set(layout.dtypes)) == 1:
        return data.view(layout.dtypes[0]).float()
    sizes = [size * own.itemsize for size, own in zip(layout.sizes, layout.dtypes, strict=True)]
    parts = zip(torch.split(data, sizes), layout.dtypes, strict=True)
    # A view needs memory that begins at a multiple of its elements' size; a copy does.
    return torch.cat([part.clone().view(own).float() for part, own in parts])


def _views(plan: _Plan, layout: _Layout, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = torch.split(whole, layout.sizes)
    return {name: part.view(plan.shapes[name]) for name, part in zip(layout.names, parts, strict=True)}
