"""How much may still be written to the volume: caps, and what adapters under way have been promised."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from adapters_sync.errors import NoRoom
from adapters_sync.inventory import Limits
from adapters_sync.paths import MirrorPaths
from adapters_sync.tasks import in_thread


class Room:
    """What the limits leave of one volume. Use it from one event loop.

    `measure` reads the size of every file that there is, so it is for once a pass; in between, what was
    claimed and written is added to it.
    """

    def __init__(self, paths: MirrorPaths, limits: Limits) -> None:
        self._paths = paths
        self._limits = limits
        self._used_bytes = 0
        self._promised_bytes = 0

    async def measure(self) -> None:
        """See how much the versions take now, if there is a cap on that."""
        if self._limits.disk_bytes is not None:
            self._used_bytes = await in_thread(_used_bytes, self._paths)

    @contextmanager
    def claim(self, needed_bytes: int) -> Iterator["Claim"]:
        """Room for so many bytes more, besides what others have claimed; they are written in the block."""
        claim = Claim(partial(self._check, needed_bytes, self._promised_bytes))
        self._promised_bytes += needed_bytes
        try:
            yield claim
        finally:
            self._promised_bytes -= needed_bytes
            self._used_bytes += claim.used_bytes

    def _check(self, needed_bytes: int, promised_bytes: int) -> None:
        # The figures of the volume stay out of the message: they change all the time, and with them the
        # state file would.
        limits, more = self._limits, needed_bytes + promised_bytes
        if shutil.disk_usage(self._paths.adapters_dir).free - more < limits.free_bytes:
            raise NoRoom(
                f"no room for {needed_bytes} bytes: {limits.free_bytes} must stay free on the volume"
            )
        if limits.disk_bytes is not None and self._used_bytes + more > limits.disk_bytes:
            cap = limits.disk_bytes
            raise NoRoom(f"no room for {needed_bytes} bytes: all versions together may take {cap}")


class Claim:
    """What was asked for, for as long as it is being written."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        """Raises NoRoom when the bytes would pass a cap. Blocking."""
        self.used_bytes = 0

    def used(self, written_bytes: int) -> None:
        """So many bytes are on the volume now, for good."""
        self.used_bytes += written_bytes


def _used_bytes(paths: MirrorPaths) -> int:
    """The size of all files of all versions, each counted once however many links it has."""
    sizes = {}
    for folder, _, names in os.walk(paths.versions):
        for name in names:
            status = Path(folder, name).lstat()
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
