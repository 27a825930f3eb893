"""Holds: what somebody reads stays on the disk, whoever collects."""

import os
import shutil
import subprocess
import sys

import pytest

from adapters_sync import hold as hold_module
from adapters_sync.hold import unheld
from adapters_sync.layout import AdapterFolder, check_folder, hold, resolve
from tests.sync.builders import CONFIG, WEIGHTS, weights, write_folder

HOLDER = """
import sys
from pathlib import Path
from adapters_sync.layout import hold, resolve
with hold(resolve(Path(sys.argv[1]), sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held_by_another_process(world):
    """Adapter `a`, held in its first version by a process of its own; (folder, process)."""
    world.bucket.put_adapter("a", fill=1)
    world.sync(grace_seconds=0)
    folder = resolve(world.adapters_dir, "a")
    command = [sys.executable, "-c", HOLDER, str(world.adapters_dir), "a"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield folder, process
        process.kill()


def replace(world, **kwargs):
    world.bucket.put_adapter("a", fill=2)
    world.time += 10
    return world.sync(**kwargs)


def test_a_version_that_another_process_holds_is_not_collected_until_that_process_is_gone(
    world, held_by_another_process
):
    folder, process = held_by_another_process
    assert replace(world, passes=3, grace_seconds=0).collected == 0
    check_folder(folder.path)
    process.kill()
    process.wait()
    assert world.sync(grace_seconds=0).collected == 1
    assert not folder.path.exists()
    assert (resolve(world.adapters_dir, "a").path / WEIGHTS).read_bytes() == weights(2)


def test_a_hold_outlives_flip_and_delete_and_ends_with_close(world):
    world.bucket.put_adapter("a", fill=1)
    world.bucket.put_adapter("b", fill=3)
    world.sync(grace_seconds=0)
    with hold(resolve(world.adapters_dir, "a")) as held:
        replace(world, grace_seconds=0)
        world.bucket.remove_adapter("a")
        report = world.sync(passes=3, grace_seconds=0)
        assert resolve(world.adapters_dir, "a") is None
        assert [one.name for one in report.adapters] == ["b"]
        check_folder(held.folder.path)
        assert (held.folder.path / WEIGHTS).read_bytes() == weights(1)
    held.close()
    assert world.sync(grace_seconds=0).collected == 1
    assert not held.folder.path.parent.exists()


def test_a_version_is_collected_when_the_last_of_its_holders_lets_go(world):
    world.bucket.put_adapter("a", fill=1)
    world.sync(grace_seconds=0)
    one, other = (hold(resolve(world.adapters_dir, "a")) for _ in range(2))
    assert replace(world, grace_seconds=0).collected == 0
    one.close()
    assert world.sync(grace_seconds=0).collected == 0
    other.close()
    assert world.sync(grace_seconds=0).collected == 1


def test_a_version_that_is_held_holds_up_no_other(world):
    for name in "ab":
        world.bucket.put_adapter(name, fill=1)
    world.sync(grace_seconds=0)
    with hold(resolve(world.adapters_dir, "a")) as held:
        world.bucket.put_adapter("b", fill=3)
        assert replace(world, grace_seconds=0).collected == 1
        assert held.folder.path.exists()


def test_a_version_that_went_since_it_was_resolved_cannot_be_held(world):
    world.bucket.put_adapter("a", fill=1)
    world.sync(grace_seconds=0)
    folder = resolve(world.adapters_dir, "a")
    replace(world, grace_seconds=0)
    assert not folder.path.exists()
    with pytest.raises(FileNotFoundError):
        hold(folder)
    hold(resolve(world.adapters_dir, "a")).close()


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_version_that_goes_between_open_and_lock_cannot_be_held(world, monkeypatch, comes_back):
    world.bucket.put_adapter("a", fill=1)
    world.sync(grace_seconds=0)
    folder = resolve(world.adapters_dir, "a")
    real = os.open

    def overtaken(path, *args, **kwargs):
        descriptor = real(path, *args, **kwargs)
        monkeypatch.undo()
        folder.path.rename(world.paths.staging / "gone")
        if comes_back:
            write_folder(folder.path)
        return descriptor

    before = open_descriptors()
    monkeypatch.setattr(hold_module.os, "open", overtaken)
    with pytest.raises(FileNotFoundError, match="has gone"):
        hold(folder)
    assert open_descriptors() == before


def test_a_version_that_is_being_removed_cannot_be_held(world):
    world.bucket.put_adapter("a")
    world.sync()
    folder = resolve(world.adapters_dir, "a")
    with unheld(folder.path) as free:
        assert free
        with pytest.raises(FileNotFoundError, match="is being removed"):
            hold(folder)
    hold(folder).close()


def test_a_plain_folder_needs_no_hold(tmp_path):
    write_folder(tmp_path / "adapters" / "a")
    folder = resolve(tmp_path / "adapters", "a")
    before = open_descriptors()
    with hold(folder):
        assert open_descriptors() == before
    with hold(AdapterFolder("gone", "0" * 64, tmp_path / "gone")):
        pass


@pytest.mark.parametrize("damage", ["no weights", "short weights", "a folder for a file", "no manifest"])
def test_a_damaged_version_is_mended_under_the_hold_that_keeps_it(world, damage):
    world.bucket.put_adapter("a", fill=1)
    world.sync(grace_seconds=0)
    with hold(resolve(world.adapters_dir, "a")) as held:
        path = held.folder.path
        match damage:
            case "no weights":
                (path / WEIGHTS).unlink()
            case "short weights":
                (path / WEIGHTS).unlink()
                (path / WEIGHTS).write_bytes(b"x")
            case "a folder for a file":
                (path / CONFIG).unlink()
                (path / CONFIG / "x").mkdir(parents=True)
            case "no manifest":
                (path / "manifest.json").unlink()
        assert world.sync(grace_seconds=0).published == (f"a@{held.folder.version}",)
        check_folder(path)
        assert (path / WEIGHTS).read_bytes() == weights(1)
        assert not list(world.paths.staging.iterdir())
        assert replace(world, grace_seconds=0).collected == 0
        check_folder(path)
    assert world.sync(grace_seconds=0).collected == 1


def test_a_file_in_the_place_of_a_version_makes_way(world):
    world.bucket.put_adapter("a", fill=1)
    world.sync()
    path = resolve(world.adapters_dir, "a").path
    shutil.rmtree(path)
    path.write_bytes(b"not a folder")
    assert world.sync().published
    check_folder(resolve(world.adapters_dir, "a").path)


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
