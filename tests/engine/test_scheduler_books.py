"""The books of the engine: blocks, slots and rows, under any order of events."""

from collections import Counter
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.scheduling import KEYS, sequence
from worker.engine.kv_cache import OwnBlocks, SharedBlocks
from worker.engine.lora_slots import LoRASlots
from worker.engine.promises import Promises
from worker.engine.scheduler import Batch, Scheduler
from worker.engine.sequence import Sequence, Status
from worker.jobs import AdapterKey, FinishReason

NAN = "not finite"


def said(number):
    """The token of this number in any row's text, where the row generates it."""
    return 7 + number % 2


class Device:
    """What every place of the cache holds: the adapter version and the text up to its token, or NaN.

    A row that is bad from some token on has NaN there. A place that is not listed holds zeros.
    """

    def __init__(self, cache, bad):
        self.cache = cache
        self.bad = bad
        self.places = {}

    def place(self, blocks, number):
        index, offset = divmod(number, self.cache.block_size)
        return blocks[index], offset

    def prepare(self, batch):
        for source, target, num_tokens in batch.copies:
            for offset in range(num_tokens):
                self.places[target, offset] = self.places[source, offset]
        for block, start, stop in batch.leftovers:
            for offset in range(start, stop):
                self.places.pop((block, offset), None)

    def run(self, batch):
        """Returns the rows whose logits are not finite."""
        for row, *_ in batch.rows:
            self.check_row(row)
        for row, start, num_tokens, _ in batch.rows:
            assert start == row.computed
            tokens = [*row.tokens, said(len(row.tokens))]  # the last is on the device only, if at all
            for number in range(start, start + num_tokens):
                text = (row.request.adapter, *tokens[: number + 1])
                self.places[self.place(row.blocks, number)] = NAN if self.is_bad(row, number) else text
        return [row.sequence for row in batch.rows if row.ends and self.has_nan(row)]

    def is_bad(self, row, number):
        return number >= self.bad.get(row.request.id, number + 1)

    def has_nan(self, row):
        return NAN in (self.places[self.place(row.sequence.blocks, number)] for number in range(row.stop))

    def check_row(self, row):
        for number in range(len(row.blocks) * self.cache.block_size):
            found = self.places.get(self.place(row.blocks, number))
            if number < row.computed:
                bad = number >= row.proven and self.is_bad(row, number)
                text = (row.request.adapter, *row.tokens[: number + 1])
                assert found == (NAN if bad else text), "a row would attend to another text"
            else:
                assert found is None, "a row would attend, masked, to what another has left"


class Flight(NamedTuple):
    """A step that was launched, and what will come of it."""

    batch: Batch
    bad: list[Sequence]
    """Rows whose logits are not finite."""
    scored: list[list[int]]
    """For each row the positions whose logits were asked for."""


