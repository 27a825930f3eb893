"""A world in which one delivery after another is seen through, and may be stopped at any step."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from prometheus_client import CollectorRegistry

from tests.glue.malformed import MAX_ROWS
from worker import wire
from worker.adapters.directory import AdapterDirectory
from worker.delivery.commit import Committer, Provenance
from worker.delivery.flow import FlowControl
from worker.delivery.inputs import rows_of
from worker.delivery.row_runner import Hold
from worker.delivery.rows import EngineRows
from worker.delivery.runner import JobLimits, Runner
from worker.delivery.splitter import Splitter
from worker.jobs import Delivery, FinishReason, Job, Output, Row, RowResult
from worker.metrics import Metrics
from worker.transport.lease import Lease, LeaseKeeper
from worker.transport.memory import ManualClock, MemoryQueue, MemoryStore
from worker.transport.objects import StoredObject
from worker.transport.queue import Outcome

PREFIX = "s3://out/jobs/"
DEAD = "s3://out/dead-letter/"
VISIBILITY = 30
PROVENANCE = Provenance(worker="w", base_model="m", software_version="v")
BASE_MODELS = (PROVENANCE.base_model,)

Hook = Callable[[str], Awaitable[None]]


class Died(BaseException):
    """The process ends here: nothing of ours handles this."""


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads bring about: a fixed number of turns of the loop is not enough for that."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.001)


async def nothing(_: str) -> None:
    """The hook of a world where all goes well."""


class WatchedStore(MemoryStore):
    """Tells `hook` before and after every call: `get manifest.json?`, `get manifest.json!`."""

    def __init__(self) -> None:
        super().__init__({"out", "in"})
        self.hook: Hook = nothing
        self.files: list[str] = []
        """What was stored from files."""

    async def put_if_absent(
        self,
        uri: str,
        body: bytes,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        await self.hook(f"put {_file(uri)}?")
        stored = await super().put_if_absent(uri, body, content_type, metadata)
        await self.hook(f"put {_file(uri)}!")
        return stored

    async def put(
        self, uri: str, body: bytes, content_type: str = "application/octet-stream"
    ) -> StoredObject:
        await self.hook(f"overwrite {_file(uri)}?")
        stored = await super().put(uri, body, content_type)
        await self.hook(f"overwrite {_file(uri)}!")
        return stored

    async def get(self, uri: str, *, max_bytes: int | None = None) -> tuple[bytes, StoredObject]:
        await self.hook(f"get {_file(uri)}?")
        found = await super().get(uri, max_bytes=max_bytes)
        await self.hook(f"get {_file(uri)}!")
        return found

    async def put_file_if_absent(
        self,
        uri: str,
        file: BinaryIO,
        content_type: str = "application/octet-stream",
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        self.files.append(uri)
        return await super().put_file_if_absent(uri, file, content_type, metadata)

    async def head(self, uri: str) -> StoredObject | None:
        await self.hook(f"head {_file(uri)}?")
        found = await super().head(uri)
        await self.hook(f"head {_file(uri)}!")
        return found

    def text(self, uri: str) -> str:
        return self._objects[uri][0].decode()

    @property
    def uris(self) -> set[str]:
        return set(self._objects)


class WatchedQueue(MemoryQueue):
    """Tells `hook` of deletes and releases; `lose` makes the next heartbeat lose every lease."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hook: Hook = nothing
        self.lose = False
        self.released: list[int] = []

    async def extend(self, receipts: Sequence[str], seconds: int) -> Outcome:
        return Outcome(frozenset(receipts)) if self.lose else await super().extend(receipts, seconds)

    async def release(self, receipt: str, delay_seconds: int) -> None:
        await self.hook("release?")
        self.released.append(delay_seconds)
        await super().release(receipt, delay_seconds)

    async def delete(self, receipts: Sequence[str]) -> Outcome:
        await self.hook("delete?")
        outcome = await super().delete(receipts)
        await self.hook("delete!")
        return outcome


class EchoRows:
    """In the place of EngineRows: answers a row with its own text in capitals."""

    keeps_raw = False

    def __init__(self) -> None:
        self.hook: Hook = nothing
        self.computed: list[str] = []
        self.cancelled = 0

    @contextmanager
    def hold(self, num_bytes: int = 0) -> Iterator[Hold]:
        yield Hold(num_bytes)

    def grow(self, hold: Hold, num_bytes: int) -> None:
        pass

    async def run(
        self,
        hold: Hold,
        rows: AsyncIterator[Row],
        encode: Callable[[RowResult], Any],
        emit: Callable[[Any], Awaitable[None]],
    ) -> None:
        assert hold.job is not None
        try:
            await self.hook("run?")
            taken = [row async for row in rows]
            self.computed += [f"{hold.job.id}/{row.index}" for row in taken]
            await self.hook("run!")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        for row in taken:
            await emit(encode(echo(row)))


def make_runner(bridge: Any, tokenizer: Any, adapters: AdapterDirectory, **options: Any) -> EngineRows:
    """EngineRows that take `max_rows` rows (8) at a time."""
    flow = FlowControl(max_rows=options.pop("max_rows", 8), max_tokens=1 << 40, max_bytes=1 << 40)
    return EngineRows(bridge, tokenizer, adapters, flow, **options)


