"""Adapters of a custom handler: the handler is told of each, and makes of it what it likes.

They come from the adapters folder, as they do without a handler, and from the management API. Of an adapter
in S3 the handler gets a copy in a folder; any other source is a path for it, and need not be there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from worker.adapters.info import AdapterInfo
from worker.adapters.places import path_of_url, reading
from worker.adapters.registrations import (
    REFRESH_SECONDS,
    Book,
    Registration,
    changed,
    check_name,
    page_of,
    unknown,
)
from worker.custom.folders import keep_only, settle, survey, version_of
from worker.custom.handler import CustomHandler
from worker.custom.messages import Call
from worker.custom.telling import Known, ask, gone, info_of, told
from worker.errors import (
    AdapterTaken,
    InvalidRegistration,
    RegistrationError,
    StorageFull,
)
from worker.turns import Turns

logger = logging.getLogger(__name__)


class HandlerAdapters:
    """Use it from one event loop. `folder` is the adapters folder, `place` one of our own for what is kept.

    `fetch` makes a folder a copy of an s3 prefix and gives a digest of what is there; it raises what the
    store does.
    """

    def __init__(
        self,
        handler: CustomHandler,
        folder: Path,
        place: Path,
        fetch: Callable[[str, Path], Awaitable[str]],
    ) -> None:
        self._handler = handler
        self._folder = folder
        self._book = Book(place.parent / "handler-registrations.json")
        self._copies = place.parent / "handler-adapters"
        self._fetch = fetch
        self._known: dict[str, Known] = {}
        self._said_of_folder: dict[str, Registration] = {}
        """What was said here about adapters of the folder."""
        self._refused: set[str] = set()
        """Those that a new process of the handler refused, and may take yet."""
        handler.on_lost = self._lose
        self._turns = Turns()
        self._writing = asyncio.Lock()
        self._taking = asyncio.Lock()
        self._owns_book = False

    async def start(self) -> None:
        """Tell the handler of what was registered before, and of what is in the folder.

        What it refuses, and a book that cannot be read, are logged; the worker runs without.
        """
        try:
            await self._read()
            if self._known or self._said_of_folder:
                await self._own_book()
        except RegistrationError as error:
            logger.warning("registered adapters cannot be changed", extra={"reason": str(error)})
        await self.refresh()

    async def run(self) -> None:
        """Follow what becomes of the adapters folder, for ever."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            await self.refresh()

    def close(self) -> None:
        """Let another worker register adapters."""
        self._book.close()
        self._owns_book = False

    def version(self, name: str) -> str | None:
        """The version of an adapter that the handler was told of; None for any other name."""
        known = self._known.get(name)
        return None if known is None else known.said.version

    async def page(self, begin: int, limit: int) -> tuple[list[AdapterInfo], int | None]:
        """Adapters by name from number `begin` on, and where the next page begins, if there is one."""
        names, following = page_of(sorted(self._known), begin, limit)
        return [info_of(self._known[name]) for name in names], following

    async def names(self) -> list[str]:
        """Of all adapters."""
        return sorted(self._known)

    async def source_of(self, name: str) -> str | None:
        """Where a registered adapter that can be used came from; None when none has the name."""
        known = self._known.get(name)
        return None if known is None or known.trouble is not None else known.said.src

    async def describe(self, name: str) -> AdapterInfo:
        """One adapter. Raises UnknownAdapter."""
        return info_of(self._known_as(name))

    async def register(
        self,
        name: str,
        src: str,
        *,
        preload: bool = True,
        pin: bool = False,
        options: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> str | None:
        """Tell the handler of an adapter; returns what it says to that.

        Raises RegistrationError, and then nothing is registered.
        """
        check_name(name)
        await self._own_book()
        said = Registration(
            name=name, src=src, preload=preload, pin=pin, options=dict(options or {}), alias=alias
        )
        async with self._turns.of(name):
            if name in self._known:
                raise AdapterTaken(f"The adapter {name} is registered already")
            return await self._change(said, None, fetch=True)

    async def update(
        self,
        name: str,
        *,
        src: str | None = None,
        preload: bool | None = None,
        pin: bool | None = None,
        options: Mapping[str, str] | None = None,
        alias: str | None = None,
    ) -> str | None:
        """Tell the handler what is different; what is None stays as it is.

        Raises RegistrationError, and then it is known as it was.
        """
        await self._own_book()
        async with self._turns.of(name):
            known = self._known_as(name)
            if known.in_folder and src not in {None, known.path}:
                raise _not_ours(name, known)
            if known.in_folder and known.said.version is None:
                raise InvalidRegistration(f"Adapter {name} is invalid: {known.trouble}")
            src = None if known.in_folder else src
            said = changed(known.said, src=src, preload=preload, pin=pin, options=options, alias=alias)
            return await self._change(said, known, fetch=src is not None)

    async def delete(self, name: str, *, alias: str | None = None) -> str | None:
        """Tell the handler that an adapter is gone. Raises RegistrationError, and then it is not."""
        await self._own_book()
        async with self._turns.of(name):
            known = self._known_as(name)
            if known.in_folder:
                raise _not_ours(name, known)
            said = None
            if known.trouble is None:  # else the handler does not know it
                said = await ask(self._handler, gone(known, alias))
            await self._keep(name, None, undo=told("register_adapter", known))
            await asyncio.to_thread(keep_only, self._copies / name, ())
        logger.info("adapter unregistered", extra={"adapter": name})
        return said

    async def refresh(self) -> None:
        """Tell the handler what became of the adapters folder, and of what it refused for a while."""
        try:
            found = await asyncio.to_thread(survey, self._folder)
        except OSError as error:
            logger.warning("the adapters folder cannot be read", extra={"reason": str(error)})
            return
        for name, one in found.items():
            async with self._turns.of(name):
                known = self._known.get(name)
                if known is not None and (not known.in_folder or one.version is None):
                    continue
                said = self._said_of_folder.get(name) or Registration(name=name, preload=True)
                fresh = Known(msgspec.structs.replace(said, version=one.version), one.path, True, one.trouble)
                if known is None or known.said != fresh.said or name in self._refused:
                    await self._tell_of(fresh)
        for name in list(self._known):
            async with self._turns.of(name):
                known = self._known.get(name)
                if known is not None and known.in_folder and name not in found:
                    await self._drop(known)
                elif known is not None and not known.in_folder and name in self._refused:
                    await self._tell_of(known._replace(trouble=None))

    def trouble(self, name: str) -> str | None:
        """Why an adapter cannot be used; None if it can, or nobody knows it."""
        known = self._known.get(name)
        return None if known is None else known.trouble

    # What was registered here.

    async def _own_book(self) -> None:
        """Become the one that may change things, and begin with what the book says by then."""
        async with self._taking:
            if self._owns_book:
                return
            await asyncio.to_thread(self._book.take)
            try:
                await self._read()
                await asyncio.to_thread(_tidy, self._copies, self._known)
            except BaseException:
                self._book.close()
                raise
            self._owns_book = True

    async def _read(self) -> None:
        """Tell the handler what the book says. Raises RegistryUnavailable when it cannot be read."""
        book = await asyncio.to_thread(self._book.read)
        registered = {said.name: said for said in book if said.src is not None}
        self._said_of_folder = {said.name: said for said in book if said.src is None}
        for name, said in registered.items():
            async with self._turns.of(name):
                known = self._known.get(name)
                if known is None or known.said != said:
                    await self._tell_of(self._registered(said))
        for name in self._known.keys() - registered.keys():
            async with self._turns.of(name):
                known = self._known.get(name)
                if known is not None and not known.in_folder:
                    await self._drop(known)

    def _registered(self, said: Registration) -> Known:
        try:
            return Known(said, self._path(said))
        except RegistrationError as error:
            return Known(said, said.src or "", trouble=str(error))

    async def _change(self, said: Registration, before: Known | None, *, fetch: bool) -> str | None:
        known = Known(said, "") if before is None else before._replace(said=said, trouble=None)
        try:
            if fetch:
                said = await self._fetched(said)
                known = known._replace(said=said, path=self._path(said))
            if before is None or before.trouble is not None:  # the handler does not know it
                function, undo = "register_adapter", gone(known)
            else:
                function, undo = "update_adapter", told("update_adapter", before)
            status = await ask(self._handler, told(function, known))
            await self._keep(said.name, known, undo)
        finally:
            if fetch:
                wanted = _copies_of(self._known.get(said.name))
                await asyncio.to_thread(keep_only, self._copies / said.name, wanted)
        logger.info("adapter registered or updated", extra={"adapter": said.name, "version": said.version})
        return status

    async def _fetched(self, said: Registration) -> Registration:
        """The registration with the version that its source has now; what is in S3 is copied."""
        assert said.src is not None
        scheme, colon, _ = said.src.partition("://")
        if not colon or scheme == "file":
            try:
                version = await asyncio.to_thread(version_of, Path(self._path(said)))
            except OSError as error:
                raise InvalidRegistration(f"src is {said.src!r}, which cannot be read: {error}") from error
            return msgspec.structs.replace(said, version=version)
        if scheme != "s3":
            raise InvalidRegistration(f"src is {said.src!r}; it must be an s3://bucket/prefix/ or a folder")
        staging = self._copies / said.name / "coming"
        try:
            with reading(f"src is {said.src!r}"):
                version = await self._fetch(said.src, staging)
            await asyncio.to_thread(settle, staging, version)
        except OSError as error:
            raise StorageFull(str(error)) from error
        return msgspec.structs.replace(said, version=version)

    def _path(self, said: Registration) -> str:
        """Where the handler finds what is registered."""
        assert said.src is not None
        if said.src.startswith("s3://"):
            return str(self._copies / said.name / (said.version or ""))
        return path_of_url(said.src, "src")

    async def _keep(self, name: str, known: Known | None, undo: Call) -> None:
        """What is known about a name from now on, in the book first.

        Raises StorageFull, and then has told the handler to `undo` what it was told.
        """
        async with self._writing:
            known_of = {**self._known, name: known}
            said_of_folder = dict(self._said_of_folder)
            if known is not None and known.in_folder:
                said_of_folder[name] = msgspec.structs.replace(known.said, version=None)
            said = [one.said for one in known_of.values() if one is not None and not one.in_folder]
            try:
                await asyncio.to_thread(self._book.write, [*said, *said_of_folder.values()])
            except StorageFull:
                with suppress(RegistrationError):
                    await ask(self._handler, undo)
                raise
            self._said_of_folder = said_of_folder
        if known is None:
            self._forget(name)
        else:
            self._remember(known)

    # What the handler is told.

    async def _tell_of(self, known: Known) -> None:
        """Tell the handler of an adapter that is there; its refusal is kept as the adapter's trouble."""
        name, before = known.said.name, self._known.get(known.said.name)
        is_new = before is None or before.trouble is not None
        trouble = known.trouble
        if trouble is None:
            try:
                await ask(self._handler, told("register_adapter" if is_new else "update_adapter", known))
            except RegistrationError as error:
                trouble = str(error)
        if trouble is not None:
            logger.warning("an adapter cannot be used", extra={"adapter": name, "reason": trouble})
        self._remember(known._replace(trouble=trouble))

    def _lose(self, name: str, reason: str, ended: bool) -> None:
        """A process that was started anew did not take an adapter. One that ended it is not tried again."""
        known = self._known.get(name)
        if known is not None:
            self._known[name] = known._replace(trouble=reason)
            if not ended:
                self._refused.add(name)

    async def _drop(self, known: Known) -> None:
        name = known.said.name
        try:
            if known.trouble is None:
                await ask(self._handler, gone(known))
        except RegistrationError as error:
            logger.warning("the handler kept an adapter", extra={"adapter": name, "reason": str(error)})
        self._forget(name)

    def _remember(self, known: Known) -> None:
        self._known[known.said.name] = known
        self._refused.discard(known.said.name)
        if known.trouble is None:
            self._handler.remember(known.said.name, told("register_adapter", known))

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._refused.discard(name)
        self._handler.forget(name)

    def _known_as(self, name: str) -> Known:
        """Raises UnknownAdapter."""
        known = self._known.get(name)
        if known is None:
            raise unknown(name)
        return known


def _tidy(copies: Path, known: Mapping[str, Known]) -> None:
    """Remove copies that nobody was told of. Blocking."""
    for folder in copies.glob("*"):
        keep_only(folder, _copies_of(known.get(folder.name)))


def _copies_of(known: Known | None) -> tuple[str, ...]:
    return () if known is None or known.said.version is None else (known.said.version,)


def _not_ours(name: str, known: Known) -> AdapterTaken:
    return AdapterTaken(f"The adapter {name} was not registered here: change or delete {known.path}")
