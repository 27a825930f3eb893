"""The worker, wired: what is built from what, and the order in which it all comes up and down."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import torch
import transformers
from prometheus_client import CollectorRegistry

from adapters_sync.inventory import Limits
from adapters_sync.layout import BaseModel as AdapterBase
from adapters_sync.layout import MirrorPaths, write_base_model
from adapters_sync.metrics import SyncMetrics
from adapters_sync.options import MirrorOptions
from adapters_sync.reconcile import Mirror, open_mirror
from worker.adapters import AdapterDirectory
from worker.bridge import Bridge
from worker.engine.adapter import Target
from worker.engine.adapter_loader import AdapterLoader
from worker.engine.base_model import BaseModel, load_base_model, load_outline, resolve_device
from worker.engine.discovery import foresee
from worker.engine.engine import Engine
from worker.engine.kernels.tilings import Tuner
from worker.engine.limits import EngineLimits
from worker.engine.lora_layers import measure_costs
from worker.engine.lora_store import LoRAStore
from worker.engine.model_runner import ModelRunner
from worker.engine.products import product_dtype
from worker.errors import SettingsError
from worker.flow import FlowControl
from worker.http.adapters_api import AdaptersApi
from worker.http.generation import CallLimits, Generation
from worker.http.inference_api import HttpLimits, InferenceApi
from worker.http.server import Apis, serving
from worker.intake import Intake
from worker.messages import open_messages
from worker.metrics import Metrics
from worker.model_source import fetch_weights, remote_properties
from worker.registry import AdapterRegistry
from worker.rows import RowRunner
from worker.runner import names_of
from worker.settings import Settings, notes
from worker.shelf import VersionShelf
from worker.stats import Exporter
from worker.transport.clients import Clients
from worker.transport.store import S3Store

logger = logging.getLogger(__name__)

_EXPORT_SECONDS = 1.0
_LAST_POLL_SECONDS = 2.0
_CACHES_AHEAD = 4
"""How often the tokens at work may fill the KV cache; few rows generate as much as they may."""


class Core(NamedTuple):
    """The part with torch in it."""

    base: BaseModel
    engine: Engine
    store: LoRAStore
    targets: Mapping[str, Target]
    """What adapters may name."""
    cache_tokens: int
    """That the KV cache has room for."""


async def run_worker(settings: Settings, reread: Callable[[str], Settings]) -> None:
    """Serve until SIGTERM or SIGINT, or until idle for `exit_when_idle_seconds`, then drain.

    `reread` gives the settings anew with the text of the serving.properties that was found beside a model
    in S3. Raises LoramillError when the worker cannot start, or broke: its leases are given back first.
    """
    signals = _Signals()
    async with AsyncExitStack() as stack:
        clients = await stack.enter_async_context(_clients(settings))
        objects = S3Store(clients)
        properties = await remote_properties(settings, objects)
        if properties is not None:
            settings = reread(properties)
        _tell(notes(settings, properties))
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
        apis = Apis(adapters=api, calls=calls, metrics=metrics)
        await stack.enter_async_context(_listening(settings, registry, not_ready, apis))
        messages = await stack.enter_async_context(open_messages(settings, clients))
        mirror = await stack.enter_async_context(_mirror(settings))
        owned = await stack.enter_async_context(_owned_tasks())
        weights = await fetch_weights(settings, objects, _logging_bytes())
        if mirror is not None:
            # The first pass has to know what adapters must fit. It is at work while the weights are loaded.
            await asyncio.to_thread(_tell_mirrors_beforehand, settings, weights)
            owned.add(_mirroring(mirror, SyncMetrics(registry), asyncio.Event()))
        core = await asyncio.to_thread(build_core, settings, weights)
        await asyncio.to_thread(_tell_mirrors, settings, core.targets)
        if signals.stop.is_set():
            return

        bridge = await stack.enter_async_context(
            Bridge(
                core.engine,
                core.store,
                exporter.step,
                on_row=exporter.row,
                max_passed_over=settings.max_passed_over,
            )
        )
        api.registry = registered = await _registered(settings, bridge, owned)
        adapters = AdapterDirectory(
            settings.adapters_path if settings.lora_enabled else None,
            settings.adapter_wait_seconds,
            on_missing=mirror.wake if mirror is not None else lambda: None,
            registered=registered.find if registered is not None else lambda _: None,
        )
        rows = RowRunner(bridge, core.base.tokenizer, adapters, flow_of(settings, core))
        _let_call(calls, settings, rows, registered)
        intake = None if messages is None else messages.intake(rows, objects, metrics)

        def export() -> None:
            if messages is not None:
                exporter.leases(messages.keeper.stats, messages.keeper.lag)
            exporter.store(core.store.stats())
            exporter.waiting(adapters.num_waiting, bridge.num_waiting_for_room)
            metrics.rows_in_flight.set(rows.in_flight)

        if messages is not None:
            owned.add(asyncio.create_task(messages.keeper.wait(), name="leases"))
        idleness = _watch_idleness(intake, calls, settings.exit_when_idle_seconds, signals.stop)
        owned |= {
            asyncio.create_task(bridge.wait(), name="engine"),
            asyncio.create_task(_export(export), name="export"),
            asyncio.create_task(idleness, name="idleness"),
        }
        loaded.set()
        metrics.ready.set_function(lambda: 0 if not_ready() else 1)
        logger.info("ready", extra={"queue": settings.queue_url})
        await _serve(intake, calls, owned, signals, settings.drain_timeout_seconds)


def build_core(settings: Settings, weights: str) -> Core:
    """Load the base model from folder (or hub id) `weights` and put an engine on it. Blocking; minutes."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # logs are lines
    device = resolve_device(settings.device)
    base = load_base_model(
        weights,
        device=device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        trust_remote_code=settings.trust_remote_code,
    )
    auto = settings.lora_dtype == "auto"
    dtype = product_dtype(base.dtype, device) if auto else getattr(torch, settings.lora_dtype)
    limits = EngineLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        lora_dtype=dtype,
    )
    costs = measure_costs(dtype) if settings.lora_enabled and device.type == "cpu" else None
    tuner = _tuner(settings, device) if settings.lora_enabled and device.type == "cuda" else None
    runner = ModelRunner(base, limits, memory_share=settings.memory_share, costs=costs, tuner=tuner)
    store = LoRAStore(
        AdapterLoader(
            runner.targets,
            max_lora_rank=settings.max_lora_rank,
            dtype=dtype,
            pin=device.type == "cuda",
        ),
        settings.cpu_loras,
        settings.max_cpu_lora_bytes,
    )
    engine = Engine(
        runner,
        base.tokenizer,
        store.weights,
        eos_token_ids=base.eos_token_ids,
        max_model_len=base.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_loras=settings.max_loras,
        prefix_reuse=settings.prefix_reuse,
        max_passed_over=settings.max_passed_over,
        look_ahead=device.type == "cuda",
    )
    logger.info(
        "model loaded",
        extra={
            "device": str(device),
            "dtype": str(base.dtype),
            "max_model_len": base.max_model_len,
            "cache_bytes": runner.cache_bytes,
        },
    )
    shape = runner.cache_shape
    return Core(base, engine, store, runner.targets, shape.num_blocks * shape.block_size)


