"""The queue's side of a worker: its messages, their leases, and who sees them through."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.delivery.commit import Committer, provenance
from worker.delivery.intake import POLL_SECONDS, Intake
from worker.delivery.row_runner import RowRunner
from worker.delivery.runner import JobLimits, Runner
from worker.delivery.splitter import Splitter
from worker.metrics import Metrics
from worker.settings import Settings
from worker.transport.clients import Clients
from worker.transport.lease import LeaseKeeper
from worker.transport.queue import QueueInfo, SqsQueue
from worker.transport.store import S3Store

logger = logging.getLogger(__name__)


class QueueSide:
    """A queue that is there, and the leases of what comes from it."""

    def __init__(self, settings: Settings, queue: SqsQueue, info: QueueInfo, keeper: LeaseKeeper) -> None:
        self._settings = settings
        self._queue = queue
        self._info = info
        self.keeper = keeper

    def intake(self, rows: RowRunner, objects: S3Store, metrics: Metrics) -> Intake:
        """Who takes messages, once `rows` can be run."""
        settings = self._settings
        return Intake(
            self._queue,
            self.keeper,
            _runner(settings, self._info, rows, objects, self._queue, metrics=metrics),
            metrics,
            room=lambda: rows.room,
            mean_rows=lambda: rows.mean_rows,
            max_messages=settings.in_flight_rows,
            poll_seconds=max(1.0, min(POLL_SECONDS, settings.exit_when_idle_seconds or POLL_SECONDS)),
        )


@asynccontextmanager
async def open_queue_side(settings: Settings, clients: Clients) -> AsyncIterator[QueueSide | None]:
    """The queue's side, to the end of the block; None if there is no queue. Raises LoramillError."""
    if settings.queue_url is None:
        logger.info("there is no queue_url: calls over HTTP are all that is answered")
        yield None
        return
    queue = SqsQueue(clients, settings.queue_url, visibility_seconds=settings.visibility_timeout_seconds)
    info = await queue.describe()
    _warn_about(info, settings)
    async with LeaseKeeper(queue, settings.visibility_timeout_seconds) as keeper:
        yield QueueSide(settings, queue, info, keeper)


def _runner(
    settings: Settings,
    info: QueueInfo,
    rows: RowRunner,
    objects: S3Store,
    queue: SqsQueue,
    *,
    metrics: Metrics,
) -> Runner:
    committer = Committer(objects, provenance(settings))
    splitter = Splitter(objects, committer, queue, rows_per_part=settings.rows_per_part)
    return Runner(_limits(settings, info), rows, committer, splitter, metrics, store=objects)


def _limits(settings: Settings, info: QueueInfo) -> JobLimits:
    return JobLimits(
        output_prefixes=settings.output_prefixes,
        max_rows_per_job=settings.max_rows_per_job,
        dead_letter_prefix=settings.dead_letter_prefix if settings.dead_letter == "store" else None,
        max_receive_count=info.max_receive_count,
        # `enqueue` puts files where their results go.
        base_models=settings.model_names,
        input_prefixes=settings.input_prefixes and settings.input_prefixes + settings.output_prefixes,
    )


def _warn_about(info: QueueInfo, settings: Settings) -> None:
    """Say at the start what about the queue will hurt later."""
    if info.max_receive_count is None:
        logger.warning("the queue has no redrive policy: a message that always fails comes back for ever")
    elif settings.dead_letter == "store" and settings.dead_letter_prefix is None:
        logger.warning("dead_letter is store, and there is no place to store: set dead_letter_uri")
