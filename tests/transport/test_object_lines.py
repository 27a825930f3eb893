"""Lines of objects: every line once, however the object is cut, packed, or arrives."""

import asyncio
import gzip
import itertools
import random
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import InvalidInput, StoreUnavailable
from worker.transport import lines
from worker.transport.lines import END, Line, Span, read_lines
from worker.transport.memory import MemoryStore
from worker.transport.objects import StoredObject

texts = st.lists(
    st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b" ", b"\xef\xbb\xbf", b"d" * 40]), max_size=60
).map(b"".join)


class Chunked(MemoryStore):
    """Streams in chunks of any sizes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.streamed = 0

    async def stream(self, stored, start=0, stop=None):
        body, _ = await self.get(stored.uri)
        body = body[start:stop]
        while body:
            size = self.random.choice([1, 2, 3, 7, 50, 1000])
            self.streamed += len(body[:size])
            yield body[:size]
            body = body[size:]


def expected(text: bytes) -> list[Line]:
    """By the plainest means."""
    found, offset = [], 0
    for line in text.split(b"\n"):
        content = line.removesuffix(b"\r") if offset + len(line) < len(text) or line else line
        if offset == 0:
            content = content.removeprefix(b"\xef\xbb\xbf")
        if content.strip():
            found.append(Line(offset, content))
        offset += len(line) + 1
    return found


def read(store: MemoryStore, body: bytes, spans: list[Span], *, packed: bool = False) -> list[list[Line]]:
    async def main() -> list[list[Line]]:
        stored = await store.put("s3://b/k", body)
        return [[line async for line in read_lines(store, stored, span, gzip=packed)] for span in spans]

    return asyncio.run(main())


@st.composite
def cuts(draw):
    text = draw(texts)
    edges = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=5))})
    return text, [Span(*both) for both in itertools.pairwise(edges)]


@given(cuts(), st.integers(0, 2**32))
@settings(deadline=None)
def test_spans_have_every_line_once_wherever_they_are_cut(case, seed):
    text, spans = case
    got = read(Chunked(seed), text, spans)
    assert [line for part in got for line in part] == expected(text)
    for span, part in zip(spans, got, strict=True):
        assert all(span.start <= line.offset < span.stop for line in part)


@given(cuts(), st.integers(0, 2**32), st.integers(1, 4))
@settings(deadline=None)
def test_packed_files_are_the_same_lines(case, seed, files):
    text, spans = case
    edges = [len(text) * number // files for number in range(files + 1)]
    packed = b"".join(gzip.compress(text[a:b]) for a, b in itertools.pairwise(edges))
    got = read(Chunked(seed), packed, spans, packed=True)
    assert [line for part in got for line in part] == expected(text)


@pytest.mark.parametrize("packed", [False, True])
def test_line_that_is_too_long_is_told_and_its_neighbours_are_read(packed, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    text = b"short\n" + b"x" * 11 + b"\n" + b"y" * 10 + b"\n" + b"z" * 500
    body = gzip.compress(text) if packed else text
    (got,) = read(Chunked(3), body, [Span(0, len(text))], packed=packed)
    assert got == [Line(0, b"short"), Line(6, None), Line(18, b"y" * 10), Line(29, None)]


def test_no_more_is_read_than_the_span_and_its_last_line():
    store, text = Chunked(), b"".join(b"%05d\n" % number for number in range(50_000))
    ((first, *_),) = read(store, text, [Span(150_000, 150_600)])
    assert first.content == b"25000"
    assert store.streamed < 10_000
    store.streamed = 0
    read(store, text, [Span(150_000, 150_602)])
    assert store.streamed > 603, "a line that goes on beyond the span is read to its end"


def test_nothing_is_read_beyond_a_span_that_ends_with_a_line():
    store, text = Chunked(), b"".join(b"%05d\n" % number for number in range(50_000))
    (got,) = read(store, text, [Span(150_000, 150_600)])
    assert len(got) == 100
    assert store.streamed == 601


@pytest.mark.parametrize(
    "damage",
    [lambda body: body[:-9], lambda body: body[:20], lambda body: body + b"more", lambda body: b"{}\n" + body,
     lambda body: body[:30] + b"\xff" * 8 + body[38:]],
)  # fmt: skip
def test_damaged_gzip_is_told_by_the_name_of_the_file(damage):
    text = b"".join(b"%d\n" % number for number in range(1000))
    with pytest.raises(InvalidInput, match="s3://b/k is no whole gzip file"):
        read(Chunked(), damage(gzip.compress(text)), [Span(0, len(text))], packed=True)


@pytest.mark.parametrize("seed", range(5))
def test_zeros_after_a_gzip_file_are_padding(seed):
    body = gzip.compress(b"a\nb") + bytes(100) + gzip.compress(b"c\n") + bytes(9)
    (got,) = read(Chunked(seed), body, [Span(0, 5)], packed=True)
    assert got == [Line(0, b"a"), Line(2, b"bc")]


def test_many_empty_files_in_one_and_many_empty_lines_take_no_time():
    """Counted in what the event loop can do meanwhile: each of these took seconds of it."""
    empty, turns = gzip.compress(b"") * 30_000, 0

    async def main():
        nonlocal turns
        store = MemoryStore()
        stored = await store.put("s3://b/k", gzip.compress(b"\n" * 3_000_000) + empty)
        reading = asyncio.create_task(
            _collect(read_lines(store, stored, Span(0, 1 << 40), gzip=True)), name="reading"
        )
        while not reading.done():
            turns += 1
            await asyncio.sleep(0.001)
        return await reading

    assert asyncio.run(main()) == []
    assert turns > 3


async def _collect(found):
    return [line async for line in found]


def test_line_that_is_too_long_is_not_kept():
    pending = []

    async def main():
        async def endless():
            for _ in range(64):
                yield bytes(1 << 20)
                pending.append(sum(map(len, found.ag_frame.f_locals["pending"])))

        found = lines._cut(endless(), 0)
        return [line async for line in found]

    assert asyncio.run(main()) == [Line(0, None)]
    assert max(pending) <= lines.MAX_LINE_BYTES


@pytest.mark.parametrize("body", [b"", gzip.compress(b"")])
def test_nothing_is_no_line(body):
    assert read(Chunked(), body, [Span(0, 0), Span(0, 1)], packed=bool(body)) == [[], []]


def test_what_unpacks_to_a_thousand_times_its_size_is_unpacked_bit_by_bit():
    """The size of the pieces is what is in memory."""
    text = bytes(200 << 20)
    packed = gzip.compress(text, 6)
    assert len(packed) * 500 < len(text)
    longest = 0
    to_thread = asyncio.to_thread

    async def watched(function, *given):
        nonlocal longest
        piece, rest = await to_thread(function, *given)
        longest = max(longest, len(piece))
        return piece, rest

    async def main():
        store = MemoryStore()
        stored = await store.put("s3://b/k", packed)
        return [line async for line in read_lines(store, stored, Span(0, END), gzip=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", watched)
        assert asyncio.run(main()) == [Line(0, None)]
    assert longest <= 2 << 20


def test_store_that_fails_says_so_and_a_reader_may_leave(run_store):
    async def scenario(store, bucket):
        stored = await store.put(f"{bucket}/k", b"line\n" * 200_000)
        async with aclosing(read_lines(store, stored, Span(0, stored.size), gzip=False)) as some:
            assert (await anext(some)).content == b"line"
        gone = StoredObject(stored.uri, "0" * 32, stored.size)
        with pytest.raises(StoreUnavailable, match="overwritten"):
            [_ async for _ in read_lines(store, gone, Span(0, 10), gzip=False)]

    run_store(scenario)
