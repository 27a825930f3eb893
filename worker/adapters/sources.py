"""Where a registered adapter comes from: a prefix in S3 or a folder, read as the mirror reads its prefix."""

import asyncio
import hashlib
import math
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import msgspec

from adapters_sync.complete import Complete, Quiet, judge
from adapters_sync.errors import InvalidAdapter, InvalidUri, ObjectChanged, RemoteUnavailable
from adapters_sync.folder import carried_files
from adapters_sync.inventory import Limits, RemoteAdapter, RemoteFile, take_inventory
from adapters_sync.manifests import UploadManifest
from adapters_sync.names import MODEL_PY, REQUIRED_FILES, shown
from adapters_sync.remote import Remote, connect
from adapters_sync.tasks import in_thread
from adapters_sync.uris import S3Prefix, parse_prefix
from worker.adapters.places import path_of_url

_CHUNK_BYTES = 1 << 20
_MAX_PATH = 4096
_LIST_SECONDS = 60.0
_FORMS = "an s3://bucket/prefix/, an absolute path or a file:// URL"


class Found(msgspec.Struct, frozen=True):
    """An adapter at its source, and a way to read it under the name it gets here."""

    remote: Remote
    adapter: RemoteAdapter
    sha256: Mapping[str, str] = {}
    """What each file's content must be, where that is known."""


@asynccontextmanager
async def opened(src: str, name: str, limits: Limits) -> AsyncIterator[Found]:
    """What is at `src` now, to be read in the block, as adapter `name`.

    Raises InvalidUri, InvalidAdapter with what is wrong with it, ObjectChanged and RemoteUnavailable.
    """
    source = parse_source(src)
    if isinstance(source, Path):
        yield await in_thread(_look_into, source, name, limits)
        return
    async with connect(source) as prefix:
        remote = OneAdapter(prefix, name)
        try:
            async with asyncio.timeout(_LIST_SECONDS):  # a prefix may hold millions of objects
                objects = await remote.list()
        except TimeoutError as error:
            raise RemoteUnavailable(f"listing {source} took more than {_LIST_SECONDS:g} s") from error
        adapter = take_inventory(objects, limits).get(name)
        if adapter is None:
            raise InvalidAdapter(f"there is nothing under {source}")
        if adapter.fault is not None:
            raise InvalidAdapter(adapter.fault)
        yield Found(remote, adapter)


def check_complete(adapter: RemoteAdapter, manifest: UploadManifest | None) -> Mapping[str, str]:
    """Raise InvalidAdapter unless the adapter can be taken; returns the digests that its manifest tells.

    A plain upload need not settle: whoever names it here says that it is there.
    """
    verdict = judge(adapter, manifest, Quiet(math.inf, 2), settle_seconds=0)
    if not isinstance(verdict, Complete):
        raise InvalidAdapter(verdict.reason)
    return verdict.sha256


def parse_source(src: str) -> S3Prefix | Path:
    """Read `s3://bucket/prefix/`, `/a/folder` or `file:///a/folder`.

    Raises InvalidUri, or InvalidRegistration for a wrong `file://` URL, with what is wrong.
    """
    if src.startswith("s3://"):
        try:
            return parse_prefix(src)
        except InvalidUri as error:
            raise InvalidUri(f"src: {shown(src)} is not an s3://bucket/prefix/ of an adapter") from error
    path = path_of_url(src, "src")
    if not path.startswith("/"):
        raise InvalidUri(f"src: {shown(src)} is not {_FORMS}")
    if ".." in path.split("/") or not path.isprintable() or len(path) > _MAX_PATH:
        raise InvalidUri(
            f"src: {shown(src)} has a segment '..', a control character or more than {_MAX_PATH} characters"
        )
    return Path(path)


class OneAdapter(Remote):
    """The objects below one adapter's own prefix, as a mirror that knew it as `name` would see them."""

    def __init__(self, prefix: Remote, name: str) -> None:
        self._prefix = prefix
        self._below = f"{name}/"
        self.source = _Itself(prefix.source.bucket, prefix.source.prefix)

    async def list(self) -> list[RemoteFile]:
        """Every object, its path below `name/`."""
        objects = await self._prefix.list()
        return [msgspec.structs.replace(one, path=self._below + one.path) for one in objects]

    def read(self, path: str, etag: str) -> AsyncGenerator[bytes, None]:
        """As for the prefix itself."""
        return self._prefix.read(path.removeprefix(self._below), etag)


class _Itself(S3Prefix, frozen=True):
    """A prefix that is an adapter's already."""

    def below(self, name: str) -> S3Prefix:
        del name
        return S3Prefix(self.bucket, self.prefix)


class _Copied(RemoteAdapter, frozen=True, kw_only=True, dict=True):
    """A folder's files. Its version is the one that a plain folder of adapters gives them."""

    content_version: str

    @cached_property
    def version(self) -> str:
        return self.content_version


class FolderRemote(Remote):
    """The files of one folder, as a mirror that knew it as `name` would see them."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._below = f"{name}/"
        self.source = _FolderSource(str(folder), "")

    async def read(self, path: str, etag: str) -> AsyncGenerator[bytes, None]:
        """Stream a file, exactly the one that was listed, or raise ObjectChanged. Follows no link."""
        # Here, not on a thread, whose answer a cancelled caller would leave open behind it.
        file = _open(self._folder / path.removeprefix(self._below), path, etag)
        try:
            while chunk := await in_thread(file.read, _CHUNK_BYTES):
                yield chunk
        finally:
            file.close()


class _FolderSource(S3Prefix, frozen=True):
    """A folder in the place of a prefix: what manifests say the adapter came from."""

    def __str__(self) -> str:
        return self.bucket

    def below(self, name: str) -> S3Prefix:
        del name
        return self


def _look_into(folder: Path, name: str, limits: Limits) -> Found:
    """Hash the files of a folder: the copy that is made after must be the same."""
    try:
        # A folder without these is no adapter: its tree, which may be a whole disk, is not walked.
        for required in REQUIRED_FILES:
            if not (folder / required).exists():
                raise InvalidAdapter(f"{required} is missing in {folder}")
        files = carried_files(folder, code=limits.code)
        objects = [_listed(f"{name}/{path}", status) for path, status in files.items()]
        adapter = take_inventory(objects, limits)[name] if objects else RemoteAdapter(name=name)
        if adapter.fault is not None:
            raise InvalidAdapter(adapter.fault)
        sha256 = {file.path: _sha256(folder / file.path, file) for file in adapter.files}
    except OSError as error:
        raise InvalidAdapter(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    version = hashlib.sha256(msgspec.json.encode([[path, digest] for path, digest in sha256.items()]))
    skipped = (MODEL_PY,) if (folder / MODEL_PY).is_file() and MODEL_PY not in files else ()
    copied = _Copied(name=name, files=adapter.files, skipped=skipped, content_version=version.hexdigest())
    return Found(FolderRemote(folder, name), copied, sha256)


def _listed(path: str, status: os.stat_result) -> RemoteFile:
    return RemoteFile(path=path, size=status.st_size, etag=_etag(status), modified=status.st_mtime)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


def _sha256(path: Path, listed: RemoteFile) -> str:
    digest = hashlib.sha256()
    with _open(path, listed.path, listed.etag) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _open(path: Path, key: str, etag: str) -> BinaryIO:
    """The regular file that was listed, or ObjectChanged."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ObjectChanged(key) from error
    file = open(descriptor, "rb")  # noqa: PTH123, SIM115 (a descriptor, and whoever asked closes it)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or _etag(status) != etag:
        file.close()
        raise ObjectChanged(key)
    return file
