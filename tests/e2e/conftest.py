"""The real commands against a moto server of their own, with a tiny base model and adapters in its S3."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests import tiny
from tests.sync import servers

BUCKET, MODEL, PREFIX = "mill", "s3://mill/tiny/", "s3://mill/out/"
PATIENCE_SECONDS = 60


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class Process:
    """A `loramill worker` at work, its log in a file."""

    def __init__(self, arguments: list[str], environ: dict[str, str], log: Path) -> None:
        self.log = log
        self.port = _free_port()
        environ = environ | {"LORAMILL_HTTP_PORT": str(self.port)}
        command = [sys.executable, "-m", "worker.cli", "worker", *arguments]
        with log.open("wb") as file:
            self.popen = subprocess.Popen(command, env=environ, stdout=file, stderr=file)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def said(self) -> list[str]:
        """The messages of its log so far."""
        lines = self.text.splitlines()
        return [json.loads(line)["message"] for line in lines if line.startswith("{")]

    def get(self, path: str) -> tuple[int, str]:
        """Ask the worker's HTTP side; status 0 while it is not there."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_for(self, status: int, text: str) -> None:
        """Wait for this answer to /ready."""

        def found() -> bool:
            assert self.popen.poll() is None, f"ended by {self.popen.returncode}: {self.text}"
            return self.get("/ready") == (status, text)

        wait_until(found, f"{text!r} of {self.text}")

    def wait_ready(self) -> None:
        self.wait_for(200, "ready\n")

    def wait_at_work(self) -> None:
        """Wait until the engine has made a step."""
        self.wait_ready()
        wait_until(lambda: self.metric("loramill_tokens_total") > 0, "a step of the engine")

    def metric(self, sample: str) -> float:
        """The sum of all samples that begin like this; 0 before there are any."""
        _, text = self.get("/metrics")
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(sample))

    def end(self, seconds: float = PATIENCE_SECONDS) -> int:
        return self.popen.wait(seconds)


class Mill:
    """A bucket, a model and the commands; `queue()` makes queues."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")},
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": endpoint,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "LORAMILL_MODEL": MODEL,
            "LORAMILL_OUTPUT_PREFIXES": PREFIX,
            "LORAMILL_LOG_FORMAT": "json",
            "LORAMILL_DEVICE": "cpu",
            "LORAMILL_SYNC_INTERVAL_SECONDS": "1",
            "LORAMILL_ADAPTER_WAIT_SECONDS": "4",
        }
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        client: Any = lambda name: boto3.client(  # noqa: E731
            name, endpoint_url=endpoint, region_name="us-east-1", **keys
        )
        self.s3, self.sqs = client("s3"), client("sqs")
        self.s3.create_bucket(Bucket=BUCKET)
        self._count = 0

    def new_name(self) -> str:
        self._count += 1
        return f"n{self._count}"

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """A command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "worker.cli", *arguments],
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    @contextlib.contextmanager
    def worker(self, *arguments: str, **environ: str) -> Iterator[Process]:
        """A worker with a cache of its own, killed at the end if it lives still."""
        name = self.new_name()
        process = Process(
            list(arguments),
            self.environ | {"LORAMILL_CACHE_DIR": str(self.folder / name)} | environ,
            self.folder / f"{name}.log",
        )
        try:
            yield process
        finally:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGKILL)
            process.popen.wait(30)

    def upload(self, folder: Path, prefix: str) -> None:
        for path in sorted(one for one in folder.iterdir() if one.is_file()):
            self.s3.put_object(Bucket=BUCKET, Key=prefix + path.name, Body=path.read_bytes())

    def push(self, folder: Path, name: str) -> str:
        """Publish an adapter; returns its version."""
        done = self.run("push", str(folder), f"{MODEL}adapters/{name}", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["version"]

    def queue(self, *, max_receives: int = 50) -> "Queue":
        return Queue(self, max_receives)

    def keys(self, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def manifest(self, job_id: str) -> dict[str, Any] | None:
        key = f"out/{job_id}/manifest.json"
        return json.loads(self.read(key)) if key in self.keys(key) else None

    def results(self, job_id: str) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for key in self.keys(f"out/{job_id}/results-")
            for line in self.read(key).decode().splitlines()
        ]


class Queue:
    """A queue with its dead-letter queue."""

    def __init__(self, mill: Mill, max_receives: int) -> None:
        self._mill = mill
        name = mill.new_name()
        self.dead_url = mill.sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
        arn = mill.sqs.get_queue_attributes(QueueUrl=self.dead_url, AttributeNames=["QueueArn"])
        redrive = {"deadLetterTargetArn": arn["Attributes"]["QueueArn"], "maxReceiveCount": max_receives}
        self.url = mill.sqs.create_queue(
            QueueName=name, Attributes={"RedrivePolicy": json.dumps(redrive), "VisibilityTimeout": "30"}
        )["QueueUrl"]

    def send(
        self, body: str | None = None, attributes: Mapping[str, str] | None = None, **fields: Any
    ) -> str:
        texts = {
            name: {"DataType": "String", "StringValue": value} for name, value in (attributes or {}).items()
        }
        answer = self._mill.sqs.send_message(
            QueueUrl=self.url, MessageBody=body or json.dumps(fields), MessageAttributes=texts
        )
        return answer["MessageId"]

    def counts(self) -> tuple[int, int]:
        """Messages that are visible, and messages that are not."""
        return self._counts(self.url)

    @property
    def dead(self) -> int:
        return sum(self._counts(self.dead_url))

    def _counts(self, url: str) -> tuple[int, int]:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self._mill.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return int(found[names[0]]), int(found[names[1]])


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("e2e") / "base")


@pytest.fixture(scope="session")
def adapter_paths(base: Path) -> dict[str, Path]:
    shapes: dict[str, dict[str, Any]] = {
        "red": {"r": 4, "target_modules": tiny.ATTENTION},
        "green": {"r": 8, "lora_alpha": 4, "target_modules": tiny.MLP, "use_rslora": True},
        "blue": {"r": 2, "lora_alpha": 16, "target_modules": "all-linear"},
    }
    return {
        name: tiny.make_adapter(base.parent / name, base, seed=seed, **shape)
        for seed, (name, shape) in enumerate(shapes.items(), 1)
    }


@pytest.fixture(scope="session")
def mill(base: Path, adapter_paths: dict[str, Path]) -> Iterator[Mill]:
    with servers.moto_apart() as address:
        mill = Mill(address, base.parent)
        mill.upload(base, "tiny/")
        yield mill


@pytest.fixture(scope="session")
def versions(mill: Mill, adapter_paths: dict[str, Path]) -> dict[str, str]:
    """The three adapters, published; their versions by name."""
    return {name: mill.push(path, name) for name, path in adapter_paths.items()}
