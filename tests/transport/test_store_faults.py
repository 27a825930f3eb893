"""Conflicts, refusals and damaged bytes: S3 as emulators seldom show it."""

import asyncio
import base64
import hashlib
import os
import re
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError

from worker.errors import ObjectExists, StoreRefused, StoreUnavailable
from worker.transport import multipart
from worker.transport.clients import Clients
from worker.transport.store import S3Store, StoredObject, make_uri, parse_uri


class Service:
    """Answers `put_object` from a list of error codes; empty means stored."""

    def __init__(self, codes: list[str]) -> None:
        self.codes = codes
        self.puts: list[dict] = []

    async def put_object(self, **request):
        self.puts.append(request)
        code = self.codes.pop(0) if self.codes else ""
        if code:
            raise ClientError({"Error": {"Code": code}}, "PutObject")
        return {"ETag": '"etag"'}


def play(service: Service, scenario) -> list[float]:
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    asyncio.run(scenario(S3Store(SimpleNamespace(objects=service), sleep=nap)))
    return naps


def test_conflict_is_tried_again():
    async def scenario(store):
        assert (await store.put_if_absent("s3://b/k", b"x")).etag == "etag"

    service = Service(["ConditionalRequestConflict"] * 2)
    naps = play(service, scenario)
    assert len(service.puts) == 3
    assert len(naps) == 2
    assert all(0 < nap < 1 for nap in naps)


def test_conflict_that_the_other_one_won_is_object_exists():
    async def scenario(store):
        with pytest.raises(ObjectExists):
            await store.put_if_absent("s3://b/k", b"x")

    play(Service(["ConditionalRequestConflict", "PreconditionFailed"]), scenario)


def test_endless_conflict_is_unavailable():
    async def scenario(store):
        with pytest.raises(StoreUnavailable, match="another conditional PUT"):
            await store.put_if_absent("s3://b/k", b"x")

    service = Service(["ConditionalRequestConflict"] * 100)
    play(service, scenario)
    assert len(service.puts) == 6


@pytest.mark.parametrize(("code", "error"), [("AccessDenied", StoreRefused), ("SlowDown", StoreUnavailable)])
def test_errors_name_the_object(code, error):
    async def scenario(store):
        with pytest.raises(error, match="s3://b/k"):
            await store.put("s3://b/k", b"x")

    play(Service([code]), scenario)


def test_every_put_carries_its_checksum_and_only_conditional_ones_a_condition():
    async def scenario(store):
        await store.put_if_absent("s3://b/k", b"x", "application/json")
        await store.put("s3://b/k", b"x")

    service = Service([])
    play(service, scenario)
    first, second = service.puts
    assert first["ChecksumSHA256"] == second["ChecksumSHA256"]
    assert len(base64.b64decode(first["ChecksumSHA256"])) == 32
    assert (first["IfNoneMatch"], first["ContentType"]) == ("*", "application/json")
    assert "IfNoneMatch" not in second


def test_damaged_bytes_are_never_returned(aws):
    async def main():
        async with Clients() as clients:
            await clients.objects.create_bucket(Bucket="damaged")
            await clients.objects.put_object(
                Bucket="damaged",
                Key="k",
                Body=b"these are not the bytes",
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=base64.b64encode(bytes(32)).decode(),  # moto keeps it without looking
            )
            store = S3Store(clients)
            with pytest.raises(StoreUnavailable, match="checksum"):
                await store.get("s3://damaged/k")
            stored = await store.head("s3://damaged/k")
            assert stored
            with pytest.raises(StoreUnavailable, match="checksum"):
                [chunk async for chunk in store.stream(stored)]

    asyncio.run(main())


def test_body_cut_short_is_unavailable(monkeypatch):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 100\r\n\r\nshort')
        await writer.drain()
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        async with server, Clients() as clients:
            with pytest.raises(StoreUnavailable):
                await S3Store(clients).get("s3://b/k")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    asyncio.run(main())


def test_list_reads_every_page(aws):
    async def main():
        async with Clients() as clients:
            await clients.objects.create_bucket(Bucket="paged")
            store = S3Store(clients)
            for number in range(5):
                await store.put(f"s3://paged/p/{number}", b"x")
            whole = clients.objects.list_objects_v2
            pages = 0

            async def by_twos(**request):
                nonlocal pages
                pages += 1
                return await whole(**request, MaxKeys=2)

            store = S3Store(SimpleNamespace(objects=SimpleNamespace(list_objects_v2=by_twos)))
            listed = [stored.uri async for stored in store.list("s3://paged/p/")]
            assert listed == [f"s3://paged/p/{number}" for number in range(5)]
            assert pages == 3

    asyncio.run(main())


