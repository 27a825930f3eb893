"""Input and output formatters: a model's own and its adapters', run beside the engine in one process.

A formatter is a function of a `model.py`, as DJL Serving documents it: from a payload to a payload, or from a
response to a response. An adapter's own goes before the model's, each kind by itself.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import msgspec

from adapters_sync.layout import MODEL_PY, AdapterFolder, left_out_code
from worker.custom.answers import Answer
from worker.custom.handler import CustomHandler
from worker.custom.messages import Content
from worker.errors import (
    AdapterInvalid,
    EngineFailed,
    HandlerBusy,
    HandlerDied,
    HandlerRefused,
    HandlerRefusedRow,
    LoramillError,
    ModelError,
    RowFailed,
)
from worker.turns import Turns
from worker.wire.results import encode

logger = logging.getLogger(__name__)

_MOST_KNOWN = 10_000
_OFF = "its model.py is not run: custom_code is off"
_LEFT_OUT = "its model.py was not carried, since custom_code was off: give its source again, or set it there"


class Formatter(NamedTuple):
    """One function: `kind` is input or output."""

    kind: str
    name: str
    key: str
    folder: Path
    whose: str

    def __str__(self) -> str:
        return f"{self.kind} formatter {self.name} of {self.whose}"


class Own(NamedTuple):
    """The formatters for a row."""

    input: Formatter | None = None
    output: Formatter | None = None


class Code(Protocol):
    """What becomes of a `model.py` that an adapter brings."""

    async def load(self, adapter: AdapterFolder) -> None:
        """Make ready what a version brings. Raises HandlerRefused when that fails."""
        ...

    async def drop(self, name: str) -> None:
        """No version of this name is used any more."""
        ...

    def note(self, adapter: AdapterFolder) -> str | None:
        """What somebody should know about it. Blocking."""
        ...


class NoCode:
    """Nothing that adapters bring is run."""

    async def load(self, adapter: AdapterFolder) -> None:
        del adapter

    async def drop(self, name: str) -> None:
        del name

    def note(self, adapter: AdapterFolder) -> str | None:
        return _OFF if (adapter.path / MODEL_PY).is_file() or left_out_code(adapter) else None


class Formatters:
    """`async with Formatters(handler, folder) as formatters`; use it from one event loop.

    `handler` runs `worker.custom.formatter_host`; `folder` is the model's, None when it brings no formatters.
    An adapter's are loaded when it is registered, or else by the first row that is for it.
    """

    def __init__(self, handler: CustomHandler, folder: Path | None) -> None:
        self._handler = handler
        self._folder = folder
        self._model = Own()
        self._known: dict[tuple[str, str], Own | str] = {}
        """Of adapters by name and version, or why they cannot be loaded."""
        self._turns = Turns()

    async def __aenter__(self) -> Self:
        """Raises ModelError when the model's cannot be loaded."""
        try:
            await self._handler.__aenter__()
        except ModelError as error:
            raise ModelError(f"the formatters of the model cannot be used: {error.__cause__}") from error
        if self._folder is not None:
            try:
                self._model = await self._look("", self._folder, "the model")
            except BaseException as error:
                await self._handler.__aexit__()
                if isinstance(error, LoramillError):
                    raise ModelError(f"the formatters of the model cannot be used: {error}") from error
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._handler.__aexit__()

    @property
    def num_restarts(self) -> int:
        return self._handler.num_restarts

    async def wait(self) -> None:
        """Raise EngineFailed when the process cannot be started any more."""
        await self._handler.wait()

    async def of(self, adapter: AdapterFolder | None, *, urgent: bool = True) -> Own:
        """Those for rows with this adapter, or without any.

        Raises AdapterInvalid if they cannot be used, RowFailed if that cannot be told now, and EngineFailed.
        """
        if adapter is None:
            return self._model
        key = adapter.name, adapter.version
        found = self._known.get(key)
        if found is None:
            async with self._turns.of(adapter.name):
                try:
                    found = self._known.get(key) or await self._find(adapter, urgent=urgent)
                except HandlerBusy as error:
                    raise RowFailed(f"The formatters of adapter {adapter.name} wait: {error}") from error
        if isinstance(found, str):
            raise AdapterInvalid(f"Adapter {adapter.name} is invalid: {found}", "file")
        return Own(found.input or self._model.input, found.output or self._model.output)

    async def load(self, adapter: AdapterFolder) -> None:
        """As `of`, also when it was tried before. Raises HandlerRefused."""
        async with self._turns.of(adapter.name):
            try:
                found = await self._find(adapter)
            except HandlerBusy as error:
                found = str(error)
        if isinstance(found, str):
            raise HandlerRefused(f"Adapter {adapter.name} is invalid: {found}", 424)

    async def drop(self, name: str) -> None:
        """Unload those of an adapter."""
        self._known = {key: own for key, own in self._known.items() if key[0] != name}
        try:
            await self._handler.call("unregister_adapter", {}, (("name", name.encode()),))
        except (HandlerDied, HandlerBusy) as error:
            logger.warning("formatters were not unloaded", extra={"adapter": name, "reason": str(error)})

    def note(self, adapter: AdapterFolder) -> str | None:
        """Why an adapter's cannot be used."""
        found = self._known.get((adapter.name, adapter.version))
        return found if isinstance(found, str) else None

    async def run(self, formatter: Formatter, given: Mapping[str, Any], *, urgent: bool) -> dict[str, Any]:
        """What a formatter makes of a payload or a response.

        Raises HandlerRefusedRow, which names it, and EngineFailed where no formatter can be run any more.
        """
        content = (*_place(formatter.key, formatter.folder), ("data", encode(given)))
        try:
            function = f"format_{formatter.kind}"
            answer = await self._handler.call(function, {}, content, urgent=urgent)
            body = await answer.read()
        except (HandlerDied, HandlerBusy) as error:
            if self._handler.has_ended:
                raise EngineFailed(f"no formatter can be run: {error}") from error
            raise HandlerRefusedRow(f"The {formatter} failed: {error}") from error
        if answer.is_failure:
            raise HandlerRefusedRow(f"The {formatter} {answer.reason}")
        try:
            made = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise HandlerRefusedRow(f"The {formatter} returned what is no JSON object: {error}") from error
        return made

    async def _find(self, adapter: AdapterFolder, *, urgent: bool = True) -> Own | str:
        """What an adapter brings, or why that cannot be used, as it is known then. Raises HandlerBusy."""
        key, whose = (adapter.name, adapter.version), f"adapter {adapter.name}"
        found: Own | str = Own()
        if await asyncio.to_thread((adapter.path / MODEL_PY).is_file):
            try:
                found = await self._look("/".join(key), adapter.path, whose, urgent=urgent)
            except HandlerRefused as error:
                found = str(error)
                extra = {"adapter": adapter.name, "version": adapter.version, "reason": found}
                logger.warning("the formatters of an adapter cannot be used", extra=extra)
        elif await asyncio.to_thread(left_out_code, adapter):
            found = _LEFT_OUT
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[key] = found
        return found

    async def _look(self, key: str, folder: Path, whose: str, *, urgent: bool = True) -> Own:
        for again in (True, False):  # what ended the process may not have been this file
            try:
                answer = await self._handler.call("look", {}, _place(key, folder), urgent=urgent)
                break
            except HandlerDied as error:
                if self._handler.has_ended:
                    raise EngineFailed(f"no formatter can be run: {error}") from error
                if not again:
                    raise HandlerRefused(f"its model.py cannot be loaded: {error}", 424) from error
        if answer.is_failure:
            raise HandlerRefused(f"its model.py {answer.reason}", 424)
        return Own(*(_formatter(answer, kind, key, folder, whose) for kind in ("input", "output")))


def _formatter(answer: Answer, kind: str, key: str, folder: Path, whose: str) -> Formatter | None:
    name = json.loads(answer.body)[kind]
    return None if name is None else Formatter(kind, str(name), key, folder, whose)


def _place(key: str, folder: Path) -> Content:
    return ("key", key.encode()), ("folder", str(folder.absolute()).encode())
