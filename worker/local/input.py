"""A file of this machine in the place of a store: what reads the lines of objects reads its lines."""

import asyncio
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, cast

from worker.errors import InvalidInput, InvalidMessage
from worker.transport.lines import END, Span, read_lines
from worker.transport.objects import Readable, StoredObject

STDIN = "-"
_CHUNK_BYTES = 1 << 20


class LocalInput(Readable):
    """An open file, read as the only object of a store.

    It stays this file when another takes its name, and one that is written to meanwhile is noticed.
    """

    def __init__(self, uri: str, file: BinaryIO) -> None:
        self.uri = uri
        self._file = file
        self.etag = self._look()

    @property
    def is_packed(self) -> bool:
        return self.uri.endswith(".gz")

    async def head(self, uri: str) -> StoredObject:
        """As `Store.head`."""
        assert uri == self.uri
        return self._stored

    async def stream(
        self, stored: StoredObject, start: int = 0, stop: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """As `Store.stream`. Raises InvalidInput when the file was changed, or cannot be read."""
        stop = stored.size if stop is None else stop
        while start < stop:
            count = min(_CHUNK_BYTES, stop - start)
            try:
                chunk = await asyncio.to_thread(os.pread, self._file.fileno(), count, start)
            except OSError as exc:
                raise InvalidInput(f"{self.uri} cannot be read: {exc.strerror}") from exc
            if not chunk or self._look() != stored.etag:
                raise InvalidInput(f"{self.uri} was changed while it was read")
            start += len(chunk)
            yield chunk

    @cached_property
    def sha256(self) -> str:
        """Of all its bytes, in hex. Blocking. Raises InvalidInput."""
        try:
            with os.fdopen(self._file.fileno(), "rb", closefd=False) as file:
                file.seek(0)
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as exc:
            raise InvalidInput(f"{self.uri} cannot be read: {exc.strerror}") from exc

    async def measure(self, row: int) -> tuple[int, int]:
        """How many rows there are, and where the one of this number begins; 0 if there is none.

        Raises InvalidInput for a damaged gzip file, and what `stream` raises.
        """
        rows = offset = 0
        lines = read_lines(self, self._stored, Span(0, END), gzip=self.is_packed)
        async with aclosing(lines):
            async for line in lines:
                if rows == row:
                    offset = line.offset
                rows += 1
        return rows, offset

    def is_at(self, path: Path) -> bool:
        """Whether this very file is the one at `path`."""
        return path.exists() and os.path.samestat(path.stat(), os.fstat(self._file.fileno()))

    @property
    def _stored(self) -> StoredObject:
        return StoredObject(self.uri, self.etag, os.fstat(self._file.fileno()).st_size)

    def _look(self) -> str:
        status = os.fstat(self._file.fileno())
        return f"{status.st_size}-{status.st_mtime_ns}"


@contextmanager
def open_input(name: str) -> Iterator[LocalInput]:
    """The file, or standard input for "-". What can be read only once is copied first, to no file's name.

    Raises InvalidMessage when it cannot be read.
    """
    try:
        file, uri = _open(name)
    except OSError as exc:
        raise InvalidMessage(f"--input {name}: {exc.strerror}") from exc
    with file:
        yield LocalInput(uri, file)


def _open(name: str) -> tuple[BinaryIO, str]:
    if name == STDIN:
        return _copied(sys.stdin.buffer), STDIN
    path = Path(name).expanduser().absolute()
    file = path.open("rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file, str(path)
    with file:
        return _copied(file), str(path)


def _copied(pipe: BinaryIO) -> BinaryIO:
    copy = tempfile.TemporaryFile(prefix="loramill-")  # noqa: SIM115 (whoever asked closes it)
    try:
        shutil.copyfileobj(pipe, copy, _CHUNK_BYTES)
        copy.flush()
    except BaseException:
        copy.close()
        raise
    return cast("BinaryIO", copy)
