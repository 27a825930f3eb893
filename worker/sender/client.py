"""The sender's side: jobs to the queue, with their files to the store, and dead letters back."""

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec

from worker import wire
from worker.errors import InvalidMessage, LoramillError, ObjectExists, StoreRefused
from worker.jobs import Delivery, Given, Output, Task
from worker.sender.files import ENDS, LocalFile
from worker.sender.redrive import redrive
from worker.transport.clients import Clients
from worker.transport.queue import Queue, QueueInfo, SqsQueue
from worker.transport.store import S3Store, Store, StoredObject
from worker.wire.native import is_job_id

_ANYWHERE = "s3://any/"
_SHA256 = "sha256"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the jobs of one command have in common."""

    adapters: Sequence[str] | None = None
    """One for all rows, or one for each."""
    parameters: Mapping[str, Any] = {}
    workflow: str | None = None
    task: str | None = None
    output: Output | None = None
    """None is the worker's only one."""

    @property
    def adapter(self) -> str | None:
        """That of all rows. Raises InvalidMessage when there are several."""
        if self.adapters is not None and len(self.adapters) > 1:
            raise InvalidMessage(
                "--adapter: for a file that is too large for a message give one, for all rows"
            )
        return self.adapters[0] if self.adapters else None

    @property
    def given(self) -> Given:
        """What is said about every row of a file."""
        return Given(
            adapter=self.adapter,
            parameters=self.parameters or None,
            workflow=self.workflow,
            task=Task.SCORE if self.task == Task.SCORE else Task.GENERATE,
        )


class Written(msgspec.Struct, frozen=True):
    """A job message, and what it is known by."""

    job_id: str
    body: str
    digest: str
    """As its manifest will have it."""


def write_job(inputs: Sequence[Any], order: Order, job_id: str) -> Written:
    """A job with its rows, checked as a worker will check it.

    Raises InvalidMessage for the first thing that a worker would refuse, a single row's mistake included.
    """
    scalar = order.adapters[0] if order.adapters is not None and len(order.adapters) == 1 else None
    body = wire.encode_job(
        inputs,
        id=job_id,
        adapters=scalar if scalar is not None else order.adapters,
        parameters=order.parameters or None,
        model=order.workflow,
        task=order.task,
        output=order.output,
    )
    job = _decoded(body, order, len(inputs))
    for row in job.rows:
        if row.failure is not None:
            raise InvalidMessage(f"row {row.index}: {row.failure.message}")
    return Written(job_id, body, job.digest)


def write_reference(stored: StoredObject, order: Order, job_id: str) -> Written:
    """A job whose rows are the lines of an object. Raises InvalidMessage."""
    body = wire.encode_job(
        id=job_id,
        input={"uri": stored.uri, "etag": stored.etag},
        adapters=order.adapter,
        parameters=order.parameters or None,
        model=order.workflow,
        task=order.task,
        output=order.output,
    )
    return Written(job_id, body, wire.located(_decoded(body, order, 1), stored.etag).digest)


class Upload(msgspec.Struct, frozen=True):
    """A file whose rows are good, and where it is to go."""

    file: LocalFile
    sha256: str
    uri: str


def plan_upload(file: LocalFile, order: Order, job_id: str) -> Upload:
    """Look at all rows of a file as a worker will. Raises InvalidMessage for what is wrong first."""
    if order.output is None:
        raise InvalidMessage(
            f"--file {file.path} is too large for a message: say where it may go, and the results; give "
            "--output or LORAMILL_OUTPUT_PREFIXES"
        )
    uri = wire.input_uri(order.output, job_id, packed=file.is_packed)
    write_reference(StoredObject(uri, "0", 0), order, job_id)  # whatever is wrong besides the file
    return Upload(file, file.check(order.given), uri)


async def upload(store: Store, planned: Upload) -> StoredObject:
    """Put the file there. One of an earlier command that was cut short is taken if it is the same.

    Raises InvalidMessage when it is another, and what the store raises.
    """
    with planned.file.path.open("rb") as content:
        try:
            return await store.put_file_if_absent(
                planned.uri, content, "application/jsonl", {_SHA256: planned.sha256}
            )
        except ObjectExists as error:
            there = await store.head(planned.uri)
            if there is None or there.metadata.get(_SHA256) != planned.sha256:
                raise InvalidMessage(f"--id was used before, for another file: {planned.uri}") from error
            return there


