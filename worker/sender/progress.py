"""How far a job is: its parts, its rows, how fast, and how long it may take."""

import asyncio
import enum
import time
from collections.abc import Callable

import msgspec

from worker import wire
from worker.errors import ObjectNotFound
from worker.jobs import Failure, Output
from worker.sender.follow import find_manifest
from worker.transport.store import Store
from worker.wire.results import Tally, total

_AT_ONCE = 16


class State(enum.StrEnum):
    UNSEEN = "unseen"
    """Nothing of it is in the store: it waits, is at work in one part, or was never sent."""
    RUNNING = "running"
    """It was split, and parts are left."""
    ENDED = "ended"


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job. Times are seconds."""

    job_id: str
    state: State
    status: str | None = None
    """That of its manifest; None while there is none."""
    error: Failure | None = None
    """Why the job as a whole failed. While that is retryable, it may succeed yet."""
    cancelled: bool = False
    """Its sender took it back: rows that were not started are not started any more."""
    parts: int | None = None
    parts_done: int = 0
    rows: int | None = None
    rows_done: int = 0
    rows_failed: int = 0
    seconds: float | None = None
    """Since its first rows were begun; of a job that has ended, for how long it ran."""
    rows_per_second: float | None = None
    seconds_left: float | None = None
    """At that rate."""


class Observer:
    """Looks at one job, again and again; what is committed is read once."""

    def __init__(
        self, store: Store, output: Output, job_id: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._output = output
        self._job_id = job_id
        self._clock = clock
        self._split: wire.Split | None = None
        self._tallies: dict[str, Tally] = {}

    async def look(self) -> Progress:
        """How far the job is now. Raises what the store raises, and LoramillError for damaged objects."""
        manifest = await find_manifest(self._store, self._output, self._job_id)
        if manifest is not None and (manifest.error is None or not manifest.error.retryable):
            return _ended(manifest)
        cancel = wire.cancel_uri(self._output, self._job_id)
        known = Progress(
            job_id=self._job_id,
            state=State.UNSEEN,
            status=None if manifest is None else manifest.status.value,
            error=None if manifest is None else manifest.error,
            cancelled=await self._store.head(cancel) is not None,
        )
        if self._split is None:
            self._split = await self._find_split()
        if self._split is None:
            return known
        return self._running(known, self._split, await self._done(self._split))

    def _running(self, known: Progress, split: wire.Split, done: Tally) -> Progress:
        seconds = max(0.0, self._clock() - split.created_at)
        rate = done.rows / seconds if done.rows and seconds else None
        return msgspec.structs.replace(
            known,
            state=State.RUNNING,
            parts=len(split.parts),
            parts_done=len(self._tallies),
            rows=split.rows,
            rows_done=done.rows,
            rows_failed=done.failed,
            seconds=seconds,
            rows_per_second=rate,
            seconds_left=None if rate is None else (split.rows - done.rows) / rate,
        )

    async def _find_split(self) -> wire.Split | None:
        try:
            body, _ = await self._store.get(wire.parts_uri(self._output, self._job_id))
        except ObjectNotFound:
            return None
        return wire.decode_split(body)

    async def _done(self, split: wire.Split) -> Tally:
        """What the parts that are committed add up to."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def read(uri: str) -> None:
            async with gate:
                body, _ = await self._store.get(uri)
            self._tallies[uri] = wire.decode_part_tally(body).tally

        new = [
            stored.uri
            async for stored in self._store.list(wire.tallies_uri(self._output, self._job_id))
            if stored.uri not in self._tallies and self._is_of(stored.uri, split)
        ]
        await asyncio.gather(*(read(uri) for uri in new))
        return total(list(self._tallies.values()))

    def _is_of(self, uri: str, split: wire.Split) -> bool:
        found = wire.part_number(uri, self._output, self._job_id)
        return found is not None and found[1] == len(split.parts)


def _ended(manifest: wire.Manifest) -> Progress:
    counts, parts = manifest.request_counts, len(manifest.outputs)
    seconds = None if manifest.started_at is None else manifest.finished_at - manifest.started_at
    return Progress(
        job_id=manifest.job_id,
        state=State.ENDED,
        status=manifest.status.value,
        error=manifest.error,
        parts=parts,
        parts_done=parts,
        rows=counts.total,
        rows_done=counts.completed + counts.failed,
        rows_failed=counts.failed,
        seconds=seconds,
        rows_per_second=counts.total / seconds if seconds else None,
        seconds_left=0.0,
    )