async def run_rows(rows: EngineRows, job: Job) -> list[RowResult]:
    """All results of a job by itself."""
    results: list[RowResult] = []

    async def emit(result: RowResult) -> None:
        results.append(result)

    with rows.hold() as hold:
        hold.take(job)
        await rows.run(hold, rows_of(job, MemoryStore()), lambda result: result, emit)
    return results


def echo(row: Row) -> RowResult:
    return RowResult(
        row=row,
        text=(row.text or "").upper(),
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=1,
        completion_tokens=2,
        failure=row.failure,
    )


class World:
    """One queue with its dead-letter queue, one store, and a worker's glue between them."""

    def __init__(self, *, max_receive_count: int = 5, dead_letter: bool = True) -> None:
        self.clock = ManualClock(1_000_000.0)
        timing: Any = {"clock": self.clock, "sleep": self.clock.sleep}
        self.dead_letters = MemoryQueue(**timing)
        self.queue = WatchedQueue(
            visibility_seconds=VISIBILITY,
            max_receive_count=max_receive_count,
            dead_letters=self.dead_letters,
            **timing,
        )
        self.store = WatchedStore()
        self.committer = Committer(self.store, PROVENANCE, clock=self.clock)
        self.rows: Any = EchoRows()
        self.rows_per_part = 4
        self.metrics = Metrics(CollectorRegistry())
        self.limits = JobLimits(
            output_prefixes=(PREFIX,),
            max_rows_per_job=MAX_ROWS,
            dead_letter_prefix=DEAD if dead_letter else None,
            max_receive_count=max_receive_count,
            base_models=BASE_MODELS,
        )
        self.journal: list[str] = []

    @property
    def runner(self) -> Runner:
        timing: Any = {"clock": self.clock, "sleep": self.clock.sleep}
        splitter = Splitter(self.store, self.committer, self.queue, rows_per_part=self.rows_per_part)
        return Runner(
            self.limits, self.rows, self.committer, splitter, self.metrics, store=self.store, **timing
        )

    def keeper(self) -> LeaseKeeper:
        return LeaseKeeper(self.queue, VISIBILITY, clock=self.clock, sleep=self.clock.sleep)

    def watch(self, hook: Hook) -> None:
        """Let `hook` see every step of the store, the queue and the rows."""
        self.store.hook = self.queue.hook = hook
        if isinstance(self.rows, EchoRows):
            self.rows.hook = hook

    def record(self, hook: Hook = nothing) -> list[str]:
        """Every step from here on that had its effect; `hook` sees them all the same."""
        steps: list[str] = []

        async def note(step: str) -> None:
            await hook(step)
            if step.endswith("!") or step.startswith("release"):
                steps.append(step.rstrip("!?"))

        self.watch(note)
        return steps

    async def send(self, body: str | None = None, **fields: Any) -> str:
        return await self.queue.send(body if body is not None else body_of(**fields))

    async def receive(self, keeper: LeaseKeeper) -> Lease | None:
        deliveries = await self.queue.receive(1, 0)
        return keeper.open(deliveries[0]) if deliveries else None

    async def handle_next(self) -> bool:
        """One delivery, seen through by a worker of its own; False when there is none."""
        async with self.keeper() as keeper:
            lease = await self.receive(keeper)
            if lease is None:
                return False
            await self.runner.handle(lease)
        return True

    async def handle_all(self, times: int = 10) -> None:
        """Time passes, and whatever becomes visible is seen through."""
        for _ in range(times):
            while await self.handle_next():
                pass
            if not await self.left():
                return
            await self.clock.advance(1000)

    async def left(self) -> int:
        info = await self.queue.describe()
        return info.messages + info.in_flight

    def results(self, job_id: str) -> list[dict[str, Any]]:
        lines = self.store.text(f"{PREFIX}{job_id}/results-00000-of-00001.jsonl").splitlines()
        return [json.loads(line) for line in lines]

    def manifest(self, job_id: str) -> wire.Manifest:
        return wire.decode_manifest(self.store.text(manifest_uri(job_id)).encode())

    def counted(self, outcome: str) -> float:
        return self.metrics.messages.labels(outcome)._value.get()


def body_of(job_id: str = "j", inputs: Any = ("a", "b", "c"), **fields: Any) -> str:
    return json.dumps({"id": job_id, "inputs": inputs} | fields)


def make_job(job_id: str = "j", inputs: Any = ("a", "b", "c"), **fields: Any) -> Job:
    """What a worker makes of that body."""
    delivery = Delivery(message_id="m", body=body_of(job_id, inputs, **fields), receipt="r", sent_at=999.0)
    return wire.decode(
        delivery, output_prefixes=[PREFIX], max_rows=MAX_ROWS, now=999.0, base_models=BASE_MODELS
    )


def manifest_uri(job_id: str) -> str:
    return wire.manifest_uri(Output(PREFIX), job_id)


def _file(uri: str) -> str:
    return "dead letter" if uri.startswith(DEAD) else uri.rpartition("/")[2].partition("-")[0]