class Uploads:
    """Takes uploads in parts, and fails as it is told: by operation, an error code for each call."""

    def __init__(self, **codes: list[str]) -> None:
        self.codes = codes
        self.calls: Counter[str] = Counter()
        self.stored: bytes | None = None
        self.parts: dict[str, dict[int, bytes]] = {}

    def __getattr__(self, operation):
        async def call(**request):
            self.calls[operation] += 1
            codes = self.codes.get(operation)
            code = codes.pop(0) if codes else ""
            if code == "NoSuchUpload":
                self.stored = b"by a call whose answer was lost"
            if code:
                raise ClientError({"Error": {"Code": code}}, operation)
            return getattr(self, f"_{operation}")(**request)

        return call

    def _head_object(self, **request):
        if self.stored is None:
            raise ClientError({"Error": {"Code": "404"}}, "HeadObject")
        return {"ETag": '"etag"', "ContentLength": len(self.stored), "Metadata": {}}

    def _create_multipart_upload(self, **request):
        assert request["ChecksumAlgorithm"] == "SHA256"
        upload = f"upload-{len(self.parts)}"
        self.parts[upload] = {}
        return {"UploadId": upload}

    def _upload_part(self, **request):
        assert base64.b64decode(request["ChecksumSHA256"]) == hashlib.sha256(request["Body"]).digest()
        self.parts[request["UploadId"]][request["PartNumber"]] = request["Body"]
        return {"ETag": f'"{request["PartNumber"]}"'}

    def _complete_multipart_upload(self, **request):
        assert request["IfNoneMatch"] == "*"
        parts = self.parts.pop(request["UploadId"])
        assert [part["PartNumber"] for part in request["MultipartUpload"]["Parts"]] == sorted(parts)
        self.stored = b"".join(parts[number] for number in sorted(parts))
        return {"ETag": '"etag-3"'}

    def _abort_multipart_upload(self, **request):
        self.parts.pop(request["UploadId"], None)
        return {}


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr(multipart, "LEAST_BYTES", 1000)
    monkeypatch.setattr(multipart, "PART_BYTES", 400)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(250)) * 4)
    return path


def upload(service, path, error=None):
    async def scenario(store):
        with nullcontext() if error is None else pytest.raises(error), path.open("rb") as file:
            await store.put_file_if_absent("s3://b/k", file)

    return play(service, scenario)


def test_large_file_goes_in_parts(large):
    service = Uploads()
    upload(service, large)
    assert service.stored == large.read_bytes()
    assert service.calls["upload_part"] == 3


def test_many_parts_are_made_fewer(large, monkeypatch):
    monkeypatch.setattr(multipart, "MAX_PARTS", 2)
    service = Uploads()
    upload(service, large)
    assert service.stored == large.read_bytes()
    assert service.calls["upload_part"] == 2


