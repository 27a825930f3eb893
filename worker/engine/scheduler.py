"""Decides, step by step, which tokens of which sequences go through the model. No torch here."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from worker.engine.kv_cache import KVCache
from worker.engine.lora_slots import LoRASlots
from worker.engine.sequence import Sequence, Status
from worker.jobs import AdapterKey, FinishReason


class ScheduledRow(NamedTuple):
    sequence: Sequence
    num_tokens: int
    """How many of the sequence's tokens, from `computed` on, go through the model in this step."""

    @property
    def num_prompt_tokens(self) -> int:
        """How many of those are of the prompt."""
        left = len(self.sequence.request.prompt) - self.sequence.computed
        return max(0, min(left, self.num_tokens))

    @property
    def samples(self) -> bool:
        """Whether this step reaches the sequence's end, so that its next token can be sampled."""
        return self.num_tokens == self.sequence.remaining


class Batch(NamedTuple):
    rows: tuple[ScheduledRow, ...]
    loads: tuple[tuple[int, AdapterKey], ...] = ()
    """Adapters to put into their slots before the forward pass."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class Scheduler:
    """First come, first served, within four limits.

    A step holds at most `max_num_seqs` sequences, `max_num_batched_tokens` tokens, the adapters that
    fit `slots`, and the keys and values that fit `kv_cache`. Prompts longer than what is left of the
    token budget are put through in chunks, in the same steps in which other rows decode.

    A row whose adapter has no slot yet is passed over, so that the batch stays full, but by at most
    `max_passed_over` rows: then nothing behind it starts until it has. When blocks run out, the
    sequence that started last gives its own back and starts over later (its text is kept).
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
        self.max_passed_over = max_passed_over
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._given_back: list[tuple[list[int], int]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        assert self.kv_cache.missing([], len(sequence.tokens) + 1) <= self.kv_cache.num_blocks
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """The next step: running rows first, then as many waiting ones as fit. May be empty."""
        rows = self._continue_running()
        loads = self._admit(rows)
        return Batch(tuple(rows), tuple(loads))

    def update(
        self,
        batch: Batch,
        sampled: Iterable[tuple[int, float | None]],
        finish: Callable[[Sequence], FinishReason | None],
    ) -> list[Sequence]:
        """Record that `batch` was computed; `sampled` has a token for each row that samples, in order.

        `finish` tells whether, and why, a sequence ends with the token just appended.
        Returns the sequences that ended, their blocks and slots given back.
        """
        tokens = iter(sampled)
        ended = []
        for row in batch.rows:
            sequence, samples = row.sequence, row.samples
            sequence.computed += row.num_tokens
            if samples:
                sequence.append(*next(tokens))
                reason = finish(sequence)
                if reason is not None:
                    self.finish(sequence, reason)
                    ended.append(sequence)
        return ended

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it stands, and take back what it holds."""
        if sequence.status is Status.RUNNING:
            self._take_back(sequence)
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue; it will be computed anew."""
        self._take_back(sequence)
        self.running.remove(sequence)
        sequence.computed = 0
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _continue_running(self) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        budget = self.max_num_batched_tokens
        # A chunk never eats the one token that each row behind it needs.
        behind = len(self.running)
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:  # preempted by a row before it
                continue
            behind -= 1
            num_tokens = min(sequence.remaining, budget - behind)
            if self._make_room(sequence, sequence.computed + num_tokens):
                rows.append(ScheduledRow(sequence, num_tokens))
                budget -= num_tokens
        return rows

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        while not self.kv_cache.grow(sequence.blocks, num_tokens):
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        return True

    def _admit(self, rows: list[ScheduledRow]) -> list[tuple[int, AdapterKey]]:
        """Move waiting sequences to `running` and append them to `rows`; returns the adapters to load."""
        budget = self.max_num_batched_tokens - sum(row.num_tokens for row in rows)
        loads: list[tuple[int, AdapterKey]] = []
        passed: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            if passed and passed[0].passed_over >= self.max_passed_over:
                break
            sequence = self.waiting.popleft()
            key = sequence.request.adapter
            if key is not None and not self.slots.can_acquire(key):
                passed.append(sequence)
                continue
            num_tokens = min(sequence.remaining, budget)
            if not self._fits(sequence, rows) or not self.kv_cache.grow(sequence.blocks, num_tokens):
                passed.append(sequence)
                break
            if key is not None:
                sequence.slot, fresh = self.slots.acquire(key)
                if fresh:
                    loads.append((sequence.slot, key))
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            rows.append(ScheduledRow(sequence, num_tokens))
            budget -= num_tokens
            for other in passed:
                other.passed_over += 1
        self.waiting.extendleft(reversed(passed))
        return loads

    def _fits(self, sequence: Sequence, rows: list[ScheduledRow]) -> bool:
        """Whether the whole of what `sequence` has now fits beside a next token for every other row.

        Admitting less would only lead to preempting it again.
        """
        own = self.kv_cache.missing(sequence.blocks, len(sequence.tokens) + 1)
        others = sum(self.kv_cache.missing(row.sequence.blocks, len(row.sequence.tokens) + 1) for row in rows)
        return own + others <= self.kv_cache.num_free or not rows

    def take_given_back(self) -> list[tuple[list[int], int]]:
        """The blocks given back since the last call, with the number of tokens in each group of them."""
        given_back, self._given_back = self._given_back, []
        return given_back

    def _take_back(self, sequence: Sequence) -> None:
        self._given_back.append((list(sequence.blocks), len(sequence.tokens)))
        self.kv_cache.free(sequence.blocks)
        if sequence.slot is not None:
            assert sequence.request.adapter is not None
            self.slots.release(sequence.request.adapter)
            sequence.slot = None

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, slots and states agree."""
        self.kv_cache.check_integrity(sequence.blocks for sequence in [*self.running, *self.waiting])
        users = Counter(seq.request.adapter for seq in self.running if seq.request.adapter is not None)
        self.slots.check_integrity(users)
        assert len(self.running) <= self.max_num_seqs
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        assert all(sequence.status is Status.WAITING for sequence in self.waiting)
        assert not any(sequence.blocks or sequence.slot is not None for sequence in self.waiting)
