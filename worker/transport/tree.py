"""Copying everything under a prefix to a folder that appears whole: the base model, several GB of it."""

import asyncio
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from worker.errors import ObjectNotFound, StoreRefused, StoreUnavailable
from worker.transport.objects import StoredObject, parse_uri

MARKER = ".loramill-listing"
"""File inside a copied folder that holds the digest of the listing it was made from."""

_PARALLEL = 6
_ATTEMPTS = 3


class Source(Protocol):
    """What a copy needs of a store."""

    def list(self, uri: str) -> AsyncGenerator[StoredObject, None]:
        """See `Store.list`."""

    def stream(self, stored: StoredObject) -> AsyncGenerator[bytes, None]:
        """See `Store.stream`."""


async def download_tree(
    source: Source,
    uri: str,
    directory: Path,
    *,
    on_bytes: Callable[[int], None] | None = None,
    without: Collection[str] = (),
) -> bool:
    """Make `directory` a copy of everything under the folder `uri`; True if anything had to be fetched.

    `without` names folders directly below `uri` that are left out.

    Nothing is fetched when the directory is a copy of the very same listing (names, etags, sizes). The
    files arrive in a folder beside it, are checked and synced to disk, and one rename makes them appear. A
    directory that is not a copy made by this function is never replaced, unless it is empty.

    `on_bytes` is told of the bytes as they are written, and of a negative number when an object has to be
    fetched again. Raises ObjectNotFound when nothing lies under `uri`, StoreRefused for keys that are no
    safe file names, StoreUnavailable when fetching failed or the objects changed meanwhile, and OSError.
    """
    files = await _listing(source, uri, without)
    digest = _digest(files)
    if not await asyncio.to_thread(_needs_copy, directory, digest):
        return False
    with _staging(directory) as staging:
        await _fetch_all(source, files, staging, on_bytes or (lambda _: None))
        # Not in a thread: cancelled half way, the clean-up would empty the folder that is being published.
        _publish(staging, directory, digest)
    return True


async def _listing(source: Source, uri: str, without: Collection[str]) -> dict[str, StoredObject]:
    prefix = uri.rstrip("/") + "/"
    parse_uri(prefix)
    # Consoles make empty objects named like a folder; they are not files.
    files = {stored.uri[len(prefix) :]: stored async for stored in source.list(prefix)}
    files = {
        name: stored
        for name, stored in files.items()
        if name and not name.endswith("/") and name.partition("/")[0] not in without
    }
    if not files:
        raise ObjectNotFound(prefix)
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for name, stored in files.items():
        unsafe = name == MARKER or "\\" in name or "\0" in name or name in folders
        if unsafe or any(part in {"", ".", ".."} for part in name.split("/")):
            raise StoreRefused(f"{stored.uri!r} is no safe file name below {prefix}")
    return files


def _digest(files: Mapping[str, StoredObject]) -> str:
    lines = [f"{name}\0{stored.etag}\0{stored.size}\0" for name, stored in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _needs_copy(directory: Path, digest: str) -> bool:
    marker = directory / MARKER
    if marker.is_file():
        return marker.read_text() != digest
    if directory.exists() and any(directory.iterdir()):
        raise StoreRefused(f"{directory} is not empty and was not fetched by loramill: it is left as it is")
    return True


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A new folder beside `directory`, locked while in use; those of dead processes are removed."""
    parent = directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f".{directory.name}.*.staging"):
        with _locked(left) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".staging", dir=parent))
    try:
        with _locked(staging) as mine:
            if not mine:
                raise StoreUnavailable(f"another process is cleaning up beside {directory}")
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which the kernel drops with the process; False when somebody else has it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


async def _fetch_all(
    source: Source, files: Mapping[str, StoredObject], staging: Path, on_bytes: Callable[[int], None]
) -> None:
    room = asyncio.Semaphore(_PARALLEL)

    async def fetch(name: str, stored: StoredObject) -> None:
        async with room:
            await _fetch(source, stored, staging / name, on_bytes)

    tasks = [asyncio.create_task(fetch(name, stored), name=f"fetch {name}") for name, stored in files.items()]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # The staging folder goes next: nobody may be writing to it any more.
        await asyncio.gather(*tasks, return_exceptions=True)


async def _fetch(source: Source, stored: StoredObject, path: Path, on_bytes: Callable[[int], None]) -> None:
    for attempt in range(_ATTEMPTS):
        written = 0

        def count(size: int) -> None:
            nonlocal written
            written += size
            on_bytes(size)

        try:
            return await _write(source, stored, path, count)
        except StoreUnavailable:
            on_bytes(-written)
            if attempt == _ATTEMPTS - 1:
                raise
    return None


async def _write(source: Source, stored: StoredObject, path: Path, count: Callable[[int], None]) -> None:
    size = 0
    with _created(path) as file:
        async with aclosing(source.stream(stored)) as chunks:
            async for chunk in chunks:
                await asyncio.to_thread(file.write, chunk)
                size += len(chunk)
                count(len(chunk))
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    if size != stored.size:
        raise StoreUnavailable(f"{stored.uri} gave {size} bytes where {stored.size} were listed")


def _created(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _publish(staging: Path, directory: Path, digest: str) -> None:
    if not _needs_copy(directory, digest):
        return  # another process was faster
    with (staging / MARKER).open("w") as marker:
        marker.write(digest)
        marker.flush()
        os.fsync(marker.fileno())
    staging.chmod(0o755)
    for folder in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        _sync(folder)
    old = staging.with_name(f"{staging.stem}.old.staging")
    if (directory / MARKER).is_file():
        directory.rename(old)
    staging.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
