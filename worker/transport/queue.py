"""The queue: what the worker asks of it, and SQS.

One rule is the caller's to keep: a pending `receive` is never cancelled. The service hands its messages to
the abandoned call, and they stay invisible, a receive burnt, until their visibility ends.
"""

import asyncio
import json
import math
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import msgspec

from worker.errors import QueueRefused, QueueUnavailable
from worker.jobs import Delivery
from worker.transport.clients import MAX_POLL_SECONDS, Clients, jittered, plain_code, translated

MAX_BATCH = 10
"""Entries that SQS takes in one batch call, and messages that it gives in one receive."""

MAX_VISIBILITY_SECONDS = 43_200
"""12 h after its receive a message becomes visible again, whatever is asked."""

MAX_BATCH_BYTES = 1_048_576
"""Of all messages of one send."""

_DELETE_ATTEMPTS = 3
_SEND_ATTEMPTS = 3

_NAMES = [
    "VisibilityTimeout",
    "RedrivePolicy",
    "MessageRetentionPeriod",
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
]

_LOST_CODES = frozenset(
    {
        "ReceiptHandleIsInvalid",
        "MessageNotInflight",
        # What SQS itself says of a receipt that has expired. Nothing else in our entries can be invalid:
        # ids are counted, and a timeout is kept within the limits before it is sent.
        "InvalidParameterValue",
    }
)


class QueueInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How the queue is set up and roughly what is in it. The counts are approximate."""

    visibility_timeout_seconds: int
    max_receive_count: int | None = None
    """Receives before redrive; None without a redrive policy."""
    dead_letter_arn: str | None = None
    retention_seconds: int | None = None
    """How long a message is kept that nobody deletes; None where the service does not say."""
    messages: int = 0
    """Messages that could be received now."""
    in_flight: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """What a batch call did not do. Receipts in neither field are done."""

    lost: frozenset[str] = frozenset()
    """The receipt is no longer good: the message is deleted, visible, or with somebody else."""
    failed: dict[str, str] = {}
    """Receipt -> error code, for what another try may mend."""


class Outgoing(msgspec.Struct, frozen=True):
    """A message to be sent."""

    body: str
    attributes: dict[str, str] = {}
    """Of type String."""
    group_id: str | None = None
    """The tenant on a standard queue (fair queues); required on a FIFO queue."""

    @property
    def num_bytes(self) -> int:
        """As SQS counts them, the type names of the attributes included."""
        named = sum(len(f"{name}String{text}".encode()) for name, text in self.attributes.items())
        return len(self.body.encode()) + named


class Queue(Protocol):
    """An SQS queue. Every method raises QueueRefused when no retry can help.

    A receipt belongs to one receive of one message, and the next receive of that message makes it stale.
    """

    async def receive(self, limit: int, wait_seconds: float) -> list[Delivery]:
        """Take up to `limit` (1 to 10) messages, waiting up to `wait_seconds` (at most 20) for the first.

        Never cancel a pending receive: what it brings would be lost until the visibility ends. To stop,
        start no new one, let the pending one finish, and release what it brings. Raises QueueUnavailable.
        """

    async def extend(self, receipts: Sequence[str], seconds: int) -> Outcome:
        """Let the messages stay invisible for `seconds` (0 to 43200) from now.

        Trouble with part of the receipts, or with reaching the queue at all, is in `Outcome.failed`.
        """

    async def release(self, receipt: str, delay_seconds: int) -> None:
        """Give the message back, to be visible after `delay_seconds`.

        A lost receipt is not an error: the message is back already. Raises QueueUnavailable.
        """

    async def delete(self, receipts: Sequence[str]) -> Outcome:
        """Delete the messages for good; `Outcome.failed` is what still failed after a few tries.

        Deleting twice is not an error. A stale receipt deletes nothing; whether it is reported as lost is
        up to the service (standard queues report success).
        """

    async def send(
        self, body: str, attributes: Mapping[str, str] | None = None, group_id: str | None = None
    ) -> str:
        """Send one message with String `attributes` and return its id. Raises QueueUnavailable.

        `group_id` is the tenant on a standard queue (fair queues) and required on a FIFO queue.
        """

    async def send_all(self, messages: Sequence[Outgoing]) -> None:
        """Send many. Raises QueueUnavailable when some were still not sent after a few tries; others are."""

    async def describe(self) -> QueueInfo:
        """Read the queue's settings and approximate counts. Raises QueueUnavailable."""


