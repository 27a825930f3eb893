"""Which adapter a name means, while uploads come and do not come."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from adapters_sync.layout import AdapterFolder, AdapterState, AdapterStatus, MirrorPaths, MirrorState
from adapters_sync.publish import collect, flip
from tests.glue.support import World, make_job, run_rows, until
from tests.glue.test_runner import AnsweringBridge, row_runner
from tests.sync.builders import adapter_files, write_folder
from worker.adapters.directory import AdapterDirectory
from worker.errors import AdapterInvalid, AdapterNotFound
from worker.transport.memory import ManualClock

WAIT = 30.0


class Scene:
    def __init__(self, folder: Path | None) -> None:
        self.clock = ManualClock(1000.0)
        self.missing = 0
        self.directory = AdapterDirectory(
            folder, WAIT, on_missing=self._missed, clock=self.clock, sleep=self.clock.sleep
        )

    def _missed(self) -> None:
        self.missing += 1

    async def asleep(self, count: int = 1) -> None:
        """Lookups are on other threads: wait until `count` waits sleep on the clock."""
        await until(lambda: len(self.clock._sleepers) >= count)

    async def find_while_time_passes(self, name: str) -> AdapterFolder:
        finding = asyncio.create_task(self.directory.find(name))
        while not finding.done():
            if self.clock._sleepers:
                await self.clock.advance(1.0)
            await asyncio.sleep(0.001)
        return await finding


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def refused(folder: Path, name: str, state: AdapterState = AdapterState.INVALID) -> None:
    """What a mirror leaves of an upload that it did not take."""
    status = AdapterStatus(name=name, state=state, reason="r is 0; it must be at least 1")
    told = MirrorState(source="s3://b/m/adapters/", folder=folder.name, adapters=(status,))
    MirrorPaths(folder).state_file.write_bytes(msgspec.json.encode(told))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def test_an_adapter_that_is_there_is_found_without_waiting(folder):
    write_folder(folder / "a")

    async def scenario() -> None:
        scene = Scene(folder)
        found = await scene.directory.find("a")
        assert (found.name, len(found.version), found.path) == ("a", 64, folder / "a")
        assert (scene.clock(), scene.missing) == (1000.0, 0)

    run(scenario)


def test_lora_off_refuses_every_name():
    async def scenario() -> None:
        with pytest.raises(AdapterNotFound, match="not enabled"):
            await Scene(None).directory.find("a")

    run(scenario)


def test_an_upload_on_its_way_is_waited_for(folder):
    async def scenario() -> None:
        scene = Scene(folder)
        finding = asyncio.create_task(scene.directory.find("late"))
        await scene.asleep()
        write_folder(folder / "late")
        await scene.clock.advance(0.25)
        assert (await finding).name == "late"
        assert scene.missing == 1

    run(scenario)


def test_rows_that_miss_the_same_adapter_wait_together(folder):
    async def scenario() -> None:
        scene = Scene(folder)
        finding = [asyncio.create_task(scene.directory.find("late")) for _ in range(20)]
        other = asyncio.create_task(scene.directory.find("other"))
        await scene.asleep(2)
        write_folder(folder / "late")
        await scene.clock.advance(0.25)
        assert {(await one).name for one in finding} == {"late"}
        assert scene.missing == 2
        assert not other.done()
        other.cancel()

    run(scenario)


def test_one_who_gives_up_does_not_end_the_wait_of_the_others(folder):
    async def scenario() -> None:
        scene = Scene(folder)
        first, second = (asyncio.create_task(scene.directory.find("late")) for _ in range(2))
        await scene.asleep()
        await asyncio.sleep(0.02)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        write_folder(folder / "late")
        await scene.clock.advance(0.25)
        assert (await second).name == "late"

    run(scenario)


def test_a_name_that_never_comes_is_not_found_after_the_wait(folder):
    async def scenario() -> None:
        scene = Scene(folder)
        with pytest.raises(AdapterNotFound, match="Adapter none is not registered"):
            await scene.find_while_time_passes("none")
        assert WAIT <= scene.clock() - 1000 <= WAIT + 2

    run(scenario)


def test_time_already_waited_for_other_names_is_taken_off(folder):
    async def scenario() -> None:
        directory = AdapterDirectory(folder, 30.0, clock=ManualClock(), sleep=ManualClock().sleep)
        with pytest.raises(AdapterNotFound, match="Adapter late is not registered"):
            await directory.find("late", waited_seconds=31.0)

    run(scenario)


def test_a_folder_that_does_not_exist_yet_is_as_good_as_an_empty_one(tmp_path):
    async def scenario() -> None:
        with pytest.raises(AdapterNotFound):
            await Scene(tmp_path / "not-yet").find_while_time_passes("a")

    run(scenario)


@pytest.mark.parametrize("name", ["../a", "a/b", ".hidden", "a" * 300, "a\0b", "\ud800"])
def test_a_name_that_is_no_adapter_name_leads_nowhere(folder, name):
    write_folder(folder.parent / "a")

    async def scenario() -> None:
        with pytest.raises(AdapterNotFound):
            await Scene(folder).find_while_time_passes(name)

    run(scenario)


def test_an_adapter_that_the_mirror_refused_is_invalid_for_the_mirrors_reason(folder):
    refused(folder, "ill")

    async def scenario() -> None:
        with pytest.raises(AdapterInvalid, match="Adapter ill is invalid: r is 0"):
            await Scene(folder).find_while_time_passes("ill")

    run(scenario)


def test_an_adapter_that_is_pending_still_is_not_found(folder):
    refused(folder, "slow", AdapterState.PENDING)

    async def scenario() -> None:
        with pytest.raises(AdapterNotFound):
            await Scene(folder).find_while_time_passes("slow")

    run(scenario)


def test_a_mirror_that_died_while_it_wrote_does_not_disturb(folder):
    MirrorPaths(folder).state_file.write_bytes(b'{"sou')

    async def scenario() -> None:
        with pytest.raises(AdapterNotFound):
            await Scene(folder).find_while_time_passes("a")

    run(scenario)


def test_a_replaced_adapter_is_another_version(folder):
    async def scenario() -> None:
        scene = Scene(folder)
        write_folder(folder / "a", adapter_files(fill=1))
        before = await scene.directory.find("a")
        shutil.rmtree(folder / "a")
        write_folder(folder / "a", adapter_files(fill=2))
        assert (await scene.directory.find("a")).version != before.version

    run(scenario)


def test_a_name_that_did_not_come_is_not_waited_for_by_every_row_anew(folder):
    """Ten thousand rows with a typo would otherwise hold their message for hours."""

    async def scenario() -> None:
        world = World()
        world.rows = row_runner(world, AnsweringBridge(), max_at_once=2, folder=folder)
        began = world.clock()
        job = make_job(inputs=["x"] * 10, adapters="typo")
        running = asyncio.create_task(run_rows(world.rows, job))
        while not running.done():
            if world.clock._sleepers:
                await world.clock.advance(1.0)
            await asyncio.sleep(0.001)
        results = await running
        assert {result.failure and result.failure.code for result in results} == {"adapter_not_found"}
        assert world.clock() - began <= 2 * WAIT

    run(scenario)


def publish(folder: Path, version: str) -> Path:
    """A version of adapter `a` as the mirror publishes it."""
    paths = MirrorPaths(folder)
    write_folder(paths.version_dir("a", version))
    flip(paths, "a", version, now=0.0)
    return paths.version_dir("a", version)


def versions_left(folder: Path) -> list[str]:
    collect(MirrorPaths(folder), now=1e9, grace_seconds=0.0)
    return sorted(path.name[0] for path in (folder.parent / ".versions" / "a").iterdir())


def test_version_in_use_stays_on_disk_after_it_was_replaced(folder):
    publish(folder, "1" * 64)

    async def scenario() -> None:
        directory = Scene(folder).directory
        async with directory.use("a") as first, directory.use("a") as same:
            assert first == same
            publish(folder, "2" * 64)
            async with directory.use("a") as second:
                assert (first.version[0], second.version[0]) == ("1", "2")
            assert versions_left(folder) == ["1", "2"]
        assert versions_left(folder) == ["2"]
        assert not directory._holds

    run(scenario)


def test_version_that_goes_before_it_is_held_is_looked_for_again(folder, monkeypatch):
    old = publish(folder, "1" * 64)

    async def scenario() -> None:
        directory = Scene(folder).directory
        find = directory.find

        async def find_what_then_goes(name: str, waited_seconds: float = 0.0) -> AdapterFolder:
            found = await find(name, waited_seconds)
            if found.path == old and old.exists():
                publish(folder, "2" * 64)
                shutil.rmtree(old)
            return found

        monkeypatch.setattr(directory, "find", find_what_then_goes)
        async with directory.use("a") as found:
            assert found.version == "2" * 64

    run(scenario)


def test_cancelled_row_holds_nothing(folder):
    publish(folder, "1" * 64)

    async def scenario() -> None:
        directory = Scene(folder).directory

        async def row() -> None:
            async with directory.use("a"):
                await asyncio.sleep(60)

        running = asyncio.create_task(row())
        await until(lambda: bool(directory._holds))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not directory._holds

    run(scenario)
