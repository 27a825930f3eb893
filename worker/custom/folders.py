"""Adapters of a custom handler on the disk: what is in the adapters folder, and copies of what is in S3.

They may hold anything, so all of their files count. Everything here blocks.
"""

import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from adapters_sync.layout import MirrorPaths, content_version, is_adapter_name


class Found(NamedTuple):
    """An adapter of the adapters folder."""

    path: str
    version: str | None
    """None when it cannot be read."""
    trouble: str | None = None
    """Why not."""


def survey(folder: Path) -> dict[str, Found]:
    """Every adapter in the folder, by name; nothing when there is no folder. Raises OSError."""
    paths = MirrorPaths(Path(os.path.realpath(folder)))
    try:
        names = sorted(path.name for path in paths.adapters_dir.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return {}
    found = {name: _look(paths, name) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def version_of(path: Path) -> str | None:
    """The version that a folder's files make, wherever it is; None when it is none. Raises OSError."""
    return content_version(path, _files(path)) if path.is_dir() else None


def settle(staging: Path, version: str) -> Path:
    """Give a fetched copy the name of its version. Raises OSError."""
    final = staging.with_name(version)
    if final.exists():
        shutil.rmtree(staging)
    else:
        staging.rename(final)
    return final


def keep_only(folder: Path, wanted: Collection[str]) -> None:
    """Remove what else is in a folder, and the folder too if nothing is wanted."""
    for path in folder.glob("*"):
        if path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)
    if not wanted:
        shutil.rmtree(folder, ignore_errors=True)


def _look(paths: MirrorPaths, name: str) -> Found | None:
    version, path = paths.linked_version(name), paths.link(name)
    if version is not None:
        path = paths.version_dir(name, version)
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return None
        if not is_adapter_name(name):
            return Found(str(path), None, "its name does not match [A-Za-z0-9][A-Za-z0-9._-]{0,127}")
        return Found(str(path.resolve()), version or version_of(path))
    except OSError as error:
        return Found(str(path), None, f"it cannot be read: {error}")


def _files(path: Path) -> dict[str, os.stat_result]:
    """Regular files, behind links too, sorted by their paths in the folder."""
    files = {}
    for parent, _, names in os.walk(path):
        for name in names:
            file = Path(parent, name)
            try:
                status = file.stat()
            except OSError:  # removed meanwhile, or a link that leads nowhere
                continue
            if stat.S_ISREG(status.st_mode):
                files[str(file.relative_to(path))] = status
    return dict(sorted(files.items()))
