"""Conflicts, refusals and damaged bytes: S3 as emulators seldom show it."""

import asyncio
import base64
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError

from worker.errors import ObjectExists, StoreRefused, StoreUnavailable
from worker.transport.clients import Clients
from worker.transport.store import S3Store, make_uri, parse_uri


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


def test_uri_and_parts_are_the_same_thing():
    for uri in ("s3://b/", "s3://b/k", "s3://b/a//b", "s3://b/a?b#c%20d"):
        assert make_uri(*parse_uri(uri)) == uri
    assert parse_uri("s3://b") == ("b", "")
