"""The host tier: adapters read from disk and kept in memory while somebody uses them, or might."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from worker.engine.adapter import LoRAWeights
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

Loader = Callable[[AdapterKey, Path], LoRAWeights]


class StoreStats(NamedTuple):
    resident: int
    num_bytes: int
    hits: int
    misses: int
    evictions: int
    failures: int


class _Entry:
    __slots__ = ("lock", "users", "weights")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.weights: LoRAWeights | None = None


class LoRAStore:
    """At most `max_cpu_loras` adapters, counted by their users; the least recently used idle one goes first.

    `reserve` comes before use and `release` after the last row's end. All methods may be called from
    any thread; only `load` blocks.
    """

    _REMEMBERED_FAILURES = 1024

    def __init__(self, loader: Loader, max_cpu_loras: int) -> None:
        self._loader = loader
        self._capacity = max_cpu_loras
        self._lock = threading.Lock()
        self._entries: OrderedDict[AdapterKey, _Entry] = OrderedDict()
        self._failures: OrderedDict[AdapterKey, str] = OrderedDict()
        self._hits = self._misses = self._evictions = 0

    def reserve(self, key: AdapterKey) -> bool:
        """Count one more user of `key`, making room for it. False, and no change, when nothing is idle."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                if len(self._entries) >= self._capacity and not self._evict():
                    return False
                entry = self._entries[key] = _Entry()
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
            raise AdapterInvalid(failure)
        with entry.lock:  # two rows that want the same adapter read it once
            if entry.weights is not None:
                self._hits += 1
                return entry.weights
            self._misses += 1
            try:
                entry.weights = self._loader(key, folder)
            except AdapterInvalid as exc:
                self._remember(key, str(exc))
                raise
            return entry.weights

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

    def stats(self) -> StoreStats:
        with self._lock:
            loaded = [entry.weights for entry in self._entries.values() if entry.weights is not None]
            return StoreStats(
                resident=len(loaded),
                num_bytes=sum(weights.num_bytes for weights in loaded),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                failures=len(self._failures),
            )

    def _evict(self) -> bool:
        idle = next((key for key, entry in self._entries.items() if not entry.users), None)
        if idle is None:
            return False
        del self._entries[idle]
        self._evictions += 1
        return True

    def _remember(self, key: AdapterKey, failure: str) -> None:
        with self._lock:
            self._failures[key] = failure
            if len(self._failures) > self._REMEMBERED_FAILURES:
                self._failures.popitem(last=False)
