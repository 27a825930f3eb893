"""A volume that fills up between any two steps: a pass does what it can, and a later one mends the rest."""

import shutil

from adapters_sync.report import FailureKind
from tests.sync.test_crash import AFTER, Guillotine, change, contents, prepare

FREEING = ("unlink", "rmdir")
"""Steps that a full volume still takes."""


class Full(Guillotine):
    """From the n-th step on, the volume has no room for another one."""

    def guard(self, name, real):
        return real if name in FREEING else super().guard(name, real)

    def fall(self, name):
        raise OSError(28, "No space left on device")


def test_a_volume_that_is_full_from_any_step_on_is_mended_once_it_has_room(world, monkeypatch):
    prepare(world)
    old = {"kept": 1, "changed": 1, "removed": 1}
    volume = world.adapters_dir.parent
    pristine = volume.with_name("pristine")
    volume.rename(pristine)
    change(world)
    for step in range(1000):
        shutil.rmtree(volume, ignore_errors=True)
        shutil.copytree(pristine, volume, symlinks=True)
        with monkeypatch.context() as patch:
            full = Full(patch, step)
            report = world.sync(passes=2, grace_seconds=5)
        if full.fell_on is None:
            break
        assert report.failures.keys() <= {FailureKind.DISK}
        seen = contents(world)
        assert seen.keys() >= {"kept", "changed"}
        assert all(fill in (old.get(name), AFTER.get(name)) for name, fill in seen.items())
        assert world.sync(passes=2, grace_seconds=5).ok
        assert contents(world) == AFTER
    assert step > 20
