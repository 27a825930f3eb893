"""A copied folder appears whole or not at all."""

import asyncio
import fcntl
import os

import pytest

from worker.errors import ObjectNotFound, StoreRefused, StoreUnavailable
from worker.transport.memory import MemoryStore
from worker.transport.tree import MARKER, download_tree


class Faulty(MemoryStore):
    """A MemoryStore whose streams can end early, fail or wait."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = 0
        self.cut = 0
        self.failures = 0
        self.started = asyncio.Event()
        self.gate: asyncio.Event | None = None

    async def stream(self, stored):
        self.streams += 1
        self.started.set()
        if self.gate:
            await self.gate.wait()
        body, _ = self._find(stored.uri)
        if self.failures:
            self.failures -= 1
            yield body[:1]
            raise StoreUnavailable("the line went dead")
        yield body[: len(body) - self.cut]


def play(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


async def filled(**files: bytes) -> Faulty:
    store = Faulty()
    for name, body in files.items():
        await store.put(f"s3://b/m/{name}", body)
    return store


def test_same_listing_is_not_fetched_again(tmp_path):
    async def scenario():
        store = await filled(a=b"one", b=b"two")
        assert await download_tree(store, "s3://b/m/", tmp_path / "m")
        assert store.streams == 2
        assert not await download_tree(store, "s3://b/m", tmp_path / "m")
        assert store.streams == 2

    play(scenario)


def test_changed_listing_replaces_the_whole_folder(tmp_path):
    async def scenario():
        store = await filled(a=b"one", b=b"two")
        await download_tree(store, "s3://b/m", tmp_path / "m")
        changed = await filled(a=b"new", c=b"three")
        assert await download_tree(changed, "s3://b/m", tmp_path / "m")
        assert {path.name for path in (tmp_path / "m").iterdir()} == {"a", "c", MARKER}
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    play(scenario)


def test_folder_of_somebody_else_is_never_replaced(tmp_path):
    async def scenario():
        (tmp_path / "m").mkdir()
        (tmp_path / "m/thesis.txt").write_text("mine")
        with pytest.raises(StoreRefused, match="left as it is"):
            await download_tree(await filled(a=b"one"), "s3://b/m", tmp_path / "m")
        assert (tmp_path / "m/thesis.txt").read_text() == "mine"

    play(scenario)


def test_empty_folder_is_filled(tmp_path):
    async def scenario():
        (tmp_path / "m").mkdir()
        await download_tree(await filled(a=b"one"), "s3://b/m", tmp_path / "m")
        assert (tmp_path / "m/a").read_bytes() == b"one"

    play(scenario)


def test_nothing_below_the_prefix_is_not_found(tmp_path):
    async def scenario():
        store = MemoryStore()
        await store.put("s3://b/m/", b"")
        with pytest.raises(ObjectNotFound):
            await download_tree(store, "s3://b/m", tmp_path / "m")
        assert list(tmp_path.iterdir()) == []

    play(scenario)


def test_folder_markers_are_no_files(tmp_path):
    async def scenario():
        store = await filled(a=b"one")
        await store.put("s3://b/m/", b"")
        await store.put("s3://b/m/sub/", b"")
        await download_tree(store, "s3://b/m", tmp_path / "m")
        assert {path.name for path in (tmp_path / "m").iterdir()} == {"a", MARKER}

    play(scenario)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "a/..", "./x", "/etc/x", "a//x", "a\\x", "a\0x", MARKER, "ok/deeper"]
)
def test_unsafe_key_is_refused_before_anything_is_written(tmp_path, name):
    async def scenario():
        store = await filled(ok=b"fine")
        await store.put(f"s3://b/m/{name}", b"evil")
        with pytest.raises(StoreRefused, match="no safe file name"):
            await download_tree(store, "s3://b/m", tmp_path / "m")
        assert list(tmp_path.iterdir()) == []

    play(scenario)


def test_broken_stream_is_fetched_again_and_progress_stays_true(tmp_path):
    async def scenario():
        store = await filled(a=b"0123456789")
        store.failures = 2
        steps: list[int] = []
        await download_tree(store, "s3://b/m", tmp_path / "m", on_bytes=steps.append)
        assert (tmp_path / "m/a").read_bytes() == b"0123456789"
        assert sum(steps) == 10
        assert min(steps) == -1

    play(scenario)


@pytest.mark.parametrize("fault", [{"failures": 100}, {"cut": 1}])
def test_failed_copy_leaves_nothing_behind(tmp_path, fault):
    async def scenario():
        store = await filled(a=b"0123456789", b=b"x", c=b"y")
        for name, value in fault.items():
            setattr(store, name, value)
        with pytest.raises(StoreUnavailable):
            await download_tree(store, "s3://b/m", tmp_path / "m")
        assert list(tmp_path.iterdir()) == []

    play(scenario)


def test_failed_copy_leaves_the_older_one(tmp_path):
    async def scenario():
        await download_tree(await filled(a=b"one"), "s3://b/m", tmp_path / "m")
        changed = await filled(a=b"new")
        changed.failures = 100
        with pytest.raises(StoreUnavailable):
            await download_tree(changed, "s3://b/m", tmp_path / "m")
        assert (tmp_path / "m/a").read_bytes() == b"one"

    play(scenario)


def test_cancelled_copy_leaves_nothing_behind(tmp_path):
    async def scenario():
        store = await filled(a=b"one", b=b"two")
        store.gate = asyncio.Event()
        copying = asyncio.create_task(download_tree(store, "s3://b/m", tmp_path / "m"))
        await store.started.wait()
        copying.cancel()
        await asyncio.wait([copying])
        assert copying.cancelled()
        assert list(tmp_path.iterdir()) == []

    play(scenario)


def test_staging_of_a_dead_process_is_removed_and_of_a_living_one_kept(tmp_path):
    async def scenario():
        dead, living = tmp_path / ".m.dead.staging", tmp_path / ".m.alive.staging"
        dead.mkdir()
        (dead / "half").write_text("x")
        living.mkdir()
        handle = os.open(living, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            await download_tree(await filled(a=b"one"), "s3://b/m", tmp_path / "m")
        finally:
            os.close(handle)
        assert {path.name for path in tmp_path.iterdir()} == {"m", living.name}

    play(scenario)


def test_two_copies_at_once_end_in_one_whole_folder(tmp_path):
    async def scenario():
        store = await filled(a=b"one", b=b"two")
        store.gate = asyncio.Event()
        copies = [asyncio.create_task(download_tree(store, "s3://b/m", tmp_path / "m")) for _ in range(2)]
        while store.streams < 4:
            await asyncio.sleep(0)
            await store.started.wait()
        store.gate.set()
        await asyncio.gather(*copies)
        assert {path.name for path in (tmp_path / "m").iterdir()} == {"a", "b", MARKER}
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    play(scenario)


def test_at_most_six_objects_are_fetched_at_once(tmp_path):
    async def scenario():
        store = await filled(**{f"f{number}": b"x" for number in range(20)})
        store.gate = asyncio.Event()
        copying = asyncio.create_task(download_tree(store, "s3://b/m", tmp_path / "m"))
        await store.started.wait()
        await asyncio.sleep(0.05)
        assert store.streams == 6
        store.gate.set()
        await copying
        assert store.streams == 20

    play(scenario)


def test_folders_left_out_are_not_fetched(tmp_path):
    async def scenario():
        store = await filled(**{"config.json": b"{}", "adapters/a/x": b"1", "adapters.txt": b"2"})
        await download_tree(store, "s3://b/m", tmp_path / "m", without={"adapters"})

    play(scenario)
    found = {path.name for path in (tmp_path / "m").rglob("*") if path.name != MARKER}
    assert found == {"config.json", "adapters.txt"}
