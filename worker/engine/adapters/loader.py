"""A LoRA adapter folder -> checked weights. PEFT's `LoraConfig` says what the folder means.

Nothing is skipped: a tensor that no module takes, a module that should have a tensor and has none,
a setting whose effect is not built, each refuses the adapter and says which.
"""

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from worker.engine.adapters.adapter import LoRAPair, LoRAWeights, Target, Vocabulary
from worker.engine.adapters.config import CONFIG_FILE, read_bytes, read_config
from worker.engine.adapters.expected_tensors import make_plan
from worker.engine.adapters.plan import Plan, Role, VocabularySizes
from worker.engine.adapters.reading import Kinds, assemble, not_finite
from worker.engine.rope import RopeScaling
from worker.engine.tokenizer import Tokenizer
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


class _Layout(NamedTuple):
    """Where a file's tensors lie, one after the other from the end of its header, without a gap."""

    names: tuple[str, ...]
    """In the order of the file."""
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: list[int]
    """Elements of each."""
    vocabulary: Vocabulary | None
    """What the adapter knows of tokens; None if that is what the base model does."""

    @property
    def num_bytes(self) -> int:
        return sum(size * dtype.itemsize for size, dtype in zip(self.sizes, self.dtypes, strict=True))


class _Known:
    """A plan, and the layouts of files that were found to follow it, by their headers."""

    def __init__(self, plan: Plan, rope_factor: float) -> None:
        self.plan = plan
        self.rope_factor = rope_factor
        self.is_plain = plan.extra is None
        self.layouts = _Remembered[_Layout]()


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
        lora_extra_vocab_size: int = 256,
        least_tokens: int | None = None,
        base_dtype: torch.dtype | None = None,
        base_rows: Mapping[str, torch.Tensor] = MappingProxyType({}),
        tokenizers: Callable[[Path], Tokenizer | None] = lambda _: None,
        rope: RopeScaling = RopeScaling(),  # noqa: B008 (it never changes)
        is_shared: bool = False,
    ) -> None:
        """`targets` are the base model's modules by name, `dtype` is that of the weights.

        With `pin` they lie in memory that a GPU reads by itself. What stands for the base model's own weights
        is of `base_dtype`, or None for `dtype`; of those in `base_rows`, by the names of modules, whose rows
        have these fingerprints, only what differs is kept. Embeddings must have `least_tokens` rows, None for
        as many as in the base model. `tokenizers` gives what a folder brings. `rope` is what adapters may ask
        for their positions. Of a model that `is_shared` by devices they may change no module, only add to
        linear ones.
        """
        self._is_shared = is_shared
        self._rope = rope
        self._targets = targets
        self._max_rank = max_lora_rank
        self._sizes = VocabularySizes(lora_extra_vocab_size, least_tokens)
        self._kinds = Kinds(dtype, base_dtype or dtype, pin)
        self._base_rows = base_rows
        self._tokenizers = tokenizers
        self._known = _Remembered[_Known]()
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
            known = self._look_up(folder / CONFIG_FILE)
            layout, data = _read(folder / WEIGHTS_FILE, known, self._sizes)
            with _memory_errors():
                weights = self._weights(key, known, layout, data)._replace(rope_factor=known.rope_factor)
            tokenizer = self._tokenizers(folder)
            return weights if tokenizer is None else weights._replace(tokenizer=tokenizer)
        except (OSError, MemoryError):
            raise
        except Exception as exc:  # an upload finds ways to make a library raise that nobody listed
            known_reason = isinstance(exc, AdapterInvalid)
            reason = f"Adapter {key.name} is invalid: {exc if known_reason else repr(exc)}"
            raise AdapterInvalid(reason, exc.kind if isinstance(exc, AdapterInvalid) else "config") from exc

    def _look_up(self, path: Path) -> _Known:
        """What a configuration asks for."""
        content = read_bytes(path)

        def make() -> _Known:
            config = read_config(content, self._targets, self._rope)
            plan = make_plan(config.lora, self._targets, self._max_rank)
            if self._is_shared and plan.extra is not None:
                raise _not_shared(f"the configuration asks for tensor {plan.extra}")
            return _Known(plan, config.rope_factor)

        return self._known.get(content, make)

    def _weights(self, key: AdapterKey, known: _Known, layout: _Layout, data: torch.Tensor) -> LoRAWeights:
        if known.is_plain and _is_plain(known.plan, layout):
            return LoRAWeights(key, _pairs(known.plan, layout, data, self._kinds))
        pairs, changes = assemble(known.plan, _apart(layout, data), self._kinds, self._base_rows)
        if self._is_shared and (changes or layout.vocabulary is not None):
            whose = ", ".join(sorted(changes)) or "tokens that it adds"
            raise _not_shared(f"it has weights of its own for {whose}")
        return LoRAWeights(key, pairs, changes, layout.vocabulary)


