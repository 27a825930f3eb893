"""One adapter's files, from S3 into a staging folder: counted and hashed, and on the disk in the end.

The files of an adapter are small as often as not. What is small is held in memory until all have arrived and
is then written in one go, since a change of threads takes longer than writing such a file.
"""

import asyncio
import hashlib
import os
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

import msgspec

from adapters_sync.errors import InvalidAdapter, ObjectChanged
from adapters_sync.inventory import RemoteAdapter, RemoteFile
from adapters_sync.manifests import PublishedFile, PublishedManifest
from adapters_sync.names import shown
from adapters_sync.remote import Remote
from adapters_sync.tasks import all_done, in_thread

HELD_BYTES = 64 << 10
"""What one file may keep in memory while the others of its adapter arrive."""
_WRITE_BYTES = 1 << 20


class Previous(msgspec.Struct, frozen=True):
    """The version that is served now, whose unchanged files need not travel again."""

    path: Path
    manifest: PublishedManifest


class Arrived(msgspec.Struct, frozen=True):
    """All files of an adapter, some of them not on the disk yet."""

    files: tuple["PublishedFile | _Arrival", ...]
    fetched_bytes: int
    """What came from S3; the rest was linked."""

    def finish(self, sha256: Mapping[str, str]) -> tuple[PublishedFile, ...]:
        """Bring all of it to the disk. `sha256` is what the uploader read, by path. Blocking.

        Raises InvalidAdapter when a content is another one, and OSError.
        """
        files = tuple(file.finish() if isinstance(file, _Arrival) else file for file in self.files)
        for file in files:
            _check_digest(file, sha256)
        return files


async def fetch(
    remote: Remote,
    adapter: RemoteAdapter,
    staging: Path,
    *,
    linked: Mapping[str, PublishedFile],
    gate: asyncio.Semaphore,
) -> Arrived:
    """Fetch the files of an adapter that `prepare` did not link. `gate` bounds the files under way.

    Raises ObjectChanged when an object is not the one listed, RemoteUnavailable, OSError. What is in
    `staging` is worthless then.
    """

    async def one(file: RemoteFile) -> PublishedFile | _Arrival:
        if file.path in linked:
            return linked[file.path]
        async with gate:
            return await _download(remote, adapter.name, file, staging / file.path)

    files = await all_done(one(file) for file in adapter.files)
    return Arrived(tuple(files), sum(file.size for file in adapter.files if file.path not in linked))


def prepare(staging: Path, adapter: RemoteAdapter, previous: Previous | None) -> dict[str, PublishedFile]:
    """Make `staging`, a new folder, with hard links to the files that are the same objects as before.

    Returns those, by path. Blocking; raises OSError.
    """
    staging.mkdir(parents=True)
    linked = {}
    for file in adapter.files:
        if "/" in file.path:
            (staging / file.path).parent.mkdir(parents=True, exist_ok=True)
        if known := _link(previous, file, staging):
            linked[file.path] = known
    return linked


def bytes_to_fetch(adapter: RemoteAdapter, previous: Previous | None) -> int:
    """How many bytes are not on the volume yet."""
    return sum(file.size for file in adapter.files if _known(previous, file) is None)


def _link(previous: Previous | None, file: RemoteFile, staging: Path) -> PublishedFile | None:
    """Hard-link the file when it is the same object as before; None when it has to be fetched."""
    known = _known(previous, file)
    if previous is None or known is None:
        return None
    try:
        os.link(previous.path / file.path, staging / file.path)
    except OSError:
        return None  # gone, or a file system without hard links: fetching is always right
    return known


def _known(previous: Previous | None, file: RemoteFile) -> PublishedFile | None:
    known = previous.manifest.file(file.path) if previous is not None else None
    if known is None or (known.size, known.etag, known.version_id) != (file.size, file.etag, file.version_id):
        return None
    return known


async def _download(remote: Remote, adapter_name: str, file: RemoteFile, target: Path) -> "_Arrival":
    key = f"{adapter_name}/{file.path}"
    arrival = _Arrival(file, target)
    count, whole = 0, False
    try:
        async with aclosing(remote.read(key, file.etag)) as chunks:
            async for chunk in chunks:
                count += len(chunk)
                if count > file.size:
                    raise ObjectChanged(key)  # never write more than was listed and counted against the caps
                arrival.held += chunk
                if len(arrival.held) >= _WRITE_BYTES:
                    await in_thread(arrival.write)
        if count != file.size:
            raise ObjectChanged(key)
        if count > HELD_BYTES:
            await in_thread(arrival.finish)
        whole = True
    finally:
        if not whole:
            arrival.close()
    return arrival


def _check_digest(file: PublishedFile, sha256: Mapping[str, str]) -> None:
    expected = sha256.get(file.name, file.sha256)
    if file.sha256 != expected:
        raise InvalidAdapter(f"{shown(file.name)} has the sha256 {file.sha256}; its manifest says {expected}")


class _Arrival:
    """A new file that hashes what is written to it, and is read-only and on the disk in the end."""

    def __init__(self, file: RemoteFile, path: Path) -> None:
        self.held = bytearray()
        """What has arrived and is not written."""
        self._listed = file
        self._path = path
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._published: PublishedFile | None = None

    def write(self) -> None:
        if self._file is None:
            self._file = self._path.open("xb", buffering=0)
        left = memoryview(self.held)
        while left:
            left = left[self._file.write(left) :]
        self._digest.update(self.held)
        self.held = bytearray()

    def finish(self) -> PublishedFile:
        """Write the last of it, and bring all of it to the disk. May be called again."""
        if self._published is None:
            self._published = self._finish()
        return self._published

    def _finish(self) -> PublishedFile:
        try:
            self.write()
            assert self._file is not None
            os.fchmod(self._file.fileno(), 0o444)
            os.fsync(self._file.fileno())
        finally:
            self.close()
        listed = self._listed
        return PublishedFile(
            name=listed.path,
            size=listed.size,
            sha256=self._digest.hexdigest(),
            etag=listed.etag,
            version_id=listed.version_id,
        )

    def close(self) -> None:
        """Nothing of what was written waits to be, so this does not block."""
        if self._file is not None:
            self._file.close()
