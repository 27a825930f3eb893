"""The mirror: when adapters and old versions go, and when they must not."""

import pytest

from adapters_sync import passes
from adapters_sync.errors import RemoteUnavailable
from adapters_sync.layout import read_state, resolve, scan
from adapters_sync.publish import collect
from adapters_sync.report import FailureKind
from tests.sync.builders import WEIGHTS
from tests.sync.memory_s3 import MemoryBucket


def test_an_adapter_goes_after_two_listings_and_its_version_waits_out_the_grace_time(world):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("b", fill=2)

    async def work(mirror):
        await mirror.run_once()
        held = resolve(world.adapters_dir, "a")
        world.bucket.remove_adapter("a")
        assert (await mirror.run_once()).deleted == ()
        assert resolve(world.adapters_dir, "a") == held
        assert (await mirror.run_once()).deleted == ("a",)
        assert resolve(world.adapters_dir, "a") is None
        assert (held.path / WEIGHTS).exists()
        world.time += 99
        await mirror.run_once()
        assert (held.path / WEIGHTS).exists()
        world.time += 1
        assert (await mirror.run_once()).collected == 1
        assert not held.path.parent.exists()
        assert mirror.state.find("a") is None

    world.with_mirror(work, grace_seconds=100)
    assert [one.name for one in scan(world.adapters_dir)] == ["b"]


def test_an_adapter_that_comes_back_is_not_deleted(world):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("b", fill=2)

    async def work(mirror):
        await mirror.run_once()
        for _ in range(3):
            world.bucket.remove_adapter("a")
            await mirror.run_once()
            world.bucket.put_adapter("a")
            await mirror.run_once()
        return resolve(world.adapters_dir, "a")

    assert world.with_mirror(work) is not None


def test_a_failed_listing_deletes_nothing_and_breaks_the_row(world, monkeypatch):
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("b", fill=2)
    real = MemoryBucket.list

    async def failing(self):
        raise RemoteUnavailable("throttled")

    async def work(mirror):
        await mirror.run_once()
        world.bucket.remove_adapter("a")
        await mirror.run_once()
        for listing, deleted in ((failing, ()), (real, ()), (failing, ()), (real, ()), (real, ("a",))):
            monkeypatch.setattr(MemoryBucket, "list", listing)
            report = await mirror.run_once()
            assert report.ok is (listing is real)
            assert report.deleted == deleted
            if listing is failing:
                assert report.failures == {FailureKind.LIST: 1}
                assert read_state(world.paths.state_file).error == "throttled"
                assert len(read_state(world.paths.state_file).adapters) == 2

    world.with_mirror(work)
    assert read_state(world.paths.state_file).error is None


@pytest.mark.parametrize("allow_empty", [False, True])
def test_an_empty_prefix_empties_the_mirror_only_when_that_is_allowed(world, allow_empty):
    for name in "abc":
        world.bucket.put_adapter(name)
    world.sync()
    for name in "abc":
        world.bucket.remove_adapter(name)
    world.sync(passes=5, allow_empty=allow_empty)
    assert len(scan(world.adapters_dir)) == (0 if allow_empty else 3)


def test_an_old_version_still_linked_is_never_collected(world):
    world.bucket.put_adapter("a")
    world.sync()
    world.time += 1e6
    world.sync(grace_seconds=0)
    assert resolve(world.adapters_dir, "a") is not None


def test_old_versions_are_looked_for_only_when_there_may_be_some(world, monkeypatch):
    looked = []
    monkeypatch.setattr(passes, "collect", lambda *args: looked.append(args) or collect(*args))

    async def work(mirror):
        async def collected_and_looks():
            looked.clear()
            collected = (await mirror.run_once()).collected
            return collected, len(looked)

        seen = [await collected_and_looks() for _ in range(3)]
        world.bucket.put_adapter("a", fill=2)
        seen += [await collected_and_looks() for _ in range(3)]
        world.time += 100
        seen += [await collected_and_looks() for _ in range(3)]
        return seen

    world.bucket.put_adapter("a", fill=1)
    assert world.with_mirror(work, grace_seconds=100) == [
        (0, 1), (0, 0), (0, 0),
        (0, 1), (0, 0), (0, 0),
        (1, 1), (0, 0), (0, 0),
    ]  # fmt: skip


def test_a_link_that_somebody_else_moved_has_old_versions_looked_for(world):
    world.bucket.put_adapter("a", fill=1)

    async def work(mirror):
        await mirror.run_once()
        await mirror.run_once()
        world.bucket.put_adapter("a", fill=2)
        other = world.mirror(mirror._passes._remote, grace_seconds=100)
        assert (await other.run_once()).published
        world.time += 100
        return (await mirror.run_once()).collected

    assert world.with_mirror(work, grace_seconds=100) == 1


def test_a_replaced_version_is_collected_after_the_grace_time_and_not_before(world):
    world.bucket.put_adapter("a", fill=1)
    world.sync(grace_seconds=100)
    old = resolve(world.adapters_dir, "a").path
    world.time += 1000
    world.bucket.put_adapter("a", fill=2)
    world.sync(grace_seconds=100)
    world.time += 90
    world.sync(grace_seconds=100)
    assert old.exists()
    world.time += 10
    assert world.sync(grace_seconds=100).collected == 1
    assert not old.exists()
