"""One run: messages go to a real worker, and what it leaves is accounted for."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests import tiny
from tests.e2e.conftest import BUCKET, PREFIX, Mill, Process, Queue, wait_until
from tests.poison import samples
from tests.poison.accounts import Accounts, Bucket, account
from tests.poison.messages import MAX_ROWS, Message
from tests.sync import servers

LETTERS = "dead/"
GOOD = {"inputs": ["still there?", "and so?"], "adapters": ["red", ""], "parameters": {"max_new_tokens": 4}}
_FLAGS = ("--sync", "--max-num-seqs", "8", "--max-rows-per-job", str(MAX_ROWS), "--adapter-wait-seconds", "1")
_STALL_SECONDS = 60
_OUT = PREFIX.removeprefix(f"s3://{BUCKET}/")


class Report(NamedTuple):
    accounts: Accounts
    mistakes: list[str]
    """Those of the accounts, and of the worker."""
    said: list[str]
    """The worker's log above `info`, without what differs from one to the next."""
    seconds: float
    """From the first message to the last one's end."""


def run(fuzzed: Sequence[Message], folder: Path) -> Report:
    """Send the messages to a worker of their own, and see what becomes of them. `folder` is for its files."""
    with servers.moto_apart() as address, _mill(address, folder) as mill:
        queue = mill.queue(max_receives=3)
        with mill.worker(*_FLAGS, LORAMILL_QUEUE_URL=queue.url) as worker:
            worker.wait_ready()
            wait_until(lambda: worker.metric('loramill_sync_adapters{state="ready"}') >= 2, "the adapters")
            began = time.monotonic()
            with ThreadPoolExecutor(4) as threads:
                sent = dict(
                    zip(threads.map(lambda one: _send(mill, queue, one), fuzzed), fuzzed, strict=True)
                )
            mistakes = _wait_for_end(queue, worker)
            seconds = time.monotonic() - began
            if worker.popen.poll() is None:
                mistakes += _still_serving(mill, queue, worker)
                mistakes += [] if mistakes else _wait_for_end(queue, worker)
                mistakes += _stopped(worker)
        accounts = account(sent, Bucket(_below(mill, _OUT, "good/"), _below(mill, LETTERS)))
        strangers = [
            key for key in mill.keys("") if not key.startswith(("tiny/", samples.FILES, _OUT, LETTERS))
        ]
        mistakes += [f"written where nothing belongs: {key}" for key in strangers]
        said = [line for line in map(_loud, worker.text.splitlines()) if line]
        return Report(accounts, [*accounts.mistakes, *mistakes], said, seconds)


@contextmanager
def _mill(address: str, folder: Path) -> Iterator[Mill]:
    """A bucket with a tiny model, its adapters, and what messages refer to."""
    mill = Mill(address, folder)
    mill.environ |= {"LORAMILL_DEAD_LETTER_URI": f"s3://{BUCKET}/{LETTERS}", "LORAMILL_SETTLE_SECONDS": "0"}
    base = tiny.make_base(folder / "base")
    mill.upload(base, "tiny/")
    for seed, name in enumerate(samples.ADAPTERS):
        path = tiny.make_adapter(folder / name, base, seed=seed, r=4, target_modules=tiny.ATTENTION)
        mill.upload(path, f"tiny/adapters/{name}/")
    for key, body in samples.OBJECTS.items():
        mill.s3.put_object(Bucket=BUCKET, Key=key, Body=body)
    try:
        yield mill
    finally:
        mill.s3.close()
        mill.sqs.close()


def _send(mill: Mill, queue: Queue, message: Message) -> str:
    answer = mill.sqs.send_message(
        QueueUrl=queue.url, MessageBody=message.body, MessageAttributes=dict(message.attributes)
    )
    return str(answer["MessageId"])


def _wait_for_end(queue: Queue, worker: Process) -> list[str]:
    """Wait until the queue is empty, for as long as it grows shorter."""
    left, since = (0, 0), time.monotonic()
    while time.monotonic() - since < _STALL_SECONDS:
        if worker.popen.poll() is not None:
            return [f"the worker ended with {worker.popen.returncode}: {worker.text[-2000:]}"]
        now = queue.counts()
        if now == (0, 0):
            return [f"{queue.dead} messages went to the dead-letter queue"] if queue.dead else []
        if now != left:
            left, since = now, time.monotonic()
        time.sleep(0.1)
    return [f"{left[0]} messages are left, and {left[1]} in flight"]


def _still_serving(mill: Mill, queue: Queue, worker: Process) -> list[str]:
    """What becomes of a good job now."""
    queue.send(id="good", **GOOD)
    try:
        wait_until(lambda: mill.manifest("good") or worker.popen.poll() is not None, "a good job")
    except AssertionError as late:
        return [str(late)]
    if worker.popen.poll() is not None:
        return [f"a good job ended the worker with {worker.popen.returncode}"]
    return [f"a good job failed: {line}" for line in mill.results("good") if line["error"]]


def _stopped(worker: Process) -> list[str]:
    """Tell the worker twice to stop, so that it waits for nothing."""
    worker.popen.send_signal(signal.SIGTERM)
    worker.wait_for(503, "draining\n")
    worker.popen.send_signal(signal.SIGTERM)
    code = worker.end()
    return [f"the worker ended with {code}"] if code else []


def _below(mill: Mill, prefix: str, without: str = "-") -> dict[str, bytes]:
    """Bodies by what comes after the prefix."""
    names = (key.removeprefix(prefix) for key in mill.keys(prefix))
    return {name: mill.read(prefix + name) for name in names if not name.startswith(without)}


def _loud(line: str) -> str:
    """A line of the log in few words, if it is a warning or worse."""
    if not line.startswith("{"):
        return line
    entry = json.loads(line)
    return "" if entry["level"] == "info" else f"{entry['level']}: {entry['message']}".split(": ", 2)[1]
