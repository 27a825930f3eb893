"""The mirror: pass after pass, readiness, stopping, and two syncers on one volume."""

import asyncio
from itertools import pairwise

import msgspec

from adapters_sync import disk
from adapters_sync.errors import RemoteUnavailable
from adapters_sync.layout import AdapterState, resolve, scan
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


def only_short_sleeps(world, mirror, instead=lambda: None):
    """Sleeps up to a second pass time; `instead` is called for any other, which lasts for ever."""

    async def sleep(seconds):
        if seconds <= 1:
            await world.time.sleep(seconds)
        else:
            instead()
            await asyncio.Event().wait()

    mirror._clock = msgspec.structs.replace(mirror._clock, sleep=sleep)


def run_passes(world, mirror, number, after_each=lambda: None):
    """Run the mirror for so many passes; the times at which they ended."""
    stop, times = asyncio.Event(), []
    start = world.time.seconds

    def on_pass(report):
        times.append(world.time.seconds - start)
        after_each()
        if len(times) == number:
            stop.set()

    async def run():
        await asyncio.wait_for(mirror.run(stop, on_pass), 10)
        return times

    return run()


def test_wake_begins_the_next_pass_a_second_after_the_last(world):
    async def work(mirror):
        only_short_sleeps(world, mirror)
        return await run_passes(world, mirror, 4, after_each=mirror.wake)

    assert world.with_mirror(work, interval_seconds=3600) == [0, 1, 2, 3]


def test_wake_begins_the_next_pass_at_once_when_the_last_is_long_over(world):
    async def work(mirror):
        only_short_sleeps(world, mirror, instead=mirror.wake)
        return await run_passes(world, mirror, 2)

    assert world.with_mirror(work, interval_seconds=3600) == [0, 1]


def test_a_wake_during_a_pass_is_not_lost(world, monkeypatch):
    real = MemoryBucket.list

    async def work(mirror):
        async def woken(self):
            found = await real(self)
            monkeypatch.setattr(MemoryBucket, "list", real)
            mirror.wake()
            return found

        only_short_sleeps(world, mirror)
        monkeypatch.setattr(MemoryBucket, "list", woken)
        return await run_passes(world, mirror, 2)

    assert world.with_mirror(work, interval_seconds=3600) == [0, 1]


def test_a_plain_upload_is_served_when_it_has_settled_however_long_the_interval(world):
    for name, data in adapter_files().items():
        world.bucket.put(f"a/{name}", data)

    async def work(mirror):
        times = await run_passes(world, mirror, 2)
        return times, mirror.state.find("a").state

    assert world.with_mirror(work, interval_seconds=3600) == ([0, 60], AdapterState.READY)


def test_a_later_upload_does_not_put_off_an_earlier_one(world):
    late = iter([{"late": 2}])

    def upload(fill, name):
        for path, data in adapter_files(fill=fill).items():
            world.bucket.put(f"{name}/{path}", data)

    async def work(mirror):
        found = []

        def after_each():
            for name, fill in next(late, {}).items():
                upload(fill, name)
            found.append([one.name for one in scan(world.adapters_dir)])

        times = await run_passes(world, mirror, 4, after_each)
        return [*zip(times, found, strict=True)]

    upload(1, "early")
    assert world.with_mirror(work, interval_seconds=40) == [
        (0, []), (40, []), (60, ["early"]), (100, ["early", "late"]),
    ]  # fmt: skip


def test_an_upload_that_never_comes_to_rest_does_not_make_it_list_all_the_time(world):
    numbers = iter(range(100))

    def change():
        for path, data in adapter_files(fill=next(numbers)).items():
            world.bucket.put(f"a/{path}", data)

    async def work(mirror):
        return await run_passes(world, mirror, 14, after_each=change)

    change()
    times = world.with_mirror(work, interval_seconds=1000, settle_seconds=1)
    assert [later - earlier for earlier, later in pairwise(times)] == [2**n for n in range(10)] + [1000] * 3


def test_half_an_upload_waits_for_the_interval(world):
    world.bucket.put("a/adapter_config.json", config())

    async def work(mirror):
        return await run_passes(world, mirror, 3)

    assert world.with_mirror(work, interval_seconds=3600) == [0, 3600, 7200]


def test_an_upload_that_is_replaced_between_two_wakes_is_not_deleted(world):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("b", fill=2)
    steps = iter([lambda: world.bucket.remove_adapter("a"), *[lambda: None] * 4])

    async def work(mirror):
        def after_each():
            next(steps, lambda: world.bucket.put_adapter("a", fill=3))()
            assert resolve(world.adapters_dir, "a") is not None
            mirror.wake()

        return await run_passes(world, mirror, 9, after_each)

    assert world.with_mirror(work) == [*range(9)]
    assert len({one.version for one in scan(world.adapters_dir)}) == 2


def test_an_upload_that_stays_away_is_deleted_though_wakes_never_end(world):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("b", fill=2)
    seen = []

    async def work(mirror):
        def after_each():
            world.bucket.remove_adapter("a")
            seen.append(resolve(world.adapters_dir, "a") is not None)
            mirror.wake()

        await run_passes(world, mirror, 20, after_each)

    world.with_mirror(work, settle_seconds=10)
    assert seen == [True] * 11 + [False] * 9


def test_a_deletion_is_confirmed_after_the_settle_time_however_long_the_interval(world):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("b", fill=2)
    world.sync()
    world.bucket.remove_adapter("a")

    async def work(mirror):
        return await run_passes(world, mirror, 2)

    assert world.with_mirror(work, interval_seconds=3600) == [0, 60]
    assert [one.name for one in scan(world.adapters_dir)] == ["b"]


def test_a_pass_that_was_asked_for_and_failed_is_tried_again_soon(world, monkeypatch):
    real, answers = MemoryBucket.list, iter([True, False, False, False])

    async def sometimes(self):
        if not next(answers, True):
            raise RemoteUnavailable("throttled")
        return await real(self)

    async def work(mirror):
        mirror.wake()
        monkeypatch.setattr(MemoryBucket, "list", sometimes)
        return await run_passes(world, mirror, 6)

    assert world.with_mirror(work, interval_seconds=3600) == [0, 1, 2, 4, 8, 3608]


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

        async def broken(**_):
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
        await asyncio.sleep(0)  # time for the others to begin
        async for chunk in real(self, path, etag):
            yield chunk
        running -= 1

    monkeypatch.setattr(MemoryBucket, "read", counted)
    report = world.sync(files_at_once=2, adapters_at_once=3)
    assert len(report.published) == 6
    assert most == 2
