"""Hears from a queue that something changed in S3, and wakes the mirror.

A message is a hint to list now, and nothing else: what is there is told by the listing, which comes with
every interval anyway. So a message is deleted as soon as it is read, whatever becomes of the listing, one
that cannot be read is deleted too, and a lost one costs at most an interval. A message reaches one listener
only: each mirror needs a queue of its own.

One upload is several events, and thousands may come at once: the listener goes on reading for about a second
after the first before it calls, so it calls about once a second at most. The mirror lets a second pass after
each of its own passes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from adapters_sync.errors import QueueUnavailable, UnreadableEvent
from adapters_sync.event_queue import MAX_POLL_SECONDS, EventMessage, EventQueue
from adapters_sync.events import EventOutcome, concerns
from adapters_sync.options import Clock
from adapters_sync.uris import S3Prefix

_logger = logging.getLogger(__name__)
_GATHER_SECONDS = 1
_MAX_BACKOFF_SECONDS = 60.0
_MAX_DOUBLINGS = 6
_QUIET_SECONDS = 60.0
"""Between two log lines about messages that cannot be read."""


class Listener:
    """One queue and who wants to hear of one prefix. Use it from one event loop.

    `wake` is called on the event loop; `on_event` is told what became of each message.
    """

    def __init__(
        self,
        queue: EventQueue,
        source: S3Prefix,
        wake: Callable[[], None],
        on_event: Callable[[EventOutcome], None],
        clock: Clock,
    ) -> None:
        self._queue = queue
        self._source = source
        self._wake = wake
        self._on_event = on_event
        self._clock = clock
        self._heard_at: float | None = None
        """When the first hint came that nobody was woken for yet."""
        self._unreadable = 0
        """Messages that cannot be read, since the last log line about them."""
        self._quiet_until = 0.0

    async def run(self) -> None:
        """Listen until cancelled. A queue that does not answer is asked again, at least once a minute."""
        failures = 0
        while True:
            try:
                await self._listen()
            except QueueUnavailable as error:
                failures += 1
                details = {"queue": self._queue.url, "failures": failures, "reason": str(error)}
                _logger.warning("the queue of S3 events cannot be read", extra=details)
            except Exception:
                failures += 1
                _logger.exception("listening for S3 events failed by a mistake of ours")
            else:
                failures = 0
                continue
            self._call()  # it may be long until more is heard
            await self._clock.sleep(self._backoff(failures))

    async def _listen(self) -> None:
        """Take in what is on the queue, up to ten messages of it, and call when enough was gathered."""
        waiting = self._heard_at is not None
        messages = await self._queue.receive(_GATHER_SECONDS if waiting else MAX_POLL_SECONDS)
        outcomes = [self._read(message) for message in messages]
        if EventOutcome.HINT in outcomes and self._heard_at is None:
            self._heard_at = self._clock.monotonic()
        if messages:
            await self._queue.delete(messages)
        if not messages or self._gathered_seconds() >= _GATHER_SECONDS:
            self._call()

    def _read(self, message: EventMessage) -> EventOutcome:
        try:
            outcome = EventOutcome.HINT if concerns(message.body, self._source) else EventOutcome.OTHER
        except UnreadableEvent as error:
            outcome = EventOutcome.UNREADABLE
            self._warn(str(error))
        self._on_event(outcome)
        return outcome

    def _call(self) -> None:
        if self._heard_at is not None:
            self._heard_at = None
            self._wake()

    def _gathered_seconds(self) -> float:
        return 0.0 if self._heard_at is None else self._clock.monotonic() - self._heard_at

    def _backoff(self, failures: int) -> float:
        """In seconds: 2, 4, 8, ... up to a minute, half of it left to chance."""
        seconds = min(_MAX_BACKOFF_SECONDS, 2.0 ** min(failures, _MAX_DOUBLINGS))
        return seconds * (0.5 + 0.5 * self._clock.random())

    def _warn(self, reason: str) -> None:
        """Say that a message cannot be read, once a minute at most."""
        self._unreadable += 1
        now = self._clock.monotonic()
        if now < self._quiet_until:
            return
        details = {"queue": self._queue.url, "messages": self._unreadable, "reason": reason}
        _logger.warning("messages on the queue of S3 events are about no S3 event", extra=details)
        self._unreadable, self._quiet_until = 0, now + _QUIET_SECONDS


@asynccontextmanager
async def listening(
    queue: EventQueue | None,
    source: S3Prefix,
    wake: Callable[[], None],
    on_event: Callable[[EventOutcome], None],
    clock: Clock,
) -> AsyncIterator[None]:
    """A Listener at work until the end of the block; nothing without a queue."""
    if queue is None:
        yield
        return
    listener = Listener(queue, source, wake, on_event, clock)
    _logger.info("listening for S3 events", extra={"queue": queue.url})
    task = asyncio.create_task(listener.run(), name="s3-events")
    try:
        yield
    finally:
        # A poll under way is broken off: what it would have brought is hints for the next start, which lists.
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
