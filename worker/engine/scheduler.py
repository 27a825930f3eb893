"""Decides, step by step, which tokens of which sequences go through the model. No torch here."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from worker.engine.kv_cache import BlockCopy, Growth, KVCache, Leftover
from worker.engine.lengths import Lengths, work
from worker.engine.lora_slots import LoRASlots
from worker.engine.prefixes import Node
from worker.engine.promises import Promises
from worker.engine.sequence import Sequence, Status
from worker.engine.urgent import Urgent
from worker.engine.waiting import Waiting
from worker.jobs import AdapterKey, FinishReason

_EARLY = 0.7
"""A long row starts this much before it has to: places in the batch become free only now and then."""
_MAX_SCORED_TOKENS = 256
"""Tokens in a step whose log-probabilities are asked for. Each keeps the logits of a whole vocabulary,
in float32 a MiB where that has 262,144 tokens: `max_num_batched_tokens` of them could be gigabytes."""
_BESIDE_INTERACTIVE = 64
"""Tokens in a step of rows of the queue, beside interactive ones: a step takes as long as its tokens, and
somebody waits for each of them. Every row that runs gets one all the same."""


Sampled = tuple[int, float | None, tuple[tuple[int, float], ...] | None]
"""A token, its log-probability and the likeliest tokens with theirs, where they were asked for."""


class ScheduledRow(NamedTuple):
    sequence: Sequence
    start: int
    """How many of the sequence's tokens went through the model in earlier steps."""
    num_tokens: int
    """How many go through it in this one."""
    ends: bool
    """Whether those reach the sequence's end."""

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """How many of its tokens are of the prompt."""
        return max(0, min(len(self.sequence.request.prompt) - self.start, self.num_tokens))

    @property
    def samples(self) -> bool:
        """Whether its next token can be sampled."""
        return self.ends and self.sequence.generates

    @property
    def scored(self) -> range:
        """Positions in this step whose logits say how likely targets are that have no score yet."""
        sequence = self.sequence
        num_targets = len(sequence.targets)
        if not num_targets:
            return range(0)
        start = max(self.start, sequence.first_scored + len(sequence.scores))
        stop = min(self.stop, sequence.first_scored + num_targets)
        return range(start, max(start, stop))

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens that are to be scored at these positions."""
        first, scored = self.sequence.first_scored, self.scored
        return self.sequence.targets[scored.start - first : scored.stop - first]

    @property
    def keep(self) -> int:
        """How many of its tokens, from the last backwards, must give logits."""
        scored = self.scored
        return self.stop - scored.start if scored else int(self.samples)


class Batch(NamedTuple):
    rows: tuple[ScheduledRow, ...]
    loads: tuple[tuple[int, AdapterKey], ...] = ()
    """Adapters to put into their slots before the forward pass."""
    copies: tuple[BlockCopy, ...] = ()
    """Keys and values to copy before the forward pass, in this order."""
    leftovers: tuple[Leftover, ...] = ()
    """Places to zero after that, still before the forward pass."""
    reused_tokens: int = 0
    """Prompt tokens that the rows which start here need not compute."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class _Budget:
    """What is left of a step's tokens, and of those whose logits are needed to score a row's own tokens."""

    def __init__(self, tokens: int, scored: int) -> None:
        self.tokens, self.scored = tokens, scored

    def spend(self, row: ScheduledRow) -> None:
        self.tokens -= row.num_tokens
        self.scored -= len(row.scored)

    def give_back(self, row: ScheduledRow) -> None:
        self.tokens += row.num_tokens
        self.scored += len(row.scored)

    def limit(self, tokens: int) -> None:
        """Leave no more than so many."""
        self.tokens = min(self.tokens, tokens)

    def row(self, sequence: Sequence, start: int, behind: int = 0) -> ScheduledRow:
        """As much of `sequence` from `start` on as fits: at least a token; each row behind is left one."""
        end = len(sequence.tokens) + sequence.pending
        stop = min(end, start + self.tokens - behind)
        if sequence.targets:
            scored = ScheduledRow(sequence, start, stop - start, ends=False).scored
            if len(scored) > max(0, self.scored):
                stop = scored.start + max(1, self.scored)
        return ScheduledRow(sequence, start, stop - start, stop == end)


