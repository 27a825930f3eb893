"""The sender's own files of rows: small enough for a message, or not."""

import gzip
import hashlib
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from worker.errors import InvalidMessage
from worker.jobs import Given
from worker.transport.lines import MAX_LINE_BYTES
from worker.wire.enqueue import MAX_BODY_BYTES
from worker.wire.lines import read_line

ENDS = (".jsonl", ".jsonl.gz")
"""Of the names of files of rows, where a folder is given."""
MAX_ROWS = 10_000
"""That a message is given; a worker may take fewer."""
_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class LocalFile(msgspec.Struct, frozen=True):
    """A file of rows that is too large for a message."""

    path: Path
    is_packed: bool

    def check(self, given: Given) -> str:
        """Read it as a worker will, and return its sha256. Raises InvalidMessage for the first bad row."""
        with _readable(self.path), _opened(self.path, packed=self.is_packed) as file:
            index = 0
            for number, line in _lines(file):
                row = read_line(line, index, given)
                if row.failure is not None:
                    raise InvalidMessage(f"--file {self.path}, line {number}: {row.failure.message}")
                index += 1
        if not index:
            raise InvalidMessage(f"--file {self.path} has no rows")
        with _readable(self.path), self.path.open("rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()


def find_files(file: str) -> list[tuple[str, Path]]:
    """The file, or the files of rows in the folder, with their names there. Raises InvalidMessage."""
    path = Path(file)
    if not path.is_dir():
        return [("", path)]
    found = sorted(one for one in path.rglob("*") if one.name.endswith(ENDS) and one.is_file())
    if not found:
        raise InvalidMessage(f"--file {file}: nothing in it ends in {' or '.join(ENDS)}")
    return [(one.relative_to(path).as_posix(), one) for one in found]


@contextmanager
def from_stdin() -> Iterator[Path]:
    """Standard input as a file, for as long as the block."""
    with tempfile.NamedTemporaryFile(prefix="loramill-", suffix=".jsonl") as file:
        while block := sys.stdin.buffer.read(_BLOCK_BYTES):
            file.write(block)
        file.flush()
        yield Path(file.name)


def read_file(path: Path, shown: str) -> list[Any] | LocalFile:
    """The rows, if a message may have so many and so large ones; else the file, to be sent by itself.

    Raises InvalidMessage for what cannot be read, or is no JSON.
    """
    packed, rows, size = path.name.endswith(".gz"), list[Any](), 0
    with _readable(shown), _opened(path, packed=packed) as file:
        for number, line in _lines(file):
            size += len(line)
            if size > MAX_BODY_BYTES or len(rows) == MAX_ROWS:
                return LocalFile(path, packed)
            try:
                rows.append(msgspec.json.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise InvalidMessage(f"--file {shown}, line {number}: {exc}") from exc
    return rows


def _lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank by their numbers, from 1; at most a little more of one than a row may have."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_LINE_BYTES + 1:
            raise InvalidMessage(f"line {number} has more than {MAX_LINE_BYTES} bytes")
        if line.strip():
            yield number, line.rstrip(b"\r\n")


@contextmanager
def _opened(path: Path, *, packed: bool) -> Iterator[IO[bytes] | gzip.GzipFile]:
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        yield file


@contextmanager
def _readable(shown: object) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as exc:  # what is no gzip file is an OSError too
        raise InvalidMessage(f"--file {shown}: {getattr(exc, 'strerror', None) or exc}") from exc
