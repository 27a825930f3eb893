"""The sender's side of the queue: put a job there, and dead letters back."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worker import wire
from worker.errors import InvalidMessage
from worker.jobs import Delivery, Output
from worker.redrive import redrive
from worker.transport.clients import Clients
from worker.transport.queue import QueueInfo, SqsQueue

_ANYWHERE = "s3://any/"


def build_job(
    inputs: Sequence[Any],
    adapters: Sequence[str] | None,
    parameters: Mapping[str, Any],
    *,
    job_id: str,
    output: Output | None,
    task: str | None = None,
) -> tuple[str, str]:
    """The body of a job message, checked as a worker will check it, and the digest of what it asks for.

    Raises InvalidMessage for the first thing that a worker would refuse, a single row's mistake included.
    """
    scalar = adapters[0] if adapters is not None and len(adapters) == 1 else None
    body = wire.encode_job(
        inputs,
        id=job_id,
        adapters=scalar if scalar is not None else adapters,
        parameters=parameters or None,
        task=task,
        output=output,
    )
    job = wire.decode(
        Delivery(message_id="-", body=body, receipt="-"),
        output_prefixes=[_ANYWHERE if output is None else _folder(output.uri)],
        max_rows=len(inputs) or 1,
        now=time.time(),
    )
    for row in job.rows:
        if row.failure is not None:
            raise InvalidMessage(f"row {row.index}: {row.failure.message}")
    return body, job.digest


async def send_job(queue_url: str, body: str) -> None:
    """Put the message on the queue."""
    async with Clients() as clients:
        await SqsQueue(clients, queue_url).send(body)


async def redrive_all(
    queue_url: str, limit: int | None, on_moved: Callable[[int], None]
) -> tuple[int, QueueInfo, str]:
    """Move up to `limit` dead letters back to their queue: how many, what is left, and where they were.

    Raises InvalidMessage for a queue that has none, or whose messages are in order.
    """
    if queue_url.endswith(".fifo"):
        raise InvalidMessage(
            f"queue_url: {queue_url} is a FIFO queue, whose order would be lost; use StartMessageMoveTask"
        )
    async with Clients() as clients:
        queue = SqsQueue(clients, queue_url)
        arn = (await queue.describe()).dead_letter_arn
        if arn is None:
            raise InvalidMessage(f"queue_url: {queue_url} has no redrive policy, and so no dead letters")
        dead_letters = await SqsQueue.of_arn(clients, arn)
        moved = await redrive(dead_letters, queue, limit=limit, on_moved=on_moved)
        return moved, await dead_letters.describe(), arn


def _folder(uri: str) -> str:
    return uri if uri.endswith("/") else f"{uri}/"
