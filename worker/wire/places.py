"""Where a job's results lie: the check of `output`, and the keys below it."""

import re
from collections.abc import Mapping, Sequence

from worker.errors import ForbiddenOutput, InvalidMessage
from worker.jobs import Job, Output
from worker.wire.checks import show, unknown

FORMATS = ("native", "openai", "bedrock")
# An S3 key has 1024 bytes, of which the job id takes up to 128 and the file's name about 40.
MAX_PREFIX_BYTES = 850
_NUMBERED = re.compile(r"(\d{5})-of-(\d{5})\.json")


def read_output(value: object, output_prefixes: Sequence[str]) -> Output:
    """The `output` of a message; when absent, the worker's only output prefix.

    Raises InvalidMessage when it is not an output, ForbiddenOutput when it lies outside `output_prefixes`.
    """
    if value is None:
        return _only(output_prefixes)
    if not isinstance(value, Mapping):
        raise InvalidMessage(f"output is {show(value)}; it must be an object with a uri")
    stranger = unknown(value, ("uri", "format"))
    if stranger is not None:
        raise InvalidMessage(f"output: {stranger}")
    return Output(uri=_allowed(_read_uri(value.get("uri")), output_prefixes), format=_format(value))


def job_prefix(output: Output, job_id: str) -> str:
    """The prefix that holds everything of one job."""
    return f"{as_folder(output.uri)}{job_id}/"


def as_folder(prefix: str) -> str:
    """The prefix with a slash at its end; "" is a bucket's root."""
    return prefix if not prefix or prefix.endswith("/") else f"{prefix}/"


def result_uri(job: Job) -> str:
    """Where the results go of the part that `job` is about."""
    suffix = ".out" if job.output.format == "bedrock" else ""
    return f"{job_prefix(job.output, job.id)}results-{_numbered(*job.place)}.jsonl{suffix}"


def input_uri(output: Output, job_id: str, *, packed: bool) -> str:
    """Where the rows go of a job whose sender has them in a file of his own."""
    return f"{job_prefix(output, job_id)}input.jsonl{'.gz' if packed else ''}"


def parts_uri(output: Output, job_id: str) -> str:
    """Where it stands how a large job was split."""
    return job_prefix(output, job_id) + "parts.json"


def tally_uri(job: Job) -> str:
    """Where the tally goes of the part that `job` is about: it says that the part is committed."""
    return f"{tallies_uri(job.output, job.id)}{_numbered(*job.place)}.json"


def tallies_uri(output: Output, job_id: str) -> str:
    """What the tallies of all parts begin with."""
    return job_prefix(output, job_id) + "tally-"


def part_number(uri: str, output: Output, job_id: str) -> tuple[int, int] | None:
    """The number of the part, from 0, and of how many, that a tally of this job speaks of.

    None for anything else: below what tallies begin with may lie other jobs.
    """
    found = _NUMBERED.fullmatch(uri.removeprefix(tallies_uri(output, job_id)))
    return None if found is None else (int(found[1]), int(found[2]))


def manifest_uri(output: Output, job_id: str) -> str:
    """Where the manifest goes: the commit of the whole job."""
    return job_prefix(output, job_id) + "manifest.json"


def summary_uri(job: Job) -> str:
    """Where Bedrock's own manifest goes, of a job with that output format."""
    return manifest_uri(job.output, job.id) + ".out"


def cancel_uri(output: Output, job_id: str) -> str:
    """The object whose presence cancels the job."""
    return job_prefix(output, job_id) + "cancel"


def dead_letter_uri(prefix: str, message_id: str) -> str:
    """Where a message goes that no job and no output could be made of."""
    return f"{prefix}{message_id}.json"


def _numbered(part: int, parts: int) -> str:
    assert 0 <= part < parts, (part, parts)
    return f"{part:05d}-of-{parts:05d}"


def _only(output_prefixes: Sequence[str]) -> Output:
    if len(output_prefixes) == 1:
        return Output(uri=output_prefixes[0])
    raise InvalidMessage(
        f"output is absent; it is required because the worker has {len(output_prefixes)} output prefixes"
    )


def _format(value: Mapping[str, object]) -> str:
    said = value.get("format")
    if said is None:
        return FORMATS[0]
    if said not in FORMATS:
        raise InvalidMessage(f"output.format is {show(said)}; it must be native, openai or bedrock")
    return str(said)


def _read_uri(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("s3://"):
        raise InvalidMessage(f"output.uri is {show(value)}; it must be text of the form s3://bucket/prefix/")
    if not value.isprintable():
        raise InvalidMessage("output.uri holds characters that cannot be printed")
    uri = value if value.endswith("/") else value + "/"
    if len(uri.encode()) > MAX_PREFIX_BYTES:
        raise InvalidMessage(f"output.uri has {len(uri.encode())} bytes; it may have {MAX_PREFIX_BYTES}")
    return uri


def _allowed(uri: str, output_prefixes: Sequence[str]) -> str:
    segments = uri.removeprefix("s3://").removesuffix("/").split("/")
    if not {"", ".", ".."}.isdisjoint(segments):
        raise ForbiddenOutput(f"output.uri is {show(uri)}; none of its segments may be empty, . or ..")
    if not any(uri.startswith(prefix) for prefix in output_prefixes if prefix.endswith("/")):
        raise ForbiddenOutput(f"output.uri is {show(uri)}, which is not under the worker's output prefixes")
    return uri
