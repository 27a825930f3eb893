"""Uploading an adapter, so that no mirror ever sees half of it.

The order is the point: a notice that an upload has begun, the files, the removal of files that the adapter
no longer has, and last the manifest that names them all. A push that breaks off leaves the notice; mirrors
keep the last good version and the next push mends it.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from adapters_sync.complete import Complete, Quiet, judge
from adapters_sync.errors import InvalidAdapter, SettingsError, SyncError
from adapters_sync.folder import carried_files, check_folder
from adapters_sync.inventory import Limits, RemoteAdapter, RemoteFile, take_inventory
from adapters_sync.manifests import UploadedFile, UploadManifest
from adapters_sync.names import MARKERS, UPLOAD_MANIFEST, fault_in_path, is_carried, why_skipped
from adapters_sync.remote import Remote, connect
from adapters_sync.tasks import all_done, in_thread
from adapters_sync.uris import S3Prefix, parse_push_target

FILES_AT_ONCE = 4
_DEFAULT_LIMITS = Limits(code=True)
"""Code is sent, whoever carries it then."""


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that was checked and may be sent."""

    name: str
    target: S3Prefix
    """The adapter's own prefix."""
    directory: Path
    sizes: dict[str, int]
    """Bytes by path below the folder."""
    left_out: dict[str, str]
    """Why, by path."""

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


class Pushed(msgspec.Struct, frozen=True, kw_only=True):
    """What is in S3 now. `version` is what mirrors will call it, those that carry code if it has any."""

    name: str
    version: str
    uri: str
    files: int
    bytes: int
    left_out: tuple[str, ...]


def _ignore(path: str, count: int) -> None:
    pass


def pack(directory: Path, uri: str, limits: Limits = _DEFAULT_LIMITS) -> Parcel:
    """Check an adapter's folder and address: all that a mirror would refuse is refused here.

    `uri` is `s3://bucket/model_id/adapters/`, where the adapter gets the folder's name, or the same with a
    name. Raises InvalidUri, SettingsError (no such folder) and InvalidAdapter. Blocking.
    """
    if not directory.is_dir():
        raise SettingsError([f"{directory} is not a folder"])
    prefix, name = parse_push_target(uri, directory.resolve().name)
    check_folder(directory, max_rank=limits.rank)
    sizes = {path: status.st_size for path, status in carried_files(directory, code=True).items()}
    objects = [
        RemoteFile(path=f"{name}/{path}", size=size, etag="", modified=0) for path, size in sizes.items()
    ]
    objects.append(RemoteFile(path=f"{name}/{UPLOAD_MANIFEST}", size=0, etag="", modified=0))
    if fault := take_inventory(objects, limits)[name].fault:
        raise InvalidAdapter(fault)
    left_out = _left_out(directory, sizes)
    return Parcel(name=name, target=prefix.below(name), directory=directory, sizes=sizes, left_out=left_out)


async def push(
    directory: Path,
    uri: str,
    *,
    limits: Limits = _DEFAULT_LIMITS,
    progress: Callable[[str, int], None] = _ignore,
) -> Pushed:
    """Check a folder and upload it. Raises SyncError: InvalidUri, InvalidAdapter, RemoteUnavailable.

    `progress` is told a path and how many more of its bytes were sent.
    """
    return await send(await in_thread(pack, directory, uri, limits), progress)


async def send(parcel: Parcel, progress: Callable[[str, int], None] = _ignore) -> Pushed:
    """Upload a parcel, manifest last, and make sure that what a mirror will list is what was sent."""
    gate = asyncio.Semaphore(FILES_AT_ONCE)
    async with connect(parcel.target) as remote:

        async def one(path: str, size: int) -> UploadedFile:
            async with gate:
                sha256 = await remote.put_file(
                    path, parcel.directory / path, lambda count: progress(path, count)
                )
            return UploadedFile(name=path, size=size, sha256=sha256)

        await _put_manifest(remote, UploadManifest(finished=False))
        files = await all_done(one(path, size) for path, size in parcel.sizes.items())
        for old in await remote.list():
            if is_carried(old.path, code=True) and old.path not in parcel.sizes:
                await remote.delete(old.path)
        manifest = UploadManifest(files=tuple(files))
        await _put_manifest(remote, manifest)
        adapter = await _listed(remote, parcel.name)
    verdict = judge(adapter, manifest, Quiet(0, 0), settle_seconds=1)
    if adapter.fault is not None or not isinstance(verdict, Complete):
        reason = adapter.fault or getattr(verdict, "reason", "")
        raise SyncError(f"{parcel.target} is not what was sent; is somebody else writing there? {reason}")
    return Pushed(
        name=parcel.name,
        version=adapter.version,
        uri=str(parcel.target),
        files=len(files),
        bytes=parcel.bytes,
        left_out=tuple(parcel.left_out),
    )


async def _put_manifest(remote: Remote, manifest: UploadManifest) -> None:
    await remote.put(UPLOAD_MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))


async def _listed(remote: Remote, name: str) -> RemoteAdapter:
    """The adapter as a mirror will see it."""
    objects = [msgspec.structs.replace(one, path=f"{name}/{one.path}") for one in await remote.list()]
    return take_inventory(objects, _DEFAULT_LIMITS)[name]


def _left_out(directory: Path, sizes: dict[str, int]) -> dict[str, str]:
    found = {}
    for folder, subfolders, names in os.walk(directory):
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in names + links:
            path = Path(folder, name).relative_to(directory).as_posix()
            if path not in sizes and path not in MARKERS:
                found[path] = fault_in_path(path) or why_skipped(path) or "not a regular file"
    return dict(sorted(found.items()))
