"""The host tier: what stays, what goes, and who is told no."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.lora_store import LoRAStore
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

BYTES = 64


def key(number):
    return AdapterKey(f"a{number}", "1")


def weights_of(own, num_bytes=BYTES):
    half = torch.zeros(1, num_bytes // 8)
    return LoRAWeights(own, {"q": LoRAPair(half, half.T)})


class Disk:
    """Adapters of any name; counts how often each was read."""

    def __init__(self):
        self.read = []
        self.sizes = {}
        self.broken = set()

    def __call__(self, own, folder):
        self.read.append(own)
        if own in self.broken:
            raise AdapterInvalid(f"{own.name} is broken", "tensors")
        return weights_of(own, self.sizes.get(own, BYTES))


@pytest.fixture
def disk():
    return Disk()


def use(store, number):
    assert store.reserve(key(number), BYTES)
    return store.load(key(number), Path())


def idle(store, number):
    use(store, number)
    store.release(key(number))


def test_adapter_is_read_once_while_it_stays(disk):
    store = LoRAStore(disk, 2)
    first = use(store, 1)
    assert use(store, 1) is first
    assert store.weights(key(1)) is first
    assert disk.read == [key(1)]
    assert store.stats().hits == store.stats().misses == 1


def test_least_recently_used_idle_adapter_goes_first(disk):
    store = LoRAStore(disk, 3)
    for number in (1, 2, 3, 1):
        idle(store, number)
    idle(store, 4)
    assert [number for number in range(1, 5) if key(number) in store] == [1, 3, 4]
    assert store.stats().evictions == 1


def test_nothing_in_use_or_pinned_ever_goes(disk):
    store = LoRAStore(disk, 3)
    use(store, 1)
    idle(store, 2)
    assert store.pin(key(2))
    use(store, 3)
    assert not store.reserve(key(4))
    assert store.loaded(key(2)) is not None
    store.release(key(3))
    assert store.reserve(key(4))
    assert store.loaded(key(3)) is None
    store.unpin(key(2))
    assert store.reserve(key(5))
    assert store.loaded(key(2)) is None


def test_pins_leave_a_place_for_others(disk):
    """Else rows of any other adapter would wait for ever."""
    store = LoRAStore(disk, 2)
    idle(store, 1)
    idle(store, 2)
    assert store.pin(key(1))
    assert not store.pin(key(2))
    assert store.pin(key(1)), "it is pinned already"
    assert store.stats().pinned == 1


def test_bytes_are_a_limit_of_their_own(disk):
    store = LoRAStore(disk, 100, max_bytes=3 * BYTES)
    for number in range(3):
        use(store, number)
    assert not store.reserve(key(3), BYTES)
    store.release(key(1))
    assert store.reserve(key(3), BYTES)
    assert key(1) not in store


def test_adapter_larger_than_expected_drives_idle_ones_out(disk):
    """A float16 file is twice as large in float32."""
    store = LoRAStore(disk, 100, max_bytes=4 * BYTES)
    idle(store, 1)
    idle(store, 2)
    disk.sizes[key(3)] = 3 * BYTES
    use(store, 3)
    assert [number for number in (1, 2, 3) if key(number) in store] == [2, 3]
    assert store.stats().num_bytes == 4 * BYTES


def test_adapter_that_can_never_fit_is_refused_with_the_limit(disk):
    store = LoRAStore(disk, 100, max_bytes=BYTES)
    disk.sizes[key(1)] = 2 * BYTES
    assert store.reserve(key(1), BYTES)
    with pytest.raises(AdapterInvalid, match=f"{2 * BYTES} bytes in memory, max_cpu_lora_bytes is {BYTES}"):
        store.load(key(1), Path())
    assert store.stats().failures == {"size": 1}


def test_pinned_bytes_do_not_shut_the_others_out(disk):
    store = LoRAStore(disk, 100, max_bytes=2 * BYTES)
    for number in (1, 2):
        idle(store, number)
        assert store.pin(key(number))
    use(store, 3)
    assert not store.reserve(key(4), BYTES), "one at a time"
    store.release(key(3))
    use(store, 4)
    assert key(3) not in store


def test_room_is_not_made_in_vain(disk):
    store = LoRAStore(disk, 100, max_bytes=3 * BYTES)
    use(store, 1)
    use(store, 2)
    idle(store, 3)
    assert not store.reserve(key(4), 2 * BYTES)
    assert key(3) in store


def test_version_that_failed_is_not_read_again(disk):
    store = LoRAStore(disk, 2)
    disk.broken.add(key(1))
    for _ in range(3):
        assert store.reserve(key(1))
        with pytest.raises(AdapterInvalid, match="a1 is broken") as caught:
            store.load(key(1), Path())
        assert caught.value.kind == "tensors"
        store.release(key(1))
    assert disk.read == [key(1)]
    assert key(1) not in store
    assert store.stats().failures == {"tensors": 1}


def test_two_rows_read_an_adapter_once_and_both_get_it():
    started, go = threading.Event(), threading.Event()
    read = []

    def slow(own, folder):
        read.append(own)
        started.set()
        assert go.wait(10)
        return weights_of(own)

    store = LoRAStore(slow, 2)
    got = []

    def row():
        assert store.reserve(key(1))
        got.append(store.load(key(1), Path()))

    rows = [threading.Thread(target=row) for _ in range(2)]
    for thread in rows:
        thread.start()
    assert started.wait(10)
    go.set()
    for thread in rows:
        thread.join()
    assert read == [key(1)]
    assert got[0] is got[1]


def test_load_times_are_told_once(disk):
    store = LoRAStore(disk, 2)
    idle(store, 1)
    idle(store, 2)
    assert len(store.stats().load_seconds) == 2
    assert store.stats().load_seconds == ()


class StoreLife(RuleBasedStateMachine):
    """Against a plain model: who is in use or pinned stays, and the limits hold."""

    def __init__(self):
        super().__init__()
        self.store = LoRAStore(Disk(), 4, max_bytes=4 * BYTES)
        self.users = {}
        self.pinned = set()

    @rule(number=st.integers(0, 7))
    def reserve(self, number):
        if self.store.reserve(key(number), BYTES):
            self.store.load(key(number), Path())
            self.users[number] = self.users.get(number, 0) + 1
        else:
            held = {one for one, count in self.users.items() if count} | self.pinned
            assert number not in held
            assert len(held) >= 4

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def release(self, data):
        number = data.draw(st.sampled_from(sorted(one for one, count in self.users.items() if count)))
        self.users[number] -= 1
        self.store.release(key(number))

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def pin(self, data):
        number = data.draw(st.sampled_from(sorted(one for one, count in self.users.items() if count)))
        if self.store.pin(key(number)):
            self.pinned.add(number)
        else:
            assert len(self.pinned - {number}) == 3

    @rule(number=st.integers(0, 7))
    def unpin(self, number):
        self.pinned.discard(number)
        self.store.unpin(key(number))

    @invariant()
    def limits_hold_and_what_is_held_is_there(self):
        stats = self.store.stats()
        assert stats.resident <= 4
        assert stats.num_bytes <= 4 * BYTES
        assert stats.pinned == len(self.pinned)
        for number in self.pinned | {one for one, count in self.users.items() if count}:
            assert self.store.loaded(key(number)) is not None


TestStoreLife = StoreLife.TestCase
TestStoreLife.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
