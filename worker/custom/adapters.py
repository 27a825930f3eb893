"""Adapters of a custom handler: the handler is told of each, and makes of it what it likes.

They come from the adapters folder, as they do without a handler, and from the management API. Of an adapter
in S3 the handler gets a copy in a folder; any other source is handed to it as it was said.
"""

import asyncio
import hashlib
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from adapters_sync.layout import is_adapter_name
from worker.adapters.info import AdapterInfo
from worker.adapters.registrations import Registration, read_book, write_book
from worker.custom.answers import Answer
from worker.custom.handler import CustomHandler
from worker.custom.messages import Call, Content
from worker.errors import (
    AdapterTaken,
    HandlerBusy,
    HandlerDied,
    HandlerRefused,
    InvalidRegistration,
    LoramillError,
    RegistrationError,
    RegistryUnavailable,
    StorageFull,
    UnknownAdapter,
)
from worker.turns import Turns

logger = logging.getLogger(__name__)

_REFRESH_SECONDS = 10.0
_SAYS_NOTHING = frozenset({"OK", "No content", ""})
_FILE_URL = "file://"


class _Known(NamedTuple):
    said: Registration
    path: str
    """What the handler was told as `src`."""
    in_folder: bool = False
    trouble: str | None = None


class HandlerAdapters:
    """Use it from one event loop. `folder` is the adapters folder, `place` one of our own for what is kept.

    `fetch` makes a folder a copy of an s3 prefix, gives a digest of what is there, and raises LoramillError.
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
        self._book = place.parent / "handler-registrations.json"
        self._copies = place.parent / "handler-adapters"
        self._fetch = fetch
        self._known: dict[str, _Known] = {}
        self._refused: set[str] = set()
        """Those that a new process of the handler refused, and may take yet."""
        handler.on_lost = self._lose
        self._turns = Turns()
        self._writing = asyncio.Lock()

    async def start(self) -> None:
        """Tell the handler of what was registered before, and of what is in the folder.

        What it refuses is logged, and told by `describe`.
        """
        try:
            book = await asyncio.to_thread(read_book, self._book)
        except (OSError, msgspec.DecodeError) as error:
            raise RegistryUnavailable(f"{self._book} cannot be read: {error}") from error
        wanted = {(said.name, said.version or "") for said in book}
        await asyncio.to_thread(_tidy, self._copies, wanted)  # of an earlier worker: nobody reads them
        for said in book:
            if said.src is not None:
                await self._tell_of(said, str(self._path(said)), in_folder=False)
        await self.refresh()

    async def run(self) -> None:
        """Follow what becomes of the adapters folder, for ever."""
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            await self.refresh()

    def close(self) -> None:
        """Nothing is held."""

    def version(self, name: str) -> str | None:
        """The version of an adapter that the handler was told of; None for any other name."""
        known = self._known.get(name)
        return None if known is None else known.said.version

    async def page(self, begin: int, limit: int) -> tuple[list[AdapterInfo], int | None]:
        """Adapters by name from number `begin` on, and where the next page begins, if there is one."""
        names = sorted(self._known)
        end = begin + limit
        return [self._info(name) for name in names[begin:end]], end if end < len(names) else None

    async def describe(self, name: str) -> AdapterInfo:
        """One adapter. Raises UnknownAdapter."""
        if name not in self._known:
            raise _unknown(name)
        return self._info(name)

    async def register(
        self,
        name: str,
        src: str,
        *,
        preload: bool = True,
        pin: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> str | None:
        """Tell the handler of an adapter; returns what it says to that.

        Raises RegistrationError, and then nothing is registered.
        """
        if not is_adapter_name(name):
            raise InvalidRegistration(f"name is {name!r}; it must match [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}")
        if name in self._known:
            raise AdapterTaken(f"The adapter {name} is registered already")
        said = Registration(name=name, src=src, preload=preload, pin=pin, options=dict(options or {}))
        async with self._turns.of(name):
            if name in self._known:
                raise AdapterTaken(f"The adapter {name} is registered already")
            return await self._change(said, "register_adapter", fetch=True)

    async def update(
        self,
        name: str,
        *,
        src: str | None = None,
        preload: bool | None = None,
        pin: bool | None = None,
        options: Mapping[str, str] | None = None,
    ) -> str | None:
        """Tell the handler what is different; what is None stays as it is.

        Raises RegistrationError, and then it is known as it was.
        """
        async with self._turns.of(name):
            known = self._known.get(name)
            if known is None:
                raise _unknown(name)
            if known.in_folder and src not in {None, known.path}:
                raise _not_ours(name, known)
            said = msgspec.structs.replace(
                known.said,
                src=known.said.src if src is None or known.in_folder else src,
                preload=known.said.preload if preload is None else preload,
                pin=known.said.pin if pin is None else pin,
                options={**known.said.options, **(options or {})},
            )
            return await self._change(said, "update_adapter", fetch=src is not None, before=known)

    async def delete(self, name: str) -> str | None:
        """Tell the handler that an adapter is gone. Raises RegistrationError, and then it is not."""
        async with self._turns.of(name):
            known = self._known.get(name)
            if known is None:
                raise _unknown(name)
            if known.in_folder:
                raise _not_ours(name, known)
            said = None
            if known.trouble is None:  # else the handler does not know it
                said = _status_of(await self._ask("unregister_adapter", {"name": name, "alias": name}, ()))
            await self._keep(name, None)
        logger.info("adapter unregistered", extra={"adapter": name})
        return said

    async def refresh(self) -> None:
        """Tell the handler what became of the adapters folder."""
        try:
            found = await asyncio.to_thread(_survey, self._folder)
        except OSError as error:
            logger.warning("the adapters folder cannot be read", extra={"reason": str(error)})
            return
        for name, (path, version) in found.items():
            async with self._turns.of(name):
                known = self._known.get(name)
                changed = known is None or known.said.version != version or name in self._refused
                if known is None or (known.in_folder and changed):
                    said = Registration(name=name, version=version, preload=True)
                    if known is not None:
                        said = msgspec.structs.replace(known.said, version=version)
                    await self._tell_of(said, path, in_folder=True)
        for name in self._refused & self._known.keys() - found.keys():
            async with self._turns.of(name):
                known = self._known.get(name)
                if known is not None and not known.in_folder:
                    await self._tell_of(known.said, known.path, in_folder=False)
        gone = [name for name, known in self._known.items() if known.in_folder and name not in found]
        for name in gone:
            async with self._turns.of(name):
                await self._drop(name)

    async def _change(
        self, said: Registration, function: str, *, fetch: bool, before: _Known | None = None
    ) -> str | None:
        path, in_folder = (before.path, before.in_folder) if before is not None else ("", False)
        if fetch and not in_folder:
            said = await self._fetched(said)
            path = str(self._path(said))
        if before is not None and before.trouble is not None:
            function = "register_adapter"  # the handler does not know it
        status = _status_of(await self._ask(function, *_told(said, path)))
        await self._keep(said.name, _Known(said, path, in_folder))
        logger.info("adapter registered or updated", extra={"adapter": said.name, "version": said.version})
        return status

    async def _tell_of(self, said: Registration, path: str, *, in_folder: bool) -> None:
        """Tell the handler of an adapter that is there; its refusal is kept as the adapter's trouble."""
        known = self._known.get(said.name)
        is_new = known is None or known.trouble is not None
        trouble = None
        try:
            await self._ask("register_adapter" if is_new else "update_adapter", *_told(said, path))
        except RegistrationError as error:
            trouble = str(error)
            logger.warning("the handler refused an adapter", extra={"adapter": said.name, "reason": trouble})
        self._refused.discard(said.name)
        known = self._known[said.name] = _Known(said, path, in_folder, trouble)
        self._remember(known)

    def trouble(self, name: str) -> str | None:
        """Why an adapter cannot be used; None if it can, or nobody knows it."""
        known = self._known.get(name)
        return None if known is None else known.trouble

    def _lose(self, name: str, reason: str, ended: bool) -> None:
        """A process that was started anew did not take an adapter. One that ended it is not tried again."""
        known = self._known.get(name)
        if known is not None:
            self._known[name] = known._replace(trouble=reason)
            if not ended:
                self._refused.add(name)

    async def _drop(self, name: str) -> None:
        try:
            await self._ask("unregister_adapter", {"name": name, "alias": name}, ())
        except RegistrationError as error:
            logger.warning("the handler kept an adapter", extra={"adapter": name, "reason": str(error)})
        self._known.pop(name, None)
        self._handler.forget(name)

    async def _ask(self, function: str, properties: dict[str, str], content: Content) -> Answer:
        """Raises HandlerRefused for an answer that is a failure, RegistryUnavailable for none."""
        try:
            answer = await self._handler.call(function, properties, content)
            await answer.read()
        except HandlerBusy as error:
            raise RegistryUnavailable(str(error)) from error
        except HandlerDied as error:
            raise HandlerRefused(str(error), 424) from error
        if answer.is_failure:
            raise HandlerRefused(answer.reason, answer.status if 400 <= answer.status <= 599 else 424)
        return answer

    async def _fetched(self, said: Registration) -> Registration:
        """The registration with the version that its source has now; what is in S3 is copied."""
        assert said.src is not None
        scheme, colon, _ = said.src.partition("://")
        if not colon or scheme == "file":
            path = said.src.removeprefix(_FILE_URL)
            version = await asyncio.to_thread(_version_of, Path(path))
            return msgspec.structs.replace(said, version=version)
        if scheme != "s3":
            raise InvalidRegistration(f"src is {said.src!r}; it must be an s3://bucket/prefix/ or a folder")
        staging = self._copies / said.name / "coming"
        try:
            version = await self._fetch(said.src, staging)
            await asyncio.to_thread(_settle, staging, version)
        except LoramillError as error:
            raise RegistryUnavailable(f"{said.src} cannot be read: {error}") from error
        except OSError as error:
            raise StorageFull(str(error)) from error
        return msgspec.structs.replace(said, version=version)

    def _path(self, said: Registration) -> Path | str:
        """Where the handler finds what is registered."""
        assert said.src is not None
        if said.src.startswith("s3://"):
            return self._copies / said.name / (said.version or "")
        return said.src.removeprefix(_FILE_URL)

    async def _keep(self, name: str, known: _Known | None) -> None:
        """What is known about a name from now on, in the book first. Raises StorageFull."""
        async with self._writing:
            all_known = {one: kept for one, kept in self._known.items() if one != name}
            if known is not None:
                all_known[name] = known
            said = [kept.said for kept in all_known.values() if not kept.in_folder]
            try:
                await asyncio.to_thread(write_book, self._book, said)
            except OSError as error:
                raise StorageFull(f"{self._book} cannot be written: {error}") from error
            if known is None:
                self._known.pop(name, None)
            else:
                self._known[name] = known
        if known is None:
            self._handler.forget(name)
        else:
            self._remember(known)

    def _remember(self, known: _Known) -> None:
        if known.trouble is None:
            self._handler.remember(known.said.name, Call("register_adapter", *_told(known.said, known.path)))

    def _info(self, name: str) -> AdapterInfo:
        said, path, _, trouble = self._known[name]
        return AdapterInfo(
            name=name,
            src=said.src or path,
            preload=said.preload,
            pin=said.pin,
            options=said.options,
            tier="handler",
            version=said.version,
            rank=None,
            bytes=None,
            requests=None,
            note=trouble,
        )


