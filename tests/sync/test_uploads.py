"""Uploads in motion: whatever an uploader is in the middle of, readers have one whole version or another."""

import pytest
from botocore.exceptions import EndpointConnectionError

from adapters_sync.layout import AdapterState, check_folder, resolve, scan
from adapters_sync.report import FailureKind
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, config, state_of, weights
from tests.sync.memory_s3 import MemoryBucket


def test_an_upload_overwritten_while_it_is_fetched_is_not_published_as_a_mixture(world, monkeypatch):
    world.bucket.put_adapter("a", fill=1)
    world.sync()
    good = resolve(world.adapters_dir, "a")
    world.bucket.put_adapter("a", fill=2, r=8)
    real = MemoryBucket.read

    async def overtaken(self, path, etag):
        """All is overwritten once the first file has been read to its end."""
        async for chunk in real(self, path, etag):
            yield chunk
        if path == f"a/{CONFIG}":
            world.bucket.put_adapter("a", fill=3, r=16)

    async def work(mirror):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryBucket, "read", overtaken)
            report = await mirror.run_once()
        assert report.failures == {FailureKind.CHANGED: 1}
        assert resolve(world.adapters_dir, "a") == good
        assert mirror.state.find("a").state is AdapterState.PENDING
        return await mirror.run_once()

    assert world.with_mirror(work, files_at_once=1).published
    found = resolve(world.adapters_dir, "a")
    assert check_folder(found.path).rank == 16
    assert (found.path / WEIGHTS).read_bytes() == weights(3)


def test_an_object_overwritten_in_the_middle_of_its_read_is_read_whole_or_not_at_all(s3_world):
    large = {size: {CONFIG: config(), WEIGHTS: weights(size % 7, size=size)} for size in (3 << 20, 4 << 20)}
    old, new = large.values()
    s3_world.bucket.put_adapter("a", old)

    async def work(mirror):
        client = mirror._passes._remote._client
        overwritten = []

        def overtake(**kwargs):
            if not overwritten:
                overwritten.append(True)
                s3_world.bucket.put(f"a/{WEIGHTS}", new[WEIGHTS])

        client.meta.events.register("after-call.s3.GetObject", overtake)
        await mirror.run_once()
        found = resolve(s3_world.adapters_dir, "a")
        assert found is None or (found.path / WEIGHTS).read_bytes() in (old[WEIGHTS], new[WEIGHTS])
        s3_world.bucket.put_adapter("a", new)
        await mirror.run_once()

    s3_world.with_mirror(work)
    assert (resolve(s3_world.adapters_dir, "a").path / WEIGHTS).read_bytes() == new[WEIGHTS]


def test_half_an_upload_is_pending_for_as_long_as_it_is_half(world):
    files = adapter_files() | {"tokenizer.json": b"{}"}

    async def work(mirror):
        for number, name in enumerate([*files, "_SUCCESS"]):
            before = [mirror.state.find("a").state] if number else []
            world.bucket.put(f"a/{name}", files.get(name, b""))
            for _ in range(3):  # each time shorter than settling takes
                await mirror.run_once()
                world.time += 19
            assert scan(world.adapters_dir) == []
            assert set(before) <= {AdapterState.PENDING}
        world.time += 60
        await mirror.run_once()

    world.with_mirror(work, settle_seconds=60)
    assert {path.name for path in resolve(world.adapters_dir, "a").path.iterdir()} >= files.keys()


@pytest.mark.parametrize("first", [CONFIG, WEIGHTS])
def test_half_an_upload_is_never_published_whatever_comes_first(world, first):
    world.bucket.put(f"a/{first}", adapter_files()[first])

    async def work(mirror):
        for _ in range(5):
            await mirror.run_once()
            world.time += 1000

    world.with_mirror(work, settle_seconds=60)
    assert state_of(world, "a").state is AdapterState.PENDING
    assert "is missing" in state_of(world, "a").reason
    assert scan(world.adapters_dir) == []


def test_a_manifest_that_is_there_before_its_files_waits_for_them(world):
    world.bucket.put_adapter("a")
    withheld = world.bucket.get(f"a/{WEIGHTS}")
    world.bucket.remove(f"a/{WEIGHTS}")
    world.sync(passes=3)
    assert state_of(world, "a").state is AdapterState.PENDING
    world.bucket.put(f"a/{WEIGHTS}", withheld)
    assert world.sync().published


@pytest.mark.parametrize("fill", [1, 2])
def test_deleted_and_uploaded_again_between_two_passes_is_just_another_version_or_none(any_world, fill):
    any_world.bucket.put_adapter("a", fill=1)
    any_world.bucket.put_adapter("b", fill=9)

    async def work(mirror):
        await mirror.run_once()
        first = resolve(any_world.adapters_dir, "a")
        any_world.bucket.remove_adapter("a")
        any_world.bucket.put_adapter("a", fill=fill)
        report = await mirror.run_once()
        assert report.deleted == ()
        return first, report

    first, report = any_world.with_mirror(work)
    found = resolve(any_world.adapters_dir, "a")
    assert (found.path / WEIGHTS).read_bytes() == weights(fill)
    assert (found == first) is (fill == 1)
    assert bool(report.published) is (fill == 2)


def test_an_adapter_that_comes_back_as_another_one_after_a_listing_without_it_is_replaced(world):
    world.bucket.put_adapter("a", fill=1)
    world.bucket.put_adapter("b", fill=9)

    async def work(mirror):
        await mirror.run_once()
        world.bucket.remove_adapter("a")
        await mirror.run_once()
        world.bucket.put_adapter("a", fill=2)
        report = await mirror.run_once()
        assert report.deleted == ()
        assert len(report.published) == 1
        await mirror.run_once()

    world.with_mirror(work)
    assert (resolve(world.adapters_dir, "a").path / WEIGHTS).read_bytes() == weights(2)


def test_a_listing_that_fails_at_its_second_page_is_no_listing(s3_world):
    for number in range(4):
        s3_world.bucket.put_adapter(f"a{number}", fill=number)

    async def work(mirror):
        await mirror.run_once()
        client = mirror._passes._remote._client
        listed = []

        def small_pages(params, **kwargs):
            params["MaxKeys"] = 4

        def fail_later(**kwargs):
            listed.append(True)
            if len(listed) > 1:
                raise EndpointConnectionError(endpoint_url="gone")

        client.meta.events.register("provide-client-params.s3.ListObjectsV2", small_pages)
        client.meta.events.register("before-call.s3.ListObjectsV2", fail_later)
        for _ in range(3):
            listed.clear()
            report = await mirror.run_once()
            assert len(listed) == 2
            assert report.failures == {FailureKind.LIST: 1}

    s3_world.with_mirror(work)
    assert len(scan(s3_world.adapters_dir)) == 4
