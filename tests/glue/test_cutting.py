"""Large inputs cut into parts: every row in one of them, at a known place."""

import asyncio
import gzip
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.delivery import cutting
from worker.delivery.cutting import cut, span_of
from worker.jobs import Source
from worker.transport.lines import read_lines
from worker.transport.memory import MemoryStore

texts = st.lists(st.sampled_from([b"a", b"bc\n", b"\n", b" \r\n", b"d" * 9]), min_size=1, max_size=80).map(
    b"".join
)


async def parts_of(text: bytes, rows: int, most: int | None, *, packed: bool, start: int = 0):
    """The cuts, and the lines that are read by each of them."""
    store, uri = MemoryStore(), "s3://b/k.gz" if packed else "s3://b/k"
    stored = await store.put(uri, gzip.compress(text) if packed else text)
    source = Source(uri=uri, start=start)
    slices = await cut(store, stored, source, rows_per_part=rows, max_parts=most)
    spans = [Source(uri=uri, start=one.start, stop=one.stop) for one in slices]
    found = [[line async for line in read_lines(store, stored, span_of(span), gzip=packed)] for span in spans]
    whole = [line async for line in read_lines(store, stored, span_of(source), gzip=packed)]
    return slices, found, whole


@settings(deadline=None)
@given(
    texts.filter(bytes.strip),
    st.integers(1, 7),
    st.sampled_from([None, 2, 4]),
    st.booleans(),
    st.integers(0, 5),
)
def test_parts_have_every_row_once_and_know_how_many(text, rows, most, packed, start):
    if not text[start:].partition(b"\n")[2].strip():
        start = 0
    slices, found, whole = asyncio.run(parts_of(text, rows, most, packed=packed, start=start))
    assert [line for part in found for line in part] == whole
    assert [one.rows for one in slices] == [len(part) for part in found]
    assert [one.first_row for one in slices] == [0, *itertools.accumulate(one.rows for one in slices[:-1])]
    assert all(one.start == part[0].offset for one, part in zip(slices, found, strict=True))
    if most is None:
        assert all(one.rows == rows for one in slices[:-1])
        assert slices[-1].rows <= rows
    else:
        assert len(slices) <= most + 1


def test_parts_are_small_in_bytes_too(monkeypatch):
    monkeypatch.setattr(cutting, "_PART_BYTES", 100)
    slices, _, _ = asyncio.run(parts_of(b"x" * 29 + b"\n" + b"y\n" * 200, 1000, None, packed=False))
    assert [one.stop - one.start for one in slices] == [100, 100, 100, 100, 30]


def test_packed_inputs_have_fewer_parts():
    text = b"a\n" * 1000
    slices, _, _ = asyncio.run(parts_of(text, 1, None, packed=True))
    assert len(slices) <= cutting.MAX_PACKED_PARTS + 1
    assert sum(one.rows for one in slices) == 1000


@pytest.mark.parametrize("packed", [False, True])
def test_nobody_reads_on_beyond_the_last_part(packed):
    slices, _, _ = asyncio.run(parts_of(b"a\nb\nc", 2, None, packed=packed))
    assert slices[-1].stop == 5
