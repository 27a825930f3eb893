"""Which adapter gets which slot."""

from collections import Counter

import pytest

from worker.engine.lora_slots import LoRASlots
from worker.jobs import AdapterKey

KEYS = [AdapterKey(f"adapter{number // 2}", f"{number % 2}") for number in range(6)]


def test_adapter_is_fresh_once_and_then_shared():
    slots = LoRASlots(2)
    assert slots.acquire(KEYS[0]) == (0, True)
    assert slots.acquire(KEYS[0]) == (0, False)
    assert slots.acquire(KEYS[1]) == (1, True)
    slots.check_integrity(Counter({KEYS[0]: 2, KEYS[1]: 1}))


def test_used_adapter_is_never_evicted():
    slots = LoRASlots(2)
    slots.acquire(KEYS[0])
    slots.acquire(KEYS[1])
    assert not slots.can_acquire(KEYS[2])
    assert slots.can_acquire(KEYS[0])
    slots.release(KEYS[1])
    assert slots.acquire(KEYS[2]) == (1, True)
    assert KEYS[1] not in slots
    assert slots.resident == {KEYS[0]: 0, KEYS[2]: 1}


def test_least_recently_used_idle_adapter_goes_first():
    slots = LoRASlots(3)
    for key in KEYS[:3]:
        slots.acquire(key)
        slots.release(key)
    slots.acquire(KEYS[0])
    slots.release(KEYS[0])
    slots.acquire(KEYS[3])
    assert set(slots.resident) == {KEYS[0], KEYS[2], KEYS[3]}


def test_idle_adapter_keeps_its_slot():
    slots = LoRASlots(1)
    slots.acquire(KEYS[0])
    slots.release(KEYS[0])
    assert KEYS[0] in slots
    assert slots.acquire(KEYS[0]) == (0, False)


def test_forgotten_adapter_leaves_its_slot_free():
    slots = LoRASlots(1)
    slots.acquire(KEYS[0])
    with pytest.raises(AssertionError):
        slots.forget(KEYS[0])
    slots.release(KEYS[0])
    slots.forget(KEYS[0])
    assert slots.acquire(KEYS[0]) == (0, True)
    slots.check_integrity(Counter({KEYS[0]: 1}))


def test_release_without_acquire_is_noticed():
    slots = LoRASlots(1)
    with pytest.raises(AssertionError):
        slots.release(KEYS[0])


def test_users_that_are_not_counted_are_noticed():
    slots = LoRASlots(1)
    slots.acquire(KEYS[0])
    with pytest.raises(AssertionError):
        slots.check_integrity(Counter())


def test_lowest_free_slot_is_taken():
    slots = LoRASlots(4)
    for key in KEYS[:3]:
        slots.acquire(key)
    for key in KEYS[:2]:
        slots.release(key)
        slots.forget(key)
    assert [slots.acquire(key)[0] for key in KEYS[3:6]] == [0, 1, 3]


def test_active_and_idle_adapters_and_whether_there_is_room():
    slots = LoRASlots(2)
    assert slots.has_room
    slots.acquire(KEYS[0])
    slots.acquire(KEYS[1])
    assert not slots.has_room
    slots.release(KEYS[0])
    assert slots.has_room
    assert (list(slots.active), list(slots.idle)) == ([KEYS[1]], [KEYS[0]])
