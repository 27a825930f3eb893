"""The books of the engine: blocks, slots and rows, under any order of events."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.engine.kv_cache import KVCache
from worker.engine.lora_slots import LoRASlots
from worker.engine.scheduler import Batch, Scheduler
from worker.engine.sequence import Sequence, Status
from worker.jobs import AdapterKey, FinishReason, InferenceRequest, SamplingParams

KEYS = [AdapterKey(f"adapter{number // 2}", f"{number % 2}") for number in range(6)]


def sequence(name="row", tokens=3, adapter=None, max_new_tokens=4):
    params = SamplingParams(max_new_tokens=max_new_tokens)
    return Sequence(InferenceRequest(id=name, prompt=(1,) * tokens, adapter=adapter, params=params))


def at_length(row):
    return FinishReason.LENGTH if row.num_generated >= row.request.params.max_new_tokens else None


def compute(scheduler, batch):
    """Record `batch` as if the model had run; returns the sequences that ended."""
    return scheduler.update(batch, [(7, None) for row in batch.rows if row.samples], at_length)


class Machine(RuleBasedStateMachine):
    """A scheduler, the promises of its docstring, and a device that holds one adapter a slot."""

    @initialize(
        blocks=st.integers(3, 24),
        block_size=st.integers(1, 5),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.integers(0, 12),
        max_loras=st.integers(1, 3),
        max_passed_over=st.integers(0, 4),
    )
    def start(self, blocks, block_size, max_num_seqs, spare_tokens, max_loras, max_passed_over):
        self.scheduler = Scheduler(
            KVCache(blocks, block_size),
            LoRASlots(max_loras),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_tokens,
            max_passed_over=max_passed_over,
        )
        self.capacity = blocks * block_size
        self.alive: dict[str, Sequence] = {}
        self.added: list[str] = []
        self.ended: Counter[str] = Counter()
        self.begun: set[str] = set()
        self.passed: Counter[str] = Counter()
        self.device: dict[int, AdapterKey] = {}

    @rule(
        tokens=st.integers(1, 20),
        new=st.integers(1, 10),
        adapter=st.sampled_from([None, *KEYS]),
        copies=st.integers(1, 3),
    )
    def add(self, tokens, new, adapter, copies):
        tokens = min(tokens, self.capacity - 1)
        new = min(new, self.capacity - tokens)
        for _ in range(copies):
            name = str(len(self.added))
            self.alive[name] = sequence(name, tokens, adapter, new)
            self.added.append(name)
            self.scheduler.add(self.alive[name])

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        self.end(data.draw(st.sampled_from(sorted(self.alive))))

    @precondition(lambda self: any(row.status is Status.RUNNING for row in self.alive.values()))
    @rule(data=st.data())
    def preempt(self, data):
        running = sorted(name for name, row in self.alive.items() if row.status is Status.RUNNING)
        self.scheduler.preempt(self.alive[data.draw(st.sampled_from(running))])

    @rule(fails=st.booleans())
    def step(self, fails):
        queue = list(self.scheduler.waiting)
        batch = self.scheduler.schedule()
        self.check_batch(batch)
        self.check_order(queue, batch)
        rows = list(batch.rows)
        if fails and rows:  # a row that fails by itself leaves before the rest is recorded
            self.end(rows.pop(0).sequence.request.id)
        computed = {row.sequence.request.id: row.sequence.computed + row.num_tokens for row in rows}
        ended = compute(self.scheduler, Batch(tuple(rows)))
        for name, count in computed.items():
            assert self.alive[name].computed == count
        for row in ended:
            assert row.finish_reason is FinishReason.LENGTH
            assert row.num_generated == row.request.params.max_new_tokens
            del self.alive[row.request.id]
            self.ended[row.request.id] += 1

    def end(self, name):
        row = self.alive.pop(name)
        self.scheduler.finish(row, FinishReason.ERROR)
        assert row.status is Status.FINISHED
        self.ended[name] += 1

    def check_batch(self, batch):
        scheduler = self.scheduler
        rows = [row.sequence for row in batch.rows]
        assert bool(rows) == bool(self.alive), "work, and a step without rows"
        assert len(rows) == len(set(rows)) <= scheduler.max_num_seqs
        assert set(rows) == set(scheduler.running)
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert len({row.request.adapter for row in rows} - {None}) <= scheduler.slots.max_loras
        for slot, key in batch.loads:
            self.device[slot] = key
        for row, num_tokens in batch.rows:
            assert 1 <= num_tokens <= row.remaining
            assert len(row.blocks) * scheduler.kv_cache.block_size >= row.computed + num_tokens
            key = row.request.adapter
            assert (row.slot is None) == (key is None)
            assert key is None or self.device[row.slot] == key, "a row would use another's adapter"

    def check_order(self, queue, batch):
        scheduler = self.scheduler
        started = {id(row.sequence) for row in batch.rows}
        for place, row in enumerate(queue):
            behind = [other for other in queue[place + 1 :] if id(other) in started]
            if id(row) in started:
                continue
            self.passed[row.request.id] += len(behind)
            assert self.passed[row.request.id] <= scheduler.max_passed_over
            assert row.request.adapter is not None or not behind, "only a lack of slots lets others pass"
            assert all(other.request.adapter != row.request.adapter for other in behind)

    @invariant()
    def books_agree(self):
        self.scheduler.check_integrity()
        assert {*self.scheduler.waiting, *self.scheduler.running} == set(self.alive.values())
        assert self.scheduler.has_work == bool(self.alive)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        most = sum(len(row.request.prompt) + row.request.params.max_new_tokens for row in self.alive.values())
        for _ in range(most):
            if not self.alive:
                break
            self.step(fails=False)
            self.books_agree()
        assert not self.alive, "the first running row always goes on, so that all of them end"
        assert self.ended == Counter(self.added)
        assert self.scheduler.kv_cache.num_free == self.scheduler.kv_cache.num_blocks


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def scheduler_of(
    *, blocks=100, block_size=4, max_num_seqs=8, tokens=64, max_loras=2, max_passed_over=256, rows=()
):
    scheduler = Scheduler(
        KVCache(blocks, block_size),
        LoRASlots(max_loras),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens,
        max_passed_over=max_passed_over,
    )
    for row in rows:
        scheduler.add(row)
    return scheduler


def names(batch):
    return [row.sequence.request.id for row in batch.rows]


def test_nothing_to_do_is_an_empty_batch():
    scheduler = scheduler_of()
    assert not scheduler.has_work
    assert scheduler.schedule() == Batch(())


def test_long_prompt_goes_through_in_chunks_while_others_decode():
    short, long = sequence("short", 2, max_new_tokens=9), sequence("long", 20)
    scheduler = scheduler_of(max_num_seqs=2, tokens=8, rows=[short, long])
    seen = []
    for _ in range(4):
        batch = scheduler.schedule()
        seen.append([row.num_tokens for row in batch.rows])
        compute(scheduler, batch)
        assert long.num_generated == max(0, len(seen) - 2), "a row samples when its last chunk is through"
    assert seen == [[2, 6], [1, 7], [1, 7], [1, 1]]


def test_chunk_leaves_a_token_for_every_row_behind_it():
    scheduler = scheduler_of(max_num_seqs=4, tokens=4, rows=[sequence("long", 30, max_new_tokens=9)])
    compute(scheduler, scheduler.schedule())
    for name in "abc":
        scheduler.add(sequence(name, 1))
    for _ in range(5):
        batch = scheduler.schedule()
        assert batch.num_tokens <= 4
        compute(scheduler, batch)


def test_first_come_first_served_without_adapters():
    rows = [sequence(str(number), 5) for number in range(5)]
    scheduler = scheduler_of(max_num_seqs=3, rows=rows)
    assert names(scheduler.schedule()) == ["0", "1", "2"]


def test_row_without_room_is_not_passed_over_by_a_smaller_one():
    big, small = sequence("big", 30), sequence("small", 1)
    first = sequence("first", 8)
    scheduler = scheduler_of(blocks=9, rows=[first, big, small])
    assert names(scheduler.schedule()) == ["first"]


def test_row_that_waits_for_a_slot_lets_others_pass():
    rows = [sequence("a", adapter=KEYS[0]), sequence("b", adapter=KEYS[1]), sequence("base")]
    scheduler = scheduler_of(max_loras=1, rows=[*rows, sequence("a2", adapter=KEYS[0])])
    batch = scheduler.schedule()
    assert names(batch) == ["a", "base", "a2"]
    assert batch.loads == ((0, KEYS[0]),)
    assert [row.request.id for row in scheduler.waiting] == ["b"]


@pytest.mark.parametrize("bound", [0, 1, 2, 5])
def test_row_is_passed_over_by_no_more_rows_than_stated_even_in_one_step(bound):
    rows = [sequence("a", adapter=KEYS[0]), sequence("b", adapter=KEYS[1])]
    rows += [sequence(f"base{number}") for number in range(6)]
    scheduler = scheduler_of(max_loras=1, max_passed_over=bound, rows=rows)
    assert names(scheduler.schedule()) == ["a", *(f"base{number}" for number in range(bound))]


def test_passed_over_row_is_next_once_the_bound_is_reached():
    first = sequence("first", adapter=KEYS[0], max_new_tokens=3)
    scheduler = scheduler_of(max_num_seqs=2, max_loras=1, max_passed_over=2, rows=[first])
    scheduler.add(sequence("waits", adapter=KEYS[1]))
    for number in range(6):
        scheduler.add(sequence(f"base{number}", max_new_tokens=1))
    seen = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        seen += [name for name in names(batch) if name not in seen]
        compute(scheduler, batch)
    assert seen[:4] == ["first", "base0", "base1", "waits"]


def test_preempted_row_is_first_in_the_queue_and_keeps_its_text():
    old, young = sequence("old", 6, max_new_tokens=10), sequence("young", 6, KEYS[0], max_new_tokens=10)
    scheduler = scheduler_of(blocks=4, rows=[old, young])
    for _ in range(3):
        compute(scheduler, scheduler.schedule())
    scheduler.add(sequence("last"))
    batch = scheduler.schedule()
    assert names(batch) == ["old"]
    assert scheduler.num_preempted == 1
    assert [row.request.id for row in scheduler.waiting] == ["young", "last"]
    assert young.num_generated == 3
    assert (young.computed, young.blocks, young.slot) == (0, [], None)
    scheduler.check_integrity()


def test_versions_of_one_name_have_slots_of_their_own():
    old, new = AdapterKey("tone", "1"), AdapterKey("tone", "2")
    rows = [sequence("old", adapter=old), sequence("new", adapter=new)]
    assert scheduler_of(rows=rows).schedule().loads == ((0, old), (1, new))


# KVCache


def test_blocks_are_handed_out_lowest_first_and_taken_back():
    cache = KVCache(4, 2)
    first, second = [], []
    assert cache.grow(first, 3)
    assert cache.grow(second, 1)
    assert (first, second, cache.num_free) == ([0, 1], [2], 1)
    cache.free(first)
    assert (first, cache.num_free) == ([], 3)
    assert cache.grow(second, 4)
    assert second == [2, 0]
    cache.check_integrity([second])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_that_tokens_need(tokens, blocks):
    cache = KVCache(8, 4)
    assert cache.missing([], tokens) == blocks
    assert cache.missing([7], tokens) == max(0, blocks - 1)
    assert cache.missing([7, 6, 5, 4], tokens) == 0


def test_growth_that_does_not_fit_changes_nothing():
    cache = KVCache(2, 2)
    held = []
    assert cache.grow(held, 2)
    assert not cache.grow(held, 5)
    assert (held, cache.num_free) == ([0], 1)
    assert cache.grow(held, 1)
    assert held == [0]


@pytest.mark.parametrize("held", [[[0]], [[0, 1], [1]], [[0], [1], [2]], [[0, 0]]])
def test_block_lost_or_held_twice_is_noticed(held):
    cache = KVCache(3, 1)
    cache.grow([], 2)
    with pytest.raises(AssertionError):
        cache.check_integrity(held)


# LoRASlots


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
