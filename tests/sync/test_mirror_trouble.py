"""The mirror: what is bad, or does not fit, costs nobody else anything."""

import shutil
from contextlib import suppress

import pytest
from botocore.exceptions import ClientError

from adapters_sync import disk, fetch
from adapters_sync.errors import SettingsError
from adapters_sync.inventory import Limits
from adapters_sync.layout import AdapterState, resolve, scan
from adapters_sync.names import fault_in_path, is_adapter_name
from adapters_sync.report import FailureKind
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, config, state_of, weights, write_folder
from tests.sync.memory_s3 import MemoryBucket


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({CONFIG: b"nope", WEIGHTS: weights()}, "is not a JSON object"),
        ({CONFIG: config(r=0), WEIGHTS: weights()}, "r is 0"),
        ({CONFIG: config(r=65), WEIGHTS: weights()}, "r is 65; the limit is 64"),
        ({CONFIG: config(), WEIGHTS: weights()[:-5]}, "truncated"),
    ],
)
def test_a_bad_version_costs_nobody_else_and_the_last_good_one_stays(world, files, reason):
    limits = Limits(rank=64)
    world.bucket.put_adapter("a", fill=1)
    world.sync(limits=limits)
    good = resolve(world.adapters_dir, "a")
    world.bucket.put_adapter("a", files)
    world.bucket.put_adapter("b", fill=2)
    report = world.sync(limits=limits)
    assert resolve(world.adapters_dir, "a") == good
    assert resolve(world.adapters_dir, "b") is not None
    status = state_of(world, "a")
    assert status.state is AdapterState.INVALID
    assert reason in status.reason
    assert status.version == good.version
    assert status.wanted not in (None, good.version)
    assert report.failures == {FailureKind.INVALID: 1}
    world.bucket.put_adapter("a", fill=3)
    world.sync(limits=limits)
    assert state_of(world, "a").state is AdapterState.READY


def test_a_refused_upload_is_not_fetched_again(world):
    world.bucket.put_adapter("a", {CONFIG: b"nope", WEIGHTS: weights()})

    async def work(mirror):
        first = await mirror.run_once()
        second = await mirror.run_once()
        return first.failures, second.failures, second.adapters[0].state

    assert world.with_mirror(work) == ({FailureKind.INVALID: 1}, {}, AdapterState.INVALID)


def test_content_that_is_not_what_its_uploader_read_is_refused(world):
    world.bucket.put_adapter("a", fill=1)
    world.bucket.put(f"a/{WEIGHTS}", weights(2))  # same size
    world.sync()
    status = state_of(world, "a")
    assert status.state is AdapterState.INVALID
    assert "its manifest says" in status.reason


@pytest.mark.parametrize("data", [b"nope", b"[]", b'{"files": [{"name": "x"}]}', b"\xff"])
def test_a_manifest_that_is_none_is_reported(world, data):
    world.bucket.put_adapter("a")
    world.bucket.put("a/_manifest.json", data)
    world.sync()
    assert "_manifest.json is not a manifest" in state_of(world, "a").reason


def is_fine(path):
    return fault_in_path(path) is None and is_adapter_name(path.partition("/")[0])


def test_strange_keys_never_leave_their_place_and_are_reported(any_world, tmp_path):
    any_world.bucket.put_adapter("good")
    for key in ("../../evil.json", "evil/../../../x.json", "evil/a\\b.json", "evil//x.json", ".x/y.json"):
        with suppress(ClientError):  # a server may refuse a key itself
            any_world.bucket.put(key, b"{}")
    strange = {path.partition("/")[0] for path in any_world.bucket.paths() if not is_fine(path)}
    report = any_world.sync(passes=3, settle_seconds=0)
    assert [one.name for one in scan(any_world.adapters_dir)] == ["good"]
    invalid = {one.name for one in report.adapters if one.state is AdapterState.INVALID}
    assert invalid == strange
    assert ".x" in invalid
    assert not list(tmp_path.rglob("*evil*"))


def test_an_object_that_changes_between_listing_and_reading_is_left_for_the_next_pass(world, monkeypatch):
    world.bucket.put_adapter("a", fill=1)
    real = MemoryBucket.list

    async def overtaken(self):
        found = await real(self)
        world.bucket.put_adapter("a", fill=2)
        return found

    async def work(mirror):
        monkeypatch.setattr(MemoryBucket, "list", overtaken)
        report = await mirror.run_once()
        assert report.failures == {FailureKind.CHANGED: 1}
        assert report.adapters[0].state is AdapterState.PENDING
        assert scan(world.adapters_dir) == []
        monkeypatch.setattr(MemoryBucket, "list", real)
        return await mirror.run_once()

    assert world.with_mirror(work).adapters[0].state is AdapterState.READY
    assert (resolve(world.adapters_dir, "a").path / WEIGHTS).read_bytes() == weights(2)


