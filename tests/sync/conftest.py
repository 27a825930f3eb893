import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.loaders import JSONFileLoader
from moto.server import ThreadedMotoServer

from tests.sync.builders import Bucket, World
from tests.sync.memory_s3 import MemoryBucket

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="package", autouse=True)
def _service_models_read_once() -> Iterator[None]:
    """Each new client parses S3's description again, which takes longer than most tests here."""
    load = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda self, path: load(path))
        yield


@pytest.fixture
def aws(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    return s3_endpoint


@pytest.fixture(scope="session")
def s3_client(s3_endpoint: str) -> Iterator[Any]:
    client = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    yield client
    client.close()


@pytest.fixture
def bucket(aws: str, s3_client: Any) -> Bucket:
    name = f"mirror-{next(_numbers)}"
    s3_client.create_bucket(Bucket=name)
    return Bucket(s3_client, name)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A mirror's surroundings with S3 in memory."""
    return World(MemoryBucket(), tmp_path)


@pytest.fixture
def s3_world(bucket: Bucket, tmp_path: Path) -> World:
    """The same with an S3 server."""
    return World(bucket, tmp_path)


@pytest.fixture(params=["memory", "server"])
def any_world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    if request.param == "memory":
        return World(MemoryBucket(), tmp_path)
    return World(request.getfixturevalue("bucket"), tmp_path)
