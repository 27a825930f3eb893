"""What adapters cost that are in the bucket and not used: a hundred in use, with ever more beside them.

    python -m tests.benchmarks.scale [--sizes 100 1000 10000] [--used 100] [--server seaweedfs|moto]

For each size: the first pass of `loramill sync --once` into an empty folder, passes of a running mirror that
find nothing changed, and a `loramill worker --sync` on the folder that is complete by then: how long from its
start until it is ready, and what memory is resident when it is and after a job with a row for each adapter in
use. The model is a tiny random one, so that what is measured is not the model. The last lines are ratios to
the smallest size. Ten thousand adapters are 30,000 uploads, which take some minutes.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import numpy as np
from safetensors.numpy import save

from adapters_sync.uris import S3Prefix
from tests import tiny
from tests.benchmarks import machine, mirror
from tests.benchmarks.adapters import linear_shapes
from tests.e2e.conftest import Process, wait_until
from tests.sync import servers
from tests.sync.builders import CONFIG, WEIGHTS, Bucket, manifest_of

MODULES = ("q_proj",)
RANK = 2
_PROCESSES = 4
_CHUNK = 250
_JOB = "used"
_OUTPUT = "out/"
_PATIENCE_SECONDS = 300


class Cost(NamedTuple):
    """What one size costs."""

    adapters: int
    first_ms: float
    """First pass, milliseconds for each adapter."""
    first_cpu_ms: float
    idle_cpu_ms: float
    """A pass that finds nothing changed, of a running mirror."""
    ready_seconds: float
    """From the start of the worker's process."""
    ready_mib: float
    used_mib: float


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--sizes", type=mirror.positive, nargs="+", default=[100, 1000, 10_000])
    cli.add_argument("--used", type=mirror.positive, default=100)
    mirror.add_server(cli)
    return cli


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    sizes = sorted(set(args.sizes))
    if sizes[0] < args.used:
        parser().error(f"--used {args.used} is more than the smallest of --sizes, {sizes[0]}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = tiny.make_base(folder / "base")
        address = stack.enter_context(mirror.server(args.server))
        queues = stack.enter_context(servers.moto_apart())
        stack.enter_context(mirror.environment(address))
        bucket = Bucket(servers.client(address), "scale-benchmark")
        bucket.client.create_bucket(Bucket=bucket.name)
        costs = []
        for before, adapters in zip([0, *sizes], sizes, strict=False):
            fill(address, bucket, base, range(before, adapters))
            costs.append(measure(bucket, base, folder / str(adapters), adapters, args.used, queues))
            print(table(costs), end="\n\n", flush=True)
    print(f"{args.used} adapters in use, {args.server}; {mirror.processor()}")
    print(ratios(costs))
    return 0


def fill(address: str, bucket: Bucket, base: Path, numbers: range) -> None:
    """Upload the adapters of these numbers, each as `loramill push` leaves it."""
    shapes = linear_shapes(base, MODULES)
    chunks = [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]
    with ProcessPoolExecutor(_PROCESSES) as pool:
        list(pool.map(partial(_put, address, bucket.name, bucket.source.prefix, shapes), chunks))


def _put(address: str, bucket: str, prefix: str, shapes: dict[str, tuple[int, int]], numbers: range) -> None:
    client = servers.client(address)
    for number in numbers:
        files = adapter_files(shapes, number)
        for path, data in {**files, "_manifest.json": manifest_of(files)}.items():
            client.put_object(Bucket=bucket, Key=f"{prefix}{name_of(number)}/{path}", Body=data)
    client.close()


def adapter_files(shapes: dict[str, tuple[int, int]], number: int) -> dict[str, bytes]:
    """A random adapter of the base model, another for each number."""
    rng = np.random.default_rng(number)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        for side, shape in (("A", (RANK, in_features)), ("B", (out_features, RANK))):
            values = rng.standard_normal(shape, dtype=np.float32)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = values
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(MODULES),
    }
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def name_of(number: int) -> str:
    return f"adapter-{number:06}"


