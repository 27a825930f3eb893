"""The lines of a large object, plain or gzip, a part of it at a time and never whole in memory.

A line belongs to the span in which it begins, wherever that span ends. So spans may be cut anywhere, without
a look at the object, and together they have every line once.
"""

import asyncio
import itertools
import zlib
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from typing import Any, NamedTuple

from worker.errors import InvalidInput
from worker.transport.objects import StoredObject
from worker.transport.store import Store

MAX_LINE_BYTES = 16 << 20
_GZIP = 16 + zlib.MAX_WBITS
_PIECE_BYTES = 1 << 20
"""What a piece of compressed bytes is unpacked to at a time: some unpack to a thousand times their size."""
_SLICE_BYTES = 16 << 10
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
    store: Store, stored: StoredObject, span: Span, *, gzip: bool
) -> AsyncGenerator[Line, None]:
    """Every line that begins in `span` and is not blank; close the generator if you leave early.

    Raises what `Store.stream` raises, and InvalidInput for a damaged gzip file. A packed file is unpacked
    from its beginning.
    """
    first = max(0, span.start - 1)  # the byte before tells whether a line begins at `start`
    if gzip:
        chunks = _from(first, _unpacked(store.stream(stored), stored.uri))
    else:
        chunks = store.stream(stored, first)
    async with aclosing(chunks), aclosing(_cut(chunks, first)) as lines:
        async for line in lines:
            if line.offset >= span.stop:
                return
            if line.offset >= span.start and (line.content is None or line.content.strip()):
                yield line


async def unpacked_size(store: Store, stored: StoredObject) -> int:
    """Bytes of what a gzip file holds. Reads all of it. Raises as `read_lines`."""
    async with aclosing(_unpacked(store.stream(stored), stored.uri)) as chunks:
        return sum([len(chunk) async for chunk in chunks])


def split(size: int, span_bytes: int) -> list[Span]:
    """Cut `size` bytes into spans of about `span_bytes`, all of them alike; one for an empty text."""
    count = max(1, -(-size // span_bytes))
    edges = [size * number // count for number in range(count + 1)]
    return [Span(start, stop) for start, stop in itertools.pairwise(edges)]


async def _cut(chunks: AsyncIterable[bytes], offset: int) -> AsyncGenerator[Line, None]:
    """The lines of a text that goes on from `offset` in `chunks`, but for one that began before."""
    pending, size, whole = list[bytes](), 0, offset == 0
    async for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            length = size + len(piece)
            if whole and length:
                yield _line(offset, pending, piece, length)
            offset, pending, size, whole = offset + length + 1, [], 0, True
        size += len(rest)
        if whole and rest and size <= MAX_LINE_BYTES:
            pending.append(rest)
        await asyncio.sleep(
            0
        )  # a chunk may hold a million lines, or none, and others have heartbeats to send
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
