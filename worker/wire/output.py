"""Result files in the format that a job asks for: one line per row, in input order, errors included."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from worker.errors import LoramillError
from worker.jobs import Job, RowResult
from worker.wire.bedrock_results import Record, bedrock_line, count_bedrock
from worker.wire.openai_results import OpenAILine, count_openai, openai_line
from worker.wire.results import Adder, Counted, Tally, encode, result_line


class _Format(NamedTuple):
    """How a result becomes a line, and what of a line counts."""

    line: Callable[..., msgspec.Struct]
    lines: msgspec.json.Decoder[Any]
    counted: Callable[[Any], Counted]


def _count_native(line: Any) -> Counted:
    """A line as it was made has more fields than one that was read, and these among them."""
    counted: Counted = line
    return counted


_FORMATS = {
    "native": _Format(lambda result, **_: result_line(result), msgspec.json.Decoder(Counted), _count_native),
    "openai": _Format(openai_line, msgspec.json.Decoder(OpenAILine), count_openai),
    "bedrock": _Format(bedrock_line, msgspec.json.Decoder(Record), count_bedrock),
}
FORMATS = tuple(_FORMATS)


class EncodedLine(NamedTuple):
    """A line, and what of it counts."""

    counted: Counted
    encoded: bytes
    """UTF-8, with its newline."""


class LineWriter:
    """The lines of one result file of `job`, and what they add up to so far."""

    def __init__(self, job: Job, *, base_model: str) -> None:
        self._format = _FORMATS[job.output.format]
        self._known = {"job_id": job.id, "created": int(job.created_at), "base_model": base_model}
        self._adder = Adder()

    def encode(self, result: RowResult) -> EncodedLine:
        """A line of the file, which counts once it is `add`ed."""
        line = self._format.line(result, **self._known)
        counted = self._format.counted(line)
        # Of a native line itself, which has the text too, no more is kept than what counts.
        kept = Counted(
            adapter=counted.adapter,
            adapter_version=counted.adapter_version,
            usage=counted.usage,
            error=counted.error,
        )
        return EncodedLine(kept, encode(line) + b"\n")

    def add(self, line: EncodedLine) -> None:
        """Have this be the next line."""
        self._adder.add(*line)

    def line(self, result: RowResult) -> bytes:
        """The next line: UTF-8, with its newline."""
        encoded = self.encode(result)
        self.add(encoded)
        return encoded.encoded

    @property
    def tally(self) -> Tally:
        return self._adder.tally


class LineReader:
    """Adds up a result file that comes in chunks of any size."""

    def __init__(self, format: str = "native") -> None:  # noqa: A002 (the field's name)
        self._format = _FORMATS[format]
        self._adder = Adder()
        self._pending = list[bytes]()
        """Pieces of a line that has not ended."""

    def feed(self, chunk: bytes) -> None:
        """Raises LoramillError when the bytes are not a result file of that format."""
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._add(b"".join([*self._pending, piece]))
            self._pending = []
        if rest:
            self._pending.append(rest)

    def finish(self) -> Tally:
        """What it adds up to. Raises LoramillError when the last line has no end."""
        if self._pending:
            raise LoramillError("not a result file: its last line has no end")
        return self._adder.tally

    def _add(self, line: bytes) -> None:
        try:
            counted = self._format.counted(self._format.lines.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LoramillError(f"not a result file: {error}") from error
        self._adder.add(counted, line + b"\n")


def encode_rows(job: Job, results: Sequence[RowResult], *, base_model: str) -> bytes:
    """The bytes of one result file of `job`, with the results in the order given."""
    writer = LineWriter(job, base_model=base_model)
    return b"".join(writer.line(result) for result in results)


def tally(jsonl: bytes, format: str = "native") -> Tally:  # noqa: A002 (the field's name)
    """Add up a whole result file. Raises as LineReader."""
    reader = LineReader(format)
    reader.feed(jsonl)
    return reader.finish()
