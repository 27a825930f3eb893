"""Test doubles that obey the rules of SQS and S3, and pass the same contract tests as the real ones."""

import asyncio
import hashlib
import heapq
import itertools
import os
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import BinaryIO

from worker.errors import ObjectExists, ObjectNotFound, ObjectTooLarge, StoreRefused, StoreUnavailable
from worker.jobs import Delivery
from worker.transport.objects import StoredObject, parse_uri
from worker.transport.queue import MAX_BATCH, MAX_VISIBILITY_SECONDS, Outcome, Outgoing, Queue, QueueInfo
from worker.transport.store import Store


class ManualClock:
    """A clock that stands still until told: call it for the time, `sleep` on it, `advance` it."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has been advanced by `seconds`; 0 or less just lets other tasks run."""
        if seconds <= 0:
            return await asyncio.sleep(0)
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), woken))
        return await woken

    async def advance(self, seconds: float) -> None:
        """Move on, waking sleepers in order; each gets to run, at its own time, before the next."""
        end = self._now + seconds
        await self._settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            wake_at, _, woken = heapq.heappop(self._sleepers)
            self._now = max(self._now, wake_at)
            if not woken.done():
                woken.set_result(None)
                await self._settle()
        self._now = end
        await self._settle()

    async def _settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


class _Message:
    def __init__(
        self, body: str, attributes: Mapping[str, str], sent_at: float, group_id: str | None = None
    ) -> None:
        self.group_id = group_id
        self.id = str(uuid.uuid4())
        self.body = body
        self.attributes = dict(attributes)
        self.sent_at = sent_at
        self.visible_at = sent_at
        self.received_at = sent_at
        self.receive_count = 0
        self.receipt: str | None = None


