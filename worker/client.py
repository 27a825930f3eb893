"""The sender's side of the queue: put a job there, wait for its results."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worker import wire
from worker.errors import InvalidMessage
from worker.jobs import Delivery, Output
from worker.redrive import redrive
from worker.transport.clients import Clients
from worker.transport.queue import SqsQueue

_LOOK_EVERY_SECONDS = 0.5
_ANYWHERE = "s3://any/"


def build_job(
    inputs: Sequence[Any],
    adapters: Sequence[str] | None,
    parameters: Mapping[str, Any],
    job_id: str,
    output: str | None,
) -> str:
    """The body of a job message, checked as a worker will check it.

    Raises InvalidMessage for the first thing that a worker would refuse, a single row's mistake included.
    """
    scalar = adapters[0] if adapters is not None and len(adapters) == 1 else None
    body = wire.encode_job(
        inputs,
        id=job_id,
        adapters=scalar if scalar is not None else adapters,
        parameters=parameters or None,
        output=None if output is None else Output(output),
    )
    job = wire.decode(
        Delivery(message_id="-", body=body, receipt="-"),
        output_prefixes=[_folder(output or _ANYWHERE)],
        max_rows=len(inputs) or 1,
        now=time.time(),
    )
    for row in job.rows:
        if row.failure is not None:
            raise InvalidMessage(f"row {row.index}: {row.failure.message}")
    return body


async def send_job(queue_url: str, body: str) -> None:
    """Put the message on the queue."""
    async with Clients() as clients:
        await SqsQueue(clients, queue_url).send(body)


async def redrive_all(queue_url: str, limit: int | None, on_moved: Callable[[int], None]) -> tuple[int, str]:
    """Move up to `limit` dead letters back to their queue: how many were moved, and from where."""
    async with Clients() as clients:
        queue = SqsQueue(clients, queue_url)
        arn = (await queue.describe()).dead_letter_arn
        if arn is None:
            raise InvalidMessage(f"queue_url: {queue_url} has no redrive policy, and so no dead letters")
        return await redrive(await SqsQueue.of_arn(clients, arn), queue, limit=limit, on_moved=on_moved), arn


def _folder(uri: str) -> str:
    return uri if uri.endswith("/") else f"{uri}/"