class Machine(RuleBasedStateMachine):
    """A scheduler, the promises of its docstring, and a device that holds one adapter a slot.

    Driven as the engine does it, with or without a step that is launched before the last is settled.
    """

    @initialize(
        own=st.booleans(),
        reuse=st.sampled_from([True, True, True, False]),
        blocks=st.integers(4, 16),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 6),
        spare_tokens=st.integers(0, 12),
        max_loras=st.integers(1, 3),
        max_passed_over=st.integers(0, 6),
        scored_tokens=st.integers(1, 12),
        tokens_beside=st.integers(1, 8),
        look_ahead=st.booleans(),
        min_gain=st.integers(1, 8),
        ratio=st.sampled_from([0.0, 0.0, 1.0]),
    )
    def start(self, own, reuse, blocks, block_size, min_gain, ratio, max_num_seqs, spare_tokens, **limits):
        if own:
            cache = OwnBlocks(min(blocks, 8), 40, granule=block_size, reuse=reuse)
        else:
            cache = SharedBlocks(blocks, block_size, reuse=reuse)
        self.scheduler = Scheduler(
            cache,
            LoRASlots(limits["max_loras"]),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_tokens,
            max_passed_over=limits["max_passed_over"],
        )
        self.scheduler.max_scored_tokens = limits["scored_tokens"]
        self.scheduler.max_tokens_beside = limits["tokens_beside"]
        self.interactive_starts = 0
        """While rows of the queue waited, since one of them was sheltered."""
        self.scheduler._promises = Promises(cache.granule, min_gain)
        self.scheduler.lengths.ratio = ratio
        if not ratio:  # every row comes as a surprise
            self.scheduler.lengths.learn = self.scheduler.lengths.learn_shortage = lambda *_: None
        self.capacity = 40 if own else blocks * block_size
        self.alive: dict[str, Sequence] = {}
        self.added: list[str] = []
        self.ended: Counter[str] = Counter()
        self.ends: dict[str, int] = {}
        self.passed: Counter[str] = Counter()
        self.slots: dict[int, AdapterKey] = {}
        self.bad: dict[str, int] = {}
        self.device = Device(cache, self.bad)
        self.look_ahead = limits["look_ahead"]
        self.flight: Flight | None = None

    @rule(
        head=st.integers(0, 18),
        tail=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3),
        new=st.integers(1, 20),
        end=st.integers(1, 20),
        adapter=st.sampled_from([None, *KEYS[:3], KEYS[0]]),
        copies=st.integers(1, 4),
        bad=st.none() | st.none() | st.integers(0, 24),
        whole=st.booleans(),
        interactive=st.sampled_from([False, False, True]),
    )
    def add_row(self, head, tail, new, end, adapter, copies, bad, whole, interactive):
        self.add(head, tail, new, end, adapter, copies, bad, whole, interactive)

    def add(self, head, tail, new, end, adapter, copies, bad, whole, interactive):
        prompt = ([1] * head + tail)[: self.capacity - 1]
        new = min(new, self.capacity - len(prompt))
        for _ in range(copies):
            name = str(len(self.added))
            targets = min(end, len(prompt)) if whole and head % 3 == 1 else ()
            scored = whole and head % 3 == 0
            row = sequence(name, prompt, adapter, new, targets, interactive, prompt_log_probs=scored)
            self.alive[name] = row
            self.added.append(name)
            self.ends[name] = 0 if targets else min(end, new)
            if bad is not None:
                self.bad[name] = bad
            self.scheduler.add(row)

    @rule(
        head=st.integers(0, 6),
        new=st.integers(12, 20),
        rows=st.integers(3, 6),
        adapter=st.sampled_from([None, *KEYS[:2]]),
        interactive=st.sampled_from([False, False, True]),
    )
    def add_crowd(self, head, new, rows, adapter, interactive):
        """Rows that start with little and come to need much."""
        for tail in range(rows):
            self.add(head, [tail], new, new, adapter, 1, None, whole=False, interactive=interactive)

    @rule(
        adapters=st.lists(st.sampled_from([None, *KEYS[:3]]), min_size=1, max_size=8),
        tail=st.integers(1, 6),
        new=st.integers(1, 3),
    )
    def add_callers(self, adapters, tail, new):
        """Interactive rows that come one after the other, with a step between."""
        for adapter in adapters:
            self.add(0, [2] * tail, new, new, adapter, 1, None, whole=False, interactive=True)
            self.step()
            self.books_agree()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        self.end(data.draw(st.sampled_from(sorted(self.alive))))

    @precondition(lambda self: any(row.status is Status.RUNNING for row in self.alive.values()))
    @rule(data=st.data())
    def preempt(self, data):
        self.settle()
        running = sorted(name for name, row in self.alive.items() if row.status is Status.RUNNING)
        if running:
            self.scheduler.preempt(self.alive[data.draw(st.sampled_from(running))])

    @rule(fails=st.sampled_from(["none", "none", "none", "first", "all"]), steps=st.integers(1, 4))
    def steps(self, fails, steps):
        self.step(fails)
        for _ in range(steps - 1):
            self.books_agree()
            self.step()

    def step(self, fails="none"):
        if not self.scheduler.can_look_ahead:
            self.settle()
        waited = [row for row in self.alive.values() if row.status is Status.WAITING]
        started = {row for row in self.alive.values() if row.started}
        preempted = self.scheduler.num_preempted
        sheltered = self.scheduler.sheltered
        others = sum(not row.request.interactive for row in self.scheduler.running)
        batch = self.scheduler.schedule()
        assert sheltered in {None, self.scheduler.sheltered}, "a sheltered row was preempted"
        assert self.flight is None or self.scheduler.num_preempted == preempted, "preempted while pending"
        self.check_batch(batch)
        self.check_order(waited, started, batch)
        self.check_interactive(waited, batch, sheltered, others)
        self.device.prepare(batch)
        if self.scheduler.num_preempted == preempted:  # else some may have begun anew
            self.check_reuse(waited, batch)
        failing = batch.rows[: {"none": 0, "first": 1, "all": 99}[fails]]
        if self.look_ahead and not failing:
            launched = self.launch(batch)
            self.settle()
            self.flight = launched
            return
        # A launch that raised: the rows whose fault it is leave before the rest is launched again.
        self.device.run(Batch(failing))
        self.settle()
        for row, *_ in failing:
            if row.status is Status.RUNNING:
                self.end(row.request.id)
        left = Batch(tuple(row for row in batch.rows if row.sequence.status is Status.RUNNING))
        self.flight = self.launch(left)
        self.settle()

    def launch(self, batch):
        scored = [list(row.scored) for row in batch.rows]
        bad = self.device.run(batch)
        self.scheduler.advance(batch)
        assert all(row.sequence.computed == row.stop for row in batch.rows)
        return Flight(batch, bad, scored)

    def settle(self):
        """Record the step that was launched last, if it was not yet."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        for row, scored in zip(flight.batch.rows, flight.scored, strict=True):
            row.sequence.scores += scored
        for row in flight.bad:
            if row.status is Status.RUNNING:
                self.end(row.request.id)
        rows = [row for row in flight.batch.rows if row.samples and row.sequence.status is Status.RUNNING]
        sampled = [(said(row.stop), None) for row in rows]
        recorded = self.scheduler.num_generated
        ended = self.scheduler.settle(flight.batch, sampled, self.finish)
        assert self.scheduler.num_generated == recorded + len(sampled)
        for row in ended:
            assert row.finish_reason is FinishReason.LENGTH
            prompt = row.request.prompt
            assert row.generated == [
                said(len(prompt) + number) for number in range(self.ends[row.request.id])
            ]
            if row.request.params.prompt_log_probs:
                assert row.scores == list(range(len(prompt) - 1))
            elif not row.generates:
                assert row.scores == list(range(len(prompt) - len(row.request.targets), len(prompt)))
            else:
                assert row.scores == []
            del self.alive[row.request.id]
            self.ended[row.request.id] += 1

    def finish(self, row):
        return FinishReason.LENGTH if row.num_generated >= self.ends[row.request.id] else None

    def end(self, name):
        row = self.alive.pop(name)
        self.scheduler.finish(row, FinishReason.ERROR)
        assert row.status is Status.FINISHED
        self.ended[name] += 1

    def check_batch(self, batch):
        scheduler = self.scheduler
        rows = [row.sequence for row in batch.rows]
        assert len(rows) == len(set(rows)) <= scheduler.max_num_seqs
        assert set(rows) == {row for row in scheduler.running if not row.only_settles}
        if not self.flight:
            assert set(rows) == set(scheduler.running)
            assert bool(rows) == bool(self.alive), "work, and a step without rows"
        assert batch.num_tokens <= scheduler.max_num_batched_tokens
        assert sum(row.keep for row in batch.rows) <= scheduler.max_scored_tokens + len(rows)
        assert len({row.request.adapter for row in rows} - {None}) <= scheduler.slots.max_loras
        for slot, key in batch.loads:
            self.slots[slot] = key
        holders = Counter(block for row in rows for block in row.blocks)
        for row, _, num_tokens, _ in batch.rows:
            assert 1 <= num_tokens <= row.remaining
            assert len(row.blocks) * scheduler.kv_cache.block_size >= row.computed + num_tokens
            for number in range(row.computed, row.computed + num_tokens):
                assert holders[self.device.place(row.blocks, number)[0]] == 1, "written to while shared"
            key = row.request.adapter
            assert (row.slot is None) == (key is None)
            assert key is None or self.slots[row.slot] == key, "a row would use another's adapter"

    def check_interactive(self, waited, batch, sheltered, others):
        """Rows of the queue neither hold interactive ones up, nor wait for ever while those come and go."""
        scheduler = self.scheduler
        queue = [row for row in batch.rows if not row.sequence.request.interactive]
        if len(queue) < len(batch.rows):
            beside = [row for row in queue if row.sequence is not scheduler.sheltered or row.start == 0]
            assert sum(row.num_tokens for row in beside) <= max(len(queue), scheduler.max_tokens_beside)
        begun = [row.sequence for row in batch.rows if row.sequence in waited]
        if any(not row.request.interactive for row in waited):
            self.interactive_starts += sum(row.request.interactive for row in begun)
        if scheduler.sheltered is not None:
            self.interactive_starts = 0
        assert self.interactive_starts <= scheduler.urgent.max_passed_over
        if scheduler._is_turn_of_queue or scheduler.sheltered is not sheltered or not scheduler.urgent:
            return  # or it was the queue's turn until a moment ago
        first = scheduler.urgent.offered[0]
        if first not in waited:  # it had to go in this step
            return
        stay = [row for row in scheduler.running if row.request.interactive or row is scheduler.sheltered]
        adapters = {row.request.adapter for row in stay} - {None}
        key = first.request.adapter
        spent = sum(row.num_tokens for row in batch.rows if row.sequence in stay)
        assert (
            len(stay) == scheduler.max_num_seqs
            or (key not in {None, *adapters} and len(adapters) == scheduler.slots.max_loras)
            or spent + others >= scheduler.max_num_batched_tokens
            or not scheduler._has_blocks_beside(first, stay)
            or any(row.pending for row in stay)  # they may need a block more than they have tokens
        ), "an interactive row waits for rows of the queue"

    def check_order(self, waited, started, batch):
        """The bound, and that preempted rows which can get a slot go before new ones."""
        waited = [row for row in waited if not row.request.interactive]
        running = [row.sequence for row in batch.rows if not row.sequence.request.interactive]
        first_time = [row for row in running if row not in started]
        for row in waited:
            if row not in running:
                self.passed[row.request.id] += sum(row.arrival < other.arrival for other in first_time)
                # Before its first start, and once more after it was preempted.
                most = self.scheduler.waiting.max_passed_over * (1 + row.started)
                assert self.passed[row.request.id] <= most
                free = row.request.adapter is None or self.scheduler.slots.can_acquire(row.request.adapter)
                assert not (row.started and free and first_time), "a new row went before a preempted one"

    def check_reuse(self, waited, batch):
        begun = [row.sequence for row in batch.rows if row.sequence in waited]
        assert batch.reused_tokens == sum(min(row.computed, len(row.request.prompt)) for row in begun)
        for row in begun:
            assert row.proven == row.computed < len(row.tokens)
            assert self.scheduler.kv_cache.reuse or row.computed == 0
            left = len(row.targets) - len(row.scores)
            first = len(row.request.prompt) - bool(row.request.params.prompt_log_probs) - left
            assert left == 0 or row.computed <= first, "a position that has to be scored was reused"

    @invariant()
    def books_agree(self):
        self.scheduler.check_integrity()
        scheduler = self.scheduler
        assert {*scheduler.waiting, *scheduler.urgent, *scheduler.running} == set(self.alive.values())
        assert self.scheduler.has_work == bool(self.alive)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        # One step more for each row whose end is found out by the step after.
        most = sum(1 + len(row.tokens) + row.request.params.max_new_tokens for row in self.alive.values())
        for _ in range(most):
            if not self.alive:
                break
            self.step()
            self.books_agree()
        self.settle()
        assert not self.alive, "the first running row always goes on, so that all of them end"
        assert self.ended == Counter(self.added)
        assert self.scheduler.kv_cache.num_free == self.scheduler.kv_cache.num_blocks


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
