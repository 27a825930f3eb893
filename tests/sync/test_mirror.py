"""The mirror: what readers get of what uploaders put."""

import os

import pytest

from adapters_sync import disk
from adapters_sync.fetch import HELD_BYTES
from adapters_sync.layout import AdapterState, check_folder, resolve
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, config, manifest_of, state_of, weights


def tree(root):
    """Everything on the volume with what would betray a write."""
    return {
        str(path): (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        for path in [root, *root.rglob("*")]
        for status in [path.lstat()]
    }


def test_a_pushed_adapter_is_published_whole_at_the_first_pass(any_world):
    any_world.bucket.put_adapter("sql", r=8)
    report = any_world.sync()
    found = resolve(any_world.adapters_dir, "sql")
    assert report.published == (f"sql@{found.version}",)
    assert check_folder(found.path).rank == 8
    assert (any_world.adapters_dir / "sql").readlink().as_posix() == f"../.versions/sql/{found.version}"
    manifest = disk.load(any_world.paths, "sql", found.version)
    assert manifest.source == f"{any_world.bucket.uri}sql/"
    assert {file.name for file in manifest.files} == {CONFIG, WEIGHTS}
    status = state_of(any_world, "sql")
    assert (status.state, status.version, status.rank) == (AdapterState.READY, found.version, 8)
    assert status.bytes == sum(map(len, adapter_files(r=8).values()))


@pytest.mark.parametrize("size", [0, 1, HELD_BYTES, HELD_BYTES + 1, (1 << 20) + 1, 5 << 20])
def test_a_file_of_any_size_arrives_as_it_was_sent(any_world, size):
    files = adapter_files() | {"notes/readme.md": os.urandom(size)}
    any_world.bucket.put_adapter("a", files)
    assert any_world.sync().published
    found = resolve(any_world.adapters_dir, "a")
    assert {name: (found.path / name).read_bytes() for name in files} == files


def test_a_published_version_is_read_only(world):
    world.bucket.put_adapter("a", adapter_files() | {"notes.txt": bytes(HELD_BYTES + 1)})
    world.sync()
    for path in resolve(world.adapters_dir, "a").path.iterdir():
        assert path.stat().st_mode & 0o222 == 0


def test_a_plain_upload_is_published_once_it_settles(any_world):
    for name, data in adapter_files().items():
        any_world.bucket.put(f"a/{name}", data)

    async def work(mirror):
        states = []
        for _ in range(4):
            await mirror.run_once()
            states.append(mirror.state.find("a").state)
            any_world.time += 20
        return states

    assert any_world.with_mirror(work, settle_seconds=60) == ["pending", "pending", "pending", "ready"]


def test_a_plain_upload_that_keeps_changing_never_settles(world):
    async def work(mirror):
        for number in range(5):
            world.bucket.put(f"a/{CONFIG}", config())
            world.bucket.put(f"a/{WEIGHTS}", weights(number))
            await mirror.run_once()
            world.time += 100
        return mirror.state.find("a")

    status = world.with_mirror(work, settle_seconds=60)
    assert status.state is AdapterState.PENDING
    assert status.version is None


def test_an_unchanged_pass_costs_one_listing_and_touches_no_file(s3_world):
    for number in range(5):
        s3_world.bucket.put_adapter(f"a{number}", fill=number)
    s3_world.bucket.put("broken/adapter_config.json", b"{}")
    s3_world.bucket.put("bad name/x.json", b"{}")
    s3_world.bucket.put_adapter("ill", files={CONFIG: b"{}", WEIGHTS: weights()})
    s3_world.bucket.put_adapter("stale")
    s3_world.bucket.put("stale/_manifest.json", manifest_of({}))

    async def work(mirror):
        await mirror.run_once()
        s3_world.time += 1000
        await mirror.run_once()
        calls = []
        client = mirror._passes._remote._client
        client.meta.events.register("before-call.s3", lambda model, **kwargs: calls.append(model.name))
        before = tree(s3_world.adapters_dir.parent)
        s3_world.time += 1000
        report = await mirror.run_once()
        assert report.ok
        assert tree(s3_world.adapters_dir.parent) == before
        return calls

    assert s3_world.with_mirror(work) == ["ListObjectsV2"]


def test_a_changed_adapter_is_replaced_and_unchanged_files_are_linked(any_world):
    any_world.bucket.put_adapter("a", fill=1)
    any_world.sync()
    old = resolve(any_world.adapters_dir, "a")
    any_world.bucket.put_adapter("a", fill=1, r=16)
    report = any_world.sync()
    new = resolve(any_world.adapters_dir, "a")
    assert new.version != old.version
    assert (old.path / WEIGHTS).samefile(new.path / WEIGHTS)
    assert report.fetched_bytes == len(config(r=16))
    assert check_folder(new.path).rank == 16
    assert check_folder(old.path).rank == 4


def test_a_file_that_is_gone_in_s3_is_gone_in_the_next_version(world):
    files = adapter_files()
    world.bucket.put_adapter("a", files | {"notes.txt": b"x"})
    world.sync()
    world.bucket.remove("a/notes.txt")
    world.bucket.put_adapter("a", files)
    world.sync()
    assert sorted(path.name for path in resolve(world.adapters_dir, "a").path.iterdir()) == [
        CONFIG, WEIGHTS, "manifest.json",
    ]  # fmt: skip


def test_pickles_are_never_fetched_and_the_adapter_is_fine_without(world):
    world.bucket.put_adapter("a", adapter_files() | {"training_args.bin": b"\x80\x04."})
    world.sync()
    assert state_of(world, "a").state is AdapterState.READY
    assert state_of(world, "a").skipped == ("training_args.bin",)
    assert not (resolve(world.adapters_dir, "a").path / "training_args.bin").exists()


def test_going_back_to_a_version_still_on_disk_fetches_nothing(world):
    world.bucket.put_adapter("a", fill=1)
    world.sync()
    first = resolve(world.adapters_dir, "a")
    world.bucket.put_adapter("a", fill=2)
    world.sync()
    world.bucket.put_adapter("a", fill=1)
    report = world.sync()
    assert resolve(world.adapters_dir, "a") == first
    assert report.fetched_bytes == 0


def test_the_adapters_folder_may_be_reached_through_a_link(world, tmp_path):
    world.bucket.put_adapter("a")
    world.adapters_dir.mkdir(parents=True)
    (tmp_path / "short").symlink_to(world.adapters_dir)
    real, world.adapters_dir = world.adapters_dir, tmp_path / "short"
    assert world.sync().ok
    assert resolve(tmp_path / "short", "a") == resolve(real, "a")
    assert (real / "a" / WEIGHTS).read_bytes() == weights()


def test_the_start_believes_the_disk(world):
    world.bucket.put_adapter("a")
    world.sync()
    world.paths.state_file.unlink()
    report = world.sync()
    assert report.published == ()
    assert state_of(world, "a").version == resolve(world.adapters_dir, "a").version
