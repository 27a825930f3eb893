"""Rank 0: has the other ranks do what it does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from worker.engine.adapters.adapter import LoRAWeights
from worker.engine.cuts import Rank
from worker.engine.executor import Executor, PackedRow
from worker.engine.kernels.tilings import Fit, Situation, Tuner
from worker.engine.kv_cache import BlockCopy, Leftover
from worker.engine.parallel import orders
from worker.engine.parallel.channel import Channel, Gone
from worker.engine.parallel.share import Share
from worker.errors import EngineFailed


class Processes(Protocol):
    """Where the other ranks run."""

    def check(self) -> None:
        """Raise EngineFailed if one of them has ended."""

    def close(self) -> None:
        """End them; returns when they have."""


class Followers:
    """The channels to ranks 1, 2 and so on, in this order. One thread only."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels

    def tell(self, order: orders.Order) -> None:
        """Have all of them do the same. Raises EngineFailed if one is gone."""
        message = orders.encode(order)
        for rank in self.ranks:
            self.send(rank, message)

    @property
    def ranks(self) -> range:
        return range(1, len(self._channels) + 1)

    def send(self, rank: int, *parts: bytes | memoryview) -> None:
        """Send a message to one. Raises EngineFailed."""
        with _named(rank):
            self._channels[rank - 1].send(*parts)

    def answers(self, timeout_seconds: float) -> list[orders.Answer]:
        """One from each, for each of which to wait so long. Raises EngineFailed if one is gone."""
        return [self.answer(rank, timeout_seconds) for rank in self.ranks]

    def answer(self, rank: int, timeout_seconds: float) -> orders.Answer:
        """The next one of a rank. Raises EngineFailed if it is gone."""
        with _named(rank):
            return orders.read_answer(self._channels[rank - 1].receive(timeout_seconds))


@contextmanager
def _named(rank: int) -> Iterator[None]:
    try:
        yield
    except Gone as exc:
        raise EngineFailed(f"rank {rank} of the model is gone: {exc}") from exc


class LeadingExecutor(Executor):
    """An executor that has the others do all it does, at the same time.

    A step that fails on all ranks alike leaves them together, and can be tried again. One that fails on some
    of them alone ends the engine.
    """

    def __init__(
        self,
        own: Executor,
        share: Share,
        followers: Followers,
        processes: Processes,
        *,
        step_seconds: float,
        settle_seconds: float,
    ) -> None:
        """Wait so long for what the others have to answer, and for them to agree that a step has failed."""
        self._own = own
        self._share = share
        self._followers = followers
        self._processes = processes
        self._step_seconds = step_seconds
        self._settle_seconds = settle_seconds

    def width(self, slot: int | None) -> int | None:
        """See Executor."""
        return self._own.width(slot)

    def order(self, rows: Sequence[PackedRow]) -> list[int]:
        """See Executor."""
        return self._own.order(rows)

    def run(self, rows: Sequence[PackedRow], latest: torch.Tensor | None = None) -> torch.Tensor:
        """See Executor."""
        if latest is not None and all(row.source is None for row in rows):
            latest = None
        self._followers.tell(orders.Run([*rows], None if latest is None else len(latest)))
        with self._together():
            if latest is not None:
                self._share.group.hand_out(latest)
            return self._own.run(rows, latest)

    def run_uncached(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """See Executor."""
        self._followers.tell(orders.RunUncached([*prompts]))
        with self._together():
            return self._own.run_uncached(prompts)

    def put(self, slot: int, weights: LoRAWeights) -> None:
        """See Executor. Raises RuntimeError when another rank could not."""
        degree = self._share.rank.degree
        for rank in self._followers.ranks:
            order, parts = orders.pack(slot, self._share.weights(weights, Rank(rank, degree)))
            self._followers.send(rank, orders.encode(order))
            self._followers.send(rank, *parts)
        try:
            self._own.put(slot, self._share.weights(weights, self._share.rank))
        finally:
            answers = self._followers.answers(self._step_seconds)
        for rank, answer in zip(self._followers.ranks, answers, strict=True):
            if isinstance(answer, orders.Failed):
                raise RuntimeError(f"rank {rank}: {answer.message}")  # noqa: TRY004 (an answer is no input)

    def scrub(self, leftovers: Sequence[Leftover]) -> None:
        """See Executor."""
        self._followers.tell(orders.Scrub([*leftovers]))
        self._own.scrub(leftovers)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """See Executor."""
        self._followers.tell(orders.Copy([*copies]))
        self._own.copy(copies)

    def check(self) -> None:
        """See Executor."""
        self._processes.check()

    def close(self) -> None:
        """See Executor."""
        self._processes.close()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except EngineFailed:
            raise
        except Exception as exc:
            self._settle(exc)
            raise

    def _settle(self, exc: Exception) -> None:
        """Raise EngineFailed unless all others failed as well: they are where this one is then."""
        for rank in self._followers.ranks:
            try:
                answer = self._followers.answer(rank, self._settle_seconds)
            except EngineFailed as gone:
                raise EngineFailed(f"a step failed, and not on all devices alike ({gone}): {exc}") from exc
            assert isinstance(answer, orders.Failed), answer
        self._followers.tell(orders.Resume())


class LeadingTuner(Tuner):
    """Rank 0's: what suits its device is taken by the others as well, so that all do the same."""

    def __init__(self, own: Tuner | None, followers: Followers) -> None:
        self._own = own
        self._followers = followers

    def tune(self, situation: Situation) -> Fit:
        """See Tuner."""
        fit = Fit({}, None) if self._own is None else self._own.tune(situation)
        self._followers.tell(orders.Fitted.of(fit))
        return fit


def first_failure(followers: Followers, timeout_seconds: float) -> str | None:
    """What one of them has told of its failure, if it has; otherwise None, perhaps after so long for each."""
    for rank in followers.ranks:
        try:
            answer = followers.answer(rank, timeout_seconds)
        except EngineFailed:
            continue
        if isinstance(answer, orders.Failed):
            return f"rank {rank}: {answer.message}"
    return None
