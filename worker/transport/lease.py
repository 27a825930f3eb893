"""Leases: the right to work on a received message, kept alive by one heartbeat for the whole worker.

A lease ends once, in one of three ways: acked, released, or lost. Time is the keeper's own monotonic clock,
and a lease whose visibility has run out by that clock is lost, whatever the queue would say: somebody else
may hold the message by then.
"""

import asyncio
import enum
import math
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Self

import msgspec

from worker.errors import LeaseLost, QueueUnavailable
from worker.jobs import Delivery
from worker.transport.clients import jittered
from worker.transport.queue import MAX_VISIBILITY_SECONDS, Queue

_CAP_MARGIN_SECONDS = 60


class LeaseState(enum.Enum):
    OPEN = "open"
    ACKING = "acking"
    RELEASING = "releasing"
    ACKED = "acked"
    RELEASED = "released"
    LOST = "lost"


_EXTENDED = frozenset({LeaseState.OPEN, LeaseState.ACKING})
_ENDED = frozenset({LeaseState.ACKED, LeaseState.RELEASED, LeaseState.LOST})


class LeaseStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the keeper was made. `opened` is the sum of the three endings and the open leases."""

    opened: int = 0
    acked: int = 0
    released: int = 0
    lost: int = 0
    extended: int = 0
    """Leases extended, counted once a heartbeat."""
    extend_failures: int = 0
    """Extensions that failed and were tried again."""
    release_failures: int = 0
    """Releases that never reached the queue: the message comes back when its visibility ends."""


class Lease:
    """The right to work on one delivery. Made by `LeaseKeeper.open`; used from the event loop only."""

    def __init__(self, keeper: "LeaseKeeper", delivery: Delivery, opened_at: float, deadline: float) -> None:
        self.delivery: Final = delivery
        self.opened_at: Final = opened_at
        self.deadline = deadline
        """When the visibility ends, on the keeper's clock and on the safe side."""
        self.state = LeaseState.OPEN
        self.behind = False
        """The last extension failed and is to be tried again soon."""
        self.capped = False
        """Extended as far as 12 h after the receive allow; no heartbeat can help any more."""
        self._keeper = keeper
        self._lost = asyncio.Event()

    @property
    def lost(self) -> bool:
        """True once somebody else may hold the message: stop working on it, and ack nothing."""
        overdue = self.state is LeaseState.OPEN and self._keeper.now() >= self.deadline
        return overdue or self.state is LeaseState.LOST

    async def wait_lost(self) -> None:
        """Return when the lease is lost; never, if it ends otherwise. Cancelling this is safe."""
        await self._lost.wait()

    async def ack(self) -> None:
        """Delete the message: its results are committed.

        Raises LeaseLost when the lease is lost, in which case nothing is deleted, and QueueUnavailable when
        the delete failed, in which case the lease is open still and may be acked again or released.
        """
        self._begin(LeaseState.ACKING)
        try:
            outcome = await self._keeper.queue.delete([self.delivery.receipt])
            if outcome.failed:
                codes = ", ".join(outcome.failed.values())
                raise QueueUnavailable(f"message {self.delivery.message_id} could not be deleted: {codes}")
            self.end(LeaseState.LOST if outcome.lost else LeaseState.ACKED)
        finally:
            if self.state is LeaseState.ACKING:
                self.state = LeaseState.OPEN
        self._refuse_lost()

    async def release(self, delay_seconds: int = 0) -> None:
        """Give the message back, to be received again after `delay_seconds`.

        Raises LeaseLost when the lease is lost. A release that the queue cannot be told of is a release
        still: nobody extends the lease any more, and the message returns when its visibility ends.
        """
        self._begin(LeaseState.RELEASING)
        try:
            # A heartbeat on its way would hide the message again right after we showed it.
            await self._keeper.quiet()
            await self._keeper.queue.release(self.delivery.receipt, delay_seconds)
        except QueueUnavailable:
            self._keeper.count("release_failures")
        finally:
            if self.state is LeaseState.RELEASING:
                self.end(LeaseState.RELEASED)

    def end(self, state: LeaseState) -> None:
        """For the keeper and the lease itself: end this way, once."""
        assert self.state not in _ENDED, self._says()
        self.state = state
        self._keeper.forget(self)
        if state is LeaseState.LOST:
            self._lost.set()

    def end_if_overdue(self) -> None:
        """For the keeper and the lease itself: make final what `lost` says by the clock."""
        if self.state is LeaseState.OPEN and self.lost:
            self.end(LeaseState.LOST)

    def _begin(self, state: LeaseState) -> None:
        self.end_if_overdue()
        self._refuse_lost()
        assert self.state is LeaseState.OPEN, self._says()
        self.state = state

    def _refuse_lost(self) -> None:
        if self.state is LeaseState.LOST:
            raise LeaseLost(self._says())

    def _says(self) -> str:
        return f"the lease of message {self.delivery.message_id} is {self.state.value}"


