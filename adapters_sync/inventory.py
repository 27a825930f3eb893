"""What a listing says: objects under the prefix, sorted into adapters. Pure."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property

import msgspec

from adapters_sync.manifests import MAX_MANIFEST_BYTES
from adapters_sync.names import (
    MARKERS,
    SUCCESS_MARKER,
    UPLOAD_MANIFEST,
    clash,
    fault_in_name,
    fault_in_path,
    why_skipped,
)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Caps that keep one adapter from using up what all of them share."""

    adapter_files: int = 256
    """Objects below one adapter's name, carried or not."""
    adapter_bytes: int = 8 << 30
    disk_bytes: int | None = None
    """All versions together, old ones included; None leaves it to the volume."""
    free_bytes: int = 256 << 20
    """What must stay free on the volume."""
    rank: int | None = None
    code: bool = False
    """Whether an adapter's own `model.py` is carried."""


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    """One object. `path` is its key below a prefix: that of all adapters, or of the one it is part of."""

    path: str
    size: int
    etag: str
    """Opaque: equal or not, never an MD5."""
    modified: float
    """Seconds since the Unix epoch, by S3's clock, whole seconds."""
    version_id: str = ""
    """Part of an adapter's version. ListObjectsV2 tells none; a listing that does fills it in."""


class RemoteAdapter(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One adapter as listed. Two are equal when nothing about their objects changed."""

    name: str
    files: tuple[RemoteFile, ...] = ()
    """What is carried, sorted by path."""
    manifest: RemoteFile | None = None
    success: RemoteFile | None = None
    skipped: tuple[str, ...] = ()
    with_code: bool = False
    """Whether its `model.py`, if it has one, is carried."""
    fault: str | None = None
    """Why the adapter is refused without a look at its content."""

    @cached_property
    def version(self) -> str:
        """sha256 over the sorted (relative path, size, ETag, versionId) of the files that are carried.

        The markers are left out: they say that a content is complete, they are not part of it.
        """
        lines = [[file.path, file.size, file.etag, file.version_id] for file in self.files]
        return hashlib.sha256(msgspec.json.encode(lines)).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def has(self, path: str) -> bool:
        return any(file.path == path for file in self.files)


def take_inventory(
    objects: Iterable[RemoteFile], limits: Limits, before: Mapping[str, RemoteAdapter] | None = None
) -> dict[str, RemoteAdapter]:
    """Sort objects, whose paths are keys below the adapters' prefix, into adapters by name.

    A bad name or key makes the adapter that owns it faulty and nobody else. Objects directly under the
    prefix and the empty objects that consoles make for folders belong to nobody. An adapter that is as it was
    in `before` is the same object, which knows its version by now.
    """
    found: dict[str, _Draft] = {}
    for item in objects:
        name, slash, path = item.path.partition("/")
        is_folder_marker = item.size == 0 and item.path.endswith("/")
        if not slash or is_folder_marker:
            continue
        draft = found.setdefault(name, _Draft(name, limits))
        draft.add(msgspec.structs.replace(item, path=path))
    adapters = {name: draft.finish() for name, draft in found.items()}
    known = before or {}
    return {name: known[name] if known.get(name) == one else one for name, one in adapters.items()}


class _Draft:
    """An adapter while its objects come in; holds at most `adapter_files` of them."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.fault = fault_in_name(name)
        self.count = 0
        self.files: list[RemoteFile] = []
        self.markers: dict[str, RemoteFile] = {}
        self.skipped: list[str] = []

    def add(self, file: RemoteFile) -> None:
        self.count += 1
        if self.count > self.limits.adapter_files:
            self.fault = self.fault or f"it has more than {self.limits.adapter_files} objects, the limit"
        elif fault := fault_in_path(file.path):
            self.fault = self.fault or fault
        elif file.path in MARKERS:
            self.markers[file.path] = file
        elif why_skipped(file.path, code=self.limits.code):
            self.skipped.append(file.path)
        else:
            self.files.append(file)

    def finish(self) -> RemoteAdapter:
        adapter = RemoteAdapter(
            name=self.name,
            files=tuple(sorted(self.files, key=lambda file: file.path)),
            manifest=self.markers.get(UPLOAD_MANIFEST),
            success=self.markers.get(SUCCESS_MARKER),
            skipped=tuple(sorted(self.skipped)),
            with_code=self.limits.code,
        )
        fault = self.fault or clash(file.path for file in adapter.files) or self._over_limit(adapter)
        return msgspec.structs.replace(adapter, fault=fault)

    def _over_limit(self, adapter: RemoteAdapter) -> str | None:
        if adapter.bytes > self.limits.adapter_bytes:
            return f"its files have {adapter.bytes} bytes; the limit is {self.limits.adapter_bytes}"
        if adapter.manifest is not None and adapter.manifest.size > MAX_MANIFEST_BYTES:
            return f"{UPLOAD_MANIFEST} has {adapter.manifest.size} bytes; the limit is {MAX_MANIFEST_BYTES}"
        return None
