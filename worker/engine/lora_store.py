"""The host tier: adapters read from disk and kept in memory while somebody uses them, or might."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from worker.engine.adapters.adapter import LoRAWeights
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

Loader = Callable[[AdapterKey, Path], LoRAWeights]


class StoreStats(NamedTuple):
    """Totals since the start, but for `resident`, `pinned` and `num_bytes`."""

    resident: int = 0
    pinned: int = 0
    num_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: Mapping[str, int] = {}
    """Adapters that were refused, by the kind of AdapterInvalid."""
    load_seconds: tuple[float, ...] = ()
    """What each load took that ended since the last time this was asked."""


class _Failure(NamedTuple):
    message: str
    kind: str


class _Entry:
    __slots__ = ("expected_bytes", "lock", "pinned", "users", "weights")

    def __init__(self, expected_bytes: int) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.pinned = False
        self.expected_bytes = expected_bytes
        self.weights: LoRAWeights | None = None

    @property
    def num_bytes(self) -> int:
        return self.expected_bytes if self.weights is None else self.weights.num_bytes

    @property
    def is_idle(self) -> bool:
        return not self.users and not self.pinned


class LoRAStore:
    """At most `max_cpu_loras` adapters and `max_bytes` of them, counted by their users.

    The least recently used idle one goes first; one that is pinned never does. `reserve` comes before use
    and `release` after the last row's end. All methods may be called from any thread; only `load` blocks.
    """

    _REMEMBERED_FAILURES = 1024

    def __init__(self, loader: Loader, max_cpu_loras: int, max_bytes: int | None = None) -> None:
        self._loader = loader
        self._capacity = max_cpu_loras
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[AdapterKey, _Entry] = OrderedDict()
        self._failures: OrderedDict[AdapterKey, _Failure] = OrderedDict()
        self._num_failed: Counter[str] = Counter()
        self._load_seconds: list[float] = []
        self._hits = self._misses = self._evictions = 0

    def __contains__(self, key: AdapterKey) -> bool:
        """Whether `key` has its room: it can be reserved at once."""
        return key in self._entries

    def reserve(self, key: AdapterKey, expected_bytes: int = 0) -> bool:
        """Count one more user of `key`, making room for it.

        `expected_bytes` stand for its size until it is loaded. False, and no change, when there is no room
        beside those in use and those pinned.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                if not self._make_room(expected_bytes):
                    return False
                entry = self._entries[key] = _Entry(expected_bytes)
            self._entries.move_to_end(key)
            entry.users += 1
            return True

    def load(self, key: AdapterKey, folder: Path) -> LoRAWeights:
        """The weights of a reserved adapter, read from `folder` unless they are in memory.

        Raises AdapterInvalid; a version that failed once fails again without being read, since its
        content cannot change.
        """
        with self._lock:
            entry = self._entries[key]
            failure = self._failures.get(key)
        if failure is not None:
            raise AdapterInvalid(*failure)
        with entry.lock:  # two rows that want the same adapter read it once
            if entry.weights is not None:
                with self._lock:
                    self._hits += 1
                return entry.weights
            started = time.perf_counter()
            try:
                weights = self._loader(key, folder)
                self._check_size(key, weights)
            except AdapterInvalid as exc:
                self._remember(key, exc)
                raise
            finally:
                with self._lock:
                    self._misses += 1
                    self._load_seconds.append(time.perf_counter() - started)
            with self._lock:
                entry.weights = weights
                self._make_room(0, places=0)  # it may be larger than it was expected to be
            return weights

    def weights(self, key: AdapterKey) -> LoRAWeights:
        """The weights of an adapter that is reserved and loaded."""
        weights = self._entries[key].weights
        assert weights is not None, f"{key} was not loaded"
        return weights

    def release(self, key: AdapterKey) -> None:
        with self._lock:
            entry = self._entries[key]
            assert entry.users > 0, f"{key} released more often than reserved"
            entry.users -= 1
            if not entry.users and entry.weights is None:
                del self._entries[key]

    def users(self, key: AdapterKey) -> int:
        """How often `key` is reserved."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.users

    def pin(self, key: AdapterKey) -> bool:
        """Keep a loaded adapter until `unpin`. False, and no change, if no place would be left for others."""
        with self._lock:
            entry = self._entries[key]
            assert entry.weights is not None, f"{key} was not loaded"
            pinned = [other for other in self._entries.values() if other.pinned and other is not entry]
            if len(pinned) + 1 >= self._capacity:
                return False
            entry.pinned = True
            return True

    def unpin(self, key: AdapterKey) -> None:
        """Let an adapter go as others go; unknown ones are ignored."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.pinned = False

    def loaded(self, key: AdapterKey) -> LoRAWeights | None:
        """The weights of an adapter that is in memory, whoever uses it; None if it is not."""
        entry = self._entries.get(key)
        return None if entry is None else entry.weights

    def stats(self) -> StoreStats:
        with self._lock:
            loaded = [entry for entry in self._entries.values() if entry.weights is not None]
            load_seconds, self._load_seconds = tuple(self._load_seconds), []
            return StoreStats(
                resident=len(loaded),
                pinned=sum(entry.pinned for entry in loaded),
                num_bytes=sum(entry.num_bytes for entry in loaded),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                failures=dict(self._num_failed),
                load_seconds=load_seconds,
            )

    def _make_room(self, num_bytes: int, places: int = 1) -> bool:
        """Evict idle adapters until so much more fits; none of them if it does not help."""
        idle = [(key, entry) for key, entry in self._entries.items() if entry.is_idle]
        excess = len(self._entries) + places - self._capacity
        excess_bytes = 0
        if self._max_bytes is not None:
            used = sum(entry.num_bytes for entry in self._entries.values())
            excess_bytes = used + num_bytes - self._max_bytes
        evicted: list[AdapterKey] = []
        while excess > 0 or excess_bytes > 0:
            if len(evicted) == len(idle):
                if excess > 0 or any(entry.users for entry in self._entries.values()):
                    return False
                break  # beside pinned ones alone: else whoever asks would wait for ever
            key, entry = idle[len(evicted)]
            evicted.append(key)
            excess -= 1
            excess_bytes -= entry.num_bytes
        for key in evicted:
            del self._entries[key]
        self._evictions += len(evicted)
        return True

    def _check_size(self, key: AdapterKey, weights: LoRAWeights) -> None:
        if self._max_bytes is not None and weights.num_bytes > self._max_bytes:
            raise AdapterInvalid(
                f"Adapter {key.name} is invalid: it takes {weights.num_bytes} bytes in memory, "
                f"max_cpu_lora_bytes is {self._max_bytes}",
                "size",
            )

    def _remember(self, key: AdapterKey, failure: AdapterInvalid) -> None:
        with self._lock:
            self._num_failed[failure.kind] += 1
            self._failures[key] = _Failure(str(failure), failure.kind)
            if len(self._failures) > self._REMEMBERED_FAILURES:
                self._failures.popitem(last=False)
