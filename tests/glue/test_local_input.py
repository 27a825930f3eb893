"""A file of this machine is read as an object is, and only as long as it stays what it was."""

import asyncio
import gzip
import hashlib
import io
import os
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.delivery.inputs import rows_of
from worker.errors import InvalidInput, InvalidMessage
from worker.jobs import Job, Output, Part, Source
from worker.local import input as local_input
from worker.local.input import open_input
from worker.transport.lines import Span, read_lines
from worker.transport.memory import MemoryStore

TEXT = b'\xef\xbb\xbf"one"\n\n"two"\r\n  \n"three"\n"four"'


def texts_of(found, row: int = 0) -> list[str | None]:
    """What the rows from this one on say."""

    async def read() -> list[str | None]:
        rows, offset = await found.measure(row)
        source = Source(uri=found.uri, etag=found.etag, start=offset)
        part = Part(first_row=row, rows=rows - row)
        job = Job(id="j", source=source, part=part, output=Output("o"), digest="", created_at=0.0)
        read = [one async for one in rows_of(job, found)]
        assert [one.index for one in read] == list(range(row, rows))
        return [one.text for one in read]

    return asyncio.run(read())


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
@pytest.mark.parametrize("row", range(4))
def test_rows_are_read_from_any_of_them_on(tmp_path, name, row):
    (tmp_path / name).write_bytes(gzip.compress(TEXT) if name.endswith(".gz") else TEXT)
    with open_input(str(tmp_path / name)) as found:
        assert texts_of(found, row) == ["one", "two", "three", "four"][row:]
        assert found.uri == str(tmp_path / name)
        assert found.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from([b"a", b"bc\n", b"\n", b" \r\n", b"d" * 9]), max_size=40).map(b"".join),
    st.integers(1, 7),
)
def test_lines_are_those_of_an_object(tmp_path_factory, text, chunk):
    path = tmp_path_factory.mktemp("in") / "in.jsonl"
    path.write_bytes(text)

    async def lines() -> None:
        store = MemoryStore()
        stored = await store.put("s3://b/k", text)
        span = Span(0, 1 << 62)
        wanted = [line async for line in read_lines(store, stored, span, gzip=False)]
        with pytest.MonkeyPatch.context() as patch, open_input(str(path)) as found:
            patch.setattr(local_input, "_CHUNK_BYTES", chunk)
            here = await found.head(found.uri)
            assert [line async for line in read_lines(found, here, span, gzip=False)] == wanted
            assert await found.measure(len(wanted)) == (len(wanted), 0)

    asyncio.run(lines())


def test_a_file_that_is_written_to_is_noticed_and_one_that_is_replaced_is_read_on(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(TEXT)
    with open_input(str(path)) as found:
        (tmp_path / "new").write_bytes(b'"other"\n')
        (tmp_path / "new").rename(path)
        assert texts_of(found) == ["one", "two", "three", "four"]
    with open_input(str(path)) as found:
        with path.open("ab") as file:
            file.write(b'"late"\n')
        with pytest.raises(InvalidInput, match=r"changed|ETag"):
            texts_of(found)
    with open_input(str(path)) as found:
        os.truncate(path, 3)
        with pytest.raises(InvalidInput, match=r"in\.jsonl was changed"):
            asyncio.run(found.measure(0))


def test_a_damaged_gzip_file_is_no_input(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT)[:-9])
    with open_input(str(path)) as found, pytest.raises(InvalidInput, match="no whole gzip file"):
        asyncio.run(found.measure(0))


def test_standard_input_is_read_whole(monkeypatch):
    monkeypatch.setattr(local_input.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT)))
    with open_input("-") as found:
        assert texts_of(found, 1) == ["two", "three", "four"]
        assert (found.uri, found.sha256) == ("-", hashlib.sha256(TEXT).hexdigest())


def test_a_pipe_is_read_whole(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(TEXT,))
    writing.start()
    with open_input(str(tmp_path / "pipe")) as found:
        writing.join()
        assert texts_of(found) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_is_no_file_is_named(tmp_path, name):
    with (
        pytest.raises(InvalidMessage, match=f"--input {tmp_path}/{name}: "),
        open_input(f"{tmp_path}/{name}"),
    ):
        pass
