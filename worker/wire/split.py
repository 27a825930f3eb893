"""`parts.json`: how the rows of a large input were cut into parts. Written once for a job."""

import msgspec

from worker.errors import LoramillError


class InputFile(msgspec.Struct, frozen=True):
    """The object that a job by reference was read from."""

    uri: str
    etag: str


class Slice(msgspec.Struct, frozen=True, array_like=True):
    """One part: bytes `start` to `stop` of the text, which begin with a line, and the rows in them."""

    start: int
    stop: int
    first_row: int
    rows: int


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """What `status` counts against, and what a second attempt at splitting finds."""

    job_id: str
    digest: str
    input: InputFile
    rows: int
    parts: tuple[Slice, ...]
    created_at: float
    """When the input had been read, in seconds since the epoch."""


def encode_split(split: Split) -> bytes:
    """As JSON."""
    return msgspec.json.encode(split) + b"\n"


def decode_split(data: bytes) -> Split:
    """Read it back; fields of later versions are passed over. Raises LoramillError when it is none."""
    try:
        return msgspec.json.decode(data, type=Split)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LoramillError(f"not the parts of a job: {error}") from error
