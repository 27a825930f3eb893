"""One delivery from message to committed results. Every path ends its lease exactly once.

The order is the promise: results, then manifest, then ack.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from worker import wire
from worker.commit import Committer
from worker.errors import EngineFailed, JobError, JobIdReused, LeaseLost, LoramillError, QueueRefused
from worker.jobs import Delivery, Failure, Job, RowResult
from worker.metrics import Metrics
from worker.rows import Hold, RowRunner
from worker.transport.lease import Lease, LeaseState
from worker.wire.checks import failure_of
from worker.wire.manifest import Manifest

logger = logging.getLogger(__name__)

_MAX_BACKOFF_SECONDS = 900
_CANCEL_SECONDS = 10.0
"""Between two looks whether a job was cancelled, while its rows are at work."""


class JobLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What jobs may ask for, and what happens to those that ask for more."""

    output_prefixes: tuple[str, ...]
    max_rows_per_job: int
    dead_letter_prefix: str | None
    """Where messages go that nothing can be made of; None leaves them to the queue's redrive."""
    max_receive_count: int | None
    """After this many receives the queue moves a message away; None if it never does."""


class Runner:
    """Sees deliveries through. `handle` may run for many at once, on one event loop."""

    def __init__(
        self,
        limits: JobLimits,
        rows: RowRunner,
        committer: Committer,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self._limits = limits
        self._rows = rows
        self._committer = committer
        self._metrics = metrics
        self._clock = clock

    async def handle(self, lease: Lease) -> None:
        """See one delivery through, and end its lease.

        The message is decoded, and its rows count as at work, before the first await. Raises EngineFailed
        when the process cannot go on; then, and when this is cancelled, the message is given back at once.
        """
        try:
            job = self._decode(lease.delivery)
        except JobError as error:
            await self._end(lease, self._reject(lease.delivery, error))
        else:
            with self._rows.hold(job) as hold:
                await self._end(lease, self._run(hold, lease.delivery))

    async def _end(self, lease: Lease, work: Coroutine[Any, Any, str]) -> None:
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
            await self._last_words(delivery, exc)
            await _release(lease, 0)
            raise
        except Exception as exc:  # the top of a delivery: log, count, give it back
            outcome = "released"
            unexpected = None if isinstance(exc, LoramillError) else exc
            logger.warning("the message is given back: %s", exc, extra=fields, exc_info=unexpected)
            await self._last_words(delivery, exc)
            await _release(lease, backoff_seconds(delivery.receive_count))
        finally:
            await _release(lease, 0)  # for whatever cut the above short
            self._metrics.messages.labels(outcome).inc()
        if outcome == "committed":
            self._metrics.job_seconds.observe(time.monotonic() - started)

    def _decode(self, delivery: Delivery) -> Job:
        return wire.decode(
            delivery,
            output_prefixes=self._limits.output_prefixes,
            max_rows=self._limits.max_rows_per_job,
            now=self._clock(),
            base_models=names_of(self._committer.base_model),
        )

    async def _run(self, hold: Hold, delivery: Delivery) -> str:
        """Do everything but the ack; returns how the message ended, for the metric."""
        try:
            return await self._commit(hold)
        except JobError as error:
            return await self._reject(delivery, error)

    async def _commit(self, hold: Hold) -> str:
        job = hold.job
        if await self._committer.is_committed(job):
            return "duplicate"
        started_at = self._clock()
        part = await self._committer.part(job)
        if part is None:
            results = await self._results(hold)
            body = wire.encode_rows(job, results, base_model=self._committer.base_model)
            part = await self._committer.commit_part(job, body)
        manifest = await self._committer.commit(job, part, started_at)
        if manifest is None:
            return "duplicate"
        self._count_rows(manifest)
        logger.info(
            "job committed",
            extra={"job_id": job.id, "rows": len(job.rows), "status": manifest.status.value},
        )
        return "committed"

    async def _results(self, hold: Hold) -> list[RowResult]:
        """Run the rows; those that are not started when the job is cancelled fail by that."""
        hold.cancelled = await self._committer.is_cancelled(hold.job)
        looking = asyncio.create_task(self._look_for_cancel(hold), name=f"cancel-{hold.job.id}")
        try:
            return await self._rows.run(hold)
        finally:
            looking.cancel()

    async def _look_for_cancel(self, hold: Hold) -> None:
        while not hold.cancelled:
            await self._sleep(_CANCEL_SECONDS)
            try:
                hold.cancelled = await self._committer.is_cancelled(hold.job)
            except LoramillError as exc:
                logger.info("it is not known whether a job was cancelled: %s", exc)

    async def _reject(self, delivery: Delivery, error: JobError) -> str:
        """Leave word of a job that can never succeed: a `failed` manifest, else a dead letter."""
        failure = failure_of(error)
        logger.warning(
            "the job is refused: %s", error, extra={"message_id": delivery.message_id, "code": failure.code}
        )
        # A reused id has the other job's manifest, which must stay.
        if not isinstance(error, JobIdReused) and await self._fail_job(delivery, failure, None):
            return "failed"
        if self._limits.dead_letter_prefix is None:
            raise error
        await self._committer.write_dead_letter(self._limits.dead_letter_prefix, delivery, failure)
        return "dead_letter"

    async def _fail_job(self, delivery: Delivery, failure: Failure, job: Job | None) -> bool:
        """Write a `failed` manifest if the message says where; False if it does not, or another is there."""
        job_id, output = wire.salvage(delivery, self._limits.output_prefixes)
        if output is None:
            return False
        created_at = delivery.sent_at or self._clock()
        return await self._committer.fail(job_id, output, failure, created_at, job)

    async def _last_words(self, delivery: Delivery, cause: BaseException) -> None:
        """Before the queue moves the message away, say in a manifest that nobody will try again."""
        last = self._limits.max_receive_count
        if last is None or delivery.receive_count < last:
            return
        why = "the worker was stopped" if isinstance(cause, asyncio.CancelledError) else str(cause)
        failure = Failure("gave_up", f"The last of {last} attempts failed: {why}", retryable=True)
        try:
            await self._fail_job(delivery, failure, self._decode(delivery))
        except LoramillError as exc:
            logger.warning("no failed manifest could be written: %s", exc)

    def _count_rows(self, manifest: Manifest) -> None:
        self._metrics.rows.labels("completed").inc(manifest.request_counts.completed)
        for code, count in manifest.error_counts.items():
            self._metrics.rows.labels(code).inc(count)


def backoff_seconds(receive_count: int) -> int:
    """How long a message stays hidden after its `receive_count`-th attempt met trouble."""
    base = min(_MAX_BACKOFF_SECONDS, 5 * 2 ** min(receive_count, 16))
    return int(base * random.uniform(0.75, 1.0))  # noqa: S311 (jitter)


def names_of(base_model: str) -> frozenset[str]:
    """What requests may call the base model: as the setting says it, or by the last part of that."""
    return frozenset({base_model, base_model.rstrip("/").rpartition("/")[2]})


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
