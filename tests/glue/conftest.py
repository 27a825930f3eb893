"""One tiny base model with adapters for all tests here, and a bucket."""

import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.sync import servers
from tests.sync.builders import Bucket

_numbers = itertools.count()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("glue") / "base")


@pytest.fixture(scope="session")
def adapter_paths(base: Path) -> list[Path]:
    """Six adapters that say different things."""
    return [
        tiny.make_adapter(base.parent / "adapters" / f"a{n}", base, seed=n, r=4, target_modules=tiny.MLP)
        for n in range(6)
    ]


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A client of an S3 server."""
    with servers.moto() as address, closing(servers.client(address)) as client:
        yield client


@pytest.fixture
def bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket, on the server that the SDK talks to in this test."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.meta.endpoint_url)
    name = f"registered-{next(_numbers)}"
    s3.create_bucket(Bucket=name)
    return Bucket(s3, name)
