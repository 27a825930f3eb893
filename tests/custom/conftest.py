"""Handlers at work, each in a process of its own."""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from worker.custom.answers import Answer
from worker.custom.handler import CustomHandler
from worker.custom.messages import Begin

MODELS = Path(__file__).parent / "models"
Opened = Callable[..., Any]


@asynccontextmanager
async def handler_of(
    folder: Path, *, options: dict[str, str] | None = None, entry_point: str = "model.py", **settings: Any
) -> AsyncIterator[CustomHandler]:
    """The handler of a folder, ready."""
    common = {"handler": (options or {}).get("handler", "handle"), "device_id": "-1"}
    begin = Begin(str(folder), entry_point, common)
    async with CustomHandler(
        begin, options or {}, environ=os.environ | {"LORAMILL_HTTP_TOKEN": "secret"}, **settings
    ) as handler:
        yield handler


async def ask(handler: CustomHandler, body: bytes = b"", **parameters: str) -> Answer:
    """A request with parameters in its query."""
    content = [(name, value.encode()) for name, value in parameters.items()]
    return await handler.call(handler.function, {}, (*content, ("data", body)))


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the models' folders."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(MODELS / name, tmp_path / name))

    return copied
