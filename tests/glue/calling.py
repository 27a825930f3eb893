"""A worker's whole HTTP side over a real engine, which is tiny."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from adapters_sync.inventory import Limits
from tests.glue.registering import Answer, Client
from tests.glue.support import make_job, make_runner, run_rows
from worker.adapters.directory import AdapterDirectory
from worker.adapters.registry import AdapterRegistry
from worker.adapters.shelf import VersionShelf
from worker.bridge import Bridge
from worker.core import Core, build_core
from worker.http.adapters_api import AdaptersApi
from worker.http.generation import CallLimits, Generation
from worker.http.inference_api import HttpLimits, InferenceApi
from worker.http.models_api import ModelsApi, Served
from worker.http.server import Apis, serving
from worker.http.workflows_api import WorkflowsApi
from worker.metrics import Metrics
from worker.settings import read_settings
from worker.stats import Exporter
from worker.transport.memory import MemoryStore
from worker.workflows.files import fetch_workflow
from worker.workflows.registry import Workflows

MODEL = "tiny"
MODEL_URL = "s3://bucket/llama/"


def make_core(base: Path, **flags: Any) -> Core:
    options = {"max_loras": 2, "max_cpu_loras": 3, "max_num_seqs": 4, "max_num_batched_tokens": 32} | flags
    return build_core(read_settings(environ={}, flags=options), str(base))


class Worker(Client):
    """What a client sees of a worker, and what lies behind that."""

    core: Core
    bridge: Bridge
    metrics: Metrics
    rows: Any
    calls: InferenceApi
    generation: Generation
    registry: CollectorRegistry
    reason: str | None = None

    async def invoke(self, body: Any = None, target: str = "/invocations", **headers: str) -> Answer:
        """A call with a JSON body."""
        headers = {"Content-Type": "application/json"} | headers
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self("POST", target, headers, data)

    async def job(self, inputs: Any, **fields: Any) -> list[Any]:
        """The same rows, as a job from the queue."""
        return await run_rows(self.rows, make_job(inputs=inputs, **fields))

    def metric(self, sample: str) -> float:
        """The sum of all samples that begin like this."""
        lines = generate_latest(self.registry).decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(sample))

    async def settled(self) -> None:
        """Wait until nothing is at work, and look whether the books are clean."""
        async with asyncio.timeout(30):
            while self.bridge._flights or self.core.engine.has_work:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        self.core.engine.check_integrity()
        assert not any(entry.users for entry in self.core.store._entries.values())
        assert self.calls.num_calls == self.generation.num_rows == 0


@asynccontextmanager
async def calling(
    core: Core,
    adapters: Path | None,
    tmp_path: Path,
    *,
    token: str | None = None,
    max_calls: int = 64,
    max_rows: int = 64,
    max_body_bytes: int = 1 << 20,
    body_seconds: float = 5.0,
    timeout_seconds: float = 30.0,
    max_passed_over: int = 256,
    in_flight_rows: int = 8,
    model: str = MODEL,
) -> AsyncIterator[Worker]:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    exporter = Exporter(metrics)
    async with (
        Bridge(
            core.engine, core.store, exporter.step, on_row=exporter.row, max_passed_over=max_passed_over
        ) as bridge,
        aiohttp.ClientSession() as session,
    ):
        said: list[Worker] = []
        api = AdaptersApi(model, adapters is not None, lambda: said[0].reason)
        calls = InferenceApi(
            model,
            HttpLimits(max_calls, max_body_bytes, body_seconds),
            lambda: said[0].reason,
            metrics,
        )
        registered = None
        if adapters is not None:
            shelf = VersionShelf(
                tmp_path / "registered" / "adapters", mirrored=adapters, limits=Limits(rank=16, free_bytes=0)
            )
            api.registry = registered = AdapterRegistry(adapters, shelf, bridge)
            await registered.start()
        workflows_api = WorkflowsApi(lambda url: fetch_workflow(url, MemoryStore()), lambda: said[0].reason)
        workflows_api.workflows = Workflows(registered, [MODEL_URL], [model], tmp_path / "workflows")
        await workflows_api.workflows.start()
        served = Served(model, MODEL_URL, 4, max_calls)
        models = ModelsApi(served, lambda: said[0].reason, lambda: calls.num_calls)
        calls.workflows = models.workflows = workflows_api.workflows
        directory = AdapterDirectory(
            adapters, 30.0, registered=registered.find if registered is not None else lambda _: None
        )
        rows = make_runner(
            bridge,
            core.base.tokenizer,
            directory,
            max_rows=in_flight_rows,
            workflow=workflows_api.workflows.find,
        )
        limits, names = CallLimits(max_rows, timeout_seconds), [model, "org/tiny"]
        generation = Generation(rows.answer, limits, names, workflows_api.workflows.knows)
        calls.generation = generation
        if registered is not None:
            calls.adapters = registered.names
        async with serving(
            "127.0.0.1",
            0,
            registry,
            lambda: said[0].reason,
            token=token,
            apis=Apis(api, calls, metrics, workflows_api, models),
        ) as port:
            worker = Worker(session, port)
            said.append(worker)
            worker.core, worker.bridge, worker.metrics, worker.rows = core, bridge, metrics, rows
            worker.calls, worker.generation, worker.registry = calls, generation, registry
            yield worker


def serve(
    core: Core,
    adapters: Path | None,
    tmp_path: Path,
    scenario: Callable[[Worker], Awaitable[None]],
    **options: Any,
) -> None:
    """Run `scenario` against a worker; nothing of it must be left in the engine's books."""

    async def main() -> None:
        async with calling(core, adapters, tmp_path, **options) as worker:
            await scenario(worker)
            await worker.settled()

    asyncio.run(asyncio.wait_for(main(), 120))
