"""Dead letters back to the queue that they came from.

Not by the service's own move task: it gives every message a new id, and a job without an `id` of its own is
known by its message's. Here such a job takes its first id along, so that what it had committed still counts.
"""

import asyncio
from collections.abc import Callable

import msgspec

from worker.errors import QueueUnavailable
from worker.jobs import Delivery
from worker.transport.queue import MAX_BATCH, Queue

_WAIT_SECONDS = 2.0
"""Enough for a poll to ask all of the service's servers."""


async def redrive(
    dead_letters: Queue,
    queue: Queue,
    *,
    limit: int | None = None,
    on_moved: Callable[[int], None] = lambda _: None,
) -> int:
    """Move messages until none is left, or `limit` are moved; how many that were.

    A message is sent before it is deleted: when this dies in between it is in both, and a worker does its job
    once all the same. Attributes of type Binary stay behind. Raises QueueRefused and QueueUnavailable; what
    was not moved is there still, after its visibility has ended.
    """
    moved = 0
    while limit is None or moved < limit:
        room = MAX_BATCH if limit is None else min(MAX_BATCH, limit - moved)
        deliveries = await dead_letters.receive(room, _WAIT_SECONDS)
        if not deliveries:
            break
        await asyncio.gather(*(_send(queue, delivery) for delivery in deliveries))
        outcome = await dead_letters.delete([delivery.receipt for delivery in deliveries])
        if outcome.failed:
            raise QueueUnavailable(f"{len(outcome.failed)} messages were moved and could not be deleted")
        moved += len(deliveries)
        on_moved(moved)
    return moved


async def _send(queue: Queue, delivery: Delivery) -> None:
    await queue.send(_with_id(delivery), delivery.attributes)


def _with_id(delivery: Delivery) -> str:
    """The body, with the id that its job has."""
    try:
        body = msgspec.json.decode(delivery.body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return delivery.body
    if not isinstance(body, dict) or "inputs" not in body or body.get("id") is not None:
        return delivery.body
    return msgspec.json.encode(body | {"id": delivery.message_id}).decode()
