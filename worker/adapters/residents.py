"""Adapters that are in host memory because somebody asked for that, and which version of each is pinned."""

from typing import Protocol

from adapters_sync.layout import AdapterFolder
from worker.adapters.registrations import Registration
from worker.jobs import AdapterKey


class Details(Protocol):
    """What a loader knows about an adapter's weights."""

    @property
    def rank(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Loader(Protocol):
    """Host memory, as the bridge has it; see there for what is raised."""

    async def preload(self, adapter: AdapterFolder, *, pin: bool = False) -> None: ...
    def unpin(self, key: AdapterKey) -> None: ...
    def tier(self, key: AdapterKey) -> str: ...
    def details(self, key: AdapterKey) -> Details | None: ...
    def requests(self, key: AdapterKey) -> int: ...


class Residents:
    """At most one version of each name is pinned. A change is `load`, then `settle`; or `undo`, if it failed
    in between.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._pinned: dict[str, AdapterKey] = {}

    async def load(self, folder: AdapterFolder, said: Registration) -> None:
        """Bring a version into memory if that was said; the pinned one of the name stays until `settle`.

        Raises RowError and EngineFailed.
        """
        if said.pin or said.preload:
            await self._loader.preload(folder, pin=said.pin)

    def settle(self, folder: AdapterFolder, said: Registration) -> None:
        """The name has this version now: no other one of it is pinned, and this one only if that was said."""
        before = self._pinned.pop(folder.name, None)
        if said.pin:
            self._pinned[folder.name] = key_of(folder)
        if before is not None and (not said.pin or before != key_of(folder)):
            self._loader.unpin(before)

    def undo(self, folder: AdapterFolder) -> None:
        """The name did not get this version."""
        if self._pinned.get(folder.name) != key_of(folder):
            self._loader.unpin(key_of(folder))

    def drop(self, name: str) -> None:
        """No version of this name is pinned any more."""
        before = self._pinned.pop(name, None)
        if before is not None:
            self._loader.unpin(before)


def key_of(folder: AdapterFolder) -> AdapterKey:
    """What caches know this version as."""
    return AdapterKey(folder.name, folder.version)