class SqsQueue(Queue):
    """The SQS queue at `url`.

    `visibility_seconds` is asked for with every receive; None leaves it to the queue's own setting.
    `sleep` waits between tries of a delete.
    """

    def __init__(
        self,
        clients: Clients,
        url: str,
        *,
        visibility_seconds: int | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clients = clients
        self._url = url
        self._receive_options = (
            {} if visibility_seconds is None else {"VisibilityTimeout": visibility_seconds}
        )
        self._sleep = sleep

    @classmethod
    async def of_arn(cls, clients: Clients, arn: str) -> "SqsQueue":
        """The queue that `arn` names. Raises as `describe` does."""
        *_, account, name = arn.split(":")
        with _errors():
            answer = await clients.acks.get_queue_url(QueueName=name, QueueOwnerAWSAccountId=account)
        return cls(clients, answer["QueueUrl"])

    async def receive(self, limit: int, wait_seconds: float) -> list[Delivery]:
        assert 1 <= limit <= MAX_BATCH, limit
        with _errors():
            answer = await self._clients.polls.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=limit,
                WaitTimeSeconds=min(math.ceil(wait_seconds), MAX_POLL_SECONDS),
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["SentTimestamp", "ApproximateReceiveCount", "MessageGroupId"],
                **self._receive_options,
            )
        return [_delivery(message) for message in answer.get("Messages", [])]

    async def extend(self, receipts: Sequence[str], seconds: int) -> Outcome:
        assert 0 <= seconds <= MAX_VISIBILITY_SECONDS, seconds
        call = self._clients.acks.change_message_visibility_batch
        return await self._in_tens(call, receipts, {"VisibilityTimeout": seconds})

    async def release(self, receipt: str, delay_seconds: int) -> None:
        outcome = await self.extend([receipt], delay_seconds)
        for code in outcome.failed.values():
            raise QueueUnavailable(f"{self._url}: could not release a message: {code}")

    async def delete(self, receipts: Sequence[str]) -> Outcome:
        lost: frozenset[str] = frozenset()
        rest = receipts
        for attempt in range(_DELETE_ATTEMPTS):
            if attempt:
                await self._sleep(jittered(2**attempt))
            outcome = await self._in_tens(self._clients.acks.delete_message_batch, rest, {})
            lost |= outcome.lost
            rest = list(outcome.failed)
            if not rest:
                break
        return Outcome(lost, outcome.failed)

    async def send(
        self, body: str, attributes: Mapping[str, str] | None = None, group_id: str | None = None
    ) -> str:
        message = Outgoing(body, dict(attributes or {}), group_id)
        with _errors():
            answer = await self._clients.acks.send_message(QueueUrl=self._url, **self._fields(message))
        return str(answer["MessageId"])

    async def send_all(self, messages: Sequence[Outgoing]) -> None:
        rest: Sequence[Outgoing] = messages
        for attempt in range(_SEND_ATTEMPTS):
            if attempt:
                await self._sleep(jittered(2**attempt))
            failed, codes = list[Outgoing](), set[str]()
            for batch in _batches(rest):
                refused = await self._send_batch(batch)
                failed += [batch[at] for at in refused]
                codes |= set(refused.values())
            rest = failed
            if not rest:
                return
        raise QueueUnavailable(f"{self._url}: {len(rest)} messages could not be sent: {', '.join(codes)}")

    async def _send_batch(self, batch: Sequence[Outgoing]) -> dict[int, str]:
        """The places of those that were not sent, and why."""
        entries = [{"Id": str(at), **self._fields(message)} for at, message in enumerate(batch)]
        try:
            with _errors():
                answer = await self._clients.acks.send_message_batch(QueueUrl=self._url, Entries=entries)
        except QueueUnavailable as exc:
            return dict.fromkeys(range(len(batch)), str(exc))
        return {int(entry["Id"]): plain_code(entry["Code"]) for entry in answer.get("Failed", [])}

    def _fields(self, message: Outgoing) -> dict[str, Any]:
        fields: dict[str, Any] = {"MessageBody": message.body}
        if message.attributes:
            fields["MessageAttributes"] = {
                name: {"DataType": "String", "StringValue": text} for name, text in message.attributes.items()
            }
        if message.group_id is not None:
            fields["MessageGroupId"] = message.group_id
        if self._url.endswith(".fifo"):
            # Two equal jobs are two jobs; the id serves the SDK's own retries of this one call.
            fields["MessageDeduplicationId"] = uuid.uuid4().hex
        return fields

    async def describe(self) -> QueueInfo:
        with _errors():
            answer = await self._clients.acks.get_queue_attributes(QueueUrl=self._url, AttributeNames=_NAMES)
        values = answer["Attributes"]
        retention = values.get("MessageRetentionPeriod")
        redrive = json.loads(values.get("RedrivePolicy") or "{}")
        return QueueInfo(
            visibility_timeout_seconds=int(values["VisibilityTimeout"]),
            max_receive_count=int(redrive["maxReceiveCount"]) if "maxReceiveCount" in redrive else None,
            dead_letter_arn=redrive.get("deadLetterTargetArn"),
            retention_seconds=None if retention is None else int(retention),
            messages=int(values["ApproximateNumberOfMessages"]),
            in_flight=int(values["ApproximateNumberOfMessagesNotVisible"]),
        )

    async def _in_tens(
        self, call: Callable[..., Awaitable[Any]], receipts: Sequence[str], fields: Mapping[str, int]
    ) -> Outcome:
        """Batches run side by side: a slow one must not cost the leases of the others."""
        tens = [receipts[at : at + MAX_BATCH] for at in range(0, len(receipts), MAX_BATCH)]
        # With the exceptions returned, no batch is left running behind the caller's back when one is refused.
        batches = (self._one_batch(call, ten, fields) for ten in tens)
        answers = await asyncio.gather(*batches, return_exceptions=True)
        outcomes = [_raised(answer) for answer in answers]
        lost = frozenset[str]().union(*(outcome.lost for outcome in outcomes))
        return Outcome(lost, {key: code for outcome in outcomes for key, code in outcome.failed.items()})

    async def _one_batch(
        self, call: Callable[..., Awaitable[Any]], receipts: Sequence[str], fields: Mapping[str, int]
    ) -> Outcome:
        entries = [{"Id": str(at), "ReceiptHandle": receipt, **fields} for at, receipt in enumerate(receipts)]
        try:
            with _errors():
                answer = await call(QueueUrl=self._url, Entries=entries)
        except QueueUnavailable as exc:
            return Outcome(failed=dict.fromkeys(receipts, str(exc)))
        codes = {receipts[int(entry["Id"])]: plain_code(entry["Code"]) for entry in answer.get("Failed", [])}
        lost = frozenset(receipt for receipt, code in codes.items() if code in _LOST_CODES)
        return Outcome(lost, {receipt: code for receipt, code in codes.items() if receipt not in lost})


def _batches(messages: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """As few as may be, each of a size that one call may have."""
    batch, size = list[Outgoing](), 0
    for message in messages:
        if batch and (len(batch) == MAX_BATCH or size + message.num_bytes > MAX_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += message.num_bytes
    if batch:
        yield batch


def _raised(answer: Outcome | BaseException) -> Outcome:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _errors() -> AbstractContextManager[None]:
    return translated(unavailable=QueueUnavailable, refused=QueueRefused)


def _delivery(message: Mapping[str, Any]) -> Delivery:
    system = message.get("Attributes", {})
    attributes = message.get("MessageAttributes", {})
    return Delivery(
        message_id=message["MessageId"],
        body=message["Body"],
        receipt=message["ReceiptHandle"],
        receive_count=int(system.get("ApproximateReceiveCount", 1)),
        sent_at=int(system.get("SentTimestamp", 0)) / 1000,
        attributes={
            name: value["StringValue"] for name, value in attributes.items() if "StringValue" in value
        },
        group_id=system.get("MessageGroupId"),
    )