@pytest.mark.parametrize("operation", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
@pytest.mark.parametrize(("code", "error"), [("SlowDown", StoreUnavailable), ("AccessDenied", StoreRefused)])
def test_upload_that_fails_leaves_no_parts_behind(operation, code, error, large):
    service = Uploads(**{operation: [code]})
    upload(service, large, error)
    assert not service.parts
    assert service.stored is None


def test_parts_that_cannot_be_removed_do_not_hide_what_went_wrong(large):
    service = Uploads(upload_part=["AccessDenied"], abort_multipart_upload=["AccessDenied"])
    upload(service, large, StoreRefused)
    assert service.calls["abort_multipart_upload"] == 1


def test_upload_that_is_cancelled_leaves_no_parts_behind(large):
    service, waiting = Uploads(), asyncio.Event()

    async def never_ending(**request):
        waiting.set()
        await asyncio.Event().wait()

    service.complete_multipart_upload = never_ending

    async def scenario(store):
        with large.open("rb") as file:
            task = asyncio.create_task(store.put_file_if_absent("s3://b/k", file))
            await waiting.wait()
            assert service.parts
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    play(service, scenario)
    assert not service.parts


def test_conflict_at_the_end_of_an_upload_sends_all_parts_again(large):
    service = Uploads(complete_multipart_upload=["ConditionalRequestConflict"])
    naps = upload(service, large)
    assert service.stored == large.read_bytes()
    assert (service.calls["upload_part"], len(naps), service.parts) == (6, 1, {})


@pytest.mark.parametrize("code", ["PreconditionFailed", "NoSuchUpload"])
def test_upload_that_somebody_ended_first_is_object_exists(code, large):
    """NoSuchUpload: it was ended by the very call whose answer did not come."""
    service = Uploads(complete_multipart_upload=[code])
    upload(service, large, ObjectExists)
    assert service.calls["create_multipart_upload"] == 1


def test_nothing_is_sent_where_an_object_is(large):
    service = Uploads()
    service.stored = b"there"
    upload(service, large, ObjectExists)
    assert service.calls == {"head_object": 1}


class Flaky:
    """Serves an object whose connections break after so many bytes each; 0 is before the headers.

    `short` answers are as if no more had been asked for. One that `ignores` ranges gives all of it always.
    """

    def __init__(self, body: bytes, breaks: list[int], *, short: bool = False, ignores: bool = False) -> None:
        self.body, self.breaks = body, breaks
        self.short, self.ignores = short, ignores
        self.ranges: list[str | None] = []

    async def __call__(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert 'if-match: "etag"' in head
        asked = re.search(r"range: bytes=(\d+)-(\d+)", head)
        self.ranges.append(asked and asked[0])
        asked = None if self.ignores else asked
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(self.body))
        body = self.body[start:stop]
        status = "206 Partial Content" if asked else "200 OK"
        cut = self.breaks.pop(0) if self.breaks else len(body)
        if asked:
            status += f"\r\nContent-Range: bytes {start}-{stop - 1}/{len(self.body)}"
        if self.short:
            body = body[:cut]
        if cut:
            writer.write(f'HTTP/1.1 {status}\r\nETag: "etag"\r\nContent-Length: {len(body)}\r\n\r\n'.encode())
            writer.write(body[:cut])
            await writer.drain()
        writer.close()


def stream_from(flaky, monkeypatch, start=0, stop=None):
    """What comes, and how often the store waited before it went on."""
    naps = []

    async def nap(seconds):
        naps.append(seconds)

    async def main():
        server = await asyncio.start_server(flaky, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        async with server, Clients(max_attempts=1) as clients:
            stored = StoredObject("s3://b/k", "etag", len(flaky.body))
            chunks = S3Store(clients, sleep=nap).stream(stored, start, stop)
            return b"".join([chunk async for chunk in chunks])

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return asyncio.run(main()), naps


@pytest.mark.parametrize("short", [False, True])
def test_stream_goes_on_where_it_broke(short, monkeypatch):
    """However often: what counts are tries in a row that bring nothing."""
    body = bytes(range(250)) * 40_000
    flaky = Flaky(body, [3_000_000, 0, 0, *[1_000_000] * 6], short=short)
    got, naps = stream_from(flaky, monkeypatch, 17)
    assert got == body[17:]
    assert not flaky.breaks
    assert len(naps) >= 7  # a connection that is closed unused is replaced without a word
    assert flaky.ranges[0] == f"range: bytes=17-{len(body) - 1}"
    assert flaky.ranges[1] == flaky.ranges[2] != flaky.ranges[0]


def test_stream_that_brings_nothing_any_more_is_unavailable(monkeypatch):
    flaky = Flaky(bytes(3_000_000), [2_000_000, *[0] * 100])
    with pytest.raises(StoreUnavailable):
        stream_from(flaky, monkeypatch)
    assert len(flaky.breaks) > 80


@pytest.mark.parametrize(("start", "breaks"), [(17, []), (0, [1_000_000])])
def test_store_that_gives_no_parts_is_refused(start, breaks, monkeypatch):
    with pytest.raises(StoreRefused, match="None came for bytes"):
        stream_from(Flaky(bytes(3_000_000), breaks, ignores=True), monkeypatch, start)


def test_overwritten_object_is_not_asked_for_again():
    class Gone:
        calls = 0

        async def get_object(self, **request):
            self.calls += 1
            raise ClientError({"Error": {"Code": "PreconditionFailed"}}, "GetObject")

    async def scenario(store):
        with pytest.raises(StoreUnavailable, match="overwritten"):
            [chunk async for chunk in store.stream(StoredObject("s3://b/k", "etag", 10))]

    service = Gone()
    assert play(service, scenario) == []
    assert service.calls == 1


def test_file_that_becomes_shorter_while_it_is_sent_is_not_stored(large, monkeypatch):
    service = Uploads()
    read = multipart._read

    def shrinking(file, start, size):
        os.truncate(large, 900)
        return read(file, start, size)

    monkeypatch.setattr(multipart, "_read", shrinking)
    upload(service, large, OSError)
    assert (service.stored, service.parts) == (None, {})


def test_uri_and_parts_are_the_same_thing():
    for uri in ("s3://b/", "s3://b/k", "s3://b/a//b", "s3://b/a?b#c%20d"):
        assert make_uri(*parse_uri(uri)) == uri
    assert parse_uri("s3://b") == ("b", "")
