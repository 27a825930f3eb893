"""A job message: the SQS body and its attributes -> Job."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from worker.errors import InvalidMessage, JobError
from worker.jobs import Delivery, Given, Job, Output, Task
from worker.wire import rows
from worker.wire.checks import kind, parse_object, read_task, show, unknown
from worker.wire.enqueue import MAX_BODY_BYTES
from worker.wire.places import read_output
from worker.wire.rows import read_rows
from worker.wire.source import PART_FIELDS, read_part, read_source

MAX_TTL_SECONDS = 1_000_000_000
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
"""What DJL Serving names the adapter of a request by."""
ADAPTER_ATTRIBUTES = ("adapter", ADAPTER_HEADER.lower())
"""Message attributes that name the adapter of every row, in lower case; the later one wins."""

FIELDS = rows.FIELDS | {"version", "id", "input", "model", "task", "output", "ttl_seconds", "metadata"}

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LATEST = 1 << 40


def decode(
    delivery: Delivery,
    *,
    output_prefixes: Sequence[str],
    max_rows: int,
    now: float,
    input_prefixes: Sequence[str] = (),
    base_models: Collection[str] | None = None,
    max_bytes: int = MAX_BODY_BYTES,
    keeps_raw: bool = False,
) -> Job:
    """Read a job, or raise InvalidMessage, ForbiddenInput or ForbiddenOutput.

    A row's own mistake is that row's `failure`. The rows of an `input` are not looked at.

    `now` (seconds since the epoch) stands in for a missing SentTimestamp. `base_models` are the names of the
    base model, None where nobody knows them. `keeps_raw` is as for `read_rows`. In every optional field null
    counts as absent.
    """
    try:
        body = _parse(delivery, max_bytes)
        _check_names(body)
        job_id = _read_id(body, delivery)
        adapter = adapter_attribute(delivery.attributes)
        output = read_output(body.get("output"), output_prefixes)
        task = read_task(body.get("task"))
        if task is Task.SCORE and output.format != "native":
            raise InvalidMessage(
                f"task is score and output.format is {output.format}, which has no place for scores; "
                "it must be native"
            )
        workflow = read_model(body.get("model"), base_models)
        created_at = delivery.sent_at or now
        ttl = _read_ttl(body.get("ttl_seconds"))
        job = Job(
            id=job_id,
            output=output,
            digest=_digest(body, output, adapter),
            created_at=created_at,
            expires_at=None if ttl is None else created_at + ttl,
            metadata=_read_metadata(body.get("metadata")),
        )
        if body.get("input") is not None:
            given = _read_given(body, adapter, task, base_models)
            given = msgspec.structs.replace(given, workflow=workflow, keeps_raw=keeps_raw)
            source = read_source(body["input"], input_prefixes)
            return _as_part(msgspec.structs.replace(job, source=source, given=given), body)
        _refuse_part(body)
        read = read_rows(
            body,
            max_rows=max_rows,
            adapter=adapter,
            task=task,
            base_models=base_models,
            workflow=workflow,
            keeps_raw=keeps_raw,
        )
        return msgspec.structs.replace(job, rows=read)
    except RecursionError as error:
        raise InvalidMessage("the body is nested too deeply") from error


def salvage(delivery: Delivery, output_prefixes: Sequence[str]) -> tuple[str, Output | None]:
    """The job id and output of a message that `decode` refused, as far as they can be known.

    The id falls back to the message's own. The output is None when the body is not a JSON object or its
    output is no good: nobody is known to look anywhere, and the message is a dead letter.
    """
    try:
        body = _parse(delivery)
    except (JobError, RecursionError):
        return delivery.message_id, None
    try:
        job_id = _read_id(body, delivery)
    except InvalidMessage:
        job_id = delivery.message_id
    try:
        return job_id, read_output(body.get("output"), output_prefixes)
    except JobError:
        return job_id, None


def adapter_attribute(attributes: Mapping[str, str]) -> str | None:
    """The adapter that the message attributes name for every row; None when they name none."""
    found: str | None = None
    for wanted in ADAPTER_ATTRIBUTES:
        values = {value for name, value in attributes.items() if name.lower() == wanted}
        if len(values) > 1:
            raise InvalidMessage(f"message attribute {wanted} is there twice, with different values")
        found = next(iter(values), found)
    return found


def is_job_id(text: str) -> bool:
    """Whether this may be a job's id, and so a folder's name in S3."""
    return _ID.fullmatch(text) is not None and text not in {".", ".."}


def _parse(delivery: Delivery, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    try:
        size = len(delivery.body.encode())
        size += sum(len(name.encode()) + len(value.encode()) for name, value in delivery.attributes.items())
    except UnicodeEncodeError as error:
        raise InvalidMessage("the body or an attribute cannot be written as UTF-8") from error
    if size > max_bytes:
        raise InvalidMessage(f"the message has {size} bytes; it may have {max_bytes}")
    return parse_object(delivery.body)


def _check_names(body: Mapping[str, Any]) -> None:
    stranger = unknown(body, FIELDS | PART_FIELDS)
    if stranger is not None:
        raise InvalidMessage(f"field {stranger}")
    given = {name for name in body if body[name] is not None}
    twice = sorted(given & {"inputs", "ids"}) if "input" in given else ()
    if twice:
        raise InvalidMessage(
            f"the message has input and {twice[0]}; the rows of an input are all in its object"
        )
    version = body.get("version")
    if version is not None and (isinstance(version, bool) or version != 1):
        raise InvalidMessage(f"version is {show(version)}; it must be 1")


def _read_id(body: Mapping[str, Any], delivery: Delivery) -> str:
    job_id = body.get("id")
    if job_id is None:
        job_id = delivery.message_id
    if not isinstance(job_id, str) or not is_job_id(job_id):
        raise InvalidMessage(
            f"id is {show(job_id)}; it must be 1 to 128 of A-Z a-z 0-9 . _ -, and not . or .."
        )
    return job_id


def read_model(value: object, base_models: Collection[str] | None) -> str | None:
    """The workflow that `model` names; None where it is absent, or a name of the base model's."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InvalidMessage(f"model is {show(value)}; it must be the base model's name or a workflow's")
    return None if base_models is not None and value in base_models else value


