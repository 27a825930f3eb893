import asyncio
import functools
import itertools
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from adapters_sync.cli import app
from tests.sync import servers
from tests.sync.builders import Bucket, World
from tests.sync.event_sender import EventSender
from tests.sync.memory_s3 import MemoryBucket

_numbers = itertools.count()


SERVERS = ("moto", "seaweedfs") if servers.weed() else ("moto",)


@pytest.fixture(scope="session")
def moto_address() -> Iterator[str]:
    with servers.moto() as address:
        yield address


@pytest.fixture(scope="session")
def seaweedfs_address() -> Iterator[str]:
    with servers.seaweedfs() as address:
        yield address


@pytest.fixture(scope="session")
def ministack_address() -> Iterator[str]:
    with servers.ministack() as address:
        yield address


@pytest.fixture(scope="session")
def s3_client() -> Iterator[Callable[[str], Any]]:
    """Gives a client for the server at an address, the same one each time."""
    with ExitStack() as stack:

        @functools.cache
        def connect(address: str) -> Any:
            client = servers.client(address)
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK has the servers' credentials, and no settings of this machine's."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", servers.REGION)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def make_bucket(
    request: pytest.FixtureRequest,
    s3_client: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    aws: None,
) -> Callable[[str], Bucket]:
    """Makes a bucket on a server of this name, which the SDK then talks to until the end of the test."""

    def make(server: str) -> Bucket:
        address = request.getfixturevalue(f"{server}_address")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        bucket = Bucket(s3_client(address), f"mirror-{next(_numbers)}")
        bucket.client.create_bucket(Bucket=bucket.name)
        return bucket

    return make


@pytest.fixture
def make_event_queue(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, aws: None
) -> Iterator[Callable[[str], EventSender]]:
    """Makes a queue on a server of this name, which the SDK then talks to until the end of the test."""
    with ExitStack() as stack:

        def make(server: str) -> EventSender:
            address = request.getfixturevalue(f"{server}_address")
            monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", address)
            return EventSender(address, f"events-{next(_numbers)}", stack)

        yield make


@pytest.fixture
def event_queue(make_event_queue: Callable[[str], EventSender]) -> EventSender:
    """An SQS queue on the moto server, and the ways by which S3 events get there."""
    return make_event_queue("moto")


@pytest.fixture(params=SERVERS)
def bucket(request: pytest.FixtureRequest, make_bucket: Callable[[str], Bucket]) -> Bucket:
    return make_bucket(request.param)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A mirror's surroundings with S3 in memory."""
    return World(MemoryBucket(), tmp_path)


@pytest.fixture
def s3_world(bucket: Bucket, tmp_path: Path) -> World:
    """The same with a server."""
    return World(bucket, tmp_path)


@pytest.fixture(params=["memory", *SERVERS])
def any_world(request: pytest.FixtureRequest, make_bucket: Callable[[str], Bucket], tmp_path: Path) -> World:
    return World(MemoryBucket() if request.param == "memory" else make_bucket(request.param), tmp_path)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command of `loramill`'s sync side in an environment without settings."""
    for name in [name for name in os.environ if name.startswith("LORAMILL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(logging, "basicConfig", lambda **kwargs: None)  # the log is pytest's
    return lambda *args, app=app: CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[web.Request], Awaitable[web.Response]]], str]]:
    """Serves `GET /adapters` in a thread until the end of the test, and gives the server's address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runners = []

    def start(handler: Callable[[web.Request], Awaitable[web.Response]]) -> str:
        served = web.Application()
        served.add_routes([web.get("/adapters", handler)])
        runner = web.AppRunner(served, access_log=None)

        async def listen() -> str:
            await runner.setup()
            runners.append(runner)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        return asyncio.run_coroutine_threadsafe(listen(), loop).result(10)

    yield start
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
