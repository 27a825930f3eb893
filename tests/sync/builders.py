"""Adapters to test with, and a bucket to put them in."""

import asyncio
import hashlib
import json
import struct
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Self, TypeVar

from adapters_sync.inventory import RemoteAdapter, RemoteFile
from adapters_sync.layout import MirrorPaths
from adapters_sync.options import Clock, MirrorOptions
from adapters_sync.reconcile import Mirror
from adapters_sync.remote import Remote, connect
from adapters_sync.report import PassReport
from adapters_sync.state import AdapterStatus, read_state
from adapters_sync.uris import S3Prefix

T = TypeVar("T")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config(**changes: Any) -> bytes:
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return json.dumps({key: value for key, value in (base | changes).items() if value is not ...}).encode()


def safetensors(tensors: dict[str, Any], data: bytes) -> bytes:
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


def weights(fill: int = 1, size: int = 64) -> bytes:
    """A lora_A and a lora_B of `size` bytes each, whose content depends on `fill`."""
    return safetensors(
        {
            "__metadata__": {"format": "pt"},
            "base.q_proj.lora_A.weight": {
                "dtype": "F32",
                "shape": [4, size // 16],
                "data_offsets": [0, size],
            },
            "base.q_proj.lora_B.weight": {
                "dtype": "BF16",
                "shape": [size // 2],
                "data_offsets": [size, 2 * size],
            },
        },
        bytes([fill % 256]) * 2 * size,
    )


def adapter_files(fill: int = 1, **changes: Any) -> dict[str, bytes]:
    return {CONFIG: config(**changes), WEIGHTS: weights(fill)}


def write_folder(path: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (adapter_files() if files is None else files).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def remote_file(path: str, size: int = 10, etag: str = '"e"', modified: float = 100.0) -> RemoteFile:
    return RemoteFile(path=path, size=size, etag=etag, modified=modified)


def remote_adapter(name: str = "a", etag: str = '"1"', **changes: Any) -> RemoteAdapter:
    files = (remote_file(CONFIG, etag=etag), remote_file(WEIGHTS, etag=etag))
    return RemoteAdapter(**({"name": name, "files": files} | changes))


class FakeTime:
    """Time that passes when somebody sleeps, and when told to."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    @property
    def clock(self) -> Clock:
        return Clock(now=self.read, monotonic=self.read, sleep=self.sleep, random=lambda: 0.5)

    def read(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        await asyncio.sleep(0)

    def __iadd__(self, seconds: float) -> Self:
        self.seconds += seconds
        return self


class AdapterUploads:
    """What people do to a bucket, in terms of `put`, `remove` and `paths`."""

    source: S3Prefix

    @property
    def uri(self) -> str:
        return str(self.source)

    def put_adapter(self, name: str, files: dict[str, bytes] | None = None, **kwargs: Any) -> None:
        """Upload an adapter with a `_manifest.json` that fits it, so that one pass publishes it."""
        files = adapter_files(**kwargs) if files is None else files
        for path, data in files.items():
            self.put(f"{name}/{path}", data)
        self.put(f"{name}/_manifest.json", manifest_of(files))

    def remove_adapter(self, name: str) -> None:
        for path in self.paths():
            if path.startswith(f"{name}/"):
                self.remove(path)


class Bucket(AdapterUploads):
    """A bucket on an S3 server as its users see it, with the adapters prefix of one model."""

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self.name = name
        self.source = S3Prefix(name, "model/adapters/")

    def connect(self) -> AbstractAsyncContextManager[Remote]:
        return connect(self.source)

    def put(self, path: str, data: bytes) -> None:
        # boto3 asks for leave to send a body even where it is empty. SeaweedFS gives it after its answer, and
        # the next upload on the connection hangs until boto3 loses patience, a minute later.
        body = {"Body": data} if data else {}
        self.client.put_object(Bucket=self.name, Key=self.source.prefix + path, **body)

    def get(self, path: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=self.source.prefix + path)["Body"].read()

    def remove(self, path: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=self.source.prefix + path)

    def paths(self) -> list[str]:
        answer = self.client.list_objects_v2(Bucket=self.name, Prefix=self.source.prefix)
        return [item["Key"].removeprefix(self.source.prefix) for item in answer.get("Contents", ())]


def manifest_of(files: dict[str, bytes]) -> bytes:
    entries = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]
    return json.dumps({"files": entries}).encode()


class World:
    """A bucket, a volume and a clock; each `with_mirror` is a fresh process on them."""

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self.bucket = bucket
        self.adapters_dir = root / "model" / "adapters"
        self.paths = MirrorPaths(self.adapters_dir)
        self.time = FakeTime()

    def with_mirror(self, work: Callable[[Mirror], Coroutine[Any, Any, T]], **options: Any) -> T:
        async def main() -> T:
            async with self.bucket.connect() as remote:
                return await work(self.mirror(remote, **options))

        return asyncio.run(main())

    def mirror(self, remote: Remote, **options: Any) -> Mirror:
        return Mirror(remote, self.adapters_dir, MirrorOptions(**options), self.time.clock)

    def sync(self, passes: int = 1, **options: Any) -> PassReport:
        """So many passes of one fresh mirror, a second apart; the last one's report."""

        async def work(mirror: Mirror) -> PassReport:
            for _ in range(passes):
                report = await mirror.run_once()
                self.time += 1
            return report

        return self.with_mirror(work, **options)


def state_of(world: World, name: str) -> AdapterStatus | None:
    """What the state file says about an adapter."""
    state = read_state(world.paths.state_file)
    return state.find(name) if state is not None else None