def _told(said: Registration, path: str) -> tuple[dict[str, str], Content]:
    """Properties and content of what a handler is told of an adapter: DJL's, of which the content has all."""
    properties = {"name": said.name, "alias": said.name, "src": path}
    flags = {"preload": str(said.preload).lower(), "pin": str(said.pin).lower()}
    content = {"name": said.name, "src": path, **flags, **said.options}
    return properties, tuple((key, value.encode()) for key, value in content.items())


def _status_of(answer: Answer) -> str | None:
    """What the handler says became of the adapter, if it says anything."""
    return None if answer.message in _SAYS_NOTHING else answer.message


def _survey(folder: Path) -> dict[str, tuple[str, str]]:
    """Path and version of every adapter in the folder, by name. Blocking. Raises OSError."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        return {}
    return {
        path.name: (str(path.resolve()), _version_of(path) or "")
        for path in entries
        if is_adapter_name(path.name) and path.is_dir()
    }


def _version_of(path: Path) -> str | None:
    """A digest of the names, sizes and times of the files in a folder; None when it is none. Blocking."""
    if not path.is_dir():
        return None
    files = sorted(one for one in _files(path))
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _files(path: Path) -> Iterable[tuple[str, int, int]]:
    for parent, _, names in os.walk(path):
        for name in names:
            found = Path(parent, name)
            try:
                status = found.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            yield str(found.relative_to(path)), status.st_size, status.st_mtime_ns


def _settle(staging: Path, version: str) -> None:
    """Give a fetched copy the name of its version. Blocking. Raises OSError."""
    final = staging.with_name(version)
    if final.exists():
        shutil.rmtree(staging)
    else:
        staging.rename(final)


def _tidy(copies: Path, wanted: set[tuple[str, str]]) -> None:
    """Remove copies of versions that nobody wants. Blocking."""
    for path in copies.glob("*/*"):
        if (path.parent.name, path.name) not in wanted:
            shutil.rmtree(path, ignore_errors=True)


def _unknown(name: str) -> UnknownAdapter:
    return UnknownAdapter(f"The adapter {name} was not found")


def _not_ours(name: str, known: _Known) -> AdapterTaken:
    return AdapterTaken(f"The adapter {name} was not registered here: change or delete {known.path}")