async def find_objects(store: Store, uri: str) -> AsyncIterator[tuple[str, StoredObject]]:
    """The object at `uri`, or those below it that are named like files of rows; with their names there.

    Raises InvalidMessage when there are none.
    """
    if not uri.endswith("/"):
        stored = await store.head(uri)
        if stored is None:
            raise InvalidMessage(f"--file {uri} does not exist")
        yield "", stored
        return
    found = False
    async with aclosing(store.list(uri)) as listed:
        async for stored in listed:
            if stored.uri.endswith(ENDS):
                found = True
                yield stored.uri.removeprefix(uri), stored
    if not found:
        raise InvalidMessage(f"--file {uri}: nothing below it ends in {' or '.join(ENDS)}")


async def send_job(queue_url: str, body: str) -> None:
    """Put one message on the queue."""
    async with _services(queue_url) as (_, queue):
        await queue.send(body, group_id=_group(queue_url, "cli"))


async def send_local(
    queue_url: str,
    files: Sequence[tuple[str, LocalFile | list[Any]]],
    order: Order,
    job_id: str,
    on_sent: Callable[[Written, str], None],
) -> None:
    """Put a job on the queue for each of some files with their names, small ones read already or large ones.

    A file with the name "" is the job `job_id`; the others are that and their names. Raises InvalidMessage
    before anything is sent, and what store and queue raise: what `on_sent` was told of is on the queue then.
    """
    ready = list[tuple[str, str, Written | Upload]]()
    for name, content in files:
        own_id = named(job_id, name)
        if isinstance(content, LocalFile):
            ready.append((name, own_id, plan_upload(content, order, own_id)))
        else:
            ready.append((name, own_id, write_job(content, order, own_id)))
    async with _services(queue_url) as (store, queue):
        for name, own_id, job in ready:
            if isinstance(job, Upload):
                written = write_reference(await upload(store, job), order, own_id)
            else:
                written = job
            await queue.send(written.body, group_id=_group(queue_url, written.job_id))
            on_sent(written, name)


async def send_stored(
    queue_url: str, uri: str, order: Order, job_id: str, on_sent: Callable[[Written, str], None]
) -> None:
    """As `send_local`, for an object, or for those below a prefix that are named like files of rows."""
    write_reference(StoredObject(uri, "0", 0), order, job_id)
    async with _services(queue_url) as (store, queue):
        try:
            async for name, stored in find_objects(store, uri):
                written = write_reference(stored, order, named(job_id, name))
                await queue.send(written.body, group_id=_group(queue_url, written.job_id))
                on_sent(written, name)
        except StoreRefused as error:
            raise LoramillError(f"--file {uri}: {error}") from error


def named(job_id: str, name: str) -> str:
    """The id of the job of one file among several: such as people recognise. Raises InvalidMessage."""
    if not name:
        return job_id
    readable = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in name)
    if readable != name:  # else files whose names differ there would be one job
        readable += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    own = f"{job_id}-{readable}"
    if not is_job_id(own):
        raise InvalidMessage(f"--file: {name} makes the job id {own}, which is too long; give a shorter --id")
    return own


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


def _group(queue_url: str, name: str) -> str | None:
    """A FIFO queue takes no message without one."""
    return name if queue_url.endswith(".fifo") else None


@asynccontextmanager
async def _services(queue_url: str) -> AsyncIterator[tuple[Store, Queue]]:
    async with Clients() as clients:
        yield S3Store(clients), SqsQueue(clients, queue_url)


def _decoded(body: str, order: Order, rows: int) -> Any:
    return wire.decode(
        Delivery(message_id="-", body=body, receipt="-"),
        output_prefixes=[_ANYWHERE if order.output is None else wire.as_folder(order.output.uri)],
        max_rows=rows or 1,
        now=time.time(),
    )