def _tuner(settings: Settings, device: torch.device) -> Tuner:
    from worker.engine.kernels.tuning import CudaTimer, TimingTuner, device_file  # noqa: PLC0415 (needs Triton)

    file = device_file(settings.cache_path, device)
    return TimingTuner(CudaTimer(), settings.kernel_tuning_seconds, file)


def _tell_mirrors_beforehand(settings: Settings, weights: str) -> None:
    """As `_tell_mirrors`, from the configuration of the model in `weights` alone. Raises ModelError."""
    outline = load_outline(weights, trust_remote_code=settings.trust_remote_code)
    _tell_mirrors(settings, foresee(outline))


def _tell_mirrors(settings: Settings, targets: Mapping[str, Target]) -> None:
    """Leave word beside the adapters of what they must fit, for mirrors here and in other processes."""
    folder = settings.adapters_path if settings.lora_enabled else None
    if folder is None:
        return
    paths = MirrorPaths(folder.resolve())
    place = paths.base_model_file.parent
    told = AdapterBase(
        modules={n: (one.in_features, one.out_features) for n, one in targets.items() if not one.refused},
        refused={name: one.refused for name, one in targets.items() if one.refused},
        max_lora_rank=settings.max_lora_rank,
    )
    try:
        if settings.sync:
            place.mkdir(parents=True, exist_ok=True)  # no pass has made it before the first
        if os.access(place, os.W_OK):  # else no mirror writes there either
            write_base_model(paths, told)
    except OSError as error:
        logger.warning("cannot tell mirrors what adapters must fit", extra={"reason": str(error)})


