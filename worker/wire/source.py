"""The `input` of a message, and which part of it the message is about."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from worker.errors import ForbiddenInput, InvalidMessage
from worker.jobs import Job, Output, Part, Source
from worker.wire.checks import show, unknown
from worker.wire.enqueue import MAX_BODY_BYTES, encode_fields
from worker.wire.lines import FORMATS
from worker.wire.split import Slice, Split

FIELDS = frozenset({"uri", "etag", "format", "range", "first_row", "rows"})
PART_FIELDS = frozenset({"part", "parts", "digest", "created_at"})
"""Fields of a part's message, which a worker writes and no sender needs."""
MAX_PARTS = 99_999
_MAX_KEY_BYTES = 1024
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_MAX_NUMBER = 1 << 62


def read_source(value: object, input_prefixes: Sequence[str]) -> Source:
    """The object that a message refers to; without `input_prefixes` any may be.

    Raises InvalidMessage, and ForbiddenInput when it lies under none of them.
    """
    fields = _object(value)
    stranger = unknown(fields, FIELDS)
    if stranger is not None:
        raise InvalidMessage(f"input: {stranger}")
    start, stop = _read_range(fields.get("range"))
    uri = _read_uri(fields.get("uri"))
    check_input(uri, input_prefixes)
    return Source(
        uri=uri,
        etag=_read_etag(fields.get("etag")),
        format=_read_format(fields.get("format")),
        start=start,
        stop=stop,
    )


def check_input(uri: str, input_prefixes: Sequence[str]) -> None:
    """Raise ForbiddenInput for what lies under none of the prefixes, where there are any."""
    if input_prefixes and not any(uri.startswith(prefix) for prefix in input_prefixes):
        raise ForbiddenInput(f"the input is {show(uri)}, which is not under the worker's input prefixes")


def read_part(body: Mapping[str, Any]) -> Part | None:
    """Which part of its job a message is; None when it is about all of it. Raises InvalidMessage."""
    source = _object(body.get("input"))
    numbers = {f"input.{name}": source.get(name) for name in ("first_row", "rows")}
    numbers |= {name: body.get(name) for name in ("part", "parts")}
    if all(value is None for value in numbers.values()):
        return None
    number = _whole(numbers, "part", 0, MAX_PARTS - 1)
    count = _whole(numbers, "parts", number + 1, MAX_PARTS)
    if source.get("range") is None or source.get("etag") is None:
        raise InvalidMessage("a message with part must have input.range and input.etag")
    return Part(
        number=number,
        count=count,
        first_row=_whole(numbers, "input.first_row", 0, _MAX_NUMBER),
        rows=_whole(numbers, "input.rows", 1, _MAX_NUMBER),
    )


def encode_source(source: Source, part: Part | None = None) -> dict[str, Any]:
    """The opposite of `read_source`."""
    fields: dict[str, Any] = {"uri": source.uri, "etag": source.etag, "format": source.format}
    if source.stop is not None:
        fields["range"] = [source.start, source.stop - 1]
    if part is not None:
        fields |= {"first_row": part.first_row, "rows": part.rows}
    return {name: value for name, value in fields.items() if value is not None}


def part_of(job: Job, split: Split, number: int) -> Job:
    """The part of a job by reference that its split gives this number."""
    assert job.source is not None
    slice_: Slice = split.parts[number]
    return msgspec.structs.replace(
        job,
        source=msgspec.structs.replace(job.source, start=slice_.start, stop=slice_.stop),
        part=Part(number=number, count=len(split.parts), first_row=slice_.first_row, rows=slice_.rows),
    )


def encode_part(job: Job) -> str:
    """The body of the message of a part; raises InvalidMessage when it is too large.

    Beside it goes the attribute `adapter`, where `job.given.override` is one.
    """
    assert job.source is not None
    assert job.part is not None
    body = encode_fields(
        id=job.id,
        input=encode_source(job.source, job.part),
        model=job.given.workflow,
        adapters=job.given.adapter,
        parameters=job.given.parameters,
        task=job.given.task.value,
        output=_encode_output(job.output),
        # A difference of floats may be 0, which is no time to live.
        ttl_seconds=None if job.expires_at is None else max(1e-3, job.expires_at - job.created_at),
        metadata=job.metadata or None,
        part=job.part.number,
        parts=job.part.count,
        digest=job.digest,
        created_at=job.created_at,
    )
    size = len(body.encode()) + len(f"adapterString{job.given.override or ''}".encode())
    if size > MAX_BODY_BYTES:
        raise InvalidMessage(f"the message of a part would have {size} bytes; it may have {MAX_BODY_BYTES}")
    return body


def _encode_output(output: Output) -> dict[str, str]:
    return {"uri": output.uri, "format": output.format}


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidMessage(f"input is {show(value)}; it must be an object with a uri")
    return value


def _read_uri(value: object) -> str:
    bucket, _, key = value.removeprefix("s3://").partition("/") if isinstance(value, str) else ("", "", "")
    if (
        not isinstance(value, str)
        or not value.startswith("s3://")
        or not _BUCKET.fullmatch(bucket)
        or not key
    ):
        raise InvalidMessage(f"input.uri is {show(value)}; it must be text of the form s3://bucket/key")
    if "\0" in value or len(key.encode("utf-8", "surrogatepass")) > _MAX_KEY_BYTES:
        raise InvalidMessage(
            f"input.uri is {show(value)}; its key may have {_MAX_KEY_BYTES} bytes, none of them 0"
        )
    return value


def _read_etag(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip('"') or not value.isascii() or not value.isprintable():
        raise InvalidMessage(f"input.etag is {show(value)}; it must be the object's ETag, as text")
    return value.strip('"')


def _read_format(value: object) -> str:
    if value is None:
        return FORMATS[0]
    if value not in FORMATS:
        raise InvalidMessage(
            f"input.format is {show(value)}; it must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    return str(value)


def _read_range(value: object) -> tuple[int, int | None]:
    """First byte and end, of the first and the last byte that a message names."""
    if value is None:
        return 0, None
    match value:
        case [int(first), int(last)] if not isinstance(first, bool) and not isinstance(last, bool):
            if 0 <= first <= last < _MAX_NUMBER:
                return first, last + 1
    raise InvalidMessage(
        f"input.range is {show(value)}; it must be the numbers of the first and of the last byte, from 0"
    )


def _whole(numbers: Mapping[str, object], name: str, least: int, most: int) -> int:
    value = numbers[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidMessage(
            f"{name} is {show(value)}; in the message of a part it must be a whole number from {least} to "
            f"{most}"
        )
    return value
