"""The disk under the adapter management API: versions as the mirror's, in a folder of their own.

What the mirror's modules raise becomes what the API answers here, and nowhere else.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from adapters_sync import disk, publish
from adapters_sync.base_model import BaseModelFile
from adapters_sync.disk import OnDisk
from adapters_sync.errors import (
    InvalidAdapter,
    InvalidUri,
    NoRoom,
    ObjectChanged,
    RemoteUnavailable,
    SyncError,
)
from adapters_sync.inventory import Limits
from adapters_sync.layout import AdapterFolder, MirrorPaths, check_folder, is_adapter_name, is_version
from adapters_sync.options import Clock
from adapters_sync.report import FailureKind, Trouble
from adapters_sync.tasks import in_thread
from adapters_sync.workshop import Workshop
from worker.adapters.registrations import Book, Registration
from worker.adapters.sources import check_complete, opened
from worker.errors import InvalidRegistration, RegistryUnavailable, StorageFull

BOOK = "registrations.json"
"""Beside the folder of links."""
_FILES_AT_ONCE = 8
_REAL_CLOCK = Clock()


class VersionShelf:
    """Registered adapters on one volume, by name and version, and the book of what was said about them.

    `mirrored` is the adapters folder of the mirror, beside which the worker says what its base model is.
    `take` comes before all that writes; use it from one event loop, for different names at once. A version
    that no name has stays for `grace_seconds`, and while it is held. A cancelled call ends what it does to
    the disk first.
    """

    def __init__(
        self,
        adapters_dir: Path,
        *,
        mirrored: Path,
        limits: Limits,
        clock: Clock = _REAL_CLOCK,
        grace_seconds: float = 3600.0,
    ) -> None:
        self._paths = MirrorPaths(adapters_dir.absolute())
        self._book = Book(self._paths.adapters_dir.parent / BOOK)
        self._limits = limits
        self._clock = clock
        self._grace_seconds = grace_seconds
        self._base = BaseModelFile(MirrorPaths(mirrored.absolute()))
        self._collecting = asyncio.Lock()
        self._num_putting = 0

    async def take(self) -> None:
        """Become the only writer, until `close`. Raises RegistryUnavailable when another one is."""
        await in_thread(self._take)

    def close(self) -> None:
        """Let another one write."""
        self._book.close()

    async def read(self) -> tuple[Registration, ...]:
        """What the book says. Raises RegistryUnavailable when it cannot be read."""
        return await in_thread(self._book.read)

    async def write(self, registrations: Iterable[Registration]) -> None:
        """Write the book anew. Raises StorageFull, and it is as it was."""
        await in_thread(self._book.write, registrations)

    async def restore(self, wanted: Mapping[str, str]) -> None:
        """Link the versions that are wanted, by name, and no others: what is not linked is not kept.

        Raises StorageFull.
        """
        await in_thread(self._restore, wanted)

    async def verify(self, name: str, version: str) -> AdapterFolder:
        """A version on the disk whose files are all there. Raises InvalidRegistration."""
        return await in_thread(self._verify, name, version)

    async def put(self, name: str, src: str) -> AdapterFolder:
        """Fetch what is at `src` now, check it, and make it the version that `name` has.

        Raises InvalidRegistration, RegistryUnavailable and StorageFull; the name has what it had then.
        """
        with _as_answers():
            async with self._putting(), opened(src, name, self._limits) as found:
                await in_thread(self._make_ready, name)
                workshop = Workshop(
                    found.remote,
                    self._paths,
                    self._limits,
                    self._clock.now,
                    _FILES_AT_ONCE,
                    base=self._base,
                )
                sha256 = found.sha256 or check_complete(
                    found.adapter, await workshop.upload_manifest(found.adapter)
                )
                await workshop.measure_room()
                before = None if found.sha256 else await in_thread(self._on_disk, name)
                outcome = await workshop.publish(found.adapter, sha256, before)
            if outcome.trouble is not None:
                raise _error_of(outcome.trouble)
        version = found.adapter.version
        return AdapterFolder(name, version, self._paths.version_dir(name, version))

    async def point(self, name: str, version: str | None) -> None:
        """Give a name another version that is on the disk, or none. Raises StorageFull."""
        with _as_answers():
            await in_thread(self._point, name, version)

    async def collect(self, wanted: Mapping[str, str]) -> None:
        """Remove versions whose time is over, but none that is wanted. Raises StorageFull.

        While something is being put here that has to wait for another time.
        """
        async with self._collecting:
            if not self._num_putting:
                await in_thread(self._collect, wanted)

    def _take(self) -> None:
        self._book.take()
        try:
            disk.tidy(self._paths)
            self._paths = MirrorPaths(self._paths.adapters_dir.resolve())
        except OSError as error:
            self.close()
            raise RegistryUnavailable(f"{self._paths.adapters_dir.parent} cannot be used: {error}") from error

    def _restore(self, wanted: Mapping[str, str]) -> None:
        with _as_answers():
            for entry in list(self._paths.adapters_dir.iterdir()):
                version = self._paths.linked_version(entry.name) if is_adapter_name(entry.name) else None
                if version is not None and entry.name not in wanted:
                    publish.delete(self._paths, entry.name, self._clock.now())
            for name, version in wanted.items():
                linked = self._paths.linked_version(name) == version
                if not linked and self._paths.version_dir(name, version).is_dir():
                    publish.flip(self._paths, name, version, self._clock.now())

    def _verify(self, name: str, version: str) -> AdapterFolder:
        known = is_adapter_name(name) and is_version(version)
        if not known or disk.load(self._paths, name, version) is None:
            raise InvalidRegistration(f"version {version} is not whole on the disk; give its src again")
        path = self._paths.version_dir(name, version)
        with _as_answers():
            check_folder(path, max_rank=self._limits.rank)
        return AdapterFolder(name, version, path)

    def _collect(self, wanted: Mapping[str, str]) -> None:
        self._restore(wanted)  # a change that failed on a full disk may have left other links
        with _as_answers():
            publish.collect(self._paths, self._clock.now(), self._grace_seconds)

    def _point(self, name: str, version: str | None) -> None:
        if version is not None:
            publish.flip(self._paths, name, version, self._clock.now())
        elif self._paths.linked_version(name) is not None:
            publish.delete(self._paths, name, self._clock.now())

    def _make_ready(self, name: str) -> None:
        self._base.look()
        leftovers = self._paths.staging / name
        if leftovers.exists():
            shutil.rmtree(leftovers)

    def _on_disk(self, name: str) -> OnDisk | None:
        version = self._paths.linked_version(name)
        return None if version is None else OnDisk(version, disk.load(self._paths, name, version))

    @asynccontextmanager
    async def _putting(self) -> AsyncIterator[None]:
        """Nothing is collected in the block: a folder that is empty now may be about to be filled."""
        async with self._collecting:
            self._num_putting += 1
        try:
            yield
        finally:
            self._num_putting -= 1


def _error_of(trouble: Trouble) -> SyncError:
    match trouble.kind:
        case FailureKind.INVALID:
            return InvalidAdapter(trouble.reason)
        case FailureKind.DISK:
            return NoRoom(trouble.reason)
        case _:
            return RemoteUnavailable(trouble.reason)


@contextmanager
def _as_answers() -> Iterator[None]:
    try:
        yield
    except (InvalidUri, InvalidAdapter) as error:
        raise InvalidRegistration(str(error)) from error
    except (ObjectChanged, RemoteUnavailable) as error:
        raise RegistryUnavailable(str(error)) from error
    except (NoRoom, OSError) as error:
        raise StorageFull(str(error)) from error
