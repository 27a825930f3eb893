"""What the adapter management API knows and does: adapters by name, from the API and from the folder.

Two sorts of adapters share the names. Those of the adapters folder belong to whoever puts them there, mostly
the mirror: here they can be looked at, loaded and pinned. Those that were registered here have their
versions on a shelf, and a line in a book that survives a restart. A name belongs to whoever had it first: one
that is in the folder cannot be registered, and one that was registered stays what it is when an upload of the
same name comes later, until it is deleted here; a warning says so.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from adapters_sync.layout import AdapterFolder
from worker.adapters.folder_view import FolderView, InFolder
from worker.adapters.info import AdapterInfo, Teller
from worker.adapters.registrations import (
    REFRESH_SECONDS,
    Registration,
    changed,
    check_name,
    page_of,
    unknown,
)
from worker.adapters.residents import Loader, Residents, key_of
from worker.custom.formatters import Code, NoCode
from worker.errors import (
    AdapterInvalid,
    AdapterTaken,
    InvalidRegistration,
    RegistrationError,
    RegistryUnavailable,
    RowError,
)
from worker.jobs import AdapterKey
from worker.turns import Turns

logger = logging.getLogger(__name__)

_MOST_WARNINGS = 1000
_T = TypeVar("_T")


class Shelf(Protocol):
    """The disk under what is registered: worker.adapters.shelf has the real one, and says what is raised."""

    async def take(self) -> None: ...
    def close(self) -> None: ...
    async def read(self) -> Iterable[Registration]: ...
    async def write(self, registrations: Iterable[Registration]) -> None: ...
    async def restore(self, wanted: Mapping[str, str]) -> None: ...
    async def verify(self, name: str, version: str) -> AdapterFolder: ...
    async def put(self, name: str, src: str) -> AdapterFolder: ...
    async def point(self, name: str, version: str | None) -> None: ...
    async def collect(self, wanted: Mapping[str, str]) -> None: ...


class _Registered(msgspec.Struct, frozen=True):
    said: Registration
    folder: AdapterFolder | None = None
    """None when its version on the disk cannot be used."""
    trouble: str | None = None


class AdapterRegistry:
    """Use it from one event loop. Changes to one name take turns; each happens whole or not at all.

    `folder` is the adapters folder that the mirror, or somebody else, fills. Nothing is written before the
    first change.
    """

    def __init__(
        self,
        folder: Path,
        shelf: Shelf,
        loader: Loader,
        code: Code | None = None,
        *,
        max_rank: int | None = None,
    ) -> None:
        """`code` runs what adapters bring; None is nobody.

        An adapter of a rank beyond `max_rank` is told of as one that cannot be served.
        """
        self._code = NoCode() if code is None else code
        self._folder = FolderView(folder)
        self._max_rank = max_rank
        self._shelf = shelf
        self._teller = Teller(loader, self._code, max_rank)
        self._residents = Residents(loader)
        self._registered: dict[str, _Registered] = {}
        self._said_of_folder: dict[str, Registration] = {}
        """What was said here about adapters of the folder."""
        self._coming: set[str] = set()
        """Names that are being registered."""
        self._kept: dict[str, AdapterKey] = {}
        """The version of an adapter of the folder that was last loaded because that was said."""
        self._warned: set[tuple[str, str]] = set()
        self._turns = Turns()
        self._writing = asyncio.Lock()
        self._taking = asyncio.Lock()
        self._owns_shelf = False

    async def start(self) -> None:
        """Take up what an earlier worker was told: check what is on the disk, and load what shall be loaded.

        What fails is logged, and told by `describe`; the worker runs without it.
        """
        try:
            await self._read()
            if not self._registered and not self._said_of_folder:
                return
            await self._own_shelf()
        except RegistrationError as error:
            logger.warning("registered adapters cannot be changed", extra={"reason": str(error)})
        for name, one in sorted(self._registered.items()):
            await self._load_again(name, one)
        await self.refresh()

    async def run(self) -> None:
        """Log what is wrong with the adapters of the folder, and follow what becomes of it, for ever."""
        await self._warn_of_faults()
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            await self.refresh()

    def close(self) -> None:
        """Let another worker register adapters."""
        self._shelf.close()

    def find(self, name: str) -> AdapterFolder | None:
        """The version of a registered adapter; None when none has the name.

        Raises AdapterInvalid when what was registered cannot be used any more.
        """
        one = self._registered.get(name)
        if one is None:
            return None
        if one.folder is None:
            raise AdapterInvalid(f"Adapter {name} is invalid: {one.trouble}", "file")
        return one.folder

    async def source_of(self, name: str) -> str | None:
        """Where a registered adapter that can be used came from; None when none has the name."""
        one = self._registered.get(name)
        return None if one is None or one.folder is None else one.said.src

    async def names(self) -> list[str]:
        """Of all adapters. Raises RegistryUnavailable as `page`."""
        return sorted((await _off_loop(self._folder.survey)).keys() | self._registered.keys())

    async def page(self, begin: int, limit: int) -> tuple[list[AdapterInfo], int | None]:
        """Adapters by name from number `begin` on, and where the next page begins, if there is one.

        Raises RegistryUnavailable when the adapters folder cannot be read.
        """
        in_folder = await _off_loop(self._folder.survey)
        strangers = await _off_loop(self._folder.strangers)
        self._warn_of_shadows(in_folder)
        all_names = in_folder.keys() | self._registered.keys() | strangers.keys()
        names, following = page_of(sorted(all_names), begin, limit)
        found = [await self._info(name, in_folder.get(name), strangers.get(name)) for name in names]
        return [one for one in found if one is not None], following

    async def describe(self, name: str) -> AdapterInfo:
        """One adapter. Raises UnknownAdapter."""
        found, stranger = (
            await _off_loop(self._folder.look, name),
            await _off_loop(self._folder.stranger, name),
        )
        info = await self._info(name, found, stranger)
        if info is None:
            raise unknown(name)
        return info

    async def register(
        self,
        name: str,
        src: str,
        *,
        preload: bool = True,
        pin: bool = False,
        options: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> None:
        """Fetch an adapter, check it, load it if that is said, and have it by this name from then on.

        Raises RegistrationError or RowError, and then nothing is registered.
        """
        check_name(name)
        await self._own_shelf()
        if name in self._registered or name in self._coming:
            raise AdapterTaken(f"The adapter {name} is registered already")
        said = Registration(
            name=name, src=src, preload=preload, pin=pin, options=dict(options or {}), alias=alias
        )
        self._coming.add(name)
        try:
            async with self._turns.of(name):
                await self._register(said)
        finally:
            self._coming.discard(name)

    async def update(
        self,
        name: str,
        *,
        src: str | None = None,
        preload: bool | None = None,
        pin: bool | None = None,
        options: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> None:
        """Change what is said about an adapter; what is None stays as it is, and so do other options.

        With `src`, what is there now becomes a new version; rows that began keep theirs. Raises
        RegistrationError or RowError, and then all is as it was.
        """
        await self._own_shelf()
        load = bool(preload or pin)
        async with self._turns.of(name):
            one = self._registered.get(name)
            if one is not None:
                said = changed(one.said, src=src, preload=preload, pin=pin, options=options, alias=alias)
                await self._update(one, said, fetch=src is not None, load=load)
                return
            found = await _off_loop(self._folder.look, name)
            if found is None:
                raise unknown(name)
            if src not in {None, found.src}:
                raise _not_ours(name, found)
            said = self._said_of_folder.get(name) or Registration(name=name)
            said = changed(said, preload=preload, pin=pin, options=options, alias=alias)
            await self._keep(said, found.folder, load=load)

    async def delete(self, name: str, *, alias: str | None = None) -> None:
        """Take a registered adapter away, whatever its `alias`. Rows that began with it end with it.

        Raises RegistrationError.
        """
        del alias
        await self._own_shelf()
        async with self._turns.of(name):
            if name not in self._registered:
                found = await _off_loop(self._folder.look, name)
                raise unknown(name) if found is None else _not_ours(name, found)
            await self._commit(name)
            self._residents.drop(name)
            await self._code.drop(name)
            await self._link(name, None)
        logger.info("adapter unregistered", extra={"adapter": name})

    async def refresh(self) -> None:
        """See what became of the adapters folder: load new versions of adapters that are to be in memory."""
        try:
            await self._refresh()
        except RegistrationError as error:
            self._warn("old versions of adapters, or new ones, were not looked at", "", str(error))

    async def _refresh(self) -> None:
        for name in [*self._said_of_folder]:
            async with self._turns.of(name):
                said = self._said_of_folder.get(name)
                if said is not None:
                    await self._follow(said)
        looks = {name: await _off_loop(self._folder.look, name) for name in [*self._registered]}
        self._warn_of_shadows([name for name, found in looks.items() if found is not None])
        if self._owns_shelf:
            await self._shelf.collect(self._versions)

    # What was registered here.

    async def _register(self, said: Registration) -> None:
        name = said.name
        found = await _off_loop(self._folder.look, name)
        if found is not None:
            raise AdapterTaken(f"The adapter {name} is in the adapters folder already, from {found.src}")
        await self._change(_Registered(said), None, fetch=True, load=True)
        fields = {"adapter": name, "version": self._versions[name], "src": said.src}
        logger.info("adapter registered", extra=fields)
        await self._warn_of_code(name)

    async def _update(self, one: _Registered, said: Registration, *, fetch: bool, load: bool) -> None:
        if one.folder is None and not fetch:
            raise InvalidRegistration(f"Adapter {said.name} is invalid: {one.trouble}")
        await self._change(_Registered(said, one.folder), one.said.version, fetch=fetch, load=load)
        fields = {"adapter": said.name, "version": self._versions[said.name], "src": said.src}
        logger.info("adapter updated", extra=fields)
        if fetch:
            await self._warn_of_code(said.name)

    async def _warn_of_code(self, name: str) -> None:
        folder = self._registered[name].folder
        note = None if folder is None else await asyncio.to_thread(self._code.note, folder)
        if note is not None:
            self._warn("an adapter was registered without its code", name, note)

    async def _change(self, wanted: _Registered, before: str | None, *, fetch: bool, load: bool) -> None:
        """Make a registration what is wanted, or leave the name with the version it had `before`."""
        said, folder = wanted.said, wanted.folder
        assert said.src is not None
        try:
            if fetch:
                folder = await self._shelf.put(said.name, said.src)
                await self._code.load(folder)
            assert folder is not None
            if fetch or load:
                await self._residents.load(folder, said)
            said = msgspec.structs.replace(said, version=folder.version)
            await self._commit(said.name, registered=_Registered(said, folder))
        except BaseException:
            if folder is not None:
                self._residents.undo(folder)
            if fetch:
                await self._link(said.name, before)
            raise
        self._residents.settle(folder, said)

    async def _link(self, name: str, version: str | None) -> None:
        """Link what a name has according to the book. If that fails, the next refresh does it."""
        try:
            await self._shelf.point(name, version)
        except RegistrationError as error:
            self._warn("a version could not be linked", name, str(error))

    # What was said here about the folder's own.

    async def _keep(self, said: Registration, folder: AdapterFolder, *, load: bool) -> None:
        try:
            if load:
                await self._residents.load(folder, said)
            await self._commit(said.name, said_of_folder=said)
        except BaseException:
            self._residents.undo(folder)
            raise
        if load:
            self._kept[said.name] = key_of(folder)
        if load or not said.pin:
            self._residents.settle(folder, said)
        logger.info("adapter updated", extra={"adapter": said.name, "version": folder.version})

    async def _follow(self, said: Registration) -> None:
        found = await _off_loop(self._folder.look, said.name)
        if found is None:
            self._residents.drop(said.name)
            self._kept.pop(said.name, None)
        elif self._kept.get(said.name) != key_of(found.folder):
            try:
                await self._residents.load(found.folder, said)
            except (RegistrationError, RowError) as error:
                self._warn("an adapter was not loaded", said.name, str(error))
                return
            self._kept[said.name] = key_of(found.folder)
            self._residents.settle(found.folder, said)

    # The book and the shelf.

    async def _own_shelf(self) -> None:
        """Become the one that may change things, and begin with what the book says by then."""
        async with self._taking:
            if self._owns_shelf:
                return
            try:
                await self._shelf.take()
                await self._read()
                await self._shelf.restore(self._versions)
            except BaseException:
                self._shelf.close()
                raise
            self._owns_shelf = True

    @property
    def _versions(self) -> dict[str, str]:
        """What must stay on the disk."""
        said = ((name, one.said.version) for name, one in self._registered.items())
        return {name: version for name, version in said if version is not None}

    async def _read(self) -> None:
        """Take over what the book says. Raises RegistryUnavailable when it cannot be read."""
        book = await self._shelf.read()
        registered = {said.name: await self._verified(said) for said in book if said.src is not None}
        self._registered = registered
        self._said_of_folder = {said.name: said for said in book if said.src is None}

    async def _verified(self, said: Registration) -> _Registered:
        try:
            folder = await self._shelf.verify(said.name, said.version or "")
        except RegistrationError as error:
            self._warn("a registered adapter cannot be used", said.name, str(error))
            return _Registered(said, trouble=str(error))
        return _Registered(said, folder)

    async def _load_again(self, name: str, one: _Registered) -> None:
        if one.folder is None:
            return
        try:
            await self._residents.load(one.folder, one.said)
        except (RegistrationError, RowError) as error:
            self._registered[name] = msgspec.structs.replace(one, trouble=str(error))
            self._warn("a registered adapter was not loaded", name, str(error))
        else:
            self._residents.settle(one.folder, one.said)

    async def _commit(
        self, name: str, *, registered: _Registered | None = None, said_of_folder: Registration | None = None
    ) -> None:
        """What is known about a name from now on, in the book first. Raises StorageFull."""
        async with self._writing:
            all_registered = _with(self._registered, name, registered)
            all_said = _with(self._said_of_folder, name, said_of_folder)
            await self._shelf.write([*(one.said for one in all_registered.values()), *all_said.values()])
            self._registered, self._said_of_folder = all_registered, all_said

    # What is told.

    async def _info(self, name: str, found: InFolder | None, stranger: str | None) -> AdapterInfo | None:
        one = self._registered.get(name)
        if one is not None:
            note = one.trouble
            if note is None and found is not None:
                note = f"{found.src} has this name too, and is not used until this one is deleted"
            return await self._teller.tell(one.said, str(one.said.src), one.folder, note)
        if found is not None:
            said = self._said_of_folder.get(name) or Registration(name=name)
            return await self._teller.tell(said, found.src, found.folder, None)
        if stranger is not None:
            src = str(self._folder.path_of(name))
            return await self._teller.tell(Registration(name=name), src, None, stranger)
        return None

    async def _warn_of_faults(self) -> None:
        try:
            faults = await _off_loop(self._folder.faults, self._max_rank)
        except RegistryUnavailable as error:
            faults = {"": str(error)}
        for name, fault in faults.items():
            self._warn("an adapter of the folder cannot be served", name, fault)

    def _warn_of_shadows(self, in_folder: Collection[str]) -> None:
        for name in self._registered.keys() & set(in_folder):
            reason = "the adapters folder has one of this name too, which is not used"
            self._warn("a registered adapter keeps its name", name, reason)

    def _warn(self, what: str, name: str, reason: str) -> None:
        """Once for each reason."""
        if (name, reason) not in self._warned:
            if len(self._warned) >= _MOST_WARNINGS:
                self._warned.clear()
            self._warned.add((name, reason))
            logger.warning(what, extra={"adapter": name, "reason": reason})


async def _off_loop(look: Callable[..., _T], *args: object) -> _T:
    try:
        return await asyncio.to_thread(look, *args)
    except OSError as error:
        raise RegistryUnavailable(f"the adapters folder cannot be read: {error}") from error


def _with(table: Mapping[str, _T], name: str, value: _T | None) -> dict[str, _T]:
    others = {one: known for one, known in table.items() if one != name}
    return others if value is None else {**others, name: value}


def _not_ours(name: str, found: InFolder) -> AdapterTaken:
    return AdapterTaken(
        f"The adapter {name} was not registered here: change or delete its upload, {found.src}"
    )
