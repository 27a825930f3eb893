"""A volume that fills up between any two steps: a pass does what it can, and a later one mends the rest."""

from adapters_sync.report import FailureKind
from tests.sync.test_crash import AFTER, BEFORE, Guillotine, contents, steps

FREEING = ("unlink", "rmdir")
"""Steps that a full volume still takes."""


class Full(Guillotine):
    """From the n-th step on, the volume has no room for another one."""

    def guard(self, name, real):
        return real if name in FREEING else super().guard(name, real)

    def fall(self, name):
        raise OSError(28, "No space left on device")


def test_a_volume_that_is_full_from_any_step_on_is_mended_once_it_has_room(world, monkeypatch):
    for step in steps(world):
        with monkeypatch.context() as patch:
            full = Full(patch, step)
            report = world.sync(passes=2, grace_seconds=5)
        if full.fell_on is None:
            break
        assert report.failures.keys() <= {FailureKind.DISK}
        seen = contents(world)
        assert seen.keys() >= {"kept", "changed"}
        assert all(fill in (BEFORE.get(name), AFTER.get(name)) for name, fill in seen.items())
        assert world.sync(passes=2, grace_seconds=5).ok
        assert contents(world) == AFTER
    assert step > 20