def measure(bucket: Bucket, base: Path, folder: Path, adapters: int, used: int, queues: str) -> Cost:
    target = folder / "adapters"
    first = mirror.run(mirror.mirror_command(bucket, target))
    mirror.check(target, adapters)
    idle = asyncio.run(mirror.pass_after_pass(bucket, target))[1:]
    seconds, ready_mib, used_mib = work(bucket, base, folder, used, queues)
    return Cost(
        adapters=adapters,
        first_ms=1000 * first.seconds / adapters,
        first_cpu_ms=1000 * first.cpu_seconds / adapters,
        idle_cpu_ms=1000 * statistics.median(one.cpu_seconds for one in idle),
        ready_seconds=seconds,
        ready_mib=ready_mib,
        used_mib=used_mib,
    )


def work(bucket: Bucket, base: Path, folder: Path, used: int, queues: str) -> tuple[float, float, float]:
    """Start a worker on the mirrored folder and have it do a job with a row for each adapter in use.

    Returns the seconds until it was ready, and its resident MiB then and after the job.
    """
    sqs = boto3.client("sqs", endpoint_url=queues)
    queue = sqs.create_queue(QueueName=folder.name)["QueueUrl"]
    output = S3Prefix(bucket.name, f"{_OUTPUT}{folder.name}/")
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")},
        "AWS_ENDPOINT_URL_SQS": queues,
        "HF_HUB_OFFLINE": "1",
        "LORAMILL_MODEL": str(base),
        "LORAMILL_ADAPTERS_URI": bucket.uri,
        "LORAMILL_ADAPTERS_DIR": str(folder / "adapters"),
        "LORAMILL_CACHE_DIR": str(folder / "cache"),
        "LORAMILL_QUEUE_URL": queue,
        "LORAMILL_OUTPUT_PREFIXES": str(output),
        "LORAMILL_DEVICE": "cpu",
        "LORAMILL_LOG_FORMAT": "json",
    }
    started = time.perf_counter()
    worker = Process(["--sync"], environ, folder / "worker.log")
    try:
        worker.wait_ready()
        seconds, ready_mib = time.perf_counter() - started, machine.resident_mib(worker.popen.pid)
        rows = [{"input": "To be", "adapter": name_of(number)} for number in range(used)]
        job = {"id": _JOB, "inputs": rows, "parameters": {"max_new_tokens": 4}}
        sqs.send_message(QueueUrl=queue, MessageBody=json.dumps(job))
        manifest = wait_until(partial(_manifest, bucket, output), "the job's manifest", _PATIENCE_SECONDS)
        if manifest["status"] != "completed":
            raise RuntimeError(f"the job did not go well: {manifest}")
        return seconds, ready_mib, machine.resident_mib(worker.popen.pid)
    finally:
        worker.popen.kill()
        worker.popen.wait()


def _manifest(bucket: Bucket, output: S3Prefix) -> dict[str, Any] | None:
    key = f"{output.prefix}{_JOB}/manifest.json"
    if not bucket.client.list_objects_v2(Bucket=bucket.name, Prefix=key).get("Contents"):
        return None
    return json.loads(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())


_COLUMNS = (
    "adapters",
    "first ms/adapter",
    "CPU ms/adapter",
    "idle CPU ms",
    "ready s",
    "ready MiB",
    "used MiB",
)


def table(costs: list[Cost]) -> str:
    """What each size costs."""
    lines = ["".join(f"{name:>18}" for name in _COLUMNS)]
    lines += [f"{cost.adapters:>18}" + "".join(f"{value:>18.2f}" for value in cost[1:]) for cost in costs]
    return "\n".join(lines)


def ratios(costs: list[Cost]) -> str:
    """The same as multiples of the smallest size."""
    least = costs[0]
    lines = ["".join(f"{name.rpartition(' ')[0] or name:>18}" for name in _COLUMNS)]
    for cost in costs:
        shares = (value / first for value, first in zip(cost[1:], least[1:], strict=True))
        lines.append(f"{cost.adapters:>18}" + "".join(f"{share:>18.2f}" for share in shares))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
