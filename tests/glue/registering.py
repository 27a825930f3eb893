"""A registry on a real disk with a host memory that is none, and an HTTP server before it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from prometheus_client import CollectorRegistry
from yarl import URL

from adapters_sync.inventory import Limits
from adapters_sync.layout import AdapterFolder
from adapters_sync.options import Clock
from tests.sync.builders import FakeTime, adapter_files, write_folder
from worker.adapters.registry import AdapterRegistry
from worker.adapters.shelf import VersionShelf
from worker.errors import AdapterInvalid, AdapterStoreFull, RowFailed
from worker.http.adapters_api import AdaptersApi
from worker.http.server import Apis, serving
from worker.jobs import AdapterKey

MODEL = "llama"


class FakeDetails(NamedTuple):
    rank: int
    num_bytes: int


class FakeLoader:
    """Host memory for `places` adapters, by the bridge's rules. `bad` says what is wrong with an adapter."""

    def __init__(self, places: int = 3) -> None:
        self.places = places
        self.memory: list[AdapterKey] = []
        self.pinned: set[AdapterKey] = set()
        self.bad: dict[str, str] = {}
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.loading: list[str] = []

    async def preload(self, adapter: AdapterFolder, *, pin: bool = False) -> None:
        key = AdapterKey(adapter.name, adapter.version)
        self.loading.append(adapter.name)
        await self.may_load.wait()
        if adapter.name in self.bad:
            raise AdapterInvalid(self.bad[adapter.name])
        if not (adapter.path / "adapter_config.json").is_file():
            raise RowFailed(f"Adapter {adapter.name} could not be read: no such file")
        if key not in self.memory:
            if len(self.memory) >= self.places:
                idle = next((one for one in self.memory if one not in self.pinned), None)
                if idle is None:
                    raise AdapterStoreFull(f"Adapter {adapter.name} finds no room in host memory")
                self.memory.remove(idle)
            self.memory.append(key)
        if pin:
            self.pinned.add(key)

    def unpin(self, key: AdapterKey) -> None:
        self.pinned.discard(key)

    def tier(self, key: AdapterKey) -> str:
        return "cpu" if key in self.memory else "disk"

    def details(self, key: AdapterKey) -> FakeDetails | None:
        return FakeDetails(rank=4, num_bytes=128) if key in self.memory else None

    def requests(self, key: AdapterKey) -> int:
        return 0

    @property
    def names(self) -> set[str]:
        """What is in memory."""
        return {key.name for key in self.memory}


class Scene:
    """One worker's registry; another Scene on the same folder is that worker after a restart."""

    def __init__(self, root: Path, loader: FakeLoader | None = None, limits: Limits | None = None) -> None:
        self.root = root
        self.folder = root / "model" / "adapters"
        self.place = root / "cache" / "registered" / "adapters"
        self.book = self.place.parent / "registrations.json"
        self.loader = loader or FakeLoader()
        self.time = FakeTime()
        self.shelf = VersionShelf(
            self.place,
            mirrored=self.folder,
            limits=limits or Limits(rank=16, free_bytes=0),
            clock=Clock(now=self.time.read),
        )
        self.registry = AdapterRegistry(self.folder, self.shelf, self.loader)
        self.reason: str | None = None
        self.lora = True

    def source(self, name: str, fill: int = 1, **changes: Any) -> str:
        """A folder with an adapter in it, as `src`."""
        return str(write_folder(self.root / "sources" / name, adapter_files(fill, **changes)))

    def mirrored(self, name: str, fill: int = 1) -> Path:
        """An adapter that the adapters folder has."""
        return write_folder(self.folder / name, adapter_files(fill))

    def version(self, name: str) -> str:
        """What rows would get."""
        found = self.registry.find(name)
        assert found is not None
        return found.version

    async def names(self) -> list[str]:
        return [one.name for one in (await self.registry.page(0, 1000))[0]]

    async def restarted(self, places: int = 3) -> "Scene":
        """The next worker on this disk, started."""
        self.registry.close()
        scene = Scene(self.root, FakeLoader(places))
        await scene.registry.start()
        return scene

    @asynccontextmanager
    async def serving(self, token: str | None = None) -> AsyncIterator["Client"]:
        api = AdaptersApi(MODEL, self.lora, lambda: self.reason)
        api.registry = self.registry
        async with (
            serving(
                "127.0.0.1", 0, CollectorRegistry(), lambda: self.reason, token=token, apis=Apis(api)
            ) as port,
            aiohttp.ClientSession() as session,
        ):
            yield Client(session, port)


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


class Client:
    """Sends paths exactly as they are written."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._session = session
        self.port = port

    async def __call__(
        self,
        method: str,
        target: str,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        **query: str,
    ) -> Answer:
        url = URL(f"http://127.0.0.1:{self.port}{target}", encoded=True)
        if query:
            url = url.with_query(query)
        async with self._session.request(method, url, headers=headers, data=data) as answer:
            text = await answer.text()
            body = json.loads(text) if answer.content_type == "application/json" and text else text
            return Answer(answer.status, body, dict(answer.headers))


def refused(answer: Answer, code: int, message: str, kind: str = "BadRequestException") -> bool:
    """Whether an answer is exactly this error."""
    expected = {"code": code, "type": kind, "message": message}
    assert (answer.status, answer.body) == (code, expected)
    return True


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))