class MemoryQueue(Queue):
    """A standard SQS queue in memory (no FIFO order; a `group_id` is kept and changes nothing).

    `clock` and `sleep` belong together: pass `ManualClock`'s to force a race. After `max_receive_count`
    receives a message moves to `dead_letters`.
    """

    def __init__(
        self,
        *,
        visibility_seconds: int = 30,
        max_receive_count: int | None = None,
        dead_letters: "MemoryQueue | None" = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        assert (max_receive_count is None) == (dead_letters is None), "a redrive needs both"
        self._visibility = visibility_seconds
        self._max_receives = max_receive_count
        self._dead_letters = dead_letters
        self._clock = clock
        self._sleep = sleep
        self._messages: dict[str, _Message] = {}
        self._owners: dict[str, str] = {}
        """Every receipt ever given -> message id."""
        self._changed = asyncio.Event()

    async def receive(self, limit: int, wait_seconds: float) -> list[Delivery]:
        assert 1 <= limit <= MAX_BATCH, limit
        end = self._clock() + wait_seconds
        while True:
            self._redrive()
            now = self._clock()
            ready = [message for message in self._messages.values() if message.visible_at <= now][:limit]
            if ready or now >= end:
                return [self._deliver(message) for message in ready]
            next_at = min((message.visible_at for message in self._messages.values()), default=end)
            await self._change_within(min(end, next_at) - now)

    async def extend(self, receipts: Sequence[str], seconds: int) -> Outcome:
        assert 0 <= seconds <= MAX_VISIBILITY_SECONDS, seconds
        return Outcome(frozenset(receipt for receipt in receipts if not self._hide(receipt, seconds)))

    async def release(self, receipt: str, delay_seconds: int) -> None:
        self._hide(receipt, delay_seconds)

    async def delete(self, receipts: Sequence[str]) -> Outcome:
        lost = set()
        for receipt in receipts:
            message = self._messages.get(self._owners.get(receipt, ""))
            stale = message is not None and message.receipt != receipt
            if stale or receipt not in self._owners:
                lost.add(receipt)
            elif message is not None:
                del self._messages[message.id]
        return Outcome(frozenset(lost))

    async def send(
        self, body: str, attributes: Mapping[str, str] | None = None, group_id: str | None = None
    ) -> str:
        message = _Message(body, attributes or {}, self._clock(), group_id)
        self.adopt(message)
        return message.id

    async def send_all(self, messages: Sequence[Outgoing]) -> None:
        for message in messages:
            await self.send(message.body, message.attributes, message.group_id)

    async def describe(self) -> QueueInfo:
        in_flight = sum(message.visible_at > self._clock() for message in self._messages.values())
        return QueueInfo(
            visibility_timeout_seconds=self._visibility,
            max_receive_count=self._max_receives,
            dead_letter_arn="arn:aws:sqs:memory:0:dead-letters" if self._dead_letters else None,
            messages=len(self._messages) - in_flight,
            in_flight=in_flight,
        )

    def _deliver(self, message: _Message) -> Delivery:
        message.receive_count += 1
        message.received_at = self._clock()
        message.visible_at = message.received_at + self._visibility
        message.receipt = uuid.uuid4().hex
        self._owners[message.receipt] = message.id
        return Delivery(
            message_id=message.id,
            body=message.body,
            receipt=message.receipt,
            receive_count=message.receive_count,
            sent_at=message.sent_at,
            attributes=dict(message.attributes),
            group_id=message.group_id,
        )

    def _hide(self, receipt: str, seconds: int) -> bool:
        """Change the visibility, if the receipt is the message's latest and it is in flight still."""
        now = self._clock()
        message = self._messages.get(self._owners.get(receipt, ""))
        if message is None or message.receipt != receipt or message.visible_at <= now:
            return False
        if now + seconds > message.received_at + MAX_VISIBILITY_SECONDS:
            return False
        message.visible_at = now + seconds
        self._wake()
        return True

    def _redrive(self) -> None:
        if self._dead_letters is None or self._max_receives is None:
            return
        for message in list(self._messages.values()):
            if message.visible_at <= self._clock() and message.receive_count >= self._max_receives:
                del self._messages[message.id]
                self._dead_letters.adopt(message)

    def adopt(self, message: _Message) -> None:
        """For `send` and redrive: take a message in as it is."""
        self._messages[message.id] = message
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change_within(self, seconds: float) -> None:
        waits = [asyncio.ensure_future(self._changed.wait()), asyncio.ensure_future(self._sleep(seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class MemoryStore(Store):
    """S3 buckets in memory. With `buckets` given, any other bucket does not exist."""

    def __init__(self, buckets: Collection[str] | None = None) -> None:
        self._buckets = buckets
        self._objects: dict[str, tuple[bytes, StoredObject]] = {}

    async def put_if_absent(
        self,
        uri: str,
        body: bytes,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        await asyncio.sleep(0)
        if uri in self._objects:
            raise ObjectExists(uri)
        return self._store(uri, body, metadata)

    async def put_file_if_absent(
        self,
        uri: str,
        file: BinaryIO,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        body = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        return await self.put_if_absent(uri, body, content_type, metadata)

    async def put(
        self, uri: str, body: bytes, content_type: str = "application/octet-stream"
    ) -> StoredObject:
        await asyncio.sleep(0)
        return self._store(uri, body)

    async def get(self, uri: str, *, max_bytes: int | None = None) -> tuple[bytes, StoredObject]:
        body, stored = self._find(uri)
        if max_bytes is not None and stored.size > max_bytes:
            raise ObjectTooLarge(uri, stored.size, max_bytes)
        return body, stored

    async def head(self, uri: str) -> StoredObject | None:
        parse_uri(uri)
        return self._objects[uri][1] if uri in self._objects else None

    async def list(self, uri: str) -> AsyncGenerator[StoredObject, None]:
        self._check_bucket(uri)
        for name in sorted(self._objects):
            if name.startswith(uri):
                yield self._objects[name][1]

    async def stream(
        self, stored: StoredObject, start: int = 0, stop: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        body, current = self._find(stored.uri)
        if current.etag != stored.etag:
            raise StoreUnavailable(f"{stored.uri} was overwritten while it was read")
        end = len(body) if stop is None else min(stop, len(body))
        for at in range(start, end, 65_536):
            yield body[at : min(at + 65_536, end)]

    def _store(self, uri: str, body: bytes, metadata: Mapping[str, str] | None = None) -> StoredObject:
        self._check_bucket(uri)
        if not parse_uri(uri)[1]:
            raise StoreRefused(f"{uri} has no key")
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        self._objects[uri] = (bytes(body), StoredObject(uri, etag, len(body), dict(metadata or {})))
        return self._objects[uri][1]

    def _find(self, uri: str) -> tuple[bytes, StoredObject]:
        self._check_bucket(uri)
        if uri not in self._objects:
            raise ObjectNotFound(uri)
        return self._objects[uri]

    def _check_bucket(self, uri: str) -> None:
        bucket, _ = parse_uri(uri)
        if self._buckets is not None and bucket not in self._buckets:
            raise StoreRefused(f"{uri}: no such bucket")
