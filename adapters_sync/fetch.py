"""One adapter's files, from S3 into a staging folder: counted, hashed and on the disk before it returns."""

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


class Previous(msgspec.Struct, frozen=True):
    """The version that is served now, whose unchanged files need not travel again."""

    path: Path
    manifest: PublishedManifest


class Fetched(msgspec.Struct, frozen=True):
    """What lies in the staging folder."""

    files: tuple[PublishedFile, ...]
    fetched_bytes: int
    """What came from S3; the rest was linked."""


async def fetch(
    remote: Remote,
    adapter: RemoteAdapter,
    staging: Path,
    *,
    sha256: Mapping[str, str],
    previous: Previous | None,
    gate: asyncio.Semaphore,
) -> Fetched:
    """Fill `staging`, a new folder, with the files of an adapter. `gate` bounds the files under way.

    Raises ObjectChanged when an object is not the one listed, InvalidAdapter when a content is not the one
    its uploader read (`sha256`, by path), RemoteUnavailable, OSError. What is in `staging` is worthless then.
    """
    await in_thread(_make_folders, staging, adapter)

    async def one(file: RemoteFile) -> tuple[PublishedFile, int]:
        async with gate:
            linked = None
            if _known(previous, file) is not None:
                linked = await in_thread(_link, previous, file, staging)
            published = linked or await _download(remote, adapter.name, file, staging / file.path)
        _check_digest(published, sha256)
        return published, 0 if linked else file.size

    results = await all_done(one(file) for file in adapter.files)
    return Fetched(tuple(file for file, _ in results), sum(size for _, size in results))


def bytes_to_fetch(adapter: RemoteAdapter, previous: Previous | None) -> int:
    """How many bytes are not on the volume yet."""
    return sum(file.size for file in adapter.files if _known(previous, file) is None)


def _make_folders(staging: Path, adapter: RemoteAdapter) -> None:
    staging.mkdir(parents=True)
    for file in adapter.files:
        (staging / file.path).parent.mkdir(parents=True, exist_ok=True)


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


async def _download(remote: Remote, adapter_name: str, file: RemoteFile, target: Path) -> PublishedFile:
    key = f"{adapter_name}/{file.path}"
    sink = _Sink(target)
    last, count = b"", 0
    try:
        async with aclosing(remote.read(key, file.etag)) as chunks:
            async for chunk in chunks:
                count += len(chunk)
                if count > file.size:
                    raise ObjectChanged(key)  # never write more than was listed and counted against the caps
                if last:
                    await in_thread(sink.write, last)
                last = chunk
        if count != file.size:
            raise ObjectChanged(key)
        await in_thread(sink.finish, last)  # with the end of the file, so a small one is one step
    finally:
        sink.close()
    return PublishedFile(
        name=file.path, size=file.size, sha256=sink.sha256, etag=file.etag, version_id=file.version_id
    )


def _check_digest(file: PublishedFile, sha256: Mapping[str, str]) -> None:
    expected = sha256.get(file.name, file.sha256)
    if file.sha256 != expected:
        raise InvalidAdapter(f"{shown(file.name)} has the sha256 {file.sha256}; its manifest says {expected}")


class _Sink:
    """A new file that hashes what is written to it, and is read-only and on the disk in the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, chunk: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("xb", buffering=0)
        left = memoryview(chunk)
        while left:
            left = left[self._file.write(left) :]
        self._digest.update(chunk)

    def finish(self, chunk: bytes) -> None:
        """Write the last of it, and bring all of it to the disk."""
        self.write(chunk)
        assert self._file is not None
        os.fchmod(self._file.fileno(), 0o444)
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Nothing waits to be written, so this does not block."""
        if self._file is not None:
            self._file.close()
