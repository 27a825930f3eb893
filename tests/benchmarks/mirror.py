"""What mirroring many small adapters costs: the mirror beside `aws s3 sync`, on one server, in one run.

    python -m tests.benchmarks.mirror [--adapters 1000] [--rounds 1] [--server seaweedfs|moto] [--aws PATH]

First from nothing, then again with nothing changed, each side in a process of its own, the order turning from
round to round; times include starting Python. Then passes of one mirror that goes on running, with what they
ask of the server and of the disk. The sides do not promise the same: `aws s3 sync` checks no content, puts
files in their place one by one, and brings nothing to the disk for good. Its program is looked for on the
PATH; one that is not there leaves our own figures. SeaweedFS is the server where its `weed` is on the PATH:
moto takes longer to answer than either side to ask.
"""

import argparse
import asyncio
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from adapters_sync.layout import scan
from adapters_sync.reconcile import Mirror
from adapters_sync.remote import connect
from tests.benchmarks import machine
from tests.sync import servers
from tests.sync.builders import Bucket, adapter_files, manifest_of

HOW_TO_GET_AWS = "no `aws` to compare with: pip install awscli, in an environment apart, and give --aws PATH"
PAGE = 1000
"""Objects in one page of a listing."""
_BUCKET = "mirror-benchmark"
_UPLOADS_AT_ONCE = 8
_IDLE_PASSES = 5


