"""A file of a million lines: how long until it is split, and what memory the worker takes to the end.

    python -m tests.benchmarks.large [--lines 1000000] [--packed] [--server seaweedfs|moto]

The object lies in one S3 server, the queue is moto's, the model is a tiny random one: what is measured is the
way of the rows. After `--work-seconds` of generating the job is cancelled, by which the rest of its rows
become error lines, so that all of it is written, committed and counted in minutes. At the end every line of
every part is looked at once more: each row must be there once, in order.
"""

import argparse
import asyncio
import gzip
import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests import tiny
from tests.benchmarks import machine, mirror
from tests.benchmarks.busy import environ_of
from tests.e2e.conftest import Process, wait_until
from tests.sync import servers
from worker import wire
from worker.jobs import Output
from worker.sender.follow import cancel, find_manifest, stream_results
from worker.sender.progress import Observer
from worker.transport.clients import Clients
from worker.transport.store import S3Store

BUCKET, JOB = "large", "large"
OUTPUT = Output(f"s3://{BUCKET}/out/")
_PATIENCE_SECONDS = 3600


class Watch:
    """Samples a process's resident memory until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self.peak = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, machine.resident_mib(self._pid))

    def restart(self) -> float:
        """The peak so far, in MiB; a new one begins."""
        peak, self.peak = self.peak, 0.0
        return peak

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Found(NamedTuple):
    """What was measured. Memory in MiB."""

    bytes: int
    ready: float
    split_seconds: float
    split: float
    work: float
    rows_worked: int
    rest: float
    rest_seconds: float
    parts: int


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--lines", type=mirror.positive, default=1_000_000)
    cli.add_argument("--work-seconds", type=mirror.positive, default=60)
    cli.add_argument("--packed", action="store_true", help="gzip")
    mirror.add_server(cli)
    return cli


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = tiny.make_base(folder / "base")
        store = stack.enter_context(mirror.server(args.server))
        queues = stack.enter_context(servers.moto_apart())
        stack.enter_context(mirror.environment(store))
        servers.client(store).create_bucket(Bucket=BUCKET)
        found = asyncio.run(measure(args, folder, base, store, queues))
    print(
        f"{args.lines} lines, {found.bytes / 1e6:.0f} MB, {args.server}; {mirror.processor()}\n"
        f"resident when ready      {found.ready:.0f} MiB\n"
        f"splitting into {found.parts:<9} {found.split_seconds:.1f} s, peak {found.split:.0f} MiB\n"
        f"generating {found.rows_worked:<13} {args.work_seconds} s, peak {found.work:.0f} MiB\n"
        f"the rest, and manifest   {found.rest_seconds:.1f} s, peak {found.rest:.0f} MiB\n"
        "every row once, in order"
    )
    return 0


async def measure(args: argparse.Namespace, folder: Path, base: Path, address: str, queues: str) -> Found:
    file = write(folder, args.lines, packed=args.packed)
    uri = f"s3://{BUCKET}/in/{file.name}"
    sqs = servers.client(queues, service="sqs")
    url = sqs.create_queue(QueueName="large")["QueueUrl"]
    environ = environ_of(address) | {"AWS_ENDPOINT_URL_SQS": queues}
    flags = ["--model", str(base), "--queue-url", url, "--output-prefixes", OUTPUT.uri]
    flags += ["--cache-dir", str(folder / "cache"), "--max-num-seqs", "64", "--max-in-flight-rows", "256"]
    async with Clients() as clients:
        store = S3Store(clients)
        with file.open("rb") as content:
            await store.put_file_if_absent(uri, content)
        worker = Process(flags, environ, folder / "worker.log")
        watch = Watch(worker.popen.pid)
        try:
            await asyncio.to_thread(worker.wait_ready)
            ready = watch.restart()
            body = {"id": JOB, "input": {"uri": uri}, "output": {"uri": OUTPUT.uri}}
            started = time.perf_counter()
            sqs.send_message(
                QueueUrl=url, MessageBody=json.dumps(body | {"parameters": {"max_new_tokens": 1}})
            )
            done = partial(worker.metric, 'loramill_messages_total{outcome="split"}')
            await asyncio.to_thread(wait_until, done, "the split", _PATIENCE_SECONDS)
            split_seconds, split = time.perf_counter() - started, watch.restart()
            await asyncio.sleep(args.work_seconds)
            work, rows = watch.restart(), int(worker.metric("loramill_adapter_rows_total"))
            seen = await Observer(store, OUTPUT, JOB).look()
            started = time.perf_counter()
            await cancel(store, OUTPUT, JOB)
            manifest = await until_done(store, worker)
            rest_seconds, rest = time.perf_counter() - started, watch.restart()
        finally:
            watch.close()
            worker.popen.kill()
            worker.popen.wait()
        if manifest.request_counts.total != args.lines or seen.rows != args.lines:
            raise RuntimeError(f"rows are missing: {manifest.request_counts}, {seen}")
        await check(store, manifest)
    parts = len(manifest.outputs)
    size = file.stat().st_size
    return Found(size, ready, split_seconds, split, work, rows, rest, rest_seconds, parts)


async def until_done(store: S3Store, worker: Process) -> wire.Manifest:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        manifest = await find_manifest(store, OUTPUT, JOB)
        if manifest is not None:
            return manifest
        assert worker.popen.poll() is None, worker.text
        await asyncio.sleep(0.5)
    raise TimeoutError


def write(folder: Path, lines: int, *, packed: bool) -> Path:
    path = folder / ("rows.jsonl.gz" if packed else "rows.jsonl")
    with gzip.open(path, "wb", 1) if packed else path.open("wb") as file:
        for number in range(lines):
            file.write(b'{"id": "row-%d", "input": "This is line number %d of many."}\n' % (number, number))
    return path


async def check(store: S3Store, manifest: wire.Manifest) -> None:
    """Each row once, in order, whatever became of it."""
    expected, pending = 0, b""
    async for chunk in stream_results(store, manifest):
        *whole, pending = (pending + chunk).split(b"\n")
        for line in whole:
            if not line.startswith(b'{"id":"row-%d","index":%d,' % (expected, expected)):
                raise RuntimeError(f"where row {expected} should be: {line[:80]!r}")
            expected += 1
    if pending or expected != manifest.request_counts.total:
        raise RuntimeError(f"{expected} rows of {manifest.request_counts.total}, and {pending[:80]!r}")


if __name__ == "__main__":
    sys.exit(main())
