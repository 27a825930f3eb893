"""The commit protocol: results, then the manifest, each by a conditional PUT.

Whoever dies between two steps leaves a state from which the next attempt goes on: results without a
manifest are summed up, not computed again, and what is committed counts, whoever committed it.
"""

import time
from collections.abc import Callable

import msgspec

from worker import wire
from worker.errors import JobIdReused, ObjectExists, ObjectNotFound
from worker.jobs import Delivery, Failure, Job, Output
from worker.transport.store import Store, StoredObject
from worker.wire.manifest import Manifest, OutputFile, failed, summarize
from worker.wire.results import Tally

_DIGEST = "job-digest"
_JSONL, _JSON = "application/jsonl", "application/json"

Part = tuple[OutputFile, Tally]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says about who made it."""

    worker: str
    base_model: str
    software_version: str


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
        if manifest is not None and manifest.digest != job.digest:
            raise _reused(job)
        return manifest is not None and _is_final(manifest)

    async def is_cancelled(self, job: Job) -> bool:
        """Whether its sender has taken the job back; see `follow.cancel`."""
        return await self._store.head(wire.cancel_uri(job.output, job.id)) is not None

    async def part(self, job: Job) -> Part | None:
        """The results that an earlier attempt at this job committed. Raises JobIdReused as above."""
        try:
            body, stored = await self._store.get(wire.result_uri(job))
        except ObjectNotFound:
            return None
        if stored.metadata.get(_DIGEST) != job.digest:
            raise _reused(job)
        return _part(job, body, stored)

    async def commit_part(self, job: Job, body: bytes) -> Part:
        """Store the results; where somebody stored them first, theirs count and are returned."""
        try:
            stored = await self._store.put_if_absent(
                wire.result_uri(job), body, _JSONL, metadata={_DIGEST: job.digest}
            )
        except ObjectExists:
            part = await self.part(job)
            if part is None:
                raise
            return part
        return _part(job, body, stored)

    async def commit(self, job: Job, part: Part, started_at: float) -> Manifest | None:
        """Write the manifest of a job whose results are committed; None if it was there already.

        Where Bedrock's own is wanted too, it goes first: it follows from the results, whoever writes it.
        Raises JobIdReused as above.
        """
        if job.output.format == "bedrock":
            await self._store.put(wire.summary_uri(job), wire.encode_summary(part[1]), _JSON)
        manifest = summarize(
            job,
            [part],
            started_at=started_at,
            finished_at=self._clock(),
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


def _part(job: Job, body: bytes, stored: StoredObject) -> Part:
    counted = wire.tally(body, job.output.format)
    return OutputFile(stored.uri, stored.etag, counted.sha256, counted.rows), counted


def _reused(job: Job) -> JobIdReused:
    return JobIdReused(f"id {job.id!r} was used before, for a job with other content, which is committed")
