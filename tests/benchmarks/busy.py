"""How busy the engine is: seconds in its steps over seconds by the clock, on many small jobs.

    python -m tests.benchmarks.busy [--rows 4] [--new-tokens 32] [--seconds 60] [--model DIR]

A queue of moto's is kept filled with jobs of `--rows` rows with different adapters, and a real worker with
the demo's model (or that of `--model`, then without adapters) takes them. After `--warm` seconds of work it
is looked at for `--seconds`: what the engine's thread spent in steps, by phase. The server runs on the same
machine, as queue and store elsewhere do not.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks import mirror
from tests.e2e.conftest import Process, wait_until
from tests.sync import servers

BUCKET = "busy"
_AHEAD = 40
"""Jobs that wait."""
PROMPTS = ("What do bees make?", "Tell me about the sea.", "Who are you?", "Why is the sky blue at noon?")


class Totals(NamedTuple):
    """What a worker has told so far."""

    at: float
    steps: int
    rows: float
    """Sum over steps."""
    jobs: float
    by_phase: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.by_phase.values())


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--rows", type=mirror.positive, default=4)
    cli.add_argument("--new-tokens", type=mirror.positive, default=32)
    cli.add_argument("--seconds", type=mirror.positive, default=60)
    cli.add_argument("--warm", type=mirror.positive, default=15)
    cli.add_argument("--batch", type=mirror.positive, default=16)
    cli.add_argument("--model", type=Path, help="a folder; default: the demo's model")
    return cli


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, adapters = (args.model, []) if args.model else _demo(folder / "adapters")
        address = stack.enter_context(servers.moto_apart())
        servers.client(address).create_bucket(Bucket=BUCKET)
        url = stack.enter_context(_fed(address, args, [*adapters, ""]))
        flags = ["--max-num-seqs", str(args.batch), "--queue-url", url, "--model", str(model)]
        flags += ["--output-prefixes", f"s3://{BUCKET}/out/", "--cache-dir", str(folder / "cache")]
        if adapters:
            flags += ["--adapters-dir", str(folder / "adapters")]
        worker = Process(flags, environ_of(address), folder / "worker.log")
        try:
            worker.wait_ready()
            wait_until(lambda: read(worker).jobs > 0, "the first job", 120)
            time.sleep(args.warm)
            before = read(worker)
            time.sleep(args.seconds)
            after = read(worker)
        finally:
            worker.popen.kill()
            worker.popen.wait()
    print(report(before, after, args.rows))
    print(
        f"{args.rows} rows a job, {args.new_tokens} new tokens, batch of {args.batch}; {mirror.processor()}"
    )
    return 0


def read(worker: Process) -> Totals:
    """The worker's metrics now."""
    status, text = worker.get("/metrics")
    assert status == 200, text

    def value(sample: str) -> float:
        found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    phases = re.findall(r'^loramill_step_seconds_total\{phase="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return Totals(
        at=time.monotonic(),
        steps=int(value("loramill_batch_rows_count")),
        rows=value("loramill_batch_rows_sum"),
        jobs=value('loramill_messages_total{outcome="committed"}'),
        by_phase={name: float(seconds) for name, seconds in phases},
    )


def report(before: Totals, after: Totals, rows: int) -> str:
    """What happened in between."""
    wall, steps = after.at - before.at, after.steps - before.steps
    jobs, busy = after.jobs - before.jobs, after.seconds - before.seconds
    each = f"{(after.rows - before.rows) / max(1, steps):.2f} rows, {1000 * wall / max(1, steps):.1f} ms"
    lines = [
        f"engine busy   {busy / wall:.3f} of {wall:.1f} s",
        f"steps         {steps}, each {each} on average",
        f"jobs          {jobs / wall:.2f} a second, {jobs * rows / wall:.1f} rows a second",
    ]
    shares = ((name, after.by_phase[name] - before.by_phase.get(name, 0.0)) for name in after.by_phase)
    return "\n".join([*lines, *(f"  {name:<12}{seconds / wall:.3f}" for name, seconds in shares)])


def _demo(folder: Path) -> tuple[Path, list[str]]:
    """The demo's model, and the names of its adapters, which are copied to `folder`."""
    from worker.demo import base_model

    shutil.copytree(Path(base_model.__file__).parent / "adapters", folder)
    cache = Path.home() / ".cache" / "loramill"
    model = base_model.prepare_base_model(cache, lambda text: print(text, file=sys.stderr))
    return model, sorted(path.name for path in folder.iterdir() if path.is_dir())


@contextmanager
def _fed(address: str, args: argparse.Namespace, adapters: list[str]) -> Iterator[str]:
    """A queue that has jobs as long as the block lasts; its URL. Moto is slow with many messages."""
    sqs, over = servers.client(address, service="sqs"), threading.Event()
    url: str = sqs.create_queue(QueueName="busy")["QueueUrl"]

    def feed() -> None:
        name, number = "ApproximateNumberOfMessages", 0
        while not over.is_set():
            waiting = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=[name])["Attributes"][name]
            if int(waiting) >= _AHEAD:
                over.wait(0.1)
                continue
            entries = [
                {"Id": str(at), "MessageBody": json.dumps(_job(number + at, args, adapters))}
                for at in range(10)
            ]
            sqs.send_message_batch(QueueUrl=url, Entries=entries)
            number += 10

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield url
    finally:
        over.set()
        thread.join()


def _job(number: int, args: argparse.Namespace, adapters: list[str]) -> dict[str, object]:
    rows = [
        {
            "messages": [{"role": "user", "content": PROMPTS[(number + at) % len(PROMPTS)]}],
            "adapter": adapters[(number + at) % len(adapters)],
        }
        for at in range(args.rows)
    ]
    return {"id": f"j{number}", "inputs": rows, "parameters": {"max_new_tokens": args.new_tokens}}


def environ_of(address: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")},
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": servers.KEY,
        "AWS_SECRET_ACCESS_KEY": servers.SECRET,
        "AWS_DEFAULT_REGION": servers.REGION,
        "HF_HUB_OFFLINE": "1",
        "LORAMILL_DEVICE": "cpu",
        "LORAMILL_LOG_FORMAT": "json",
    }


if __name__ == "__main__":
    sys.exit(main())
