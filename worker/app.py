"""The worker, wired: what is built from what, and the order in which it all comes up and down."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from prometheus_client import CollectorRegistry

from worker.answerer import Foundation
from worker.delivery.intake import Intake
from worker.engine_side import engine_side
from worker.handler_side import custom_handler, handler_side
from worker.http.adapters_api import AdaptersApi
from worker.http.inference_api import HttpLimits, InferenceApi
from worker.http.models_api import ModelsApi, Served
from worker.http.server import Apis, serving
from worker.http.workflows_api import WorkflowsApi
from worker.metrics import Metrics
from worker.model_source import local_properties, remote_properties
from worker.own_mirror import open_mirror_of
from worker.queue_side import open_queue_side
from worker.settings import Settings, notes
from worker.stats import Exporter
from worker.transport.clients import Clients
from worker.transport.store import S3Store
from worker.workflows.files import fetch_workflow

logger = logging.getLogger(__name__)

_EXPORT_SECONDS = 1.0
_LAST_POLL_SECONDS = 2.0


async def run_worker(
    settings: Settings, reread: Callable[[str], Settings], *, only_workflows: bool = False
) -> None:
    """Serve until SIGTERM or SIGINT, or until idle for `exit_when_idle_seconds`, then drain.

    `reread` gives the settings anew with the text of the serving.properties that was found beside a model
    in S3. With `only_workflows` nobody named the model itself: a single workflow answers calls that name
    none. Raises LoramillError when the worker cannot start, or broke: its leases are given back first.
    """
    signals = _Signals()
    async with AsyncExitStack() as stack:
        clients = await stack.enter_async_context(_clients(settings))
        objects = S3Store(clients)
        properties = await remote_properties(settings, objects)
        if properties is None:
            properties = await asyncio.to_thread(local_properties, settings)
        else:
            settings = reread(properties)
        _tell(notes(settings, properties, os.environ))
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        exporter = Exporter(metrics, settings.metrics_adapters)
        loaded = asyncio.Event()

        def not_ready() -> str | None:
            if signals.stop.is_set():
                return "draining"
            return None if loaded.is_set() else "loading the model"

        api = AdaptersApi(settings.model_name, settings.lora_enabled, not_ready)
        limits = HttpLimits(settings.http_max_calls, settings.http_max_body_bytes)
        calls = InferenceApi(settings.model_name, limits, not_ready, metrics)
        workflows_api = WorkflowsApi(partial(fetch_workflow, store=objects), not_ready)
        served = Served(
            settings.model_name, str(settings.model), settings.max_num_seqs, settings.http_max_calls
        )
        models = ModelsApi(served, not_ready, lambda: calls.num_calls)
        apis = Apis(adapters=api, calls=calls, workflows=workflows_api, models=models, metrics=metrics)
        await stack.enter_async_context(_listening(settings, registry, not_ready, apis))
        queue_side = await stack.enter_async_context(open_queue_side(settings, clients))
        mirror = await stack.enter_async_context(open_mirror_of(settings))
        owned = await stack.enter_async_context(_owned_tasks())
        foundation = Foundation(
            settings, objects, registry, exporter, owned, calls, workflows_api, models, only_workflows
        )
        custom = await custom_handler(settings, objects, properties)
        if custom is None:
            answerer = await engine_side(foundation, stack, mirror)
        else:
            answerer = await handler_side(foundation, stack, mirror, custom)
        rows, api.registry = answerer.rows, answerer.registry
        if signals.stop.is_set():
            return
        intake = None if queue_side is None else queue_side.intake(rows, objects, metrics)

        def export() -> None:
            if queue_side is not None:
                exporter.leases(queue_side.keeper.stats, queue_side.keeper.lag)
            answerer.export()
            metrics.rows_in_flight.set(rows.in_flight)

        if queue_side is not None:
            owned.add(asyncio.create_task(queue_side.keeper.wait(), name="leases"))
        idleness = _watch_idleness(intake, calls, settings.exit_when_idle_seconds, signals.stop)
        owned |= {
            asyncio.create_task(_awaited(answerer.wait), name="engine"),
            asyncio.create_task(_export(export), name="export"),
            asyncio.create_task(idleness, name="idleness"),
        }
        loaded.set()
        metrics.ready.set_function(lambda: 0 if not_ready() else 1)
        logger.info("ready", extra={"queue": settings.queue_url})
        await _serve(intake, calls, owned, signals, settings.drain_timeout_seconds)


def _tell(found: Iterable[str]) -> None:
    for note in found:
        logger.warning(note)


async def _serve(
    intake: Intake | None,
    calls: InferenceApi,
    owned: set[asyncio.Task[None]],
    signals: "_Signals",
    drain_timeout_seconds: float,
) -> None:
    """Answer calls and take messages until told to stop, or until something that must live died; then drain.

    Raises what it died of.
    """
    taking = signals.stop.wait() if intake is None else intake.run(signals.stop)
    polling: asyncio.Task[object] = asyncio.create_task(taking, name="intake")
    stopping = asyncio.create_task(signals.stop.wait(), name="stop")
    hurrying = asyncio.create_task(signals.hurry.wait(), name="hurry")
    try:
        ended, _ = await asyncio.wait({polling, stopping, *owned}, return_when=asyncio.FIRST_COMPLETED)
        broken = [task for task in ended if task.exception() is not None]
        signals.stop.set()
        logger.info("draining", extra={"timeout_seconds": drain_timeout_seconds})
        drained = await _drain(intake, calls, 0 if broken else drain_timeout_seconds, signals.hurry)
        # The poll under way may still bring messages, which go back at once.
        await asyncio.wait({polling, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        # In a hurry too: what was just given back may have come in by our own poll.
        await asyncio.wait({polling}, timeout=_LAST_POLL_SECONDS)
        logger.info("stopped", extra={"drained": drained})
        for task in broken:
            task.result()
        if polling.done():
            polling.result()
    finally:
        for task in (polling, stopping, hurrying):
            task.cancel()
        await asyncio.gather(polling, stopping, hurrying, return_exceptions=True)


async def _drain(
    intake: Intake | None, calls: InferenceApi, timeout_seconds: float, hurry: asyncio.Event
) -> bool:
    """Wait for what is at work; returns whether all of it ended by itself."""

    async def drained_calls() -> bool:
        ends = {asyncio.create_task(calls.idle()), asyncio.create_task(hurry.wait())}
        await asyncio.wait(ends, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        return not calls.num_calls

    async def drained_messages() -> bool:
        return intake is None or await intake.drain(timeout_seconds, hurry)

    return all(await asyncio.gather(drained_messages(), drained_calls()))


async def _awaited(wait: Callable[[], Awaitable[None]]) -> None:
    await wait()


@asynccontextmanager
async def _owned_tasks() -> AsyncIterator[set[asyncio.Task[None]]]:
    """Tasks that must live as long as the worker; they end with the block."""
    tasks: set[asyncio.Task[None]] = set()
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Signals:
    """The first SIGTERM or SIGINT means stop, the second means at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


