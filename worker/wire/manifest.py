"""`manifest.json`: the commit of a job, and the first thing that anybody reads about it."""

import enum
import hashlib
from collections.abc import Sequence

import msgspec

from worker.errors import LoramillError
from worker.jobs import Failure, Job
from worker.wire.results import Tally, Usage, total
from worker.wire.split import InputFile


class Status(enum.StrEnum):
    COMPLETED = "completed"
    COMPLETED_WITH_ERRORS = "completed_with_errors"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class RequestCounts(msgspec.Struct, frozen=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class OutputFile(msgspec.Struct, frozen=True):
    """One committed result file. `sha256` in hex; `etag` as S3 gave it."""

    uri: str
    etag: str
    sha256: str
    rows: int


class CommittedPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a job whose results are committed; as JSON, what lies beside them."""

    digest: str
    """`Job.digest`."""
    output: OutputFile
    tally: Tally


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a job. Times are seconds since the epoch. Make one by `summarize` or `failed`."""

    job_id: str
    status: Status
    request_counts: RequestCounts = RequestCounts()
    error_counts: dict[str, int] = {}
    """Failed rows by error code."""
    usage: Usage = Usage()
    input: InputFile | None = None
    """None when the rows were in the message."""
    outputs: tuple[OutputFile, ...] = ()
    adapters: dict[str, str] = {}
    """The version that served, by name; several, when it changed between rows, are joined by commas."""
    base_model: str | None = None
    digest: str | None = None
    """`Job.digest`; None when the message could not be decoded."""
    parameters_digest: str | None = None
    worker: str
    created_at: float
    started_at: float | None = None
    finished_at: float
    software_version: str
    metadata: dict[str, str] = {}
    error: Failure | None = None
    """Why the job as a whole failed."""


def status_of(tally: Tally, error: Failure | None = None) -> Status:
    """The status that follows from a job's rows.

    | error of the job | cancelled rows | expired rows | other failed rows | status                |
    |------------------|----------------|--------------|-------------------|-----------------------|
    | yes              | any            | any          | any               | failed                |
    | no               | some           | any          | any               | cancelled             |
    | no               | none           | some         | any               | expired               |
    | no               | none           | none         | some              | completed_with_errors |
    | no               | none           | none         | none              | completed             |
    """
    if error is not None:
        return Status.FAILED
    if tally.errors.get("cancelled"):
        return Status.CANCELLED
    if tally.errors.get("expired"):
        return Status.EXPIRED
    return Status.COMPLETED_WITH_ERRORS if tally.failed else Status.COMPLETED


def summarize(
    job: Job,
    parts: Sequence[tuple[OutputFile, Tally]],
    *,
    base_model: str,
    worker: str,
    started_at: float | None,
    finished_at: float,
    software_version: str,
    input_file: InputFile | None = None,
) -> Manifest:
    """The manifest of a job whose parts are all committed."""
    whole = total([tally for _, tally in parts])
    return Manifest(
        job_id=job.id,
        status=status_of(whole),
        request_counts=RequestCounts(whole.rows, whole.completed, whole.failed),
        error_counts=whole.errors,
        usage=whole.usage,
        input=input_file,
        outputs=tuple(output for output, _ in parts),
        adapters={name: ",".join(versions) for name, versions in whole.adapters.items()},
        base_model=base_model,
        digest=job.digest,
        parameters_digest=parameters_digest(job),
        worker=worker,
        created_at=job.created_at,
        started_at=started_at,
        finished_at=finished_at,
        software_version=software_version,
        metadata=job.metadata,
    )


def failed(
    job_id: str,
    error: Failure,
    *,
    worker: str,
    created_at: float,
    finished_at: float,
    software_version: str,
    base_model: str | None = None,
    job: Job | None = None,
) -> Manifest:
    """The manifest of a job that produced nothing, with `job` where its message could be decoded."""
    rows = 0 if job is None else job.num_rows
    return Manifest(
        job_id=job_id,
        status=Status.FAILED,
        request_counts=RequestCounts(rows, 0, rows),
        base_model=base_model,
        digest=None if job is None else job.digest,
        parameters_digest=None if job is None else parameters_digest(job),
        worker=worker,
        created_at=created_at,
        finished_at=finished_at,
        software_version=software_version,
        metadata={} if job is None else job.metadata,
        error=error,
    )


def parameters_digest(job: Job) -> str:
    """sha256, in hex, of the parameters that each row was to be run with, defaults included.

    Of rows in a source, whose own parameters nobody keeps, those that the job says.
    """
    own = [(row.params, row.fills) for row in job.rows]
    return hashlib.sha256(msgspec.json.encode(job.given.parameters if job.source else own)).hexdigest()


def encode_part_tally(part: CommittedPart) -> bytes:
    """As JSON."""
    return msgspec.json.encode(part) + b"\n"


def decode_part_tally(data: bytes) -> CommittedPart:
    """Read it back; fields of later versions are passed over. Raises LoramillError when it is none."""
    try:
        return msgspec.json.decode(data, type=CommittedPart)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LoramillError(f"not the tally of a part: {error}") from error


def encode_manifest(manifest: Manifest) -> bytes:
    """Indented, since people read it."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest; fields of later versions are passed over. Raises LoramillError when it is none."""
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LoramillError(f"not a manifest: {error}") from error
