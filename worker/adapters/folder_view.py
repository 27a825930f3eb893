"""The adapters folder as the management API sees it: what is there, and who brought it."""

from pathlib import Path
from typing import NamedTuple

from adapters_sync.layout import (
    AdapterFolder,
    InvalidAdapter,
    MirrorPaths,
    check_folder,
    read_state,
    resolve,
    scan,
)

_MOST_REMEMBERED = 10_000


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

    def _mirrored(self) -> str | None:
        state = read_state(self._paths.state_file)
        return None if state is None else state.source

    def _src(self, name: str, mirrored: str | None) -> str:
        if mirrored is not None and self._paths.linked_version(name) is not None:
            return f"{mirrored}{name}/"
        return str(self._paths.link(name).absolute())


class Ranks:
    """The rank that an adapter's files say, each version read once. Blocking; from any thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], int | None] = {}

    def of(self, folder: AdapterFolder) -> int | None:
        """None for files that are no adapter."""
        key = folder.name, folder.version
        if key not in self._known:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = self._read(folder)
        return self._known[key]

    @staticmethod
    def _read(folder: AdapterFolder) -> int | None:
        try:
            return check_folder(folder.path).rank
        except (InvalidAdapter, OSError):
            return None
