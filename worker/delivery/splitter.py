"""A job by reference -> the messages of its parts."""

import logging
from collections.abc import Sequence

from worker import wire
from worker.delivery.commit import Committer
from worker.delivery.cutting import cut
from worker.delivery.inputs import find
from worker.jobs import Delivery, Job
from worker.transport.queue import MAX_BATCH, Outgoing, Queue
from worker.transport.store import Store

logger = logging.getLogger(__name__)


class Splitter:
    """Counts the rows of large inputs, and puts their parts on the queue.

    Raises what `store` and `queue` raise.
    """

    def __init__(self, store: Store, committer: Committer, queue: Queue, *, rows_per_part: int) -> None:
        self._store = store
        self._committer = committer
        self._queue = queue
        self._rows_per_part = rows_per_part

    async def locate(self, job: Job) -> Job:
        """The same job, about the version of its input that is there. Raises InvalidInput when none is."""
        assert job.source is not None
        etag = (await find(self._store, job.source)).etag
        earlier = await self._committer.version(job)
        if earlier not in {None, etag} and not await self._committer.is_done(job):
            etag = str(earlier)  # its parts will find that this version is gone, and fail the job by that
        return wire.located(job, etag)

    async def split(self, job: Job) -> list[Job]:
        """The parts of a job: itself, if it needs no more than one. Raises InvalidInput, and JobIdReused.

        What an earlier attempt said of its parts holds, whatever the settings are now.
        """
        assert job.source is not None
        split = await self._committer.split(job)
        if split is None:
            stored = await find(self._store, job.source)
            slices = await cut(self._store, stored, job.source, rows_per_part=self._rows_per_part)
            split = await self._committer.commit_split(job, slices)
        return [wire.part_of(job, split, number) for number in range(len(split.parts))]

    async def send(self, parts: Sequence[Job], delivery: Delivery) -> int:
        """Put on the queue what is not committed of these parts; returns how many that were.

        They go under the group of their job's message. Where it had none, on a queue that may have some, the
        job is a group of its own: so that a fair queue lets the messages of others pass many parts.
        """
        done = await self._committer.numbers_done(parts[0])
        override = parts[0].given.override
        attributes = {} if override is None else {"adapter": override}
        group = delivery.group_id or parts[0].id
        left = [part for part in parts if part.place[0] not in done]
        for start in range(0, len(left), MAX_BATCH):  # not all at once: each may be as large as the job's
            await self._queue.send_all(
                [
                    Outgoing(wire.encode_part(part), attributes, group)
                    for part in left[start : start + MAX_BATCH]
                ]
            )
        logger.info("job split", extra={"job_id": parts[0].id, "parts": len(parts), "sent": len(left)})
        return len(left)

    async def forward(self, deliveries: Sequence[Delivery]) -> None:
        """Put several jobs that came in one message on the queue, each by itself."""
        await self._queue.send_all(
            [Outgoing(one.body, dict(one.attributes), one.group_id) for one in deliveries]
        )
