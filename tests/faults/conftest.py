"""One moto server for all tests here, and a proxy before it that the SDK talks to."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.config import Config
from botocore.retries.standard import ExponentialBackoff

from tests.faults.proxy import Proxy
from tests.sync import servers

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with servers.moto() as address:
        yield address


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy without faults as yet; the environment sends the SDK there."""
    with Proxy(server, delay_seconds=(0.05, 0.2)) as proxy:
        for name, value in {
            "AWS_ACCESS_KEY_ID": servers.KEY,
            "AWS_SECRET_ACCESS_KEY": servers.SECRET,
            "AWS_DEFAULT_REGION": servers.REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": proxy.endpoint,
        }.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK tries again at once."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)


@pytest.fixture
def s3(proxy: Proxy) -> Iterator[Any]:
    """A client that tries everything once, through the proxy."""
    with _client(proxy, "s3") as client:
        yield client


@pytest.fixture
def sqs(proxy: Proxy) -> Iterator[Any]:
    """The same for SQS."""
    with _client(proxy, "sqs") as client:
        yield client


@pytest.fixture
def bucket(server: str) -> str:
    """A new one, made behind the proxy's back."""
    name = f"faults-{next(_numbers)}"
    client = servers.client(server)
    client.create_bucket(Bucket=name)
    client.close()
    return name


@pytest.fixture
def queue_url(proxy: Proxy, sqs: Any) -> str:
    """A new queue, by the URL that it has through the proxy."""
    return sqs.create_queue(QueueName=f"faults-{next(_numbers)}")["QueueUrl"]


def _client(proxy: Proxy, service: str) -> Any:
    once = Config(retries={"total_max_attempts": 1})
    return contextlib.closing(servers.client(proxy.endpoint, once, service))
