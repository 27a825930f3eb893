"""Two workers without a model, real clients, and many more faults than any network has."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Self

from prometheus_client import CollectorRegistry

from tests.faults.plans import Chance
from tests.faults.proxy import Proxy
from tests.glue.support import PROVENANCE, EchoRows
from tests.sync import servers
from worker.delivery.commit import Committer
from worker.delivery.intake import Intake
from worker.delivery.runner import JobLimits, Runner
from worker.delivery.splitter import Splitter
from worker.metrics import Metrics
from worker.transport.clients import Clients
from worker.transport.lease import LeaseKeeper
from worker.transport.queue import SqsQueue
from worker.transport.store import S3Store

VISIBILITY = 3
JOBS, WORKERS = 30, 2
LARGE, LARGE_ROWS, ROWS_PER_PART = 2, 20, 6
PATIENCE_SECONDS = 120
SEED = 1


class Worker:
    """A worker's glue at work in the block; its rows are echoed."""

    def __init__(self, url: str, bucket: str) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self._url = url
        self._limits = JobLimits(
            output_prefixes=(f"s3://{bucket}/out/",),
            max_rows_per_job=100,
            dead_letter_prefix=f"s3://{bucket}/dead/",
            max_receive_count=None,
        )
        self._stack = AsyncExitStack()
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Self:
        clients = await self._stack.enter_async_context(Clients(max_attempts=2))
        queue, store = SqsQueue(clients, self._url, visibility_seconds=VISIBILITY), S3Store(clients)
        keeper = await self._stack.enter_async_context(LeaseKeeper(queue, VISIBILITY))
        committer = Committer(store, PROVENANCE)
        splitter = Splitter(store, committer, queue, rows_per_part=ROWS_PER_PART)
        runner = Runner(self._limits, EchoRows(), committer, splitter, self.metrics, store=store)
        self.intake = Intake(
            queue, keeper, runner, self.metrics, room=lambda: 10, max_messages=10, poll_seconds=1
        )
        self.running = asyncio.create_task(self.intake.run(self._stop))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stop.set()
        await self.running
        await self.intake.drain(PATIENCE_SECONDS, asyncio.Event())
        await self._stack.aclose()


def test_every_row_is_committed_once_though_a_fifth_of_all_calls_fails(proxy: Proxy, queue_url, bucket):
    rng = random.Random(SEED)
    jobs = {f"j{number}": [f"{number}/{n}" for n in range(rng.randint(1, 8))] for number in range(JOBS)}
    large = {f"l{number}": [f"l{number}/{n}" for n in range(LARGE_ROWS)] for number in range(LARGE)}
    direct = servers.client(proxy._server), servers.client(proxy._server, service="sqs")
    s3, sqs = direct
    bodies = [json.dumps({"id": job, "inputs": inputs}) for job, inputs in jobs.items()]
    for job, inputs in large.items():
        lines = "".join(json.dumps({"input": text}) + "\n" for text in inputs)
        s3.put_object(Bucket=bucket, Key=f"in/{job}.jsonl", Body=lines.encode())
        bodies.append(json.dumps({"id": job, "input": {"uri": f"s3://{bucket}/in/{job}.jsonl"}}))
    for body in bodies + bodies[:3]:
        sqs.send_message(QueueUrl=queue_url, MessageBody=body)

    def left() -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
        return sum(map(int, found.values()))

    async def main() -> Counter[str]:
        async with AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(Worker(queue_url, bucket)) for _ in range(WORKERS)]
            deadline = time.monotonic() + PATIENCE_SECONDS
            while await asyncio.to_thread(left):
                assert time.monotonic() < deadline, f"{left()} messages are left"
                assert not any(worker.running.done() for worker in workers)
                await asyncio.sleep(0.2)
            proxy.plan.chance = None
        ends = Counter[str]()
        for worker, outcome in itertools.product(workers, ("committed", "duplicate", "lost", "released")):
            ends[outcome] += int(worker.metrics.messages.labels(outcome)._value.get())
        return ends

    proxy.longest_hidden_seconds = VISIBILITY
    proxy.plan.chance = Chance(0.2, seed=SEED, stubborn=0.4)
    ends = asyncio.run(main())
    assert proxy.injected.total() > 50
    assert ends["released"] + ends["lost"] > 0, "no fault outlasted the SDK"

    for job, inputs in {**jobs, **large}.items():
        manifest = read(s3, bucket, f"out/{job}/manifest.json")
        assert (manifest["status"], manifest["request_counts"]["total"]) == ("completed", len(inputs))
        lines = []
        for output in manifest["outputs"]:
            key = output["uri"].removeprefix(f"s3://{bucket}/")
            body = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
            lines += [json.loads(line) for line in body.splitlines()]
        assert [line["generated_text"] for line in lines] == [text.upper() for text in inputs]
        assert [line["index"] for line in lines] == list(range(len(inputs)))
    commits = [name for name in proxy.written if "/results-" in name or name.endswith("/manifest.json")]
    assert {proxy.written[name] for name in commits} == {1}
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket, Prefix="dead/")
    for client in direct:
        client.close()


def read(s3, bucket, key):
    return json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
