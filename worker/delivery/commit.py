"""The commit protocol: results, then the manifest, each by a conditional PUT.

Whoever dies between two steps leaves a state from which the next attempt goes on: results without a
manifest are summed up, not computed again, and what is committed counts, whoever committed it. A job of
several parts has a tally beside each part's results; whoever finds all of them writes the manifest.
"""

import asyncio
import importlib.metadata
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing

import msgspec

from worker import wire
from worker.delivery.spool import Spool
from worker.errors import InvalidInput, JobIdReused, ObjectExists, ObjectNotFound
from worker.jobs import Delivery, Failure, Job, Output
from worker.settings import Settings
from worker.transport.store import Store, StoredObject
from worker.wire.manifest import CommittedPart, Manifest, OutputFile, failed, summarize
from worker.wire.output import LineReader
from worker.wire.results import Tally, total
from worker.wire.split import InputFile, Slice, Split

_DIGEST = "job-digest"
_JSON = "application/json"
_AT_ONCE = 16


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says about who made it."""

    worker: str
    base_model: str
    software_version: str


def provenance(settings: Settings) -> Provenance:
    """What this process says of itself in manifests."""
    return Provenance(
        worker=f"{socket.gethostname()}-{os.getpid()}",
        base_model=str(settings.model),
        software_version=f"loramill {importlib.metadata.version('loramill')}",
    )


class Committer:
    """Reads and writes the objects that say what became of a job. Raises what `store` raises."""

    def __init__(
        self, store: Store, provenance: Provenance, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._provenance = provenance
        self._clock = clock

    @property
    def base_model(self) -> str:
        return self._provenance.base_model

    async def is_committed(self, job: Job) -> bool:
        """Whether this very job has its final manifest. Raises JobIdReused if another job has it."""
        manifest = await self._manifest(job.output, job.id)
        if manifest is None or not _is_final(manifest):
            return False
        if manifest.digest != job.digest:
            raise _reused(job)
        return True

    async def is_done(self, job: Job) -> bool:
        """Whether this job has results, of whatever version of its input that was."""
        manifest = await self._manifest(job.output, job.id)
        if manifest is None or manifest.error is not None or manifest.input is None:
            return False
        return manifest.digest == wire.located(job, manifest.input.etag).digest

    async def version(self, job: Job) -> str | None:
        """The ETag of the input by which an earlier attempt at this job split it; None if none did."""
        split = await self._split(job)
        if split is not None and split.digest == wire.located(job, split.input.etag).digest:
            return split.input.etag
        return None

    async def is_cancelled(self, job: Job) -> bool:
        """Whether its sender has taken the job back; see `follow.cancel`."""
        return await self._store.head(wire.cancel_uri(job.output, job.id)) is not None

    async def split(self, job: Job) -> Split | None:
        """How an earlier attempt split this very job. Raises JobIdReused as above."""
        split = await self._split(job)
        if split is not None and split.digest != job.digest:
            raise _reused(job)
        return split

    async def commit_split(self, job: Job, slices: Sequence[Slice]) -> Split:
        """Say how a job is split, unless somebody said it before; returns what holds."""
        assert job.source is not None
        split = Split(
            job_id=job.id,
            digest=job.digest,
            input=InputFile(job.source.uri, job.source.etag or ""),
            rows=sum(one.rows for one in slices),
            parts=tuple(slices),
            created_at=self._clock(),
        )
        try:
            await self._store.put_if_absent(
                wire.parts_uri(job.output, job.id), wire.encode_split(split), _JSON
            )
        except ObjectExists:
            return await self.split(job) or split
        return split

    async def part(self, job: Job) -> CommittedPart | None:
        """What an earlier attempt committed of this part. Raises JobIdReused as above."""
        if job.place[1] > 1:
            tallied = await self._tallied(wire.tally_uri(job))
            if tallied is not None:
                if tallied.digest != job.digest:
                    raise _reused(job)
                return tallied
        stored = await self._store.head(wire.result_uri(job))
        if stored is None:
            return None
        if stored.metadata.get(_DIGEST) != job.digest:
            raise _reused(job)
        return await self._tell(job, stored, await self._recount(job, stored))

    async def commit_part(self, job: Job, spool: Spool) -> tuple[CommittedPart, bool]:
        """Store the results, and say True; where somebody stored them first, theirs count: then False."""
        try:
            stored = await spool.put_if_absent(self._store, wire.result_uri(job), {_DIGEST: job.digest})
        except ObjectExists:
            part = await self.part(job)
            if part is None:
                raise
            return part, False
        return await self._tell(job, stored, spool.tally), True

    async def numbers_done(self, job: Job) -> dict[int, str]:
        """The parts of a job that are committed, and where their tallies are."""
        uris = dict[int, str]()
        async for stored in self._store.list(wire.tallies_uri(job.output, job.id)):
            match wire.part_number(stored.uri, job.output, job.id):
                case (number, count) if count == job.place[1]:
                    uris[number] = stored.uri
        return uris

    async def finished(self, job: Job) -> list[CommittedPart] | None:
        """All parts of a job in their order, once all are committed."""
        _, count = job.place
        uris = await self.numbers_done(job)
        if len(uris) < count:
            return None
        gate = asyncio.Semaphore(_AT_ONCE)

        async def read(uri: str) -> CommittedPart | None:
            async with gate:
                return await self._tallied(uri)

        found = await asyncio.gather(*(read(uris[number]) for number in range(count)))
        parts = [part for part in found if part is not None and part.digest == job.digest]
        return parts if len(parts) == count else None

    async def commit(self, job: Job, parts: Sequence[CommittedPart], started_at: float) -> Manifest | None:
        """Write the manifest of a job whose parts are all committed; None if it was there already.

        Where Bedrock's own is wanted too, it goes first: it follows from the results, whoever writes it.
        Raises JobIdReused as above.
        """
        split = await self.split(job) if job.place[1] > 1 else None
        rows = sum(part.tally.rows for part in parts)
        if job.place[1] > 1 and (split is None or split.rows != rows):
            known = "nobody knows how many" if split is None else str(split.rows)
            raise InvalidInput(f"the parts of job {job.id} have {rows} rows, and the job {known}")
        if job.output.format == "bedrock":
            whole = total([part.tally for part in parts])
            await self._store.put(wire.summary_uri(job), wire.encode_summary(whole), _JSON)
        manifest = summarize(
            job,
            [(part.output, part.tally) for part in parts],
            started_at=started_at if split is None else split.created_at,
            finished_at=self._clock(),
            input_file=None if job.source is None else InputFile(job.source.uri, job.source.etag or ""),
            **msgspec.structs.asdict(self._provenance),
        )
        if await self._commit_manifest(job.output, manifest):
            return manifest
        await self.is_committed(job)  # for its exception: whose is the manifest that is there?
        return None

    async def fail(
        self, job_id: str, output: Output, failure: Failure, created_at: float, job: Job | None
    ) -> bool:
        """Write a `failed` manifest; False when the job has a manifest that says something else.

        A failure that is `retryable` is not final: a later attempt may replace it.
        """
        manifest = failed(
            job_id,
            failure,
            created_at=created_at,
            finished_at=self._clock(),
            job=job,
            **msgspec.structs.asdict(self._provenance),
        )
        if await self._commit_manifest(output, manifest):
            return True
        present = await self._manifest(output, job_id)
        # The very same refusal: committed by an attempt that died before its ack.
        return present is not None and present.error == failure

    async def write_dead_letter(self, prefix: str, delivery: Delivery, failure: Failure) -> None:
        """Keep a message that nothing could be made of. A second attempt writes it again."""
        letter = wire.encode_dead_letter(delivery, failure, now=self._clock())
        await self._store.put(wire.dead_letter_uri(prefix, delivery.message_id), letter, _JSON)

    async def _split(self, job: Job) -> Split | None:
        try:
            body, _ = await self._store.get(wire.parts_uri(job.output, job.id))
        except ObjectNotFound:
            return None
        return wire.decode_split(body)

    async def _tell(self, job: Job, stored: StoredObject, tally: Tally) -> CommittedPart:
        """A part that is committed; of several the tally is kept, so that nobody reads the results for it."""
        output = OutputFile(stored.uri, stored.etag, tally.sha256, tally.rows)
        part = CommittedPart(digest=job.digest, output=output, tally=tally)
        if job.place[1] > 1:
            await self._store.put(wire.tally_uri(job), wire.encode_part_tally(part), _JSON)
        return part

    async def _tallied(self, uri: str) -> CommittedPart | None:
        try:
            body, _ = await self._store.get(uri)
        except ObjectNotFound:
            return None
        return wire.decode_part_tally(body)

    async def _recount(self, job: Job, stored: StoredObject) -> Tally:
        reader = LineReader(job.output.format)
        async with aclosing(self._store.stream(stored)) as chunks:
            async for chunk in chunks:
                reader.feed(chunk)
        return reader.finish()

    async def _manifest(self, output: Output, job_id: str) -> Manifest | None:
        try:
            body, _ = await self._store.get(wire.manifest_uri(output, job_id))
        except ObjectNotFound:
            return None
        return wire.decode_manifest(body)

    async def _commit_manifest(self, output: Output, manifest: Manifest) -> bool:
        """False when there is a manifest that this one may not replace."""
        uri, body = wire.manifest_uri(output, manifest.job_id), wire.encode_manifest(manifest)
        try:
            await self._store.put_if_absent(uri, body, _JSON)
        except ObjectExists:
            present = await self._manifest(output, manifest.job_id)
            # What is not final replaces nothing: a late "gave up" must not cover a success.
            if not _is_final(manifest) or (present is not None and _is_final(present)):
                return False
            await self._store.put(uri, body, _JSON)
        return True


def _is_final(manifest: Manifest) -> bool:
    return manifest.error is None or not manifest.error.retryable


def _reused(job: Job) -> JobIdReused:
    what = "other content" if job.source is None else "other content, or another version of its input"
    return JobIdReused(f"id {job.id!r} was used before, for a job with {what}, which is committed")
