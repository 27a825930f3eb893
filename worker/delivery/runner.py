"""One delivery from message to committed results. Every path ends its lease exactly once.

The order is the promise: results, then manifest, then ack.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from worker import wire
from worker.delivery.commit import Committer
from worker.delivery.inputs import rows_of
from worker.delivery.row_runner import Hold, RowRunner
from worker.delivery.splitter import Splitter
from worker.delivery.spool import Spool
from worker.errors import (
    EngineFailed,
    InvalidInput,
    InvalidMessage,
    JobError,
    JobIdReused,
    LeaseLost,
    LoramillError,
    ObjectNotFound,
    ObjectTooLarge,
    QueueRefused,
)
from worker.jobs import Delivery, Failure, Job
from worker.metrics import Metrics
from worker.transport.lease import Lease, LeaseState
from worker.transport.store import Store
from worker.wire.checks import failure_of
from worker.wire.enqueue import MAX_BODY_BYTES
from worker.wire.envelopes import Pointer
from worker.wire.manifest import CommittedPart
from worker.wire.results import Tally
from worker.wire.source import check_input

logger = logging.getLogger(__name__)

_MAX_BACKOFF_SECONDS = 900
_CANCEL_SECONDS = 10.0
"""Between two looks whether a job was cancelled, while its rows are at work."""
_MAX_POINTED_BYTES = 16 << 20
"""Of a body that lies in S3. What is larger is an `input`."""

Opened = Job | Pointer | list[Delivery]
"""What a message holds: a job, where its body is, or several jobs, or none."""


class JobLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What jobs may ask for, and what happens to those that ask for more."""

    output_prefixes: tuple[str, ...]
    max_rows_per_job: int
    dead_letter_prefix: str | None
    """Where messages go that nothing can be made of; None leaves them to the queue's redrive."""
    max_receive_count: int | None
    """After this many receives the queue moves a message away; None if it never does."""
    input_prefixes: tuple[str, ...] = ()
    """Where inputs may lie; anywhere if there are none."""
    base_models: tuple[str, ...] = ()
    """What `model` may call the base model."""


