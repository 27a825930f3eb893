"""A kill between any two steps: whatever is on the disk then, readers see whole versions and a fresh start
ends where an undisturbed one would have.
"""

import gc
import os
import shutil
import threading

import pytest

from adapters_sync.layout import check_folder, hold, resolve, scan
from tests.sync.builders import WEIGHTS, weights

STEPS = ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "link", "fsync", "utime", "fchmod")


@pytest.fixture(autouse=True)
def _bury_the_dead():
    """What a killed scenario leaves unfinished is collected here, not in the middle of a later test."""
    yield
    gc.collect()


class Killed(BaseException):
    """Not an Exception, so that nothing but a `finally` sees it; ours do nothing to the disk."""


class Guillotine:
    """Raises in place of the n-th step, and of all later ones: a dead process does nothing more."""

    def __init__(self, monkeypatch, step):
        self.left = step
        self.lock = threading.Lock()
        self.fell_on = None
        self.passed = set()
        for name in STEPS:
            monkeypatch.setattr(os, name, self.guard(name, getattr(os, name)))

    def guard(self, name, real):
        def guarded(*args, **kwargs):
            with self.lock:  # adapters are published side by side, each in a thread
                if self.left == 0:
                    self.fell_on = self.fell_on or name
                    self.fall(name)
                self.left -= 1
                self.passed.add(name)
            return real(*args, **kwargs)

        return guarded

    def fall(self, name):
        raise Killed(name)


def contents(world):
    """What readers see now; every one of them a whole version."""
    found = {}
    for folder in scan(world.adapters_dir):
        check_folder(folder.path)
        found[folder.name] = (folder.path / WEIGHTS).read_bytes()[-1]
    return found


def prepare(world):
    world.bucket.put_adapter("kept", fill=1)
    world.bucket.put_adapter("changed", fill=1)
    world.bucket.put_adapter("removed", fill=1)
    world.sync()
    world.time += 10


def change(world):
    world.bucket.put_adapter("changed", fill=2, r=16)
    world.bucket.put_adapter("new", fill=3)
    world.bucket.remove_adapter("removed")


BEFORE = {"kept": 1, "changed": 1, "removed": 1}
AFTER = {"kept": 1, "changed": 2, "new": 3}


def rewound(volume):
    """Numbers from 0 on; at each the volume is what it is now."""
    pristine = volume.with_name("pristine")
    volume.rename(pristine)
    for step in range(1000):
        shutil.rmtree(volume, ignore_errors=True)
        shutil.copytree(pristine, volume, symlinks=True)
        yield step


def steps(world):
    """Numbers from 0 on; at each the volume holds BEFORE, and the bucket what leads to AFTER."""
    prepare(world)
    change(world)
    return rewound(world.adapters_dir.parent)


def test_a_kill_between_any_two_steps_is_mended_by_the_next_start(world, monkeypatch):
    fell_on = set()
    for step in steps(world):
        with monkeypatch.context() as patch:
            guillotine = Guillotine(patch, step)
            try:
                world.sync(passes=2, grace_seconds=5)
            except Killed:
                fell_on.add(guillotine.fell_on)
        seen = contents(world)
        assert seen.keys() <= BEFORE.keys() | AFTER.keys()
        assert all(fill in (BEFORE.get(name), AFTER.get(name)) for name, fill in seen.items())
        assert seen.keys() >= {"kept", "changed"}
        if guillotine.fell_on is None:
            break
        assert world.sync(passes=2, grace_seconds=5).ok
        assert contents(world) == AFTER
        assert not list(world.paths.staging.iterdir())
        assert not list(world.adapters_dir.glob(".*"))
        world.time += 100
        world.sync(grace_seconds=5)
        assert len(list(world.paths.versions.glob("*/*"))) == len(AFTER)
    assert step > 30
    steps_there_are = {"rename", "replace", "symlink", "unlink", "fsync", "utime"}
    assert steps_there_are <= guillotine.passed
    assert len(steps_there_are & fell_on) > 3  # which of them a number is depends on the threads


def test_a_kill_while_a_damaged_version_is_mended_is_mended_by_the_next_start(world, monkeypatch):
    prepare(world)
    damaged = resolve(world.adapters_dir, "kept").path / WEIGHTS
    damaged.unlink()
    damaged.mkdir()
    fell_on = set()
    for step in rewound(world.adapters_dir.parent):
        with monkeypatch.context() as patch, hold(resolve(world.adapters_dir, "kept")):
            guillotine = Guillotine(patch, step)
            try:
                world.sync()
            except Killed:
                fell_on.add(guillotine.fell_on)
        if guillotine.fell_on is None:
            break
        assert world.sync().ok
        assert contents(world) == {"kept": 1, "changed": 1, "removed": 1}
        assert not list(world.paths.staging.iterdir())
    assert step > 15
    assert {"replace", "fsync"} <= fell_on


@pytest.mark.parametrize("leftover", ["staged folder", "staged file", "flip", "state"])
def test_leftovers_are_cleared_at_the_start(world, leftover):
    world.bucket.put_adapter("a")
    world.paths.adapters_dir.mkdir(parents=True)
    world.paths.staging.mkdir()
    match leftover:
        case "staged folder":
            (world.paths.staging / "a").mkdir()
            (world.paths.staging / "a" / WEIGHTS).write_bytes(b"half")
        case "staged file":
            (world.paths.staging / "x").write_bytes(b"half")
        case "flip":
            (world.adapters_dir / ".a.flip").symlink_to("../.versions/a/x")
        case "state":
            world.paths.state_file.write_bytes(b"{half")
    assert world.sync().ok
    assert contents(world) == {"a": weights(1)[-1]}
    assert not list(world.paths.staging.iterdir())
    assert not list(world.adapters_dir.glob(".*"))