@asynccontextmanager
async def _clients(settings: Settings) -> AsyncIterator[Clients]:
    """Not opened for a worker that has nothing to do with AWS: it needs no region then, nor credentials."""
    clients = Clients()
    places = (settings.queue_url, settings.model_uri, settings.weights, *settings.workflows)
    if not any(place is not None and place.startswith(("http", "s3://")) for place in places):
        yield clients
        return
    async with clients:
        yield clients


@asynccontextmanager
async def _listening(
    settings: Settings, registry: CollectorRegistry, not_ready: Callable[[], str | None], apis: Apis
) -> AsyncIterator[None]:
    host, port, token = settings.http_host, settings.http_port, settings.http_token
    async with serving(host, port, registry, not_ready, token=token, apis=apis) as bound:
        logger.info("listening", extra={"host": host, "port": bound})
        yield


async def _export(bring_up_to_date: Callable[[], None]) -> None:
    """Bring the metrics up to date, for ever."""
    while True:
        bring_up_to_date()
        await asyncio.sleep(_EXPORT_SECONDS)


async def _watch_idleness(
    intake: Intake | None, calls: InferenceApi, seconds: float | None, stop: asyncio.Event
) -> None:
    """Set `stop` once there has been nothing to do for `seconds`; never, when that is None."""
    if seconds is None:
        await stop.wait()
        return

    def idle_seconds() -> float:
        idle = calls.idle_seconds
        return idle if intake is None else min(idle, intake.idle_seconds)

    while (left := seconds - idle_seconds()) > 0:  # noqa: ASYNC110 (what is waited for is time)
        await asyncio.sleep(min(1.0, left))
    logger.info("idle", extra={"seconds": seconds})
    stop.set()
