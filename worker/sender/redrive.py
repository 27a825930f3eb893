"""Dead letters back to the queue that they came from.

Not by the service's own move task: it gives every message a new id, and a job without an `id` of its own is
known by its message's. Here such a job takes its first id along, so that what it had committed still counts.
"""

import asyncio
from collections.abc import Callable

import msgspec

from worker.errors import QueueRefused, QueueUnavailable
from worker.jobs import Delivery
from worker.transport.queue import MAX_BATCH, Queue
from worker.wire.enqueue import MAX_BODY_BYTES

_WAIT_SECONDS = 2.0
"""Enough for a poll to ask all of the service's servers."""
_SHOWN = 10


async def redrive(
    dead_letters: Queue,
    queue: Queue,
    *,
    limit: int | None = None,
    on_moved: Callable[[int], None] = lambda _: None,
) -> int:
    """Move messages until none is left, or `limit` are moved; how many that were.

    A message is sent before it is deleted: when this dies in between it is in both, and a worker does its job
    once all the same. What cannot be sent stays, and costs the others nothing; what is dead again by the time
    it is met again stays too. Attributes of type Binary stay behind. Raises
    QueueRefused and QueueUnavailable, at the end if it was about single messages.
    """
    moved, trouble = 0, dict[str, BaseException | str]()
    sent, new = set[str](), set[str]()
    """Ids of messages that were sent, and those that they got by it."""
    while limit is None or moved < limit:
        room = MAX_BATCH if limit is None else min(MAX_BATCH, limit - moved)
        deliveries = await dead_letters.receive(room, _WAIT_SECONDS)
        fresh = [one for one in deliveries if one.message_id not in new]
        if not fresh:
            break  # nothing is left, or only what came back
        unsent = [one for one in fresh if one.message_id not in sent]
        answers = await asyncio.gather(*(_send(queue, one) for one in unsent), return_exceptions=True)
        for delivery, answer in zip(unsent, answers, strict=True):
            if isinstance(answer, str):
                sent.add(delivery.message_id)
                new.add(answer)
            elif isinstance(answer, QueueRefused | QueueUnavailable):
                trouble[delivery.message_id] = answer
            else:
                raise answer
        gone = [one for one in fresh if one.message_id in sent]
        outcome = await dead_letters.delete([one.receipt for one in gone])
        for one in gone:
            if one.receipt in outcome.lost or one.receipt in outcome.failed:
                trouble[one.message_id] = "it was sent and could not be deleted"
            else:
                trouble.pop(one.message_id, None)
                moved += 1
        on_moved(moved)
        if unsent and not gone:
            break  # nothing at all can be sent
    if trouble:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(trouble.items())[:_SHOWN])
        raise QueueUnavailable(f"{moved} messages were moved, {len(trouble)} were not: {shown}")
    return moved


async def _send(queue: Queue, delivery: Delivery) -> str:
    return await queue.send(_with_id(delivery), delivery.attributes, delivery.group_id)


def _with_id(delivery: Delivery) -> str:
    """The body, with the id that its job has; nothing else of it changes."""
    try:
        body = msgspec.json.decode(delivery.body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return delivery.body
    if (
        not isinstance(body, dict)
        or body.keys().isdisjoint({"inputs", "input"})
        or body.get("id") is not None
    ):
        return delivery.body
    # Of two entries with one name the last counts, should there be a null.
    named = f'{delivery.body.rstrip()[:-1]},"id":"{delivery.message_id}"}}'
    size = len(named.encode()) + sum(
        len(f"{name}{text}".encode()) for name, text in delivery.attributes.items()
    )
    return named if size <= MAX_BODY_BYTES else delivery.body
