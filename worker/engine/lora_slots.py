"""Which adapter occupies which LoRA slot. Bookkeeping only: the weights are in `lora_layers`."""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator

from worker.jobs import AdapterKey


class LoRASlots:
    """`max_loras` places for adapters, each counted by the sequences that use it.

    The lowest free slot is taken, so that those in use stay close together. A slot whose count is zero
    keeps its adapter until another needs the place: the least recently used one goes first.
    """

    def __init__(self, max_loras: int) -> None:
        self.max_loras = max_loras
        self._free = list(range(max_loras))
        self._slots: OrderedDict[AdapterKey, int] = OrderedDict()
        self._users: Counter[AdapterKey] = Counter()
        self.hits = self.misses = self.evictions = 0
        """Since the beginning: rows that found their adapter in a slot, that did not, and adapters that had
        to leave one."""

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._slots

    @property
    def resident(self) -> dict[AdapterKey, int]:
        return dict(self._slots)

    @property
    def active(self) -> Iterator[AdapterKey]:
        """The adapters that some sequence uses."""
        return (key for key in self._slots if self._users[key])

    @property
    def idle(self) -> Iterator[AdapterKey]:
        """The adapters that keep a slot without being used, the next to go first."""
        return (key for key in self._slots if not self._users[key])

    @property
    def has_room(self) -> bool:
        """Whether an adapter that has no slot could get one."""
        return bool(self._free) or any(True for _ in self.idle)

    def can_acquire(self, key: AdapterKey) -> bool:
        return key in self._slots or self.has_room

    def acquire(self, key: AdapterKey) -> tuple[int, bool]:
        """Count one more user of `key`.

        Returns its slot, and whether the weights have to be put there first.
        The caller has asked `can_acquire` before.
        """
        fresh = key not in self._slots
        self.hits += not fresh
        self.misses += fresh
        if fresh:
            self._slots[key] = heapq.heappop(self._free) if self._free else self._evict()
        self._slots.move_to_end(key)
        self._users[key] += 1
        return self._slots[key], fresh

    def release(self, key: AdapterKey) -> None:
        assert self._users[key] > 0, f"{key} released more often than acquired"
        self._users[key] -= 1

    def forget(self, key: AdapterKey) -> None:
        """Give up the slot of an unused adapter whose weights could not be put there."""
        assert self._users[key] == 0
        heapq.heappush(self._free, self._slots.pop(key))

    def _evict(self) -> int:
        key = next(self.idle, None)
        assert key is not None, "no idle slot: ask can_acquire first"
        del self._users[key]
        self.evictions += 1
        return self._slots.pop(key)

    def check_integrity(self, users: Counter[AdapterKey]) -> None:
        """Raise AssertionError unless slots are held once and counts equal `users`."""
        assert sorted([*self._free, *self._slots.values()]) == list(range(self.max_loras))
        assert +self._users == users, f"{+self._users} users counted, {users} found"
