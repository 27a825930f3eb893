"""What the demo runs on: moto's server, the model and the adapters in it, syncer and worker as processes."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from adapters_sync.push import push
from worker.demo.prompts import ADAPTERS
from worker.errors import LoramillError
from worker.transport.clients import Clients
from worker.transport.store import S3Store

BUCKET, MODEL_PREFIX = "loramill-demo", "smollm2-135m-instruct"
MODEL_URI = f"s3://{BUCKET}/{MODEL_PREFIX}/"
OUTPUT_URI = f"s3://{BUCKET}/results/"
_START_SECONDS, _STOP_SECONDS = 180, 15

Step = Callable[[str], AbstractContextManager[Any]]
"""Shows a line for what happens inside the block."""


class Services(NamedTuple):
    """What runs during the demo."""

    environ: dict[str, str]
    """What one has to export to talk to it."""
    worker_url: str
    sync_url: str
    folder: Path
    """Logs, downloads and the mirror; gone at the end."""


def start(step: Step, stack: ExitStack, model: Path) -> Services:
    """Everything that a real installation has, on loopback addresses, until `stack` is closed.

    Raises LoramillError with the end of the log of what does not come up.
    """
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 (an extra)

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loramill-demo-")))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    stack.callback(server.stop)
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environ = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LORAMILL_OUTPUT_PREFIXES": OUTPUT_URI,
    }
    stack.enter_context(_environment(environ))
    with step(f"queue, dead-letter queue and bucket on {endpoint} (moto)"):
        environ["LORAMILL_QUEUE_URL"] = asyncio.run(_make_queue_and_bucket())
    with step(f"upload of the model to {MODEL_URI}"):
        asyncio.run(_upload_model(model))
    with step(f"push of {len(ADAPTERS) - 1} adapters to {MODEL_URI}adapters/"):
        asyncio.run(_push_adapters())
    settings = environ | {
        "LORAMILL_MODEL": MODEL_URI,
        "LORAMILL_CACHE_DIR": str(folder / "cache"),
        "LORAMILL_LOG_FORMAT": "text",
    }
    sync_port, worker_port = _free_port(), _free_port()
    sync_only = {"LORAMILL_SYNC_INTERVAL_SECONDS": "2"}
    worker_only = {"LORAMILL_ADAPTER_WAIT_SECONDS": "10"}
    sync = _spawn(stack, "sync", settings | sync_only | {"LORAMILL_HTTP_PORT": str(sync_port)}, folder)
    worker = _spawn(
        stack, "worker", settings | worker_only | {"LORAMILL_HTTP_PORT": str(worker_port)}, folder
    )
    services = Services(environ, f"http://127.0.0.1:{worker_port}", f"http://127.0.0.1:{sync_port}", folder)
    with step("loramill sync: mirrors the adapters"):
        _until_ready(services.sync_url, sync, folder / "sync.log")
    with step("loramill worker: downloads and loads the model"):
        _until_ready(services.worker_url, worker, folder / "worker.log")
    return services


async def _make_queue_and_bucket() -> str:
    async with Clients() as clients:
        await clients.objects.create_bucket(Bucket=BUCKET)
        dead = await clients.acks.create_queue(QueueName="loramill-demo-dead")
        found = await clients.acks.get_queue_attributes(
            QueueUrl=dead["QueueUrl"], AttributeNames=["QueueArn"]
        )
        redrive = {"deadLetterTargetArn": found["Attributes"]["QueueArn"], "maxReceiveCount": 5}
        queue = await clients.acks.create_queue(
            QueueName="loramill-demo", Attributes={"RedrivePolicy": json.dumps(redrive)}
        )
        return str(queue["QueueUrl"])


async def _upload_model(model: Path) -> None:
    files = await asyncio.to_thread(lambda: [path for path in sorted(model.iterdir()) if path.is_file()])
    async with Clients() as clients:
        store = S3Store(clients)
        for path in files:
            await store.put(MODEL_URI + path.name, await asyncio.to_thread(path.read_bytes))


async def _push_adapters() -> None:
    for name in filter(None, ADAPTERS):
        await push(Path(__file__).parent / "adapters" / name, f"{MODEL_URI}adapters/")


def _spawn(
    stack: ExitStack, command: str, settings: dict[str, str], folder: Path
) -> "subprocess.Popen[bytes]":
    """Run `loramill COMMAND` as its users do, with its log in `folder`; stopped at the end."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("LORAMILL_", "OPTION_"))} | settings
    log = stack.enter_context((folder / f"{command}.log").open("wb"))
    process = subprocess.Popen(  # noqa: S603 (our own command)
        [sys.executable, "-m", "worker.cli", command], env=environ, stdout=log, stderr=log
    )
    stack.callback(_stop, process)
    return process


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask politely, then again, which means at once, then not at all."""
    for wait_seconds in (1.0, _STOP_SECONDS):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(wait_seconds)
            except subprocess.TimeoutExpired:
                continue
    if process.poll() is None:
        process.kill()
        process.wait()


def _until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LoramillError(f"it ended with code {process.returncode}; its log:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2):  # noqa: S310 (our own address)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise LoramillError(f"it was not ready after {_START_SECONDS} seconds; its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def read_metric(url: str, name: str) -> float:
    """The value of one sample on the /metrics page of `url`; 0 when it is not there."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:  # noqa: S310 (our own address)
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
    return 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables of this process, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
