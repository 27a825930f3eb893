"""The on-disk contract between the mirror, which writes it, and the worker, which reads it.

    <root>/<model_id>/adapters/<name>               relative symlink to ../.versions/<name>/<version>
    <root>/<model_id>/.versions/<name>/<version>/   never changes once published; holds manifest.json
    <root>/<model_id>/.staging/                     work in progress; emptied when a pass begins
    <root>/<model_id>/.state.json                   what the mirror thinks of every adapter
    <root>/<model_id>/.base_model.json              what adapters can apply to; the worker writes it, if any
    <root>/<model_id>/.lock                         held by the syncer at work

A plain folder of adapters, without links, is read too; the digest of its files is then the version.

A reader resolves a name once and keeps the AdapterFolder: the link may move on at any time, the folder it
led to stays for the mirror's grace time, and then for as long as somebody holds it. A hold is a shared lock
on the version's folder, which the mirror respects in whatever process it runs and which ends with its
holder; a reader that finds the version gone when it comes to hold it resolves the name again. A damaged
version is mended where it stands, so a hold outlives that too.

A version is always 64 hexadecimal digits: nobody types it, and a whole sha256 leaves nothing to argue about
collisions.
"""

import functools
import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from adapters_sync.base_model import BaseModel, write_base_model
from adapters_sync.errors import InvalidAdapter
from adapters_sync.folder import AdapterSummary, carried_files, check_folder
from adapters_sync.hold import Hold, hold
from adapters_sync.manifests import PublishedManifest
from adapters_sync.names import CONFIG_FILE, MODEL_PY, PUBLISHED_MANIFEST, is_adapter_name
from adapters_sync.paths import AdapterFolder, MirrorPaths, is_version
from adapters_sync.state import AdapterState, AdapterStatus, MirrorState, read_state

__all__ = [
    "MODEL_PY",
    "PUBLISHED_MANIFEST",
    "AdapterFolder",
    "AdapterState",
    "AdapterStatus",
    "AdapterSummary",
    "BaseModel",
    "Hold",
    "InvalidAdapter",
    "MirrorPaths",
    "MirrorState",
    "check_folder",
    "content_version",
    "hold",
    "is_adapter_name",
    "is_version",
    "left_out_code",
    "read_state",
    "resolve",
    "scan",
    "write_base_model",
]

_SETTLED_NS = 2_000_000_000
_CHUNK_BYTES = 1 << 20


def resolve(adapters_dir: Path, name: str) -> AdapterFolder | None:
    """The adapter of this name as it is now, or None when there is none.

    One readlink, so that whoever keeps the answer reads one version. None for a name against the rules, for
    a folder without adapter_config.json, and for a link that leads anywhere but to a version of this name.
    The version of a plain folder is the sha256 over the sorted (relative path, sha256) of its files, its
    `model.py` too; file digests are remembered, so asking again costs a stat per file. Blocking; safe from
    any thread.
    """
    if not is_adapter_name(name):
        return None
    paths = MirrorPaths(Path(os.path.realpath(adapters_dir)))
    version = paths.linked_version(name)
    if version is not None:
        path = paths.version_dir(name, version)
        return AdapterFolder(name, version, path) if (path / CONFIG_FILE).is_file() else None
    path = paths.link(name)
    if path.is_symlink() or not (path / CONFIG_FILE).is_file():
        return None
    try:
        return AdapterFolder(name, _content_version(path), path)
    except OSError:
        return None  # removed or replaced while it was read


def scan(adapters_dir: Path) -> list[AdapterFolder]:
    """Every adapter in the folder, sorted by name; empty when there is no such folder. Blocking."""
    try:
        names = sorted(entry.name for entry in os.scandir(adapters_dir))
    except FileNotFoundError:
        return []
    return [folder for name in names if (folder := resolve(adapters_dir, name)) is not None]


def left_out_code(folder: AdapterFolder) -> bool:
    """Whether a `model.py` lay with an adapter and is not in this version of it. Blocking."""
    try:
        manifest = (folder.path / PUBLISHED_MANIFEST).read_bytes()
        return msgspec.json.decode(manifest, type=PublishedManifest).left_out_code
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False  # a plain folder, or one that is gone


def _content_version(path: Path) -> str:
    return content_version(path, carried_files(path, code=True))


def content_version(path: Path, files: Mapping[str, os.stat_result]) -> str:
    """The version of these files of a plain folder, which are sorted. Blocking. Raises OSError."""
    lines = [
        [name, _file_digest(path / name, status.st_size, status.st_mtime_ns, status.st_ino)]
        for name, status in files.items()
    ]
    return hashlib.sha256(msgspec.json.encode(lines)).hexdigest()


def _file_digest(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    # A file written to a moment ago may change again without its time stamp moving (a file system's clock
    # ticks in milliseconds), so its digest is not worth remembering yet.
    if abs(time.time_ns() - mtime_ns) < _SETTLED_NS:
        return _hash(path)
    return _remembered_digest(path, size, mtime_ns, inode)


@functools.lru_cache(maxsize=65_536)
def _remembered_digest(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    del size, mtime_ns, inode  # they are the key
    return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