def test_a_full_disk_leaves_the_adapter_pending_and_the_others_served(world, monkeypatch):
    world.bucket.put_adapter("a", fill=1)
    world.bucket.put_adapter("b", fill=2)
    real = fetch._Arrival.write

    def full(self):
        if self._path.parent.name == "a":
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(fetch._Arrival, "write", full)
    report = world.sync()
    assert report.failures == {FailureKind.DISK: 1}
    assert [one.name for one in scan(world.adapters_dir)] == ["b"]
    assert state_of(world, "a").state is AdapterState.PENDING
    monkeypatch.undo()


def test_a_mistake_of_ours_with_one_adapter_stays_with_it(world, monkeypatch):
    world.bucket.put_adapter("a", fill=1)
    world.bucket.put_adapter("b", fill=2)
    real = disk.load
    monkeypatch.setattr(
        disk, "load", lambda paths, name, version: 1 / (name != "a") and real(paths, name, version)
    )
    report = world.sync()
    assert report.failures == {FailureKind.INTERNAL: 1}
    assert [one.name for one in scan(world.adapters_dir)] == ["b"]


def test_a_cap_on_disk_use_holds_for_adapters_that_arrive_together(world):
    for number in range(4):
        world.bucket.put_adapter(f"a{number}", {CONFIG: config(), WEIGHTS: weights(number, size=64_000)})
    limits = Limits(disk_bytes=2 * 128_000 + 64_000)
    assert 1 <= len(world.sync(limits=limits).published) <= 2
    world.sync(limits=limits)
    assert len(scan(world.adapters_dir)) == 2


def test_a_version_that_shares_its_weights_needs_no_room_for_them(world):
    world.bucket.put_adapter("a", fill=1)
    world.sync()
    stored = sum(path.stat().st_size for path in resolve(world.adapters_dir, "a").path.iterdir())
    world.bucket.put_adapter("a", fill=1, r=16)
    assert world.sync(limits=Limits(disk_bytes=stored + len(config(r=16)))).published


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(disk_bytes=100), "all versions together may take 100"),
        (Limits(free_bytes=1 << 62), "must stay free"),
    ],
)
def test_what_does_not_fit_on_the_volume_is_not_fetched(world, limits, reason):
    world.bucket.put_adapter("a")
    report = world.sync(limits=limits)
    assert report.failures == {FailureKind.DISK: 1}
    assert reason in state_of(world, "a").reason
    assert not list(world.paths.versions.glob("*/*"))


def test_an_adapter_over_its_cap_is_refused_by_number(world):
    world.bucket.put_adapter("a")
    world.sync(limits=Limits(adapter_bytes=10))
    assert "the limit is 10" in state_of(world, "a").reason


@pytest.mark.parametrize("damage", ["truncate", "remove file", "remove version", "remove manifest"])
def test_a_damaged_version_is_fetched_again(world, damage):
    world.bucket.put_adapter("a")
    world.sync()
    path = resolve(world.adapters_dir, "a").path
    match damage:
        case "truncate":
            (path / WEIGHTS).chmod(0o644)
            (path / WEIGHTS).write_bytes(b"x")
        case "remove file":
            (path / WEIGHTS).unlink()
        case "remove version":
            shutil.rmtree(path)
        case "remove manifest":
            (path / "manifest.json").unlink()
    assert world.sync().published
    assert (path / WEIGHTS).read_bytes() == weights()


def test_a_folder_that_is_not_ours_is_left_alone(world):
    mine = write_folder(world.adapters_dir / "mine", adapter_files(fill=9))
    write_folder(world.adapters_dir / "a", adapter_files(fill=9))
    world.bucket.put_adapter("a")
    world.bucket.put_adapter("b")
    world.sync(passes=3)
    assert (mine / WEIGHTS).read_bytes() == weights(9)
    assert (world.adapters_dir / "a" / WEIGHTS).read_bytes() == weights(9)
    assert "not the mirror's" in state_of(world, "a").reason
    assert [one.name for one in scan(world.adapters_dir)] == ["a", "b", "mine"]


def test_two_mirrored_folders_cannot_share_a_parent(world):
    world.sync()
    world.adapters_dir = world.adapters_dir.with_name("others")
    with pytest.raises(SettingsError, match="same parent"):
        world.sync()
