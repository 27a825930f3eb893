"""The rows of a job, one by one, wherever they are."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from worker.delivery.cutting import span_of
from worker.errors import InvalidInput, InvalidLine
from worker.jobs import Job, Row, Source
from worker.transport.lines import MAX_LINE_BYTES, Line, read_lines
from worker.transport.objects import Readable, StoredObject
from worker.wire.checks import failure_of
from worker.wire.lines import read_line


async def find(store: Readable, source: Source) -> StoredObject:
    """The object that a source names. Raises InvalidInput when it is gone or another version."""
    stored = await store.head(source.uri)
    if stored is None:
        raise InvalidInput(f"{source.uri} does not exist")
    if source.etag is not None and stored.etag != source.etag:
        raise InvalidInput(f"{source.uri} has the ETag {stored.etag}, and the job is about {source.etag}")
    return stored


async def rows_of(job: Job, store: Readable) -> AsyncGenerator[Row, None]:
    """Every row of a job in order; close the generator if you leave early.

    Raises InvalidInput when its source is not what was counted, or damaged, and what `Store.stream` raises.
    """
    source, part = job.source, job.part
    if source is None:
        for row in job.rows:
            yield row
        return
    assert part is not None
    count = 0
    stored = await find(store, source)
    async with aclosing(read_lines(store, stored, span_of(source), gzip=source.is_packed)) as lines:
        async for line in lines:
            if count == part.rows:
                raise InvalidInput(f"{source.uri} has more rows than the {part.rows} that were counted")
            yield _row(job, line, part.first_row + count)
            count += 1
    if count != part.rows:
        raise InvalidInput(f"{source.uri} has {count} rows where {part.rows} were counted")


def _row(job: Job, line: Line, index: int) -> Row:
    assert job.source is not None
    if line.content is None:
        error = InvalidLine(f"the line has more than {MAX_LINE_BYTES} bytes")
        return Row(index=index, id=str(index), task=job.given.task, failure=failure_of(error))
    return read_line(line.content, index, job.given, job.source.format)
