"""What is on the volume: the lock, leftovers, and what is served. Blocking."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from adapters_sync.errors import MirrorLocked
from adapters_sync.layout import MirrorPaths
from adapters_sync.manifests import PublishedManifest
from adapters_sync.names import PUBLISHED_MANIFEST, is_adapter_name
from adapters_sync.publish import FLIP_SUFFIX, sync_folder
from adapters_sync.state import MirrorState

_MANIFESTS = msgspec.json.Decoder(PublishedManifest)


class OnDisk(msgspec.Struct, frozen=True):
    """What has an adapter's name on disk."""

    version: str | None
    """None when it is not a link of ours."""
    manifest: PublishedManifest | None
    """None when the version is not whole."""


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Hold the mirror's lock, or raise MirrorLocked at once. The kernel frees it when the process dies."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MirrorLocked(f"another syncer holds {lock_file}") from error
        yield
    finally:
        os.close(descriptor)


def tidy(paths: MirrorPaths) -> None:
    """Remove what an earlier run left half done. Only the holder of the lock may."""
    if not paths.adapters_dir.is_dir():
        paths.adapters_dir.mkdir(parents=True)
    if not paths.versions.exists():
        paths.versions.mkdir()
        sync_folder(paths.versions.parent)
    if paths.staging.exists():
        for entry in list(paths.staging.iterdir()):
            _remove(entry)
    for name in [entry.name for entry in os.scandir(paths.adapters_dir)]:
        if name.startswith(".") and name.endswith(FLIP_SUFFIX) and paths.link(name).is_symlink():
            paths.link(name).unlink()


def look(paths: MirrorPaths, known: Mapping[str, OnDisk]) -> dict[str, OnDisk]:
    """What has an adapter's name, by name.

    A version that is in `known` is only asked whether it is still there; a new one has its sizes checked.
    """
    found = {}
    for entry in os.scandir(paths.adapters_dir):
        if not is_adapter_name(entry.name):
            continue
        version = paths.linked_version(entry.name)
        before = known.get(entry.name)
        if version is None:
            found[entry.name] = OnDisk(None, None)
        elif before and before.version == version and _is_there(paths, entry.name, version):
            found[entry.name] = before
        else:
            found[entry.name] = OnDisk(version, load(paths, entry.name, version))
    return found


def load(paths: MirrorPaths, name: str, version: str) -> PublishedManifest | None:
    """The manifest of a version whose files are all there in the right size; else None."""
    folder = f"{paths.versions}/{name}/{version}"
    try:
        with open(f"{folder}/{PUBLISHED_MANIFEST}", "rb", buffering=0) as file:  # noqa: PTH123 (see below)
            manifest = _MANIFESTS.decode(file.read())
        if (manifest.name, manifest.version) != (name, version):
            return None
        if any(os.lstat(f"{folder}/{file.name}").st_size != file.size for file in manifest.files):
            return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return manifest


def _is_there(paths: MirrorPaths, name: str, version: str) -> bool:
    # Paths as text here: making a Path takes longer than the question, and a pass asks it for every adapter.
    return os.path.exists(f"{paths.versions}/{name}/{version}/{PUBLISHED_MANIFEST}")  # noqa: PTH110


def write_state(state_file: Path, state: MirrorState) -> None:
    """Replace the state file, in one step for every reader. Nothing is decided by it, so no fsync."""
    fresh = state_file.with_name(state_file.name + ".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
    fresh.replace(state_file)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
