"""Result files in the format that a job asks for: one line per row, in input order, errors included."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from worker.errors import LoramillError
from worker.jobs import Job, RowResult
from worker.wire.bedrock_results import Record, bedrock_line, count_bedrock
from worker.wire.openai_results import OpenAILine, count_openai, openai_line
from worker.wire.results import Counted, Tally, add_up, encode, result_line


class _Format(NamedTuple):
    """How a result becomes a line, and what of a line counts."""

    line: Callable[..., msgspec.Struct]
    lines: msgspec.json.Decoder[Any]
    counted: Callable[[Any], Counted]


_FORMATS = {
    "native": _Format(
        lambda result, **_: result_line(result), msgspec.json.Decoder(Counted), lambda counted: counted
    ),
    "openai": _Format(openai_line, msgspec.json.Decoder(OpenAILine), count_openai),
    "bedrock": _Format(bedrock_line, msgspec.json.Decoder(Record), count_bedrock),
}
FORMATS = tuple(_FORMATS)


def encode_rows(job: Job, results: Sequence[RowResult], *, base_model: str) -> bytes:
    """The bytes of one result file of `job`: UTF-8, a newline after every line, in the order given."""
    line = _FORMATS[job.output.format].line
    known = {"job_id": job.id, "created": int(job.created_at), "base_model": base_model}
    return b"".join(encode(line(result, **known)) + b"\n" for result in results)


def tally(jsonl: bytes, format: str = "native") -> Tally:  # noqa: A002 (the field's name)
    """Add up a result file, so that a manifest can be made of a committed part alone.

    Raises LoramillError when the bytes are not a result file of that format.
    """
    kind = _FORMATS[format]
    try:
        lines = kind.lines.decode_lines(jsonl)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LoramillError(f"not a result file: {error}") from error
    return add_up([kind.counted(line) for line in lines], jsonl)
