"""What adapters there are and how each fares: from the folder, the mirror's state, and a worker's word."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from adapters_sync.base_model import BaseModel, BaseModelFile
from adapters_sync.disk import load
from adapters_sync.errors import InvalidAdapter
from adapters_sync.folder import check_folder
from adapters_sync.layout import scan
from adapters_sync.paths import AdapterFolder, MirrorPaths
from adapters_sync.state import AdapterState, AdapterStatus, MirrorState, read_state

DISK = "disk"
"""The tier of what is served and in no worker's memory."""


class AdapterLine(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter. `version`, `rank`, `bytes` and `tier` are those of the version that is served now."""

    name: str
    version: str | None = None
    """None while nothing is served."""
    rank: int | None = None
    bytes: int | None = None
    tier: str | None = None
    """Where a worker has it: gpu, cpu or disk."""
    state: AdapterState = AdapterState.READY
    """What became of the newest upload; the version that is served may be an older one."""
    reason: str | None = None


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """Every adapter of a folder, by name."""

    folder: str | None = None
    """None when only a worker was asked."""
    source: str | None = None
    """The s3:// prefix that is mirrored to the folder; None when no mirror has written there."""
    last_success: float | None = None
    error: str | None = None
    """Why the mirror's last pass failed, if it did."""
    adapters: tuple[AdapterLine, ...] = ()

    def with_worker(self, told: Mapping[str, AdapterLine]) -> "Survey":
        """The same with what a worker tells, by name: tiers, and adapters that only it knows.

        A tier counts for the version the worker has; where another one is served by now, that one is on disk.
        """
        here = {line.name: _with_tier(line, told.get(line.name)) for line in self.adapters}
        merged = {**told, **here}
        return msgspec.structs.replace(self, adapters=tuple(merged[name] for name in sorted(merged)))


def survey(adapters_dir: Path) -> Survey:
    """Look at a folder of adapters, mirrored or plain. Blocking: a plain folder's files are read."""
    paths = MirrorPaths(adapters_dir.resolve())
    state = read_state(paths.state_file)
    if state is not None and state.folder != paths.adapters_dir.name:
        state = None  # that of another folder with the same parent
    base = BaseModelFile(paths)
    base.look()
    lines = {status.name: _of_status(status) for status in _statuses(state)}
    for folder in scan(paths.adapters_dir):
        lines[folder.name] = _of_folder(paths, folder, lines.get(folder.name), base.model)
    return Survey(
        folder=str(adapters_dir),
        source=state.source if state is not None else None,
        last_success=state.last_success if state is not None else None,
        error=state.error if state is not None else None,
        adapters=tuple(lines[name] for name in sorted(lines)),
    )


def _statuses(state: MirrorState | None) -> tuple[AdapterStatus, ...]:
    return state.adapters if state is not None else ()


def _of_status(status: AdapterStatus) -> AdapterLine:
    """What the mirror says of an adapter; what is served is seen on the disk."""
    return AdapterLine(name=status.name, state=status.state, reason=status.reason)


def _of_folder(
    paths: MirrorPaths, folder: AdapterFolder, told: AdapterLine | None, base: BaseModel | None
) -> AdapterLine:
    line = told or AdapterLine(name=folder.name)
    if not folder.is_published:
        return _of_plain_folder(folder, line, base)
    manifest = load(paths, folder.name, folder.version)
    if manifest is None:
        reason = line.reason or "its version on disk is not whole"
        return msgspec.structs.replace(line, state=AdapterState.PENDING, reason=reason)
    return msgspec.structs.replace(
        line, version=folder.version, rank=manifest.rank, bytes=manifest.bytes, tier=DISK
    )


def _of_plain_folder(folder: AdapterFolder, line: AdapterLine, base: BaseModel | None) -> AdapterLine:
    try:
        summary = check_folder(folder.path, base=base)
    except (InvalidAdapter, OSError) as error:
        return msgspec.structs.replace(line, state=AdapterState.INVALID, reason=str(error))
    return msgspec.structs.replace(
        line, version=folder.version, rank=summary.rank, bytes=summary.bytes, tier=DISK
    )


def _with_tier(line: AdapterLine, told: AdapterLine | None) -> AdapterLine:
    if told is None or line.version != told.version:
        return line
    return msgspec.structs.replace(line, tier=told.tier)