class LeaseKeeper:
    """Keeps every open lease of one worker alive: `async with LeaseKeeper(queue, 120) as keeper`.

    One task extends all open leases, every third of `visibility_seconds` less some jitter; what failed is
    tried again soon. A second task ends leases that are overdue, even while a heartbeat hangs in the
    network. `visibility_seconds` must be what messages are received with. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        queue: Queue,
        visibility_seconds: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        assert 1 <= visibility_seconds <= MAX_VISIBILITY_SECONDS, visibility_seconds
        self.queue: Final = queue
        self.now: Final = clock
        self._visibility = visibility_seconds
        # The service counts from when it answered, and we from when we heard of it.
        self._slack = min(5.0, visibility_seconds / 10)
        self._sleep = sleep
        self._leases: dict[str, Lease] = {}
        self._counts: Counter[str] = Counter()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._opened = asyncio.Event()
        self._lag = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._heartbeats(), name="lease-heartbeat"),
            asyncio.create_task(self._expiries(), name="lease-expiry"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def open(self, delivery: Delivery) -> Lease:
        """Start keeping a delivery just received."""
        assert delivery.receipt not in self._leases, f"message {delivery.message_id} is kept already"
        now = self.now()
        lease = Lease(self, delivery, now, now + self._visibility - self._slack)
        self._leases[delivery.receipt] = lease
        self._counts["opened"] += 1
        return lease

    @property
    def open_leases(self) -> Sequence[Lease]:
        """The leases that have not ended, oldest first."""
        return tuple(self._leases.values())

    @property
    def lag(self) -> float:
        """Seconds by which the last heartbeat began late: above all, how long the event loop was blocked."""
        return self._lag

    @property
    def stats(self) -> LeaseStats:
        return LeaseStats(**self._counts)

    async def wait(self) -> None:
        """Return when the keeper is closed, and raise what broke a task of it.

        The worker must be waiting here: without heartbeats it may not go on. Until it stops, leases end by
        the clock.
        """
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():
                task.result()

    async def close(self) -> None:
        """Stop the heartbeats, the last thing a stopping worker does. Leases still open count as lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lease in self.open_leases:
            if lease.state is LeaseState.OPEN:
                lease.end(LeaseState.LOST)

    async def quiet(self) -> None:
        """For leases: return when no extension is on its way."""
        await self._quiet.wait()

    def count(self, name: str) -> None:
        """For leases: count one more in `stats`."""
        self._counts[name] += 1

    def forget(self, lease: Lease) -> None:
        """For leases: this one has ended."""
        del self._leases[lease.delivery.receipt]
        self.count(lease.state.value)

    async def _heartbeats(self) -> None:
        all_at = self.now() + self._interval()
        while True:
            behind = any(lease.behind for lease in self.open_leases)
            wake_at = min(all_at, self.now() + self._retry_delay()) if behind else all_at
            await self._sleep(max(0.0, wake_at - self.now()))
            self._lag = max(0.0, self.now() - wake_at)
            everyone = self.now() >= all_at
            if everyone:
                all_at = self.now() + self._interval()
            await self._extend([lease for lease in self.open_leases if everyone or lease.behind])

    async def _expiries(self) -> None:
        while True:
            for lease in self.open_leases:
                lease.end_if_overdue()
            waits = [
                lease.deadline - self.now() for lease in self.open_leases if lease.state is LeaseState.OPEN
            ]
            # A lease opened meanwhile lasts longer than the slack, so that none is overlooked.
            await self._sleep(min([self._slack, *waits]))

    async def _extend(self, leases: Sequence[Lease]) -> None:
        groups: defaultdict[int, list[Lease]] = defaultdict(list)
        for lease in leases:
            seconds = self._seconds_for(lease)
            if seconds > 0 and not lease.capped:
                groups[seconds].append(lease)
        self._quiet.clear()
        try:
            for seconds, group in groups.items():
                await self._extend_by(seconds, [lease for lease in group if lease.state in _EXTENDED])
        finally:
            self._quiet.set()

    async def _extend_by(self, seconds: int, leases: Sequence[Lease]) -> None:
        sent_at = self.now()
        outcome = await self.queue.extend([lease.delivery.receipt for lease in leases], seconds)
        for lease in leases:
            receipt = lease.delivery.receipt
            # A lease that went overdue meanwhile stays lost: somebody may have acted on that already.
            lease.end_if_overdue()
            if lease.state not in _EXTENDED:
                continue
            if receipt in outcome.lost:
                # While an ack is on its way the receipt may be gone because the ack has won.
                if lease.state is LeaseState.OPEN:
                    lease.end(LeaseState.LOST)
            elif receipt in outcome.failed:
                lease.behind = True
                self.count("extend_failures")
            else:
                lease.behind = False
                lease.capped = seconds < self._visibility
                lease.deadline = max(lease.deadline, sent_at + seconds - self._slack)
                self.count("extended")

    def _seconds_for(self, lease: Lease) -> int:
        """The whole visibility, or what is left of its 12 h: to ask for more is an error."""
        cap = lease.opened_at + MAX_VISIBILITY_SECONDS - _CAP_MARGIN_SECONDS
        return math.floor(min(self._visibility, cap - self.now()))

    def _interval(self) -> float:
        return jittered(self._visibility / 3)

    def _retry_delay(self) -> float:
        return jittered(max(0.2, self._visibility / 30))
