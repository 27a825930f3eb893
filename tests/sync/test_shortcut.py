"""Reads that do not take the SDK's whole way: what they bring, and when the SDK is asked after all."""

import asyncio
from contextlib import aclosing

import pytest
from botocore.credentials import Credentials
from botocore.exceptions import ConnectionClosedError

from adapters_sync import remote as remote_module
from adapters_sync.errors import ObjectChanged, RemoteUnavailable
from adapters_sync.remote import connect

ODD = ["a/plus+and space.json", "a/ä~(1)'%41.json", "a/model/adapters/a/again.json", "a/deep/er/x.json"]


def with_warm_remote(bucket, work):
    """Run `work` with a remote that has read one object, the list of its calls to the SDK, and a listing."""

    async def main():
        bucket.put("a/first.json", b"first")
        async with connect(bucket.source) as remote:
            calls = []
            remote._client.meta.events.register(
                "before-call.s3.GetObject", lambda params, **_: calls.append(params["url_path"])
            )
            listed = {one.path: one for one in await remote.list()}
            assert await read(remote, listed["a/first.json"]) == b"first"
            assert len(calls) == 1
            await work(remote, calls, listed)

    asyncio.run(main())


async def read(remote, listed):
    async with aclosing(remote.read(listed.path, listed.etag)) as chunks:
        return b"".join([chunk async for chunk in chunks])


def test_after_the_first_object_the_sdk_is_not_asked_whatever_the_key(bucket):
    for number, path in enumerate(ODD):
        bucket.put(path, f"content {number}".encode())

    async def work(remote, calls, listed):
        contents = await asyncio.gather(*(read(remote, listed[path]) for path in ODD))
        assert contents == [f"content {number}".encode() for number in range(len(ODD))]
        assert len(calls) == 1

    with_warm_remote(bucket, work)


def test_a_long_object_comes_in_pieces_and_whole(bucket):
    data = bytes(range(256)) * (3 * remote_module._READ_BYTES // 256) + b"end"
    bucket.put("a/long.json", data)

    async def work(remote, calls, listed):
        assert await read(remote, listed["a/long.json"]) == data
        assert len(calls) == 1

    with_warm_remote(bucket, work)


def test_another_object_than_the_listed_one_is_not_read_and_connections_are_given_back(bucket):
    bucket.put("a/x.json", b"old")
    bucket.put("a/gone.json", b"x")

    async def work(remote, calls, listed):
        bucket.put("a/x.json", b"new")
        bucket.remove("a/gone.json")
        for _ in range(remote_module.MAX_CONNECTIONS + 1):
            with pytest.raises(ObjectChanged):
                await read(remote, listed["a/x.json"])
        with pytest.raises(ObjectChanged):
            await read(remote, listed["a/gone.json"])
        assert await read(remote, listed["a/first.json"]) == b"first"

    with_warm_remote(bucket, lambda *args: asyncio.wait_for(work(*args), 60))


def test_a_wrong_checksum_is_not_read_as_content(bucket):
    bucket.put("a/x.json", b"content")

    async def work(remote, calls, listed):
        send = remote._shortcut._send

        async def tampering(request):
            response = await send(request)
            (header,) = [name for name in response.headers if name.startswith("x-amz-checksum-crc")]
            response.headers[header] = "AAAAAA=="
            return response

        remote._shortcut._send = tampering
        with pytest.raises(RemoteUnavailable, match="checksum"):
            await read(remote, listed["a/x.json"])
        assert len(calls) == 1

    with_warm_remote(bucket, work)


@pytest.mark.parametrize("trouble", ["an error", "a redirect", "a broken connection"])
def test_what_is_no_plain_success_is_left_to_the_sdk(bucket, trouble):
    bucket.put("a/x.json", b"content")

    async def work(remote, calls, listed):
        send = remote._shortcut._send

        async def failing(request):
            if trouble == "a broken connection":
                raise ConnectionClosedError(endpoint_url=request.url)
            response = await send(request)
            response.status_code = 503 if trouble == "an error" else 301
            return response

        remote._shortcut._send = failing
        assert await read(remote, listed["a/x.json"]) == b"content"
        assert len(calls) == 2

    with_warm_remote(bucket, work)


def test_each_read_is_signed_with_the_credentials_of_its_moment(bucket):
    async def work(remote, calls, listed):
        send, keys = remote._shortcut._send, []

        async def watched(request):
            keys.append(request.headers["Authorization"])
            return await send(request)

        remote._shortcut._send = watched
        signer = remote._client._request_signer
        before = await signer._credentials.get_frozen_credentials()
        renewed = Credentials("renewed", before.secret_key, "token")

        class Renewed:
            async def get_frozen_credentials(self):
                return renewed.get_frozen_credentials()

        await read(remote, listed["a/first.json"])
        signer._credentials = Renewed()
        request = remote._shortcut._pattern.copy(remote._shortcut._prefix, "a/first.json", '"e"')
        await signer.sign("GetObject", request)
        assert f"Credential={before.access_key}/" in keys[0]
        assert "Credential=renewed/" in request.headers["Authorization"]
        assert request.headers["X-Amz-Security-Token"] == "token"

    with_warm_remote(bucket, work)
