"""From a full staging folder to the version that readers see, and the way back. Blocking.

Every step leaves the volume in a state that a fresh start can go on from:

    stage     .staging/<name>              emptied when a pass begins
    seal      manifest.json, fsync         still only staging
    install   rename to .versions          a whole version that nobody sees; collected after the grace time
    flip      replace the link             readers see it, whole; the old version waits out the grace time

Power may fail between any two, so what a rename publishes is on the disk before the rename is.
"""

import os
import shutil
from pathlib import Path

import msgspec

from adapters_sync.layout import MirrorPaths, is_version
from adapters_sync.manifests import PublishedManifest
from adapters_sync.names import PUBLISHED_MANIFEST

FLIP_SUFFIX = ".flip"
"""A link before it takes its place is `.<name>.flip`, beside the one it replaces: a folder that is a volume
of its own cannot be renamed into from anywhere else."""


def seal(staging: Path, manifest: PublishedManifest, now: float) -> None:
    """Write the manifest and put every folder of the tree on the disk. The files are there already."""
    path = staging / PUBLISHED_MANIFEST
    with path.open("xb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    os.utime(staging, (now, now))
    for folder, _, _ in os.walk(staging, topdown=False):
        sync_folder(Path(folder))


def install(paths: MirrorPaths, staging: Path, name: str, version: str) -> None:
    """Give a sealed staging folder its place. A damaged version of the same content makes way."""
    target = paths.version_dir(name, version)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(paths.staging / f".damaged-{version}")
    staging.rename(target)
    sync_folder(target.parent)
    sync_folder(paths.versions)
    sync_folder(paths.versions.parent)


def flip(paths: MirrorPaths, name: str, version: str, now: float) -> None:
    """Point the adapter's link at an installed version, in one step for every reader."""
    retire(paths, name, now)
    fresh = paths.adapters_dir / f".{name}{FLIP_SUFFIX}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(paths.link_target(name, version))
    fresh.replace(paths.link(name))
    sync_folder(paths.adapters_dir)


def delete(paths: MirrorPaths, name: str, now: float) -> None:
    """Take the adapter away from readers; its version waits out the grace time."""
    retire(paths, name, now)
    paths.link(name).unlink()
    sync_folder(paths.adapters_dir)


def retire(paths: MirrorPaths, name: str, now: float) -> None:
    """Start the grace time of the version that the link points to. While linked it is never collected.

    The time stamp of the version's folder is the record, so it survives a restart; it is set before the
    link moves, since after a crash in between nobody would.
    """
    version = paths.linked_version(name)
    if version is not None and paths.version_dir(name, version).is_dir():
        os.utime(paths.version_dir(name, version), (now, now))


def collect(paths: MirrorPaths, now: float, grace_seconds: float) -> int:
    """Remove versions that no link points to and whose grace time is over; return how many."""
    collected = 0
    for folder in _subfolders(paths.versions):
        linked = paths.linked_version(folder.name)
        versions = [one for one in _subfolders(folder) if is_version(one.name)]
        old = [one for one in versions if one.name != linked and now - one.stat().st_mtime >= grace_seconds]
        for version in old:
            _discard(paths, version)
        collected += len(old)
        if old and not any(folder.iterdir()):
            folder.rmdir()
    return collected


def _discard(paths: MirrorPaths, version: Path) -> None:
    """Out of sight in one step, then away: half a version must never stand where a whole one is expected."""
    paths.staging.mkdir(exist_ok=True)
    doomed = paths.staging / f".old-{version.name}"
    version.rename(doomed)
    shutil.rmtree(doomed)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: without it a rename may be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
