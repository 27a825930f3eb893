"""From a full staging folder to the version that readers see, and the way back. Blocking.

Every step leaves the volume in a state that a fresh start can go on from:

    stage     .staging/<name>              emptied when a pass begins
    seal      manifest.json, fsync         still only staging
    install   rename to .versions          a whole version that nobody sees; collected after the grace time,
                                           if nobody holds it
    flip      replace the link             readers see it, whole; the old version waits out the grace time
    settle    fsync of the links           once for all flips of a pass

Power may fail between any two, so what a rename publishes is on the disk before the rename is.
"""

import math
import os
import shutil
from pathlib import Path

import msgspec

from adapters_sync.hold import unheld
from adapters_sync.manifests import PublishedManifest
from adapters_sync.names import PUBLISHED_MANIFEST
from adapters_sync.paths import MirrorPaths, is_version

FLIP_SUFFIX = ".flip"
"""A link before it takes its place is `.<name>.flip`, beside the one it replaces: a folder that is a volume
of its own cannot be renamed into from anywhere else."""


def seal(staging: Path, manifest: PublishedManifest, now: float) -> None:
    """Write the manifest and put every folder of the tree on the disk. The files are there already."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    with (staging / PUBLISHED_MANIFEST).open("xb", buffering=0) as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
    os.utime(staging, (now, now))
    _sync_tree(staging)


def install(paths: MirrorPaths, staging: Path, name: str, version: str) -> None:
    """Give a sealed staging folder its place. A damaged version of the same content is mended in its own."""
    target = paths.version_dir(name, version)
    is_new = not target.parent.exists()
    target.parent.mkdir(exist_ok=True)
    if os.path.lexists(target):
        _mend(target, staging)
    else:
        staging.rename(target)
    sync_folder(target.parent)
    if is_new:
        sync_folder(paths.versions)


def _mend(target: Path, staging: Path) -> None:
    """Put whole files in the place of damaged ones, the manifest last.

    The folder itself stays, and with it the locks of those who hold it. Readers see an old file or a new
    one, and both are meant to be the same.
    """
    manifest = staging / PUBLISHED_MANIFEST
    _make_way(target, for_folder=True)
    for folder, _, names in os.walk(staging):
        place = target / Path(folder).relative_to(staging)
        _make_way(place, for_folder=True)
        place.mkdir(exist_ok=True)
        for file in (Path(folder, name) for name in names):
            _make_way(place / file.name, for_folder=False)
            if file != manifest:
                file.replace(place / file.name)
    _sync_tree(target)
    manifest.replace(target / manifest.name)
    sync_folder(target)
    shutil.rmtree(staging)


def _make_way(path: Path, *, for_folder: bool) -> None:
    """Remove what stands at `path` if it is of the wrong sort."""
    is_folder = path.is_dir() and not path.is_symlink()
    if for_folder and not is_folder:
        path.unlink(missing_ok=True)
    elif is_folder and not for_folder:
        shutil.rmtree(path)


def flip(paths: MirrorPaths, name: str, version: str, now: float) -> None:
    """Point the adapter's link at an installed version, in one step for every reader."""
    retire(paths, name, now)
    fresh = paths.adapters_dir / f".{name}{FLIP_SUFFIX}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(paths.link_target(name, version))
    fresh.replace(paths.link(name))


def delete(paths: MirrorPaths, name: str, now: float) -> None:
    """Take the adapter away from readers; its version waits out the grace time."""
    retire(paths, name, now)
    paths.link(name).unlink()


def settle(paths: MirrorPaths) -> None:
    """Bring the links to the disk, before anything is collected that older ones point to."""
    sync_folder(paths.adapters_dir)


def retire(paths: MirrorPaths, name: str, now: float) -> None:
    """Start the grace time of the version that the link points to. While linked it is never collected.

    The time stamp of the version's folder is the record, so it survives a restart; it is set before the
    link moves, since after a crash in between nobody would.
    """
    version = paths.linked_version(name)
    if version is not None and paths.version_dir(name, version).is_dir():
        os.utime(paths.version_dir(name, version), (now, now))


def collect(paths: MirrorPaths, now: float, grace_seconds: float) -> tuple[int, float]:
    """Remove versions that no link points to, that nobody holds and whose grace time is over.

    Returns how many, and from when on there may be more if no link moves: at once when one was held,
    infinity when every version left is linked.
    """
    collected, again = 0, math.inf
    for folder in _subfolders(paths.versions):
        linked = paths.linked_version(folder.name)
        retired = [one for one in _subfolders(folder) if is_version(one.name) and one.name != linked]
        gone = 0
        for version in retired:
            due = version.stat().st_mtime + grace_seconds
            if now >= due and _discard(paths, version):
                gone += 1
            else:
                again = min(again, due)
        collected += gone
        if gone and not any(folder.iterdir()):
            folder.rmdir()
    return collected, again


def _discard(paths: MirrorPaths, version: Path) -> bool:
    """Out of sight in one step, then away: half a version must never stand where a whole one is expected.

    False when somebody holds it. Who comes to hold it now finds it locked, or gone.
    """
    paths.staging.mkdir(exist_ok=True)
    doomed = paths.staging / f".old-{version.name}"
    with unheld(version) as free:
        if free:
            version.rename(doomed)
    if free:
        shutil.rmtree(doomed)
    return free


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _sync_tree(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        sync_folder(folder)


def sync_folder(folder: Path | str) -> None:
    """Put a folder's entries on the disk: without it a rename may be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
