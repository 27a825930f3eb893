"""The adapters folder as the management API sees it: what is there, and who brought it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from adapters_sync.layout import (
    AdapterFolder,
    InvalidAdapter,
    MirrorPaths,
    check_folder,
    is_adapter_name,
    read_state,
    resolve,
    scan,
)

_MOST_REMEMBERED = 10_000
_CONFIG = "adapter_config.json"


class InFolder(NamedTuple):
    """An adapter that is in the folder now."""

    folder: AdapterFolder
    src: str
    """The S3 prefix that it is mirrored from, or its own folder."""


class FolderView:
    """Looks at the folder that the mirror, or somebody else, fills. All methods block; from any thread."""

    def __init__(self, folder: Path) -> None:
        self._paths = MirrorPaths(folder)

    def look(self, name: str) -> InFolder | None:
        """The adapter of this name, if there is one."""
        found = resolve(self._paths.adapters_dir, name)
        return None if found is None else InFolder(found, self._src(name, self._mirrored()))

    def survey(self) -> dict[str, InFolder]:
        """All of them, by name. Raises OSError when the folder cannot be read."""
        mirrored = self._mirrored()
        found = scan(self._paths.adapters_dir)
        return {one.name: InFolder(one, self._src(one.name, mirrored)) for one in found}

    def strangers(self) -> dict[str, str]:
        """What lies in the folder as an adapter would and is none, by name, and why.

        Raises OSError when the folder cannot be read.
        """
        return self._whys(self.stranger)

    def stranger(self, name: str) -> str | None:
        """Why nothing is served by this name; None when an adapter is, or there is nothing."""
        path = self._paths.link(name)
        is_link = os.path.islink(path)  # noqa: PTH114 (of a name that can be none, it says no)
        if "/" in name or name.startswith(".") or not (is_link or _is_folder(path)):
            return None
        if not is_adapter_name(name):
            return "its name does not match [A-Za-z0-9][A-Za-z0-9._-]{0,127}"
        if is_link and self._paths.linked_version(name) is None:
            return "it is a link that no mirror has made; put the folder itself there"
        return None if (path / _CONFIG).is_file() else f"{_CONFIG} is missing"

    def faults(self, max_rank: int | None) -> dict[str, str]:
        """What is wrong with what others than a mirror, which has looked, have put there: by name.

        Raises OSError when the folder cannot be read.
        """

        def fault(name: str) -> str | None:
            path, why = self._paths.link(name), self.stranger(name)
            if why is not None or name.startswith(".") or path.is_symlink() or not _is_folder(path):
                return why
            return check(path, max_rank)[1]

        return self._whys(fault)

    def _whys(self, why_of: Callable[[str], str | None]) -> dict[str, str]:
        try:
            whys = {path.name: why_of(path.name) for path in sorted(self._paths.adapters_dir.iterdir())}
        except FileNotFoundError:
            return {}
        # A name that is no UTF-8 could not be written.
        return {name.encode(errors="replace").decode(): why for name, why in whys.items() if why is not None}

    def _mirrored(self) -> str | None:
        state = read_state(self._paths.state_file)
        return None if state is None else state.source

    def _src(self, name: str, mirrored: str | None) -> str:
        if mirrored is not None and self._paths.linked_version(name) is not None:
            return f"{mirrored}{name}/"
        return str(self.path_of(name))

    def path_of(self, name: str) -> Path:
        """Where what has a name in the folder lies."""
        return self._paths.link(name).absolute()


class Checks:
    """What an adapter's files say of its rank, each version read once. Blocking; from any thread."""

    def __init__(self, max_rank: int | None) -> None:
        self._max_rank = max_rank
        self._known: dict[tuple[str, str], tuple[int | None, str | None]] = {}

    def of(self, folder: AdapterFolder) -> tuple[int | None, str | None]:
        """As `check`."""
        key = folder.name, folder.version
        if key not in self._known:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = check(folder.path, self._max_rank)
        return self._known[key]


def check(folder: Path, max_rank: int | None) -> tuple[int | None, str | None]:
    """The rank of an adapter, or None and what is wrong with it. Blocking."""
    try:
        return check_folder(folder, max_rank=max_rank).rank, None
    except InvalidAdapter as error:
        return None, str(error)
    except OSError as error:
        return None, f"it cannot be read: {error}"


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (of a name that can be none, it says no)
