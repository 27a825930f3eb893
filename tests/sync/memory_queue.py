"""A queue in memory that obeys the rules the listener relies on: ten messages at most, what was received is
not received again, a poll lasts until something comes or its time is over. test_event_queue.py runs it beside
SQS.
"""

import asyncio
from collections.abc import Sequence

from adapters_sync.errors import QueueUnavailable
from adapters_sync.event_queue import MAX_POLL_SECONDS, EventMessage
from tests.sync.builders import FakeTime


class MemoryQueue:
    """Messages that come at given times. A poll passes the time until then; one that is never ended, waits.

    `call_seconds` is what every receive takes.
    """

    url = "https://queue/events"

    def __init__(self, time: FakeTime, call_seconds: float = 0.0) -> None:
        self._time = time
        self._call_seconds = call_seconds
        self._coming: list[tuple[float, str]] = []
        self._numbers = iter(range(10**9))
        self._sent = asyncio.Event()
        self.taken: dict[str, str] = {}
        """Received and not deleted: bodies by receipt."""
        self.idle = asyncio.Event()
        """Set when a poll waits and nothing is to come."""
        self.trouble: list[Exception | None] = []
        """What the next receives raise; None for one that goes well."""
        self.delete_trouble: list[Exception] = []
        self.polls: list[int] = []
        """How long each receive was ready to wait."""

    def send(self, *bodies: str, after_seconds: float = 0.0) -> None:
        self._coming += [(self._time.seconds + after_seconds, body) for body in bodies]
        self._coming.sort(key=lambda one: one[0])
        self._sent.set()
        self.idle.clear()

    async def receive(self, wait_seconds: int) -> list[EventMessage]:
        assert 0 <= wait_seconds <= MAX_POLL_SECONDS
        self.polls.append(wait_seconds)
        await self._time.sleep(self._call_seconds)
        if self.trouble and (trouble := self.trouble.pop(0)) is not None:
            raise trouble
        while not self._coming and wait_seconds == MAX_POLL_SECONDS:
            self.idle.set()
            self._sent.clear()
            await self._sent.wait()
        due = min([self._time.seconds + wait_seconds, *(at for at, _ in self._coming)])
        self._time.seconds = max(self._time.seconds, due)
        number = sum(at <= self._time.seconds for at, _ in self._coming[:10])
        found, self._coming = self._coming[:number], self._coming[number:]
        messages = [EventMessage(body, f"receipt-{next(self._numbers)}") for _, body in found]
        self.taken |= {one.receipt: one.body for one in messages}
        return messages

    async def delete(self, messages: Sequence[EventMessage]) -> None:
        assert 1 <= len(messages) <= 10
        if self.delete_trouble:
            raise self.delete_trouble.pop(0)
        for message in messages:
            del self.taken[message.receipt]


def gone() -> QueueUnavailable:
    return QueueUnavailable("AWS.SimpleQueueService.NonExistentQueue: no such queue")