def weights_bytes(folder: Path) -> int:
    """The size of the file with an adapter's weights; 0 if there is none."""
    try:
        return (folder / WEIGHTS_FILE).stat().st_size
    except OSError:
        return 0


def _not_shared(found: str) -> AdapterInvalid:
    said = "with tensor_parallel_degree above 1 adapters can only add to linear modules"
    return AdapterInvalid(f"{found}; {said}", "modules")


def _refuse_links(folder: Path) -> None:
    """A version is the digest of what a folder holds; a file outside may change without it."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_symlink():
            raise AdapterInvalid(f"{name} is a link, a file is needed", "file")


def _read(path: Path, known: _Known, sizes: VocabularySizes) -> tuple[_Layout, torch.Tensor]:
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
            layout = known.layouts.get(header, lambda: _lay_out(path, file, known.plan, sizes))
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


def _lay_out(path: Path, opened: BinaryIO, plan: Plan, allowed: VocabularySizes) -> _Layout:
    """The layout of the file at `path`, which is `opened`, after a look at all that its header says."""
    own = {name: name for name in plan.wanted}  # one text for each name, however many layouts there are
    with _memory_errors(), safe_open(path, framework="pt") as file:
        names = tuple(file.offset_keys())
        slices = [file.get_slice(name) for name in names]
        shapes = tuple(tuple(one.get_shape()) for one in slices)
        stored = [one.get_dtype() for one in slices]
    if _identity(path.stat()) != _identity(os.fstat(opened.fileno())):
        raise OSError(f"{path} was replaced while it was read")
    vocabulary = plan.check(dict(zip(names, shapes, strict=True)), allowed)
    for name, dtype in zip(names, stored, strict=True):
        if dtype not in _DTYPES:
            raise AdapterInvalid(f"tensor {name} is of {dtype}, not of a floating-point type", "tensors")
    dtypes = tuple(_DTYPES[dtype] for dtype in stored)
    sizes = [math.prod(shape) for shape in shapes]
    return _Layout(tuple(own[name] for name in names), dtypes, shapes, sizes, vocabulary)


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


def _is_plain(plan: Plan, layout: _Layout) -> bool:
    return all(plan.wanted[name].required for name in layout.names)


def _pairs(plan: Plan, layout: _Layout, data: torch.Tensor, kinds: Kinds) -> dict[str, LoRAPair]:
    """Scaled and cast, by module; all in one piece of memory, which is that of `data` where it can be."""
    whole = _as_one(layout, data)
    tensors = _views(layout, whole)
    ours = [(name, plan.wanted[name]) for name in layout.names]
    of_b = {wanted.module: tensors[name] for name, wanted in ours if wanted.role is Role.B}
    torch._foreach_mul_(list(of_b.values()), [plan.scalings[module] for module in of_b])  # as optimizers do
    if kinds.pin or kinds.lora != whole.dtype:
        whole = whole.to(kinds.lora)
        whole = whole.pin_memory() if kinds.pin else whole
        tensors = _views(layout, whole)
    sides: dict[Role, dict[str, torch.Tensor]] = {Role.A: {}, Role.B: {}}
    for name, wanted in ours:
        sides[wanted.role][wanted.module] = tensors[name]
    pairs = {module: LoRAPair(sides[Role.A][module], sides[Role.B][module]) for module in plan.scalings}
    # A sum has no end if any of its terms has none: one pass where a look at each takes four.
    if not math.isfinite(whole.sum(dtype=torch.float32)):
        for module, pair in pairs.items():
            if not all(torch.isfinite(tensor).all() for tensor in pair):
                raise not_finite(module, kinds.lora)
    return pairs


def _as_one(layout: _Layout, data: torch.Tensor) -> torch.Tensor:
    """All tensors one after the other, [elements] float32; a view of `data` if that is what it holds."""
    if len(set(layout.dtypes)) == 1:
        return data.view(layout.dtypes[0]).float()
    return torch.cat([tensor.float().flatten() for tensor in _apart(layout, data).values()])


def _apart(layout: _Layout, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each tensor by itself, as it is stored; copies."""
    sizes = [size * own.itemsize for size, own in zip(layout.sizes, layout.dtypes, strict=True)]
    parts = zip(layout.names, torch.split(data, sizes), layout.dtypes, layout.shapes, strict=True)
    # A view needs memory that begins at a multiple of its elements' size; a copy does.
    return {name: part.clone().view(own).view(shape) for name, part, own, shape in parts}


def _views(layout: _Layout, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = zip(layout.names, torch.split(whole, layout.sizes), layout.shapes, strict=True)
    return {name: part.view(shape) for name, part, shape in parts}