class Runner:
    """Sees deliveries through. `handle` may run for many at once, on one event loop."""

    def __init__(
        self,
        limits: JobLimits,
        rows: RowRunner,
        committer: Committer,
        splitter: Splitter,
        metrics: Metrics,
        *,
        store: Store,
        spool_folder: Path | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self._limits = limits
        self._rows = rows
        self._store = store
        self._committer = committer
        self._splitter = splitter
        self._spool_folder = spool_folder
        self._metrics = metrics
        self._clock = clock

    async def handle(self, lease: Lease) -> None:
        """See one delivery through, and end its lease.

        The message is decoded, and its rows count as at work, before the first await; but for one that only
        points to its body. Raises EngineFailed when the process cannot go on; then, and when this is
        cancelled, the message is given back at once.
        """
        with self._rows.hold(len(lease.delivery.body)) as hold:
            try:
                job = self._open(lease.delivery)
            except JobError as error:
                work = self._reject(hold, lease.delivery, error)
            except Exception as error:  # noqa: BLE001 (a mistake of ours, and the lease must end all the same)
                work = _raising(error)
            else:
                if isinstance(job, Job):
                    hold.take(job)
                work = self._see_through(hold, lease.delivery, job)
            await self._end(hold, lease, work)

    async def _end(self, hold: Hold, lease: Lease, work: Coroutine[Any, Any, str]) -> None:
        """Do the work of a delivery, and end its lease as the outcome says."""
        delivery = lease.delivery
        fields = {"message_id": delivery.message_id, "receive_count": delivery.receive_count}
        started = time.monotonic()
        outcome = "released"
        try:
            outcome = await _unless_lost(lease, work)
            await lease.ack()
        except LeaseLost:
            outcome = "lost"
            logger.warning("the lease was lost: nothing is acked", extra=fields)
        except (EngineFailed, asyncio.CancelledError) as exc:
            outcome = "released"
            await self._last_words(hold, delivery, exc)
            await _release(lease, 0)
            raise
        except Exception as exc:  # the top of a delivery: log, count, give it back
            outcome = "released"
            unexpected = None if isinstance(exc, LoramillError) else exc
            logger.warning("the message is given back: %s", exc, extra=fields, exc_info=unexpected)
            await self._last_words(hold, delivery, exc)
            await _release(lease, backoff_seconds(delivery.receive_count))
        finally:
            await _release(lease, 0)  # for whatever cut the above short
            self._metrics.messages.labels(outcome).inc()
        if outcome == "committed":
            self._metrics.job_seconds.observe(time.monotonic() - started)

    def _open(self, delivery: Delivery, max_bytes: int = MAX_BODY_BYTES) -> "Opened":
        """What a message holds. Raises JobError."""
        pointer = wire.find_pointer(delivery)
        if pointer is not None:
            return pointer
        inner = wire.unwrap(delivery, self._no_inputs)
        if len(inner) != 1:
            return inner
        return wire.decode(
            inner[0],
            output_prefixes=self._limits.output_prefixes,
            input_prefixes=self._limits.input_prefixes,
            max_rows=self._limits.max_rows_per_job,
            now=self._clock(),
            base_models=self._limits.base_models,
            max_bytes=max_bytes,
            keeps_raw=self._rows.keeps_raw,
        )

    @property
    def _no_inputs(self) -> tuple[str, ...]:
        """Events about what lies here are about our own results."""
        return (*self._limits.output_prefixes, self._limits.dead_letter_prefix or "")

    async def _see_through(self, hold: Hold, delivery: Delivery, opened: "Opened") -> str:
        """Do everything but the ack; returns how the message ended, for the metric."""
        try:
            if isinstance(opened, Pointer):
                opened = self._open(await self._fetched(hold, delivery, opened), _MAX_POINTED_BYTES)
            if isinstance(opened, Job):
                hold.take(opened)
                return await self._run(hold, opened, delivery)
            assert not isinstance(opened, Pointer)  # what a pointer stood for has no attribute that says so
            await self._splitter.forward(opened)
        except JobError as error:
            return await self._reject(hold, delivery, error)
        return "split" if opened else "ignored"

    async def _fetched(self, hold: Hold, delivery: Delivery, pointer: Pointer) -> Delivery:
        """The message whose body lies in S3. Raises InvalidMessage when it is gone, and ForbiddenInput."""
        check_input(pointer.uri, self._limits.input_prefixes)
        try:
            body, stored = await self._store.get(pointer.uri, max_bytes=_MAX_POINTED_BYTES)
            self._rows.grow(hold, stored.size)
            return wire.with_body(delivery, body.decode())
        except (ObjectNotFound, ObjectTooLarge, UnicodeDecodeError) as exc:
            raise InvalidMessage(f"the message's body cannot be read: {exc}") from exc

    async def _run(self, hold: Hold, job: Job, delivery: Delivery) -> str:
        """A job, or a part of one, that is not committed yet is brought there."""
        if job.source is not None and job.part is None:
            try:
                job = await self._splitter.locate(job)
            except InvalidInput:
                # A job that is done may have lost its input since.
                if await self._committer.is_done(job):
                    return "duplicate"
                raise
            hold.take(job)  # with the digest that its manifest has, should there be no more than last words
        if await self._committer.is_committed(job):
            return "duplicate"
        if job.source is not None and job.part is None:
            parts = await self._splitter.split(job)
            if len(parts) > 1:
                await self._splitter.send(parts, delivery)
                return "split"
            (job,) = parts
        hold.take(job)
        return await self._commit(hold, job)

    async def _commit(self, hold: Hold, job: Job) -> str:
        started_at = self._clock()
        part, is_new = await self._committer.part(job), False
        if part is None:
            part, is_new = await self._results(hold, job)
        parts = [part] if job.place[1] == 1 else await self._committer.finished(job)
        if parts is None:
            return "committed" if is_new else "duplicate"
        manifest = await self._committer.commit(job, parts, started_at)
        if manifest is None:
            return "duplicate"
        logger.info(
            "job committed",
            extra={
                "job_id": job.id,
                "rows": manifest.request_counts.total,
                "parts": len(parts),
                "status": manifest.status.value,
            },
        )
        return "committed"

    async def _results(self, hold: Hold, job: Job) -> tuple[CommittedPart, bool]:
        """Run the rows and commit their results; rows that are not started when the job is cancelled fail.

        False if somebody else committed them first.
        """
        hold.cancelled = await self._committer.is_cancelled(job)
        looking = asyncio.create_task(self._look_for_cancel(hold, job), name=f"cancel-{job.id}")
        try:
            with Spool(job, base_model=self._committer.base_model, folder=self._spool_folder) as spool:
                async with aclosing(rows_of(job, self._store)) as rows:
                    await self._rows.run(hold, rows, spool.encode, spool.add)
                part, is_new = await self._committer.commit_part(job, spool)
        finally:
            looking.cancel()
        if is_new:
            self._count_rows(part.tally)
        return part, is_new

    async def _look_for_cancel(self, hold: Hold, job: Job) -> None:
        while not hold.cancelled:
            await self._sleep(_CANCEL_SECONDS)
            try:
                hold.cancelled = await self._committer.is_cancelled(job)
            except LoramillError as exc:
                logger.info("it is not known whether a job was cancelled: %s", exc)

    async def _reject(self, hold: Hold, delivery: Delivery, error: JobError) -> str:
        """Leave word of a job that can never succeed: a `failed` manifest, else a dead letter."""
        failure = failure_of(error)
        logger.warning(
            "the job is refused: %s", error, extra={"message_id": delivery.message_id, "code": failure.code}
        )
        # A reused id has the other job's manifest, which must stay.
        if not isinstance(error, JobIdReused) and await self._fail_job(hold.job, delivery, failure):
            return "failed"
        if self._limits.dead_letter_prefix is None:
            raise error
        await self._committer.write_dead_letter(self._limits.dead_letter_prefix, delivery, failure)
        return "dead_letter"

    async def _fail_job(self, job: Job | None, delivery: Delivery, failure: Failure) -> bool:
        """Write a `failed` manifest if it is known where; False if it is not, or if another is there."""
        if job is not None:
            return await self._committer.fail(job.id, job.output, failure, job.created_at, job)
        job_id, output = wire.salvage(delivery, self._limits.output_prefixes)
        if output is None:
            return False
        created_at = delivery.sent_at or self._clock()
        return await self._committer.fail(job_id, output, failure, created_at, None)

    async def _last_words(self, hold: Hold, delivery: Delivery, cause: BaseException) -> None:
        """Before the queue moves the message away, say in a manifest that nobody will try again."""
        last = self._limits.max_receive_count
        if last is None or delivery.receive_count < last or hold.job is None:
            return
        why = "the worker was stopped" if isinstance(cause, asyncio.CancelledError) else str(cause)
        failure = Failure("gave_up", f"The last of {last} attempts failed: {why}", retryable=True)
        try:
            await self._fail_job(hold.job, delivery, failure)
        except LoramillError as exc:
            logger.warning("no failed manifest could be written: %s", exc)

    def _count_rows(self, tally: Tally) -> None:
        self._metrics.rows.labels("completed").inc(tally.completed)
        for code, count in tally.errors.items():
            self._metrics.rows.labels(code).inc(count)


def backoff_seconds(receive_count: int) -> int:
    """How long a message stays hidden after its `receive_count`-th attempt met trouble."""
    base = min(_MAX_BACKOFF_SECONDS, 5 * 2 ** min(receive_count, 16))
    return int(base * random.uniform(0.75, 1.0))  # noqa: S311 (jitter)


async def _raising(error: Exception) -> str:
    raise error


async def _unless_lost(lease: Lease, work: Coroutine[Any, Any, str]) -> str:
    """The result of `work`; it is dropped, its rows with it, as soon as the lease is lost."""
    working = asyncio.create_task(work, name=f"job-{lease.delivery.message_id}")
    losing = asyncio.create_task(lease.wait_lost(), name=f"lease-{lease.delivery.message_id}")
    try:
        await asyncio.wait({working, losing}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise LeaseLost(f"message {lease.delivery.message_id}")
        return working.result()
    finally:
        for task in (working, losing):
            task.cancel()
        await asyncio.gather(working, losing, return_exceptions=True)


async def _release(lease: Lease, delay_seconds: int) -> None:
    """Give the message back, unless the lease has ended."""
    if lease.state is not LeaseState.OPEN:
        return
    try:
        await lease.release(delay_seconds)
    except LeaseLost:
        logger.info("the lease was lost before it could be given back")
    except QueueRefused as exc:
        logger.warning("the message could not be given back: %s", exc)
