"""The lines of a large object, plain or gzip, a part of it at a time and never whole in memory.

A line belongs to the span in which it begins, wherever that span ends. So spans may be cut anywhere, and
together they have every line once.
"""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from typing import Any, NamedTuple

from worker.errors import InvalidInput
from worker.transport.objects import Readable, StoredObject

MAX_LINE_BYTES = 16 << 20
END = 1 << 62
"""Where a span may stop that goes to the end of a text, however long that is."""
_GZIP = 16 + zlib.MAX_WBITS
_PIECE_BYTES = 1 << 20
"""What a piece of compressed bytes is unpacked to at a time: some unpack to a thousand times their size."""
_SLICE_BYTES = 16 << 10
_LINES_AT_ONCE = 1000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Span(NamedTuple):
    """Bytes `start` to `stop` of a text; of the unpacked one, where it is packed."""

    start: int
    stop: int


class Line(NamedTuple):
    """A line, without what ends it."""

    offset: int
    """Where it begins in the whole text."""
    content: bytes | None
    """None when it is longer than MAX_LINE_BYTES."""


async def read_lines(
    store: Readable, stored: StoredObject, span: Span, *, gzip: bool
) -> AsyncGenerator[Line, None]:
    """Every line that begins in `span` and is not blank; close the generator if you leave early.

    Raises what `Store.stream` raises, and InvalidInput for a damaged gzip file. A packed file is unpacked
    from its beginning.
    """
    first = max(0, span.start - 1)  # the byte before tells whether a line begins at `start`
    if gzip:
        chunks = _from(first, _unpacked(store.stream(stored), stored.uri))
    else:
        chunks = _as_far_as_needed(store, stored, first, span.stop)
    async with aclosing(chunks), aclosing(_cut(chunks, first)) as lines:
        async for line in lines:
            if line.offset >= span.stop:
                return
            if line.offset >= span.start and (line.content is None or line.content.strip()):
                yield line


async def _as_far_as_needed(
    store: Readable, stored: StoredObject, start: int, stop: int
) -> AsyncGenerator[bytes, None]:
    """Bytes `start` to `stop`, and what follows only where a line goes on beyond."""
    stop, last = min(stop, stored.size), b""
    async with aclosing(store.stream(stored, start, stop)) as chunks:
        async for last in chunks:
            yield last
    if stop < stored.size and not last.endswith(b"\n"):
        async with aclosing(store.stream(stored, stop)) as chunks:
            async for chunk in chunks:
                yield chunk


async def _cut(chunks: AsyncIterable[bytes], offset: int) -> AsyncGenerator[Line, None]:
    """The lines of a text that goes on from `offset` in `chunks`, but for one that began before."""
    pending, size, whole = list[bytes](), 0, offset == 0
    async for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for number, piece in enumerate(ended):
            if number % _LINES_AT_ONCE == 0:  # a chunk may have a million, and others have heartbeats to send
                await asyncio.sleep(0)
            length = size + len(piece)
            if whole and length:
                yield _line(offset, pending, piece, length)
            offset, pending, size, whole = offset + length + 1, [], 0, True
        size += len(rest)
        if whole and rest and size <= MAX_LINE_BYTES:
            pending.append(rest)
        await asyncio.sleep(0)
    if whole and size:
        yield _line(offset, pending, b"", size)


def _line(offset: int, pending: list[bytes], last: bytes, size: int) -> Line:
    if size > MAX_LINE_BYTES:
        return Line(offset, None)
    content = b"".join([*pending, last]).removesuffix(b"\r")
    return Line(offset, content.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else content)


async def _from(start: int, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same without the first `start` bytes."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if len(chunk) > start:
                yield chunk[start:]
            start = max(0, start - len(chunk))


async def _unpacked(chunks: AsyncGenerator[bytes, None], uri: str) -> AsyncGenerator[bytes, None]:
    """What gzip files, one after the other, hold."""
    gunzip = _Gunzip()
    async with aclosing(chunks):
        async for chunk in chunks:
            data = memoryview(chunk)
            while data:
                try:
                    piece, data = await asyncio.to_thread(gunzip.some, data)
                except zlib.error as error:
                    raise InvalidInput(f"{uri} is no whole gzip file: {error}") from error
                if piece:
                    yield piece
    rest, is_whole = gunzip.end()
    if rest:
        yield rest
    if not is_whole:
        raise InvalidInput(f"{uri} is no whole gzip file: it ends too early")


class _Gunzip:
    def __init__(self) -> None:
        self._file: Any = None
        """The one that is being unpacked."""

    def some(self, data: memoryview) -> tuple[bytes, memoryview]:
        """A piece or a little more, less where `data` ends, and what of `data` is left."""
        pieces, size = list[bytes](), 0
        while data and size < _PIECE_BYTES:
            # What comes after the end of a file is copied with each call: slices keep that small.
            head = data[:_SLICE_BYTES]
            if self._file is None:
                padding = len(head) - len(bytes(head).lstrip(b"\0"))  # some programs pad what they write
                data = data[padding:]
                if padding < len(head):
                    self._file = zlib.decompressobj(_GZIP)
                continue
            piece = self._file.decompress(head, _PIECE_BYTES)
            data = data[len(head) - len(self._file.unconsumed_tail or self._file.unused_data) :]
            pieces.append(piece)
            size += len(piece)
            if self._file.eof:
                self._file = None
        return b"".join(pieces), data

    def end(self) -> tuple[bytes, bool]:
        """What is left, and whether that was the end of a file."""
        if self._file is None:
            return b"", True
        return self._file.flush(), self._file.eof
