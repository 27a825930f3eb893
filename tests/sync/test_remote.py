import asyncio
import hashlib
from contextlib import aclosing

import pytest

from adapters_sync import remote as remote_module
from adapters_sync.errors import ObjectChanged, RemoteUnavailable
from adapters_sync.remote import connect
from adapters_sync.uris import S3Prefix
from tests.sync import servers
from tests.sync.conftest import SERVERS


def with_remote(source, work):
    async def main():
        async with connect(source) as remote:
            return await work(remote)

    return asyncio.run(main())


async def read_all(remote, path, etag):
    async with aclosing(remote.read(path, etag)) as chunks:
        return b"".join([chunk async for chunk in chunks])


def test_seaweedfs_takes_part_in_what_is_tested_with_a_server():
    if servers.weed() is None:
        pytest.skip(servers.WHY_NOT)
    assert "seaweedfs" in SERVERS


def test_a_listing_takes_every_page_and_no_siblings(bucket, monkeypatch):
    for number in range(7):
        bucket.put(f"a/{number}.json", b"x" * (number + 1))
    bucket.client.put_object(Bucket=bucket.name, Key="model/adapters-old/b/x.json", Body=b"x")

    async def work(remote):
        paginate = remote._client.get_paginator("list_objects_v2").__class__.paginate
        monkeypatch.setattr(
            remote._client.get_paginator("list_objects_v2").__class__,
            "paginate",
            lambda self, **kwargs: paginate(self, **kwargs, PaginationConfig={"PageSize": 3}),
        )
        return await remote.list()

    found = with_remote(bucket.source, work)
    assert [(one.path, one.size) for one in found] == [
        (f"a/{number}.json", number + 1) for number in range(7)
    ]
    assert all(one.etag and one.modified > 1e9 for one in found)


def test_reading_gives_exactly_the_object_that_was_listed(any_world):
    bucket = any_world.bucket

    async def main():
        bucket.put("a/x.json", b"old" * 1000)
        async with bucket.connect() as remote:
            (listed,) = await remote.list()
            assert (listed.path, listed.size) == ("a/x.json", 3000)
            assert listed.modified == int(listed.modified)
            assert await read_all(remote, listed.path, listed.etag) == b"old" * 1000
            bucket.put("a/x.json", b"new" * 1000)
            assert (await remote.list())[0].etag != listed.etag
            with pytest.raises(ObjectChanged):
                await read_all(remote, listed.path, listed.etag)
            bucket.remove("a/x.json")
            assert await remote.list() == []
            with pytest.raises(ObjectChanged):
                await read_all(remote, listed.path, listed.etag)

    asyncio.run(main())


def test_a_wrong_checksum_is_not_read_as_content(bucket, monkeypatch):
    bucket.put("a/x.json", b"content")

    async def work(remote):
        (listed,) = await remote.list()
        real = remote._client.get_object

        async def tampering(**kwargs):
            assert kwargs["ChecksumMode"] == "ENABLED"
            answer = await real(**kwargs)
            assert hasattr(answer["Body"], "_expected"), "the SDK is not verifying"
            answer["Body"]._expected = "AAAAAA=="
            return answer

        monkeypatch.setattr(remote._client, "get_object", tampering)
        with pytest.raises(RemoteUnavailable, match="checksum"):
            await read_all(remote, listed.path, listed.etag)

    with_remote(bucket.source, work)


def test_a_bucket_that_is_not_there_is_unavailable_and_not_empty(bucket):
    async def work(remote):
        with pytest.raises(
            RemoteUnavailable, match="cannot list s3://no-such-bucket/m/adapters/: NoSuchBucket"
        ):
            await remote.list()
        with pytest.raises((RemoteUnavailable, ObjectChanged)):  # some servers say NoSuchKey
            await read_all(remote, "a/x.json", '"e"')

    with_remote(S3Prefix("no-such-bucket", "m/adapters/"), work)


def test_a_server_that_cannot_be_reached_is_unavailable(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr(remote_module, "MAX_ATTEMPTS", 1)

    async def work(remote):
        with pytest.raises(RemoteUnavailable, match="cannot list"):
            await remote.list()

    with_remote(bucket.source, work)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_long_file_goes_up_in_parts_and_comes_back_the_same(bucket, tmp_path, extra):
    data = bytes(range(256)) * ((remote_module.PART_BYTES + 255) // 256)
    data = (data + b"x")[: remote_module.PART_BYTES + extra]
    (tmp_path / "big.json").write_bytes(data)
    told = []

    async def work(remote):
        return await remote.put_file("a/big.json", tmp_path / "big.json", told.append)

    assert with_remote(bucket.source, work) == hashlib.sha256(data).hexdigest()
    assert bucket.get("a/big.json") == data
    assert sum(told) == len(data)


def test_a_failed_upload_in_parts_is_aborted(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "PART_BYTES", 1024)
    (tmp_path / "big.json").write_bytes(bytes(3000))

    async def work(remote):
        async def failing(**kwargs):
            raise OSError("gone")

        monkeypatch.setattr(remote._client, "upload_part", failing)
        with pytest.raises(RemoteUnavailable, match="gone"):
            await remote.put_file("a/big.json", tmp_path / "big.json", lambda count: None)

    with_remote(bucket.source, work)
    assert not bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")
    assert bucket.paths() == []
