"""The workflows of a worker: registered names for calls of its model and adapters, one after the other.

All workflows that name the worker's model share it: what they call it is of no account, its place and its
version are. One that names another model is refused, since its rows would be answered by the wrong one.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from worker.adapters.places import path_of_url
from worker.adapters.registrations import replace_file
from worker.errors import (
    AdapterTaken,
    InvalidWorkflow,
    LoramillError,
    ModelNotFound,
    RegistrationError,
    StorageFull,
    UnknownAdapter,
    UnknownWorkflow,
)
from worker.workflows.definition import Workflow

logger = logging.getLogger(__name__)


class _Failed(NamedTuple):
    reason: str
    workflow: Workflow | None
    """None if even that cannot be read."""


class Adapters(Protocol):
    """Where a workflow's adapters are registered: see AdapterRegistry, HandlerAdapters."""

    async def names(self) -> list[str]: ...
    async def source_of(self, name: str) -> str | None: ...
    async def register(
        self, name: str, src: str, *, preload: bool, pin: bool, options: Mapping[str, str] | None
    ) -> object: ...
    async def update(
        self,
        name: str,
        *,
        src: str | None,
        preload: bool | None,
        pin: bool | None,
        options: Mapping[str, str] | None,
    ) -> object: ...
    async def delete(self, name: str) -> object: ...