def _let_call(
    calls: InferenceApi, settings: Settings, rows: RowRunner, registered: AdapterRegistry | None
) -> None:
    """The base model and its adapters can be called from now on."""
    limits = CallLimits(settings.http_max_rows, settings.http_timeout_seconds)
    names = sorted(names_of(str(settings.model)), key=len)  # the last part of it first
    if registered is not None:
        calls.adapters = registered.names
    calls.models[settings.model_name] = Generation(rows.answer, limits, names)


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
    places = (settings.queue_url, settings.model_uri, settings.weights)
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


@asynccontextmanager
async def _mirror(settings: Settings) -> AsyncIterator[Mirror | None]:
    """The mirror inside the worker, if settings ask for it."""
    if not settings.sync:
        yield None
        return
    if settings.mirror_uri is None or settings.adapters_path is None:
        raise SettingsError(["adapters_uri: sync is on and there is nothing to mirror; give --adapters-uri"])
    options = MirrorOptions(
        interval_seconds=settings.sync_interval_seconds,
        settle_seconds=settings.settle_seconds,
        limits=Limits(rank=settings.max_lora_rank),
    )
    opened = open_mirror(
        settings.mirror_uri, settings.adapters_path, options, settings.adapters_events_queue_url
    )
    async with opened as mirror:
        yield mirror


def _mirroring(mirror: Mirror, metrics: SyncMetrics, stop: asyncio.Event) -> asyncio.Task[None]:
    return asyncio.create_task(mirror.run(stop, metrics.observe, metrics.count_event), name="mirror")


async def _registered(
    settings: Settings, bridge: Bridge, owned: set[asyncio.Task[None]]
) -> AdapterRegistry | None:
    """What was registered over HTTP, loaded again; None when no adapters are served."""
    folder, place = settings.adapters_path, settings.registered_path
    if not settings.lora_enabled or folder is None or place is None:
        return None
    shelf = VersionShelf(place, mirrored=folder, limits=Limits(rank=settings.max_lora_rank))
    registry = AdapterRegistry(folder, shelf, bridge)
    await registry.start()
    owned.add(asyncio.create_task(registry.run(), name="registry"))
    return registry


def flow_of(settings: Settings, core: Core) -> FlowControl:
    """How much of the rows an engine may have at work."""
    return FlowControl(
        max_rows=settings.in_flight_rows,
        max_tokens=settings.max_in_flight_tokens or core.cache_tokens * _CACHES_AHEAD,
        max_bytes=settings.max_in_flight_bytes,
    )


def _logging_bytes() -> Callable[[int], None]:
    """Progress of a download, a line every 256 MiB."""
    step = 256 << 20
    fetched = 0

    def on_bytes(count: int) -> None:
        nonlocal fetched
        before, fetched = fetched // step, fetched + count
        if fetched // step > before:
            logger.info("downloading the model", extra={"bytes": fetched})

    return on_bytes


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