class Run(NamedTuple):
    """One process from its start to its end."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


class Pass(NamedTuple):
    """One pass of a running mirror."""

    seconds: float
    cpu_seconds: float
    requests: Counter[str]
    """By operation."""
    disk: Counter[str]
    """Steps on the volume that Python tells its audit hooks, by kind; the lock is left out."""


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--adapters", type=positive, default=1000)
    cli.add_argument("--rounds", type=positive, default=1)
    add_server(cli)
    cli.add_argument("--aws", default=shutil.which("aws"), metavar="PATH", help="the program of awscli")
    return cli


def add_server(cli: argparse.ArgumentParser) -> None:
    default = "seaweedfs" if servers.weed() else "moto"
    cli.add_argument("--server", choices=["seaweedfs", "moto"], default=default)


def server(name: str) -> AbstractContextManager[str]:
    """The server of this name, and its address; SystemExit when it is not installed."""
    if name == "moto":
        return servers.moto_apart()
    if servers.weed() is None:
        raise SystemExit(servers.WHY_NOT)
    return servers.seaweedfs()


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    with server(args.server) as address, environment(address), tempfile.TemporaryDirectory() as folder:
        bucket = fill(address, args.adapters)
        sides = {"loramill sync": mirror_command}
        if args.aws:
            sides["aws s3 sync"] = aws_command(args.aws)
        runs = {side: {"first": [], "again": []} for side in sides}
        for number in range(args.rounds):
            for side in list(sides)[:: -1 if number % 2 else 1]:
                target = Path(folder, f"{number}-{side.partition(' ')[0]}", "adapters")
                for phase in runs[side]:
                    runs[side][phase].append(run(sides[side](bucket, target)))
                check(target, args.adapters)
        passes = asyncio.run(pass_after_pass(bucket, Path(folder, "running", "adapters")))
    print(heading(args))
    print(table(runs))
    print(running(passes, args.adapters))
    if not args.aws:
        print(HOW_TO_GET_AWS)
    return 0


def fill(address: str, adapters: int) -> Bucket:
    """A bucket with so many adapters as `loramill push` leaves them: three objects each."""
    bucket = Bucket(servers.client(address), _BUCKET)
    bucket.client.create_bucket(Bucket=_BUCKET)

    def put(number: int) -> None:
        # A configuration of its own for each, since the weights are told apart by one byte only.
        files = adapter_files(number, note=f"adapter {number}")
        for path, data in {**files, "_manifest.json": manifest_of(files)}.items():
            bucket.put(f"adapter-{number:05}/{path}", data)

    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        list(pool.map(put, range(adapters)))
    return bucket


def mirror_command(bucket: Bucket, target: Path) -> list[str]:
    where = ["--adapters-uri", bucket.uri, "--adapters-dir", str(target)]
    return [sys.executable, "-m", "adapters_sync", "sync", "--once", *where]


def aws_command(program: str):
    def command(bucket: Bucket, target: Path) -> list[str]:
        return [program, "s3", "sync", bucket.uri, str(target), "--only-show-errors"]

    return command


def run(command: list[str]) -> Run:
    """Run to the end; what it prints is shown when it fails, which raises CalledProcessError."""
    with tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=printed)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            sys.stderr.write(printed.read().decode(errors="replace"))
            raise subprocess.CalledProcessError(process.returncode, command)
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def check(target: Path, adapters: int) -> None:
    """Nothing is measured that did not do its work."""
    found = len(scan(target))
    if found != adapters:
        raise RuntimeError(f"{target} has {found} adapters; {adapters} were expected")


async def pass_after_pass(bucket: Bucket, target: Path) -> list[Pass]:
    """The passes of a mirror that goes on running: the first, and some with nothing to do."""
    async with connect(bucket.source) as remote:
        requests: Counter[str] = Counter()
        remote._client.meta.events.register(
            "before-call.s3", lambda model, **_: requests.update([model.name])
        )
        mirror, found = Mirror(remote, target), []
        for _ in range(1 + _IDLE_PASSES):
            requests.clear()
            started = time.process_time()
            with steps_on(target.parent) as disk:
                report = await mirror.run_once()
            used = time.process_time() - started
            found.append(Pass(report.seconds, used, Counter(requests), Counter(disk)))
        return found


_watched: list[tuple[str, Counter[str]]] = []


@contextmanager
def steps_on(volume: Path) -> Iterator[Counter[str]]:
    """Counts the steps on files below a folder: opening, renaming, linking, but not asking for status."""
    if not _watched:
        sys.addaudithook(_hear)  # for good: Python has no way to take one away
    steps: Counter[str] = Counter()
    _watched.append((f"{volume.resolve()}{os.sep}", steps))
    try:
        yield steps
    finally:
        _watched[-1] = ("\0", steps)


def _hear(event: str, args: tuple[object, ...]) -> None:
    if not _watched or not (event == "open" or event.startswith(("os.", "shutil."))):
        return
    volume, steps = _watched[-1]
    path = args[0] if args else None
    if not isinstance(path, str | Path) or event in {"os.scandir", "os.listdir"}:
        return
    if str(path).startswith(volume) and not str(path).endswith(".lock"):
        steps[event.removeprefix("os.")] += 1


def heading(args: argparse.Namespace) -> str:
    return (
        f"{args.adapters} adapters of 3 objects, {args.server} in a process of its own, "
        f"median of {args.rounds}; {processor()}"
    )


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    name = machine.processor(cpuinfo.read_text() if cpuinfo.is_file() else "") or "unknown processor"
    return f"{name}, {os.cpu_count()} cores"


def table(runs: dict[str, dict[str, list[Run]]]) -> str:
    lines = [f"{'':<16}{'phase':<8}{'seconds':>9}{'CPU s':>9}{'MiB':>7}{'theirs / ours':>15}"]
    for phase in ("first", "again"):
        ours = _median(runs["loramill sync"][phase])
        for side, measured in runs.items():
            one = _median(measured[phase])
            ratio = "" if one == ours else f"{one.seconds / ours.seconds:.2f}"
            lines.append(
                f"{side:<16}{phase:<8}{one.seconds:>9.2f}{one.cpu_seconds:>9.2f}{one.peak_mib:>7.0f}{ratio:>15}"
            )
    return "\n".join(lines)


def running(passes: list[Pass], adapters: int) -> str:
    first, *idle = passes
    seconds = statistics.median(one.seconds for one in idle)
    cpu_seconds = statistics.median(one.cpu_seconds for one in idle)
    pages = math.ceil(3 * adapters / PAGE)
    asked = ", ".join(f"{count} {name}" for name, count in sorted(idle[-1].requests.items()))
    steps = ", ".join(f"{count} {name}" for name, count in sorted(idle[-1].disk.items())) or "none"
    return (
        f"one mirror that goes on running: first pass {first.seconds:.2f} s (CPU {first.cpu_seconds:.2f}), "
        f"idle pass {seconds:.3f} s (CPU {cpu_seconds:.3f})\n"
        f"  an idle pass asks for {asked} ({pages} pages hold the listing); steps on the volume: {steps}"
    )


def _median(runs: list[Run]) -> Run:
    return sorted(runs)[len(runs) // 2]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


@contextmanager
def environment(address: str) -> Iterator[None]:
    """What tells both sides where the server is."""
    told = {
        "AWS_ENDPOINT_URL_S3": address,
        "AWS_ACCESS_KEY_ID": servers.KEY,
        "AWS_SECRET_ACCESS_KEY": servers.SECRET,
        "AWS_DEFAULT_REGION": servers.REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with mock.patch.dict(os.environ, told):
        yield


if __name__ == "__main__":
    sys.exit(main())
