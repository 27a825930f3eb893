"""Holds: what a reader puts on a version so that the mirror, in whatever process it runs, leaves it there.

A hold is a shared flock on the version's own folder. The kernel keeps it while the descriptor is open and
frees it when the process dies, so nothing has to be written, counted or cleaned up, and a hold is as good
for the sidecar next door as for a task of the same process. Whoever wants to take a version away asks for
the exclusive lock first (`unheld`). Readers and mirror must share a kernel, not a process.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from adapters_sync.paths import AdapterFolder

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Hold:
    """Keeps one version on the disk until `close`, which may be called again. From any thread.

    Each hold has an open descriptor of its own; a plain folder, which no mirror removes, needs none.
    """

    def __init__(self, folder: AdapterFolder, descriptor: int | None = None) -> None:
        self.folder = folder
        self._descriptor = descriptor

    def close(self) -> None:
        """Let the version go. The mirror removes it at a later pass, when nothing else speaks for it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def hold(folder: AdapterFolder) -> Hold:
    """Hold the version that `resolve` gave. Does not wait; safe from any thread.

    Raises FileNotFoundError when the version has gone since, or is about to: resolve the name again then.
    A plain folder of adapters is not held, since nobody collects it.
    """
    if not folder.is_published:
        return Hold(folder)
    descriptor = os.open(folder.path, _FLAGS)
    try:
        _lock(descriptor, folder)
    except BaseException:
        os.close(descriptor)
        raise
    return Hold(folder, descriptor)


def _lock(descriptor: int, folder: AdapterFolder) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:  # only what removes a version locks it exclusively
        raise FileNotFoundError(f"{folder.path} is being removed") from error
    if not _still_there(descriptor, folder.path):  # it went between open and lock
        raise FileNotFoundError(f"{folder.path} has gone")


@contextmanager
def unheld(path: Path) -> Iterator[bool]:
    """True in the block when nobody holds the version folder at `path`, and then nobody can begin to.

    False when somebody does. Raises OSError when there is no such folder.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        free = False
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        yield free
    finally:
        os.close(descriptor)


def _still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
