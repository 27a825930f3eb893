"""What became of a job, for the one who sent it: its manifest, and its results in one file."""

import asyncio
import gzip
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import IO, cast

from worker import wire
from worker.errors import LoramillError, ObjectNotFound
from worker.jobs import Output
from worker.transport.clients import Clients
from worker.transport.store import S3Store, Store, StoredObject

_LOOK_EVERY_SECONDS = 0.5


async def manifest_of(store: Store, output: Output, job_id: str) -> wire.Manifest | None:
    """The manifest of a job that has ended; None before. Raises what the store raises."""
    try:
        body, _ = await store.get(wire.manifest_uri(output, job_id))
    except ObjectNotFound:
        return None
    return wire.decode_manifest(body)


async def wait_for_manifest(store: Store, output: Output, job_id: str, wait_seconds: float) -> wire.Manifest:
    """The manifest of a job, as soon as it is there. Raises LoramillError when it is late."""
    deadline = time.monotonic() + wait_seconds
    while True:
        manifest = await manifest_of(store, output, job_id)
        if manifest is not None:
            return manifest
        if time.monotonic() >= deadline:
            uri = wire.manifest_uri(output, job_id)
            late = f" within {wait_seconds:g} seconds" if wait_seconds else ""
            raise LoramillError(f"job {job_id} has not ended: {uri} did not appear{late}")
        await asyncio.sleep(_LOOK_EVERY_SECONDS)


async def stream_results(store: Store, manifest: wire.Manifest) -> AsyncGenerator[bytes, None]:
    """The lines of all parts in the order of the rows. Raises LoramillError if the job has none."""
    if manifest.error is not None:
        raise LoramillError(f"job {manifest.job_id} failed: {manifest.error.message}")
    for part in manifest.outputs:
        stored = await store.head(part.uri)
        if stored is None:
            raise LoramillError(f"{part.uri} is gone")
        # The version that the manifest speaks of, should somebody have replaced it.
        async with aclosing(store.stream(StoredObject(part.uri, part.etag, stored.size))) as chunks:
            async for chunk in chunks:
                yield chunk


async def save_results(store: Store, manifest: wire.Manifest, path: Path) -> int:
    """Write the lines to a file, packed when its name ends in .gz; the number of bytes before that.

    The file is there whole or not at all. Raises OSError too.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with await asyncio.to_thread(opener, fresh, "wb") as file:
            size = await _write(stream_results(store, manifest), cast("IO[bytes]", file))
        await asyncio.to_thread(fresh.replace, path)
    finally:
        await asyncio.to_thread(fresh.unlink, missing_ok=True)
    return size


async def _write(chunks: AsyncGenerator[bytes, None], file: IO[bytes]) -> int:
    size = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            await asyncio.to_thread(file.write, chunk)
            size += len(chunk)
    return size


async def print_results(
    output: str, job_id: str, wait_seconds: float, file: IO[bytes] | Path
) -> wire.Manifest:
    """Write a job's result lines, and return its manifest. Raises LoramillError if it failed, or is late."""
    async with Clients() as clients:
        store = S3Store(clients)
        manifest = await wait_for_manifest(store, folder(output), job_id, wait_seconds)
        if isinstance(file, Path):
            await save_results(store, manifest, file)
        else:
            await _write(stream_results(store, manifest), file)
    return manifest


def folder(uri: str) -> Output:
    """Where jobs' results lie, the slash at its end or not."""
    return Output(uri if uri.endswith("/") else f"{uri}/")
