"""Takes messages from the queue, as many as the engine can start soon."""

import asyncio
import logging
import time
from collections.abc import Callable

from worker.delivery.runner import Runner
from worker.errors import EngineFailed, LeaseLost, QueueUnavailable
from worker.metrics import Metrics
from worker.transport.lease import Lease, LeaseKeeper
from worker.transport.queue import Queue

logger = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""SIGTERM waits for the poll under way, so polls are shorter than the longest that SQS has."""
_MAX_MESSAGES = 10
_RETRY_SECONDS = 2.0


class Intake:
    """Polls `queue`, opens a lease for each delivery and runs it as a task of its own.

    No poll begins while there is no room for a row. The size of a message is known only after it came, so
    the last ones may exceed the room; as many are asked for as fit if they are like those at work.
    """

    def __init__(
        self,
        queue: Queue,
        keeper: LeaseKeeper,
        runner: Runner,
        metrics: Metrics,
        *,
        room: Callable[[], int],
        mean_rows: Callable[[], float] = lambda: 1.0,
        max_messages: int,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._queue = queue
        self._keeper = keeper
        self._runner = runner
        self._metrics = metrics
        self._room = room
        self._mean_rows = mean_rows
        self._max_messages = max_messages
        self._poll_seconds = poll_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._something_ended = asyncio.Event()
        self._failure: EngineFailed | None = None
        self._polled = False
        self.last_busy = time.monotonic()
        """When a message was last seen or at work."""

    @property
    def idle_seconds(self) -> float:
        """For how long the queue has been seen empty; 0 while work is at hand or nothing is known."""
        return 0.0 if self._tasks or not self._polled else time.monotonic() - self.last_busy

    async def run(self, stop: asyncio.Event) -> None:
        """Poll until `stop` is set. Raises EngineFailed when a delivery met it, QueueRefused from the queue.

        A poll under way is never cancelled, since the message it may bring would be hidden from everybody:
        what it brings after `stop` is given back at once.
        """
        while not stop.is_set():
            if self._failure is not None:
                raise self._failure
            limit = self._limit()
            if not limit:
                await self._until_something_ends(stop)
                continue
            for lease in await self._poll(limit):
                if stop.is_set():
                    await _return(lease)
                else:
                    self._start(lease)
            # Let the new tasks decode, so that their rows are counted before the next poll.
            await asyncio.sleep(0)

    async def drain(self, timeout_seconds: float, hurry: asyncio.Event) -> bool:
        """Wait for the deliveries at work; after the time-out, or `hurry`, give the rest back.

        Returns whether all of them ended by themselves.
        """
        hurried = asyncio.create_task(hurry.wait(), name="hurry")
        try:
            deadline = time.monotonic() + timeout_seconds
            while self._tasks and not hurry.is_set() and time.monotonic() < deadline:
                await asyncio.wait(
                    {hurried, *self._tasks},
                    timeout=max(0.0, deadline - time.monotonic()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            hurried.cancel()
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return not left

    def _limit(self) -> int:
        """Messages to ask for; 0 is none."""
        room = self._room()
        if room <= 0:
            return 0
        fitting = max(1, int(room / self._mean_rows()))
        return min(_MAX_MESSAGES, fitting, max(0, self._max_messages - len(self._tasks)))

    async def _poll(self, limit: int) -> list[Lease]:
        try:
            deliveries = await self._queue.receive(limit, self._poll_seconds)
        except QueueUnavailable as exc:
            self.last_busy = time.monotonic()  # nobody knows whether the queue is empty
            logger.warning("the queue cannot be polled: %s", exc)
            await asyncio.sleep(_RETRY_SECONDS)
            return []
        self._polled = True
        if deliveries:
            self.last_busy = time.monotonic()
        self._metrics.received.inc(len(deliveries))
        return [self._keeper.open(delivery) for delivery in deliveries]

    def _start(self, lease: Lease) -> None:
        task = asyncio.create_task(self._runner.handle(lease), name=f"handle-{lease.delivery.message_id}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.last_busy = time.monotonic()
        self._something_ended.set()
        if task.cancelled():
            return
        failure = task.exception()
        if isinstance(failure, EngineFailed):
            self._failure = failure
        elif failure is not None:
            logger.error("a delivery ended by an error of ours", exc_info=failure)

    async def _until_something_ends(self, stop: asyncio.Event) -> None:
        self._something_ended.clear()
        waits = [asyncio.create_task(event.wait()) for event in (stop, self._something_ended)]
        try:
            # Rows end without their message ending, so look now and then as well.
            await asyncio.wait(waits, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


async def _return(lease: Lease) -> None:
    try:
        await lease.release()
    except LeaseLost:
        logger.info("a lease was lost while it was given back")