def _read_given(
    body: Mapping[str, Any], adapter: str | None, task: Task, base_models: Collection[str] | None
) -> Given:
    """What a message says for all rows of its input."""
    adapters, parameters = body.get("adapters"), body.get("parameters")
    if adapters is not None and not isinstance(adapters, str):
        raise InvalidMessage(f"adapters is {kind(adapters)}; for an input it must be one text")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidMessage(f"parameters is {kind(parameters)}; for an input it must be one object")
    return Given(
        adapter=adapters, override=adapter, parameters=parameters, task=task, base_models=base_models
    )


def _as_part(job: Job, body: Mapping[str, Any]) -> Job:
    """The job as a part's message tells of it: when all of it was sent, and what all of it is."""
    part = read_part(body)
    if part is None:
        _refuse_part(body)
        return job
    digest, sent_at = body.get("digest"), body.get("created_at")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidMessage(
            f"digest is {show(digest)}; in the message of a part it must be a SHA-256 in hex"
        )
    if isinstance(sent_at, bool) or not isinstance(sent_at, int | float) or not 0 <= sent_at < _LATEST:
        raise InvalidMessage(
            f"created_at is {show(sent_at)}; in the message of a part it must be a Unix time"
        )
    ttl = None if job.expires_at is None else job.expires_at - job.created_at
    return msgspec.structs.replace(
        job,
        part=part,
        digest=digest,
        created_at=float(sent_at),
        expires_at=None if ttl is None else sent_at + ttl,
    )


def _refuse_part(body: Mapping[str, Any]) -> None:
    name = next((name for name in sorted(PART_FIELDS) if body.get(name) is not None), None)
    if name is not None:
        raise InvalidMessage(f"field {name} is for the messages of the parts of an input, and this is none")


def located(job: Job, etag: str) -> Job:
    """A job by reference, now that the version of its input is known: another version is another job."""
    assert job.source is not None
    digest = hashlib.sha256(f"{job.digest} {etag}".encode()).hexdigest()
    return msgspec.structs.replace(job, digest=digest, source=msgspec.structs.replace(job.source, etag=etag))


def _read_ttl(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TTL_SECONDS:
        raise InvalidMessage(
            f"ttl_seconds is {show(value)}; it must be a number above 0 and at most {MAX_TTL_SECONDS}"
        )
    return float(value)


def _read_metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise InvalidMessage(
            f"metadata is {show(value)}; it must be an object of at most {MAX_METADATA} texts"
        )
    for name, text in value.items():
        if len(name) > MAX_METADATA_KEY or not isinstance(text, str) or len(text) > MAX_METADATA_VALUE:
            raise InvalidMessage(
                f"metadata {show(name)} must be text of at most {MAX_METADATA_VALUE} characters "
                f"under a name of at most {MAX_METADATA_KEY}"
            )
    return value


def _digest(body: Mapping[str, Any], output: Output, adapter: str | None) -> str:
    """Of what was sent rather than what was made of it, so that two releases of loramill agree on it."""
    asked = {name: body[name] for name in sorted(rows.FIELDS) if body.get(name) is not None}
    asked["task"] = body.get("task") or "generate"
    asked["output"] = [output.uri, output.format]
    asked["adapter"] = adapter
    if body.get("model") is not None:  # digests of jobs without one stay what they were
        asked["model"] = body["model"]
    if isinstance(body.get("input"), dict):
        # Not the version: who named none meant the one that is there, which `located` adds.
        asked["input"] = {name: value for name, value in body["input"].items() if name != "etag"}
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
