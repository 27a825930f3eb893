"""A large input, read once and cut into parts of so many rows."""

from collections.abc import Sequence

from worker.errors import InvalidInput
from worker.jobs import Source
from worker.transport.lines import END, Span, read_lines
from worker.transport.objects import Readable, StoredObject
from worker.wire.split import Slice

MAX_PARTS, MAX_PACKED_PARTS = 10_000, 100
"""Every part of a packed object is unpacked from its beginning, so there are to be fewer."""
_PART_BYTES = 256 << 20


def span_of(source: Source) -> Span:
    """The bytes in which the rows of a source begin."""
    return Span(source.start, END if source.stop is None else source.stop)


async def cut(
    store: Readable, stored: StoredObject, source: Source, *, rows_per_part: int, max_parts: int | None = None
) -> tuple[Slice, ...]:
    """Cut what a source names into parts that begin with a line and have `rows_per_part` rows or fewer.

    Where they would be more than `max_parts` (2 or more), parts are larger. Memory holds one line and the
    cuts. Raises InvalidInput when there are no rows, or for a damaged gzip file, and what `Store.stream`
    raises.
    """
    most = max_parts or (MAX_PACKED_PARTS if source.is_packed else MAX_PARTS)
    limit, size = rows_per_part, _PART_BYTES
    slices, begins, rows, first_row, offset = list[Slice](), 0, 0, 0, 0
    async for line in read_lines(store, stored, span_of(source), gzip=source.is_packed):
        offset = line.offset
        if rows == limit or (rows and offset - begins >= size):
            slices.append(Slice(begins, offset, first_row, rows))
            first_row, rows = first_row + rows, 0
            if len(slices) == most:
                slices, limit, size = _paired(slices), limit * 2, size * 2
        if not rows:
            begins = offset
        rows += 1
    if not rows:
        raise InvalidInput(f"{source.uri} has no rows")
    # Of a packed object nobody knows the size; a line belongs to where it begins.
    end = offset + 1 if source.is_packed else min(stored.size, span_of(source).stop)
    return (*slices, Slice(begins, end, first_row, rows))


def _paired(slices: Sequence[Slice]) -> list[Slice]:
    """Every two neighbours as one; of an odd number the last stays."""
    pairs = (slices[at : at + 2] for at in range(0, len(slices), 2))
    return [
        Slice(pair[0].start, pair[-1].stop, pair[0].first_row, sum(one.rows for one in pair))
        for pair in pairs
    ]
