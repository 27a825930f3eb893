"""What became of a job, for the one who sent it: its manifest, its results, and how it is stopped."""

import asyncio
import gzip
import hashlib
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import IO

from worker import wire
from worker.errors import LoramillError, ObjectExists, ObjectNotFound
from worker.jobs import Output
from worker.transport.clients import Clients
from worker.transport.store import S3Store, Store, StoredObject

_LOOK_EVERY_SECONDS = 0.5


async def wait_for_manifest(store: Store, output: Output, job_id: str, wait_seconds: float) -> wire.Manifest:
    """The manifest of a job, as soon as it has ended. Raises LoramillError when that is late.

    A failure that may be tried again is not an end while there is time.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        manifest = await find_manifest(store, output, job_id)
        late = time.monotonic() >= deadline
        if manifest is not None and (late or not _may_go_on(manifest)):
            return manifest
        if late:
            uri = wire.manifest_uri(output, job_id)
            waited = f" within {wait_seconds:g} seconds" if wait_seconds else ""
            raise LoramillError(f"job {job_id} has not ended: {uri} did not appear{waited}")
        await asyncio.sleep(_LOOK_EVERY_SECONDS)


async def stream_results(store: Store, manifest: wire.Manifest) -> AsyncGenerator[bytes, None]:
    """The lines of all parts in the order of the rows.

    Raises LoramillError if the job has none, or if a part is not what the manifest says, which only the end
    of the part can tell.
    """
    if manifest.error is not None:
        raise LoramillError(f"job {manifest.job_id} failed: {manifest.error.message}")
    for part in manifest.outputs:
        stored = await store.head(part.uri)
        if stored is None:
            raise LoramillError(f"{part.uri} is gone")
        digest = hashlib.sha256()
        # The version that the manifest speaks of, should somebody have replaced it.
        async with aclosing(store.stream(StoredObject(part.uri, part.etag, stored.size))) as chunks:
            async for chunk in chunks:
                digest.update(chunk)
                yield chunk
        if digest.hexdigest() != part.sha256:
            raise LoramillError(f"{part.uri} is damaged: its sha256 is not the manifest's")


async def save_results(store: Store, manifest: wire.Manifest, path: Path) -> None:
    """Write the lines to a file, packed when its name ends in .gz.

    A regular file is there whole or not at all; what is a pipe or a device is written to. Raises OSError too.
    """
    target = await asyncio.to_thread(path.resolve)
    if await asyncio.to_thread(_is_special, target):
        with await asyncio.to_thread(target.open, "wb") as file:
            await _write(stream_results(store, manifest), file)
        return
    fresh = await asyncio.to_thread(_make_fresh, target)
    try:
        with await asyncio.to_thread(fresh.open, "wb") as file:
            if target.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=file, mode="wb") as packed:
                    await _write(stream_results(store, manifest), packed)
            else:
                await _write(stream_results(store, manifest), file)
            await asyncio.to_thread(_sync, file)
        await asyncio.to_thread(fresh.replace, target)
    finally:
        await asyncio.to_thread(fresh.unlink, missing_ok=True)


async def fetch_results(
    output: str,
    job_id: str,
    wait_seconds: float,
    target: IO[bytes] | Path,
    *,
    digest: str | None = None,
    on_manifest: Callable[[], None] = lambda: None,
) -> wire.Manifest:
    """Write a job's result lines, after a call of `on_manifest`, and return its manifest.

    Raises LoramillError if the job failed, is late, or is another than that of `digest`; OSError too.
    """
    async with Clients() as clients:
        store = S3Store(clients)
        manifest = await wait_for_manifest(store, Output(wire.as_folder(output)), job_id, wait_seconds)
        on_manifest()
        if None not in {digest, manifest.digest} and manifest.digest != digest:
            raise LoramillError(f"id {job_id} was used before, for another job: these are not its results")
        if isinstance(target, Path):
            await save_results(store, manifest, target)
        else:
            await _write(stream_results(store, manifest), target)
    return manifest


async def cancel(store: Store, output: Output, job_id: str) -> bool:
    """Have workers start no more rows of a job; False when it has ended already."""
    manifest = await find_manifest(store, output, job_id)
    if manifest is not None and not _may_go_on(manifest):
        return False
    with suppress(ObjectExists):
        await store.put_if_absent(wire.cancel_uri(output, job_id), b"")
    return True


async def cancel_job(output: str, job_id: str) -> bool:
    """As `cancel`, in S3."""
    async with Clients() as clients:
        return await cancel(S3Store(clients), Output(wire.as_folder(output)), job_id)


async def find_manifest(store: Store, output: Output, job_id: str) -> wire.Manifest | None:
    """The manifest of a job that has ended, or failed for now; None before."""
    try:
        body, _ = await store.get(wire.manifest_uri(output, job_id))
    except ObjectNotFound:
        return None
    return wire.decode_manifest(body)


def _may_go_on(manifest: wire.Manifest) -> bool:
    return manifest.error is not None and manifest.error.retryable


def _is_special(path: Path) -> bool:
    if path.is_dir():
        raise IsADirectoryError(21, "it is a folder", str(path))
    return path.exists() and not path.is_file()


def _make_fresh(target: Path) -> Path:
    """A new file beside the target, with the rights that any new file has."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    umask = os.umask(0)
    os.umask(umask)
    os.fchmod(handle, 0o666 & ~umask)
    os.close(handle)
    return Path(name)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


async def _write(chunks: AsyncGenerator[bytes, None], file: IO[bytes] | gzip.GzipFile) -> None:
    async with aclosing(chunks):
        async for chunk in chunks:
            await asyncio.to_thread(file.write, chunk)
