"""Servers for all tests here, and worlds in which the contract tests run."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.sync import servers
from worker.transport.clients import Clients
from worker.transport.memory import ManualClock, MemoryQueue, MemoryStore
from worker.transport.queue import Queue, SqsQueue
from worker.transport.store import S3Store, Store

_names = (f"it-{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    with servers.moto() as address:
        yield address


@pytest.fixture
def aws(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a worker that talks to moto."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": moto_endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    return moto_endpoint


@pytest.fixture(scope="session")
def seaweedfs_endpoint() -> Iterator[str]:
    if servers.weed() is None:
        pytest.skip(servers.WHY_NOT)
    with servers.seaweedfs() as address:
        yield address


@pytest.fixture(scope="session")
def ministack_endpoint() -> Iterator[str]:
    with servers.ministack() as address:
        yield address


@pytest.fixture
def server_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next two have in common."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": servers.KEY,
        "AWS_SECRET_ACCESS_KEY": servers.SECRET,
        "AWS_DEFAULT_REGION": servers.REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def real_s3(seaweedfs_endpoint: str, server_keys: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a worker that talks to SeaweedFS."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs_endpoint)
    return seaweedfs_endpoint


@pytest.fixture
def second_sqs(ministack_endpoint: str, server_keys: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a worker that talks to ministack."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", ministack_endpoint)
    return ministack_endpoint


@dataclass
class QueueWorld:
    queue: Queue
    dead_letters: Queue
    pass_time: Callable[[float], Awaitable[None]]
    new_fifo: Callable[[], Awaitable[Queue]] | None = None


@dataclass
class QueueRunner:
    """`run(scenario)` opens a fresh queue, visibility and receives as asked, and awaits the scenario."""

    kind: str

    def __call__(
        self,
        scenario: Callable[[QueueWorld], Awaitable[None]],
        *,
        visibility_seconds: int = 30,
        max_receives: int = 100,
    ) -> None:
        world = self._memory if self.kind == "memory" else self._sqs
        asyncio.run(asyncio.wait_for(world(scenario, visibility_seconds, max_receives), 20))

    async def _memory(self, scenario: Any, visibility_seconds: int, max_receives: int) -> None:
        clock = ManualClock(1_000_000.0)
        timing: Any = {"clock": clock, "sleep": clock.sleep}
        dead_letters = MemoryQueue(**timing)
        queue = MemoryQueue(
            visibility_seconds=visibility_seconds,
            max_receive_count=max_receives,
            dead_letters=dead_letters,
            **timing,
        )
        await scenario(QueueWorld(queue, dead_letters, clock.advance))

    async def _sqs(self, scenario: Any, visibility_seconds: int, max_receives: int) -> None:
        async with Clients() as clients:
            dead_url = (await clients.acks.create_queue(QueueName=next(_names)))["QueueUrl"]
            arn = await clients.acks.get_queue_attributes(QueueUrl=dead_url, AttributeNames=["QueueArn"])
            redrive = {
                "deadLetterTargetArn": arn["Attributes"]["QueueArn"],
                "maxReceiveCount": max_receives,
            }
            settings = {"VisibilityTimeout": str(visibility_seconds), "RedrivePolicy": json.dumps(redrive)}
            made = await clients.acks.create_queue(QueueName=next(_names), Attributes=settings)

            async def new_fifo() -> Queue:
                name = f"{next(_names)}.fifo"
                fifo = await clients.acks.create_queue(QueueName=name, Attributes={"FifoQueue": "true"})
                return SqsQueue(clients, fifo["QueueUrl"])

            queue = SqsQueue(clients, made["QueueUrl"])
            await scenario(QueueWorld(queue, SqsQueue(clients, dead_url), asyncio.sleep, new_fifo))


@pytest.fixture(params=["memory", "moto", pytest.param("ministack", marks=servers.NEEDS_MINISTACK)])
def run_queue(request: pytest.FixtureRequest) -> QueueRunner:
    if request.param != "memory":
        request.getfixturevalue("aws" if request.param == "moto" else "second_sqs")
    return QueueRunner(request.param)


@dataclass
class StoreRunner:
    """`run(scenario)` awaits `scenario(store, prefix)`; the bucket of `prefix` is new."""

    kind: str

    def __call__(self, scenario: Callable[[Store, str], Awaitable[None]]) -> None:
        world = self._memory if self.kind == "memory" else self._s3
        asyncio.run(asyncio.wait_for(world(scenario), 20))

    async def _memory(self, scenario: Any) -> None:
        await scenario(MemoryStore({"bucket"}), "s3://bucket")

    async def _s3(self, scenario: Any) -> None:
        async with Clients() as clients:
            name = next(_names)
            await clients.objects.create_bucket(Bucket=name)
            await scenario(S3Store(clients), f"s3://{name}")


@pytest.fixture(params=["memory", "moto", "seaweedfs"])
def run_store(request: pytest.FixtureRequest) -> StoreRunner:
    if request.param == "moto":
        request.getfixturevalue("aws")
    if request.param == "seaweedfs":
        request.getfixturevalue("real_s3")
    return StoreRunner(request.param)
