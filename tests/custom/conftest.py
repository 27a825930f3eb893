"""Handlers at work, each in a process of its own; and workers with handlers."""

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Mill, Process
from tests.sync import servers
from worker.custom.answers import Answer
from worker.custom.handler import CustomHandler
from worker.custom.messages import Begin

MODELS = Path(__file__).parent / "models"
Serve = Callable[..., AbstractContextManager[Process]]


@asynccontextmanager
async def handler_of(
    folder: Path, *, options: dict[str, str] | None = None, entry_point: str = "model.py", **settings: Any
) -> AsyncIterator[CustomHandler]:
    """The handler of a folder, ready."""
    common = {"handler": (options or {}).get("handler", "handle"), "device_id": "-1"}
    begin = Begin(str(folder), entry_point, common)
    environ = os.environ | {"LORAMILL_HTTP_TOKEN": "secret"}
    async with CustomHandler(begin, options or {}, environ=environ, **settings) as handler:
        yield handler


async def ask(handler: CustomHandler, body: bytes = b"", **parameters: str) -> Answer:
    """A request with parameters in its query."""
    content = [(name, value.encode()) for name, value in parameters.items()]
    return await handler.call(handler.function, {}, (*content, ("data", body)))


@pytest.fixture(scope="session")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    with servers.moto_apart() as address:
        yield Mill(address, tmp_path_factory.mktemp("handlers"))


@pytest.fixture(scope="session")
def serve(mill: Mill) -> Serve:
    """Starts a worker with a handler: its model's folder or URI, and variables."""

    @contextmanager
    def serving(folder: Path | str, *, ready: bool = True, **environ: str) -> Iterator[Process]:
        queue = mill.queue()
        said = {
            "LORAMILL_MODEL": str(folder),
            "LORAMILL_QUEUE_URL": queue.url,
            "LORAMILL_CUSTOM_CODE": "true",
        }
        with mill.worker(**said | environ) as worker:
            worker.queue = queue  # type: ignore[attr-defined]
            if ready:
                worker.wait_ready()
            yield worker

    return serving


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the models' folders."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(MODELS / name, tmp_path / name))

    return copied