class Workflows:
    """Use it from one event loop. A workflow is registered whole, with all its adapters, or not at all."""

    def __init__(
        self,
        adapters: Adapters | None,
        urls: Collection[str],
        reserved: Collection[str],
        folder: Path | None,
        *,
        bare: bool = False,
    ) -> None:
        """`urls` are the places of the worker's model, `reserved` names that no workflow may have.

        `adapters` None means that LoRA is off. `folder` keeps what was registered over a restart. `bare`
        has adapters known by their keys alone.
        """
        self._bare = bare
        self._adapters = adapters
        self._urls = {canonical(url) for url in urls}
        self._reserved = frozenset(reserved)
        self._folder = folder
        self._workflows: dict[str, Workflow] = {}
        self._failed: dict[str, _Failed] = {}
        """Those that were there before and cannot be served now."""
        self._changing = asyncio.Lock()
        self.of_settings = set[str]()
        """Names of those that the settings ask for."""

    def find(self, name: str) -> Workflow:
        """Raises ModelNotFound, with the reason for one that cannot be served."""
        return self._get(name, ModelNotFound, "model")

    def describe(self, name: str) -> Workflow:
        """Raises UnknownWorkflow, likewise."""
        return self._get(name, UnknownWorkflow, "workflow")

    def knows(self, name: str) -> bool:
        """Whether `find` has more to say of a name than that it is none."""
        return name in self._workflows or name in self._failed

    def _get(self, name: str, error: type[LoramillError], what: str) -> Workflow:
        if name in self._failed:
            raise error(f"The workflow {name} cannot be served: {self._failed[name].reason}")
        if name not in self._workflows:
            raise error(f"The {what} {name} was not found")
        return self._workflows[name]

    @property
    def names(self) -> list[str]:
        return sorted(self._workflows)

    @property
    def failed(self) -> dict[str, str]:
        """Why workflows that were there before cannot be served now."""
        return {name: one.reason for name, one in sorted(self._failed.items())}

    async def start(self) -> None:
        """Register again what was there before. What fails is logged, and told to whoever calls it."""
        for path, workflow in await asyncio.to_thread(_read_all, self._folder):
            try:
                if workflow is None:
                    raise InvalidWorkflow(f"{path} cannot be read")
                await self._register(self._named(workflow))
            except LoramillError as error:
                self._failed[path.stem] = _Failed(str(error), workflow)
                logger.error(  # noqa: TRY400 (what it was is in the message)
                    "a workflow could not be registered again",
                    extra={"workflow": path.stem, "reason": str(error)},
                )

    async def register(self, workflow: Workflow) -> None:
        """Have calls of the workflow's name do what it says, from now on and after a restart.

        Raises RegistrationError or RowError, and then nothing is registered; AdapterTaken when something has
        the name.
        """
        workflow = self._named(workflow)
        async with self._changing:
            if workflow.name in self._workflows or workflow.name in self._reserved:
                raise AdapterTaken(f"The workflow {workflow.name} is registered already")
            # No handler is asked by OpenAI's model.
            others = [] if self._adapters is None or self._bare else await self._adapters.names()
            if workflow.name in others:
                raise AdapterTaken(f"An adapter is called {workflow.name}; OpenAI's model may name either")
            fresh = await self._register_adapters(workflow, owned=workflow.name in self._failed)
            try:
                await asyncio.to_thread(_write, self._folder, workflow)
            except OSError as error:
                await self._forget(fresh)
                raise StorageFull(f"The workflow {workflow.name} cannot be kept: {error}") from error
            self._take(workflow)

    async def serve(self, workflow: Workflow) -> None:
        """As `register`, for one of the settings: another that has the name goes first."""
        self.of_settings.add(workflow.name)
        workflow = self._named(workflow)
        if self._workflows.get(workflow.name) == workflow:
            return
        if workflow.name in self._workflows:
            await self.delete(workflow.name)
        await self.register(workflow)

    async def delete(self, name: str) -> None:
        """Raises RegistrationError, and then it is there as it was, but for adapters that are gone already.

        Rows that began with one of its adapters end with that. One that cannot be served may be deleted too.
        """
        async with self._changing:
            workflow = self._failed[name].workflow if name in self._failed else self.describe(name)
            if workflow is not None and self._adapters is not None:
                for key in workflow.adapters:
                    with suppress(UnknownAdapter, AdapterTaken):  # gone; the folder may have the name now
                        await self._adapters.delete(workflow.adapter_name(key))
            try:
                await asyncio.to_thread(_unlink, self._folder, name)
            except OSError as error:
                raise StorageFull(f"The workflow {name} cannot be forgotten: {error}") from error
            self._workflows.pop(name, None)
            self._failed.pop(name, None)
        logger.info("workflow unregistered", extra={"workflow": name})

    async def _register(self, workflow: Workflow) -> None:
        async with self._changing:
            await self._register_adapters(workflow, owned=True)
            self._take(workflow)

    def _named(self, workflow: Workflow) -> Workflow:
        return msgspec.structs.replace(workflow, bare=self._bare)

    def _take(self, workflow: Workflow) -> None:
        self._failed.pop(workflow.name, None)
        self._workflows[workflow.name] = workflow
        logger.info("workflow registered", extra={"workflow": workflow.name, "calls": len(workflow.calls)})

    async def _register_adapters(self, workflow: Workflow, *, owned: bool) -> list[str]:
        """Returns those that were not there before.

        With `owned`, those that are there by the workflow's names are its own, of before a restart; else they
        are somebody else's.
        """
        self._check_models(workflow)
        if workflow.adapters and self._adapters is None:
            raise InvalidWorkflow("LoRA is not enabled.")
        fresh: list[str] = []
        try:
            for key, source in workflow.adapters.items():
                assert self._adapters is not None
                name = workflow.adapter_name(key)
                if owned and await self._adapters.source_of(name) == source.src:
                    continue
                said: dict[str, Any] = msgspec.structs.asdict(source)
                src = said.pop("src")
                del said["model"]
                try:
                    await self._adapters.register(name, src, **said)
                    fresh.append(name)
                except AdapterTaken:
                    if not owned:
                        raise
                    await self._adapters.update(name, src=src, **said)
        except BaseException:
            await asyncio.shield(self._forget(fresh))
            raise
        return fresh

    def _check_models(self, workflow: Workflow) -> None:
        versions = {
            source.version: other.name
            for other in self._workflows.values()
            for source in other.models.values()
            if source.version
        }
        for key, source in workflow.models.items():
            if canonical(source.url) not in self._urls:
                served = " or ".join(sorted(self._urls))
                raise InvalidWorkflow(
                    f"models.{key}.url is {source.url!r}; this worker serves {served} and no other model"
                )
            if source.version and versions and source.version not in versions:
                version, other = next(iter(versions.items()))
                raise InvalidWorkflow(
                    f"models.{key}.version is {source.version!r}; this worker's is {version!r}, as the "
                    f"workflow {other} has it"
                )
            if source.version:
                versions[source.version] = workflow.name

    async def _forget(self, names: Iterable[str]) -> None:
        """Take back what was registered for a workflow that is not."""
        for name in names:
            assert self._adapters is not None
            try:
                await self._adapters.delete(name)
            except RegistrationError as error:
                logger.warning(
                    "an adapter of a workflow could not be removed",
                    extra={"adapter": name, "reason": str(error)},
                )


def canonical(url: str) -> str:
    """One spelling for each place: S3 prefixes and folders with and without a slash at the end.

    Raises InvalidRegistration for a file:// URL that is none.
    """
    if url.startswith("s3://"):
        return url.rstrip("/")
    path = path_of_url(url, "url")
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.exists() else path.rstrip("/")


def _read_all(folder: Path | None) -> list[tuple[Path, Workflow | None]]:
    if folder is None or not folder.is_dir():
        return []
    return [(path, _read(path)) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> Workflow | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Workflow)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(folder: Path | None, workflow: Workflow) -> None:
    if folder is not None:
        replace_file(folder / f"{workflow.name}.json", msgspec.json.encode(workflow))


def _unlink(folder: Path | None, name: str) -> None:
    if folder is not None:
        (folder / f"{name}.json").unlink(missing_ok=True)
