"""The mirror: pass after pass, readiness, stopping, and two syncers on one volume."""

import asyncio
from itertools import pairwise

import msgspec

from adapters_sync import disk
from adapters_sync.errors import RemoteUnavailable
from adapters_sync.layout import resolve, scan
from adapters_sync.report import FailureKind
from tests.sync.builders import (
    WEIGHTS,
    adapter_files,
    config,
)
from tests.sync.memory_s3 import MemoryBucket


def test_two_syncers_on_one_volume_do_not_fight(world):
    world.bucket.put_adapter("a")

    async def work(mirror):
        other = world.mirror(mirror._passes._remote)
        with disk.exclusive(world.paths.lock_file):
            report = await other.run_once()
            assert report.failures == {FailureKind.LOCKED: 1}
            assert not other.ready
        reports = await asyncio.gather(mirror.run_once(), other.run_once())
        assert sorted(one.ok for one in reports) == [False, True]
        assert (await other.run_once()).ok

    world.with_mirror(work)
    assert resolve(world.adapters_dir, "a") is not None


def test_a_mirror_is_ready_after_its_first_full_pass(world, monkeypatch):
    real = MemoryBucket.list

    async def failing(self):
        raise RemoteUnavailable("no")

    async def work(mirror):
        assert not mirror.ready
        monkeypatch.setattr(MemoryBucket, "list", failing)
        await mirror.run_once()
        assert not mirror.ready
        monkeypatch.setattr(MemoryBucket, "list", real)
        await mirror.run_once()
        assert mirror.ready
        monkeypatch.setattr(MemoryBucket, "list", failing)
        await mirror.run_once()
        assert mirror.ready

    world.with_mirror(work)


def test_run_passes_again_after_an_interval_with_jitter_and_ends_when_told(world):
    times = []

    async def work(mirror):
        stop = asyncio.Event()

        def on_pass(report):
            times.append(world.time.seconds)
            if len(times) == 3:
                stop.set()

        await mirror.run(stop, on_pass)

    world.with_mirror(work, interval_seconds=30)
    assert [later - earlier for earlier, later in pairwise(times)] == [30, 30]


def test_wake_begins_the_next_pass_at_once(world):
    async def work(mirror):
        stop, passes = asyncio.Event(), []

        def on_pass(report):
            passes.append(report)
            mirror.wake() if len(passes) < 3 else stop.set()

        async def for_ever(seconds):
            await asyncio.Event().wait()

        mirror._clock = msgspec.structs.replace(mirror._clock, sleep=for_ever)
        await asyncio.wait_for(mirror.run(stop, on_pass), 10)

    world.with_mirror(work)


def test_a_stop_cancels_a_pass_under_way_and_the_next_start_goes_on(world, monkeypatch):
    world.bucket.put_adapter("a")

    async def work(mirror):
        stop = asyncio.Event()
        real = MemoryBucket.read

        async def stuck(self, path, etag):
            if path.endswith(WEIGHTS):
                stop.set()
                await asyncio.Event().wait()
            async for chunk in real(self, path, etag):
                yield chunk

        with monkeypatch.context() as patch:
            patch.setattr(MemoryBucket, "read", stuck)
            await asyncio.wait_for(mirror.run(stop), 10)
        assert scan(world.adapters_dir) == []
        return await mirror.run_once()

    assert world.with_mirror(work).published


def test_run_outlives_a_mistake_of_ours(world, monkeypatch):
    async def work(mirror):
        stop, reports = asyncio.Event(), []

        async def broken():
            raise ZeroDivisionError

        def on_pass(report):
            reports.append(report)
            monkeypatch.undo()
            if len(reports) == 2:
                stop.set()

        monkeypatch.setattr(mirror._passes, "run", broken)
        await mirror.run(stop, on_pass)
        return reports

    first, _ = world.with_mirror(work)
    assert first.failures == {FailureKind.INTERNAL: 1}


def test_settle_ends_with_plain_uploads_published_and_absent_adapters_gone(world):
    world.bucket.put_adapter("keep")
    world.bucket.put_adapter("gone", fill=2)
    world.sync()
    world.bucket.remove_adapter("gone")
    for name, data in adapter_files(fill=3).items():
        world.bucket.put(f"plain/{name}", data)
    world.bucket.put("half/adapter_config.json", config())

    async def work(mirror):
        return await mirror.settle(asyncio.Event())

    report = world.with_mirror(work, settle_seconds=60)
    assert report.ok
    assert [one.name for one in scan(world.adapters_dir)] == ["keep", "plain"]


def test_fetches_are_bounded(world, monkeypatch):
    for number in range(6):
        world.bucket.put_adapter(f"a{number}", fill=number)
    running, most = 0, 0
    real = MemoryBucket.read

    async def counted(self, path, etag):
        nonlocal running, most
        running += 1
        most = max(most, running)
        async for chunk in real(self, path, etag):
            yield chunk
        running -= 1

    monkeypatch.setattr(MemoryBucket, "read", counted)
    report = world.sync(files_at_once=2, adapters_at_once=3)
    assert len(report.published) == 6
    assert most == 2
