"""A worker that is stopped in the middle of a call, and goes on when somebody else has its message."""

import asyncio
import hashlib
import signal
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests import tiny
from tests.e2e.conftest import BUCKET, Mill, Process, Queue, wait_until
from tests.faults.calls import Call
from tests.faults.proxy import Proxy

ROWS = 5
OUTCOME = 'loramill_messages_total{outcome="%s"}'


class Frost:
    """Stops the process that makes the first call of some kind, and holds that call until told to go on."""

    def __init__(self) -> None:
        self.operation, self.part = "", ""
        self.processes: list[Process] = []
        self.frozen: Process | None = None
        self.struck, self.thaw = threading.Event(), threading.Event()

    def lie_in_wait(self, operation: str, part: str) -> None:
        self.struck.clear()
        self.thaw.clear()
        self.frozen, self.part, self.operation = None, part, operation

    async def gate(self, call: Call) -> None:
        """For the proxy."""
        if call.operation == self.operation and self.part in call.target:
            self.operation = ""
            self.frozen = await asyncio.to_thread(self._owner, call.port)
            self.frozen.popen.send_signal(signal.SIGSTOP)
            self.struck.set()
            await asyncio.to_thread(self.thaw.wait)

    def let_go(self) -> None:
        """The process runs again, and its call goes on."""
        assert self.frozen is not None
        self.frozen.popen.send_signal(signal.SIGCONT)
        self.thaw.set()

    def _owner(self, port: int) -> Process:
        for process in self.processes:
            connections = psutil.Process(process.popen.pid).net_connections("tcp")
            if any(one.laddr.port == port for one in connections):
                return process
        raise AssertionError(f"nobody is at port {port}")


@pytest.fixture(scope="module")
def mill(server: str, tmp_path_factory: pytest.TempPathFactory) -> Mill:
    """A base model and no adapters."""
    folder = tmp_path_factory.mktemp("frozen")
    mill = Mill(server, folder)
    mill.upload(tiny.make_base(folder / "base"), "tiny/")
    return mill


@pytest.fixture(scope="module")
def frost() -> Frost:
    return Frost()


@pytest.fixture(scope="module")
def through(server: str, frost: Frost) -> Iterator[Proxy]:
    """How the workers reach queue and store."""
    with Proxy(server, gate=frost.gate) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def queue(mill: Mill, server: str, frost: Frost, through: Proxy) -> Iterator[Queue]:
    """A queue with two workers."""
    queue = mill.queue()
    told = {
        "AWS_ENDPOINT_URL": through.endpoint,
        "LORAMILL_QUEUE_URL": queue.url.replace(server, through.endpoint),
        "LORAMILL_VISIBILITY_TIMEOUT_SECONDS": "10",
        "LORAMILL_ENABLE_LORA": "false",
    }
    with mill.worker(**told) as first, mill.worker(**told) as second:
        frost.processes += [first, second]
        for process in frost.processes:
            process.wait_ready()
        yield queue
        frost.thaw.set()


@pytest.fixture(autouse=True)
def _thawed(frost: Frost) -> Iterator[None]:
    """Whatever went wrong, nobody stays frozen."""
    yield
    if frost.frozen is not None:
        frost.let_go()


@pytest.mark.parametrize(
    ("operation", "part", "end", "end_of_the_other"),
    [
        ("PutObject", "/results-", "lost", "committed"),
        ("PutObject", "/manifest.json", "lost", "committed"),
        # The service says that a delete by a stale receipt has succeeded.
        ("DeleteMessageBatch", "", "committed", "duplicate"),
    ],
    ids=["results", "manifest", "ack"],
)
def test_what_a_worker_does_after_its_visibility_has_ended_changes_nothing(
    operation, part, end, end_of_the_other, mill, queue, frost, through
):
    job = f"frozen-{operation.lower()}-{part.strip('/-.')}"
    frost.lie_in_wait(operation, part)
    before = {process: counts(process) for process in frost.processes}
    queue.send(id=job, inputs=[f"{job} {n}" for n in range(ROWS)], parameters={"max_new_tokens": 3})
    assert frost.struck.wait(60)
    (other,) = (process for process in frost.processes if process is not frost.frozen)

    # The other worker gets the message when its visibility ends, and sees it through.
    wait_until(lambda: queue.counts() == (0, 0), "the other worker")
    manifest = mill.manifest(job)
    objects = {key: mill.read(key) for key in mill.keys(f"out/{job}/")}
    frozen = frost.frozen
    frost.let_go()
    wait_until(lambda: counts(frozen)[end] > before[frozen][end], "the end of the frozen one's delivery")

    assert {key: mill.read(key) for key in mill.keys(f"out/{job}/")} == objects
    assert {through.written[f"{BUCKET}/{key}"] for key in objects} == {1}
    (output,) = manifest["outputs"]
    body = objects[output["uri"].removeprefix(f"s3://{BUCKET}/")]
    assert output["sha256"] == hashlib.sha256(body).hexdigest()
    lines = mill.results(job)
    assert [line["index"] for line in lines] == list(range(ROWS))
    assert all(line["error"] is None for line in lines)
    assert manifest["status"] == "completed"
    assert counts(other)[end_of_the_other] == before[other][end_of_the_other] + 1
    assert (queue.counts(), queue.dead) == ((0, 0), 0)
    assert frozen.popen.poll() is None, "it goes on with other messages"


def counts(process: Process) -> dict[str, float]:
    """How its deliveries ended."""
    return {name: process.metric(OUTCOME % name) for name in ("committed", "duplicate", "lost", "released")}
