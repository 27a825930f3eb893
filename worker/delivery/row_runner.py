"""The rows of many jobs at once: how many of each are at work, in which order their results come out."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import TypeVar

from worker.delivery.flow import FlowControl
from worker.delivery.in_order import InOrder
from worker.errors import Cancelled, EngineFailed, Expired
from worker.jobs import Job, OnDelta, Row, RowResult

T = TypeVar("T")

LARGE = 4
_AHEAD = 64
"""Results that may wait for an earlier one, by rows at work."""


class Hold:
    """A message that is at work: its job, once that is known, and how many rows have no result yet."""

    __slots__ = ("began", "cancelled", "interactive", "job", "left", "num_bytes", "on_delta", "rows")

    def __init__(self, num_bytes: int) -> None:
        self.job: Job | None = None
        self.rows = self.left = 1  # a message that is looked at counts as a row
        self.num_bytes = num_bytes
        self.began = time.monotonic()
        self.cancelled = False
        """Whoever sets this has rows fail that are not started yet."""
        self.interactive = False
        """Whether somebody waits for it: then it is no message, but a call."""
        self.on_delta: OnDelta | None = None
        """Who is told of its tokens as they come."""

    def take(self, job: Job) -> None:
        """From now on it is this job."""
        self.job = job
        self.rows = self.left = max(1, job.num_rows)


class RowRunner(ABC):
    """Runs rows of many jobs at once, as many of one job as `flow` has room for.

    A job of more rows than a `LARGE`-th of that is a large one: its rows take turns with those of others.
    """

    keeps_raw = False
    """Whether rows must be kept as they were sent."""

    def __init__(self, flow: FlowControl, clock: Callable[[], float] = time.time) -> None:
        self._flow = flow
        self._clock = clock
        self._holds: set[Hold] = set()

    @abstractmethod
    async def _run(self, hold: Hold, row: Row) -> RowResult:
        """The result of one row, whose own failure is in it. Raises EngineFailed."""

    @property
    def in_flight(self) -> int:
        """Rows of the messages at work that have no result yet."""
        return sum(hold.left for hold in self._holds)

    @property
    def room(self) -> int:
        """How many more rows may be taken from the queue; a large job counts as the least that is large."""
        taken = sum(min(hold.left, self._large) for hold in self._holds)
        return 0 if self._flow.is_full else max(0, self._flow.max_rows - taken)

    @property
    def mean_rows(self) -> float:
        """Rows of a message, on average of those at work, a large job counted as above."""
        if not self._holds:
            return self._large
        return sum(min(hold.rows, self._large) for hold in self._holds) / len(self._holds)

    @property
    def _large(self) -> int:
        return max(1, self._flow.max_rows // LARGE)

    @contextmanager
    def hold(self, num_bytes: int = 0) -> Iterator[Hold]:
        """Count a message of so many bytes as at work from now to the end of the block."""
        hold = Hold(num_bytes)
        self._holds.add(hold)
        self._flow.take(num_bytes=num_bytes)
        try:
            yield hold
        finally:
            self._holds.discard(hold)
            self._flow.give_back(num_bytes=hold.num_bytes)

    def grow(self, hold: Hold, num_bytes: int) -> None:
        """So many more bytes belong to a message than it came with."""
        hold.num_bytes += num_bytes
        self._flow.take(num_bytes=num_bytes)

    async def run(
        self,
        hold: Hold,
        rows: AsyncIterator[Row],
        encode: Callable[[RowResult], T],
        emit: Callable[[T], Awaitable[None]],
    ) -> None:
        """Give `emit` what `encode` makes of every row's result, in order.

        A result is encoded as soon as it is there, so that what waits for an earlier one is small; a row's
        own failure is in it. Raises what `rows`, `encode` and `emit` raise, and EngineFailed.
        """
        assert hold.job is not None
        taken, in_order = _Taken(rows), InOrder(emit, max_ahead=_AHEAD * self._flow.max_rows)
        workers = min(hold.rows, self._flow.max_rows)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(workers):
                    name = f"rows-{number}-{hold.job.id}"
                    group.create_task(self._take(hold, taken, encode, in_order), name=name)
        except BaseExceptionGroup as error:
            raise cause_of(error) from error
        # A group does not mind if its tasks are cancelled.
        if not taken.ended or in_order.passed_on < taken.count:
            raise EngineFailed(f"rows of job {hold.job.id} were dropped")

    async def _take(
        self, hold: Hold, taken: "_Taken", encode: Callable[[RowResult], T], in_order: InOrder[T]
    ) -> None:
        """See rows through, one after the other, until there are none."""
        is_large = hold.rows > self._large
        while True:
            async with AsyncExitStack() as stack:
                # A job has a row ready before it takes a turn, which others could use while it reads.
                async with taken.gate:
                    numbered = await taken.next()
                    if numbered is None:
                        return
                    number, row = numbered
                    await in_order.room(number)
                    if is_large:
                        await stack.enter_async_context(self._flow.turn())
                done = encode(await self._run(hold, row))
            hold.left = max(0, hold.left - 1)
            await in_order.put(number, done)

    def _refuse_late(self, hold: Hold) -> None:
        """Raise Cancelled or Expired when no row of the job may start any more."""
        job = hold.job
        assert job is not None
        if hold.cancelled:
            raise Cancelled(f"Job {job.id} was cancelled before this row was started")
        if job.expires_at is not None and self._clock() > job.expires_at:
            raise Expired(f"The row was not started before {job.expires_at:.0f}, by ttl_seconds of its job")


class _Taken:
    """Rows by their numbers in this run, from 0; one reader at a time."""

    def __init__(self, rows: AsyncIterator[Row]) -> None:
        self._rows = rows
        self.gate = asyncio.Lock()
        """Held by whoever asks for the next."""
        self.count = 0
        self.ended = False

    async def next(self) -> tuple[int, Row] | None:
        row = None if self.ended else await anext(self._rows, None)
        if row is None:
            self.ended = True
            return None
        self.count += 1
        return self.count - 1, row


def cause_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended a task group: the engine's failure before anything else."""
    leaves = [cause_of(exc) if isinstance(exc, BaseExceptionGroup) else exc for exc in group.exceptions]
    return next((exc for exc in leaves if isinstance(exc, EngineFailed)), leaves[0])