class _Step:
    """A batch while it is put together."""

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget
        self.rows: list[ScheduledRow] = []
        self.loads: list[tuple[int, AdapterKey]] = []
        self.copies: list[BlockCopy] = []
        self.reused = 0

    def take(self, row: ScheduledRow) -> None:
        self.rows.append(row)
        self.budget.spend(row)


class Scheduler:
    """Which rows run, within four limits, and in which order they start.

    A step holds at most `max_num_seqs` sequences, `max_num_batched_tokens` tokens, the adapters that
    fit `slots`, and the keys and values that fit `kv_cache`. Prompts longer than what is left of the
    token budget are put through in chunks, in the same steps in which other rows decode; so are those
    whose log-probabilities are asked for, `max_scored_tokens` a step, or one a row where that is more.
    A row that is only to be scored ends when its prompt is computed.

    At most `max_passed_over` rows that came later start before one that came earlier does. Within that,
    preempted rows go first, and the others so that the batch stays full to the end, with few adapters in
    it: see `_choose`. A row whose adapter can get no slot lets others pass; one that finds no blocks does
    not. A row that begins with a text which a running row is computing is held back until it can reuse
    it. When blocks run out, the sequence that loses least by it gives its own back and starts over later
    (its text is kept).

    Interactive rows go first, by age. Rows of the queue, which are all the others, are preempted for what
    an interactive one lacks: a place in the batch, a slot, blocks; and beside interactive rows they get
    `max_tokens_beside` tokens of a step. But once `max_passed_over` interactive rows have started while
    some of the queue waited, one of those starts next and is kept until it ends: it is `sheltered`. There
    is one such row at a time.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        slots: LoRASlots,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_passed_over: int = 256,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running row needs one token a step"
        self.kv_cache = kv_cache
        self.slots = slots
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_scored_tokens = _MAX_SCORED_TOKENS
        self.max_tokens_beside = _BESIDE_INTERACTIVE
        self.waiting = Waiting(max_passed_over)
        """Rows of the queue."""
        self.urgent = Urgent(max_passed_over)
        """Interactive ones."""
        self.running: list[Sequence] = []
        self.sheltered: Sequence | None = None
        """The row of the queue that interactive ones do not preempt."""
        self.num_passed = 0
        """Interactive rows that started while some of the queue waited, since one of those was sheltered."""
        self.lengths = Lengths()
        self.num_preempted = 0
        self.num_generated = 0
        """Tokens that were recorded, of all sequences since the beginning."""
        self._promises = Promises(kv_cache.granule)

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self.num_waiting > 0

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.urgent)

    def add(self, sequence: Sequence) -> None:
        needed = len(sequence.tokens) + sequence.generates
        assert self.kv_cache.missing([], needed) <= self.kv_cache.num_blocks
        self._line_of(sequence).add(sequence)

    def schedule(self) -> Batch:
        """The next step: running rows first, then as many waiting ones as fit. May be empty.

        Interactive rows are seen to, running and waiting ones, before those of the queue.
        """
        step = _Step(_Budget(self.max_num_batched_tokens, self.max_scored_tokens))
        going_on = [sequence for sequence in self.running if not sequence.only_settles]
        first = [sequence for sequence in going_on if self._goes_first(sequence)]
        first.sort(key=lambda sequence: sequence is not self.sheltered)  # nobody preempts that one
        others = [sequence for sequence in going_on if not self._goes_first(sequence)]
        self._continue_running(step, first, behind=len(others))
        self._start_urgent(step, others)
        others = [sequence for sequence in others if sequence.status is Status.RUNNING]
        if any(row.sequence.request.interactive for row in step.rows):
            step.budget.limit(max(len(others), self.max_tokens_beside))
        self._continue_running(step, others)
        self._start_waiting(step)
        leftovers = self.kv_cache.take_leftovers()
        return Batch(tuple(step.rows), tuple(step.loads), tuple(step.copies), leftovers, step.reused)

    def advance(self, batch: Batch) -> None:
        """`batch` is being computed: what its rows sample is pending until it is settled.

        Until then the next batch may be scheduled, if `can_look_ahead`.
        """
        for row in batch.rows:
            row.sequence.computed = row.stop
            row.sequence.pending = row.samples

    def settle(
        self,
        batch: Batch,
        sampled: Iterable[Sampled],
        finish: Callable[[Sequence], FinishReason | None],
    ) -> list[Sequence]:
        """Record what the rows of a batch that was advanced have sampled: `sampled`, in order.

        Its logits were finite: what they depend on may be reused from now on. `finish` tells whether, and
        why, a sequence ends with the token just appended; one that samples none ends with its prompt. Rows
        that have ended since `advance` are passed by, and what they sampled is not among `sampled`.
        Returns the sequences that ended, their blocks and slots given back.
        """
        tokens = iter(sampled)
        ended = []
        for row in batch.rows:
            sequence = row.sequence
            if not row.ends or sequence.status is not Status.RUNNING:
                continue
            reason: FinishReason | None = FinishReason.LENGTH
            # If it is in a later batch already, it will have one more by then.
            sequence.pending = sequence.computed > row.stop
            self._prove(sequence, row.stop)
            if sequence.generates:
                sequence.append(*next(tokens))
                self.num_generated += 1
                reason = finish(sequence)
            if reason is not None:
                self.finish(sequence, reason)
                ended.append(sequence)
        return ended

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it stands, and take back what it holds."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
            if reason is not FinishReason.ERROR and sequence.generates:
                self.lengths.learn(sequence)
        elif sequence.status is Status.WAITING:
            self._promises.leave(sequence)
            self._line_of(sequence).remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to those that wait; what nobody overwrites is found again."""
        assert not sequence.pending, "its newest token would be lost"
        self._leave(sequence)
        sequence.computed = sequence.proven = sequence.written = 0
        sequence.status = Status.WAITING
        self._line_of(sequence).preempt(sequence)
        self.num_preempted += 1

    @property
    def can_look_ahead(self) -> bool:
        """Whether the next batch can be scheduled while tokens are pending: nobody has to be preempted."""
        if self.urgent and any(map(self._may_displace, self.running)):
            return False
        cache = self.kv_cache
        needed = sum(cache.missing(row.blocks, row.computed + row.remaining) for row in self.running)
        return needed <= cache.num_free

    def _line_of(self, sequence: Sequence) -> Urgent | Waiting:
        return self.urgent if sequence.request.interactive else self.waiting

    # Rows that run.

    def _goes_first(self, sequence: Sequence) -> bool:
        return sequence.request.interactive or sequence is self.sheltered

    def _continue_running(self, step: "_Step", going_on: list[Sequence], behind: int = 0) -> None:
        """Put running rows into the step, leaving a token for each of so many `behind` them."""
        for number, sequence in enumerate(going_on):
            if sequence.status is not Status.RUNNING:  # preempted by a row before it
                continue
            # A chunk never eats the one token that each row behind it needs.
            left = behind + len(going_on) - number - 1
            row = step.budget.row(sequence, sequence.computed, behind=left)
            gone = self._make_room(sequence, row.stop)
            if gone:
                for other in [other for other in step.rows if other.sequence in gone]:
                    step.rows.remove(other)
                    step.budget.give_back(other)
            if sequence not in gone:
                sequence.written = row.stop
                step.take(row)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> list[Sequence]:
        """Let `sequence` hold `num_tokens` tokens; returns who was preempted for it, perhaps itself.

        The row that goes before all others never is: so there is always progress.
        """
        gone: list[Sequence] = []
        while sequence not in gone and not self.kv_cache.grow(sequence.blocks, num_tokens):
            assert len(self.running) > 1, "one row alone always fits"
            keeps = min(self.running, key=self._rank)
            lower = [row for row in self.running if self._rank(row) >= self._rank(sequence)]
            # Those that go last first; of equal losses the latest.
            victim = min(
                (row for row in reversed(lower) if row is not keeps),
                key=lambda row: (-self._rank(row), self._loss(row)),
            )
            self.lengths.learn_shortage()
            self.preempt(victim)
            gone.append(victim)
        return gone

    def _rank(self, sequence: Sequence) -> int:
        """Rows preempt none of a lower rank for the blocks that they come to need."""
        if sequence is self.sheltered:
            return 0
        return 1 if sequence.request.interactive else 2

    def _loss(self, sequence: Sequence) -> tuple[bool, int]:
        """Whether preempting `sequence` frees nothing, and the tokens that may have to be computed anew."""
        num_shared = self.kv_cache.num_shared(sequence.blocks)
        return num_shared == len(sequence.blocks), sequence.computed - num_shared * self.kv_cache.block_size

    def _prove(self, sequence: Sequence, num_tokens: int) -> None:
        """Logits that depend on `num_tokens` tokens were finite."""
        before, sequence.proven = sequence.proven, num_tokens
        if before // self.kv_cache.granule < sequence.proven // self.kv_cache.granule:
            adapter = sequence.request.adapter
            self.kv_cache.remember(adapter, sequence.tokens, sequence.blocks, sequence.proven)
        self._end_promise(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence off those that run, and back what it holds."""
        self.kv_cache.free(sequence.blocks, sequence.written)
        if sequence.slot is not None:
            assert sequence.request.adapter is not None
            self.slots.release(sequence.request.adapter)
            sequence.slot = None
        self.running.remove(sequence)
        if sequence is self.sheltered:
            self.sheltered = None
        self._end_promise(sequence)

    def _end_promise(self, sequence: Sequence) -> None:
        for follower in self._promises.end(sequence):
            self.waiting.bring_back(follower)

    # Interactive rows that start.

    @property
    def _is_turn_of_queue(self) -> bool:
        """Whether a row of the queue starts before any more interactive ones."""
        enough = self.num_passed >= self.urgent.max_passed_over
        return enough and self.sheltered is None and len(self.waiting) > 0

    def _may_displace(self, sequence: Sequence) -> bool:
        return not self._goes_first(sequence)

    def _start_urgent(self, step: "_Step", others: list[Sequence]) -> None:
        """Start interactive rows, at the cost of `others`, to each of which that stays a token is left."""
        lacking: set[AdapterKey | None] = set()
        """Adapters whose rows find no slot in this step, which lets younger rows of others pass."""
        while True:
            offered = (row for row in self.urgent.offered if row.request.adapter not in lacking)
            sequence = next(offered, None)
            behind = sum(other.status is Status.RUNNING for other in others)
            if sequence is None or self._is_turn_of_queue or step.budget.tokens <= behind:
                return
            stay = [row for row in self.running if not self._may_displace(row)]
            if not self._has_slot_beside(sequence, stay):
                lacking.add(sequence.request.adapter)
                continue
            if len(stay) >= self.max_num_seqs or not self._has_blocks_beside(sequence, stay):
                return
            if not self._displace_for(sequence, step):
                return
            self.num_passed += len(self.waiting) > 0

    def _has_slot_beside(self, sequence: Sequence, stay: list[Sequence]) -> bool:
        key = sequence.request.adapter
        used = {row.request.adapter for row in stay} - {None}
        return key is None or key in used or len(used) < self.slots.max_loras

    def _has_blocks_beside(self, sequence: Sequence, stay: list[Sequence]) -> bool:
        held = {block for row in stay for block in row.blocks}
        rows = (self._growth(row) for row in stay)
        node = self._known(sequence)
        return not stay or self.kv_cache.fits(node, self._growth(sequence), rows, held=held)

    def _displace_for(self, sequence: Sequence, step: "_Step") -> bool:
        """Start an interactive row, preempting rows of the queue as long as it lacks something.

        False if it lacks blocks without them too: what is pending of the others may need one more.
        """
        while not self._has_slot(sequence):
            for user in self._users_of_a_slot():
                self.preempt(user)
        while len(self.running) >= self.max_num_seqs:
            self._displace()
        while True:
            behind = sum(self._may_displace(other) and not other.only_settles for other in self.running)
            node = self._known(sequence)
            row = step.budget.row(sequence, node.num_tokens if node else 0, behind)
            copied = self._begin(row, node)
            if copied is not None:
                self._took(step, row, copied)
                return True
            if not any(map(self._may_displace, self.running)):
                return False
            self._displace()

    def _displace(self) -> None:
        """Preempt the row of the queue that loses least by it; of equal losses the latest."""
        self.preempt(min(filter(self._may_displace, reversed(self.running)), key=self._loss))

    def _users_of_a_slot(self) -> list[Sequence]:
        """The rows of the adapter that is the cheapest to take from its slot: none of them goes first."""
        rows: dict[AdapterKey, list[Sequence]] = {}
        for row in self.running:
            if row.request.adapter is not None:
                rows.setdefault(row.request.adapter, []).append(row)
        free = [own for own in rows.values() if all(map(self._may_displace, own))]
        return min(free, key=lambda own: sum(self._loss(row)[1] for row in own))

    # Rows of the queue that start.

    def _start_waiting(self, step: "_Step") -> None:
        horizon = self._horizon()
        while step.budget.tokens > 0 and len(self.running) < self.max_num_seqs:
            sequence = self._next(horizon)
            if sequence is None:
                break
            node = self._known(sequence)
            if self._hold_back(sequence, node):
                continue
            row = step.budget.row(sequence, node.num_tokens if node else 0)
            sheltered = self._is_turn_of_queue
            copied = None if self._lacks_blocks(sequence, node) else self._begin(row, node)
            if copied is None:
                break
            if sheltered:
                self.sheltered, self.num_passed = sequence, 0
            self._took(step, row, copied)

    def _took(self, step: "_Step", row: ScheduledRow, copied: list[BlockCopy]) -> None:
        """A row that began is in the step, with what has to be done for it before."""
        step.copies += copied
        step.loads += self._take_slot(row.sequence)
        step.reused += min(row.start, len(row.sequence.request.prompt))
        step.take(row)

    def _next(self, horizon: float) -> Sequence | None:
        """The row that should start now, if it can get a slot; None if no row should."""
        due = self.waiting.due
        if due is not None:
            return due if self._has_slot(due) else None
        for sequence in self.waiting.preempted:
            if self._has_slot(sequence):
                return sequence
        # Followers keep their places: a place that stays empty for a step costs less than the adapter
        # that would fill it.
        if len(self.running) + self._promises.num_followers >= self.max_num_seqs:
            return None
        return self._choose(horizon)

    def _choose(self, horizon: float) -> Sequence | None:
        """Of the new rows, one whose late start would make the end late; else one of an active adapter.

        All the work there is keeps a full batch busy for some time: a row that is about as long, `horizon`,
        has to start now. While all are shorter, the adapters in the batch are kept few: their rows come
        first, then those of an adapter that is in a slot, then the oldest row's. Rows of the base model
        fit beside any adapters: they fill up what is left.
        """
        waiting, slots = self.waiting, self.slots
        base = waiting.of(None).longest
        active = [row for key in slots.active if (row := waiting.of(key).longest)]
        adapted = [waiting.adapted.longest] if slots.has_room else active
        longest = max(filter(None, [base, *adapted]), key=_length, default=None)
        if longest is None or work(longest) >= horizon:
            return longest
        if active:
            return max(active, key=_length)
        if not slots.has_room:
            return base
        idle = [row for key in slots.idle if (row := waiting.of(key).oldest)]
        return min(idle, key=lambda row: row.arrival, default=waiting.adapted.oldest or base)

    def _hold_back(self, sequence: Sequence, node: Node[int] | None) -> bool:
        """Set a new row aside if a running row will soon have much more of its text than `node`."""
        if sequence.started:
            return False
        leader = self._promises.leader(sequence, node.num_tokens if node else 0)
        if leader is None:
            return False
        self.waiting.set_aside(sequence)
        self._promises.follow(sequence, leader)
        return True

    def _begin(self, row: ScheduledRow, node: Node[int] | None) -> list[BlockCopy] | None:
        """Move a row from `waiting` to `running`; returns what to copy. None, and no change, without room."""
        sequence = row.sequence
        copies = self.kv_cache.begin(sequence.blocks, node, row.stop)
        if copies is None:
            return None
        self._promises.leave(sequence)
        self._line_of(sequence).start(sequence)
        sequence.computed = sequence.proven = row.start
        sequence.written = row.stop
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        if self.kv_cache.reuse:
            self._promises.make(sequence)
        return copies

    def _lacks_blocks(self, sequence: Sequence, node: Node[int] | None) -> bool:
        """Whether a row cannot be expected to run to its end beside those that run."""
        rows = (self._growth(other) for other in self.running)
        return bool(self.running) and not self.kv_cache.fits(node, self._growth(sequence), rows)

    def _take_slot(self, sequence: Sequence) -> list[tuple[int, AdapterKey]]:
        """Give a row its adapter's slot; returns what has to be loaded."""
        key = sequence.request.adapter
        if key is None:
            return []
        sequence.slot, fresh = self.slots.acquire(key)
        return [(sequence.slot, key)] if fresh else []

    def _known(self, sequence: Sequence) -> Node[int] | None:
        """What `sequence` can reuse."""
        return self.kv_cache.match(sequence.request.adapter, sequence.tokens, sequence.num_reusable)

    def _has_slot(self, sequence: Sequence) -> bool:
        key = sequence.request.adapter
        return key is None or self.slots.can_acquire(key)

    def _horizon(self) -> float:
        """The length from which on a row has to start now: see `_choose`."""
        return _EARLY * (self.waiting.work + sum(map(work, self.running))) / self.max_num_seqs

    def _growth(self, sequence: Sequence) -> Growth:
        num_blocks = len(sequence.blocks)
        num_alone = num_blocks - self.kv_cache.num_shared(sequence.blocks)
        return Growth(self.lengths.remaining(sequence), len(sequence.tokens), num_blocks, num_alone)

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, slots and states agree."""
        self.kv_cache.check_integrity(sequence.blocks for sequence in self.running)
        for row in self.running:
            self.kv_cache.check_known(row.request.adapter, row.tokens, row.blocks, row.proven)
            assert row.proven <= row.computed <= row.written <= len(row.blocks) * self.kv_cache.block_size
        users = Counter(seq.request.adapter for seq in self.running if seq.request.adapter is not None)
        self.slots.check_integrity(users)
        self.waiting.check_integrity()
        assert [row.arrival for row in self.urgent] == sorted(row.arrival for row in self.urgent)
        assert all(row.request.interactive for row in self.urgent)
        assert not any(row.request.interactive for row in self.waiting)
        assert self.sheltered is None or self.sheltered in self.running
        self._promises.check_integrity(self.running, self.waiting.aside)
        assert len(self.running) <= self.max_num_seqs
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        lines = [*self.waiting, *self.urgent]
        assert all(sequence.status is Status.WAITING for sequence in lines)
        assert not any(sequence.blocks or sequence.slot is not None for sequence in lines)


def _length(sequence: Sequence) -> tuple[float, int]:
    """Its work; of equal ones the one that came first is the greater."""
    return work(sequence), -sequence.arrival
