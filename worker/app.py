"""The worker, wired: what is built from what, and the order in which it all comes up and down."""

import asyncio
import importlib.metadata
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
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
from worker.commit import Committer, Provenance
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
from worker.http.server import serving
from worker.intake import POLL_SECONDS, Intake
from worker.metrics import Metrics
from worker.model_source import fetch_weights, remote_properties
from worker.registry import AdapterRegistry
from worker.rows import RowRunner
from worker.runner import JobLimits, Runner
from worker.settings import Settings, notes
from worker.shelf import VersionShelf
from worker.splitter import Splitter
from worker.stats import Exporter
from worker.transport.clients import Clients
from worker.transport.lease import LeaseKeeper
from worker.transport.queue import QueueInfo, SqsQueue
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
    close: Callable[[], None] = lambda: None
    """Ends what runs beside this process; when nothing is computed any more."""


async def run_worker(settings: Settings, reread: Callable[[str], Settings]) -> None:
    """Serve until SIGTERM or SIGINT, or until idle for `exit_when_idle_seconds`, then drain.

    `reread` gives the settings anew with the text of the serving.properties that was found beside a model
    in S3. Raises LoramillError when the worker cannot start, or broke: its leases are given back first.
    """
    signals = _Signals()
    async with AsyncExitStack() as stack:
        clients = await stack.enter_async_context(Clients())
        objects = S3Store(clients)
        properties = await remote_properties(settings, objects)
        if properties is not None:
            settings = reread(properties)
        for note in notes(settings, properties):
            logger.warning(note)

        registry = CollectorRegistry()
        metrics = Metrics(registry)
        exporter = Exporter(metrics, settings.metrics_adapters)
        loaded = asyncio.Event()

        def not_ready() -> str | None:
            if signals.stop.is_set():
                return "draining"
            return None if loaded.is_set() else "loading the model"

        api = AdaptersApi(settings.model_name, settings.lora_enabled, not_ready)
        host, port, token = settings.http_host, settings.http_port, settings.http_token
        port = await stack.enter_async_context(serving(host, port, registry, not_ready, token=token, api=api))
        logger.info("listening", extra={"host": host, "port": port})

        assert settings.queue_url is not None
        queue = SqsQueue(clients, settings.queue_url, visibility_seconds=settings.visibility_timeout_seconds)
        info = await queue.describe()
        _warn_about(info, settings)
        mirror = await stack.enter_async_context(_mirror(settings))
        owned = await stack.enter_async_context(_owned_tasks())
        weights = await fetch_weights(settings, objects, _logging_bytes())
        if mirror is not None:
            # The first pass has to know what adapters must fit. It is at work while the weights are loaded.
            await asyncio.to_thread(_tell_mirrors_beforehand, settings, weights)
            owned.add(_mirroring(mirror, SyncMetrics(registry), asyncio.Event()))
        core = await stack.enter_async_context(_core(settings, weights))
        await asyncio.to_thread(_tell_mirrors, settings, core.targets)
        if signals.stop.is_set():
            return

        keeper = await stack.enter_async_context(LeaseKeeper(queue, settings.visibility_timeout_seconds))
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
        runner = _runner(settings, info, rows, objects, queue, metrics=metrics)
        intake = Intake(
            queue,
            keeper,
            runner,
            metrics,
            room=lambda: rows.room,
            mean_rows=lambda: rows.mean_rows,
            max_messages=settings.in_flight_rows,
            poll_seconds=max(1.0, min(POLL_SECONDS, settings.exit_when_idle_seconds or POLL_SECONDS)),
        )

        def export() -> None:
            exporter.leases(keeper.stats, keeper.lag)
            exporter.store(core.store.stats())
            exporter.waiting(adapters.num_waiting, bridge.num_waiting_for_room)
            metrics.rows_in_flight.set(rows.in_flight)

        idleness = _watch_idleness(intake, settings.exit_when_idle_seconds, signals.stop)
        owned |= {
            asyncio.create_task(bridge.wait(), name="engine"),
            asyncio.create_task(keeper.wait(), name="leases"),
            asyncio.create_task(_export(export), name="export"),
            asyncio.create_task(idleness, name="idleness"),
        }
        loaded.set()
        metrics.ready.set_function(lambda: 0 if not_ready() else 1)
        logger.info("ready", extra={"queue": settings.queue_url})
        await _serve(intake, owned, signals, settings.drain_timeout_seconds)


@asynccontextmanager
async def _core(settings: Settings, weights: str) -> AsyncIterator[Core]:
    core = await asyncio.to_thread(build_core, settings, weights)
    try:
        yield core
    finally:
        await asyncio.to_thread(core.close)


def build_core(settings: Settings, weights: str) -> Core:
    """Load the base model from folder (or hub id) `weights` and put an engine on it. Blocking; minutes."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # logs are lines
    device = resolve_device(settings.device)
    build = _build_alone if settings.tensor_parallel_degree == 1 else _build_with_others
    base, runner = build(settings, weights, device)
    dtype = _lora_dtype(settings, base)
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
    tokens = shape.num_blocks * shape.block_size
    return Core(base, engine, store, runner.targets, tokens, runner.close)


def _build_alone(settings: Settings, weights: str, device: torch.device) -> tuple[BaseModel, ModelRunner]:
    base = load_base_model(
        weights,
        device=device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        trust_remote_code=settings.trust_remote_code,
    )
    dtype = _lora_dtype(settings, base)
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
    return base, runner


def _build_with_others(
    settings: Settings, weights: str, device: torch.device
) -> tuple[BaseModel, ModelRunner]:
    """On several devices, each of which has a process."""
    from worker.engine.parallel.orders import Setup  # noqa: PLC0415 (few need torch.distributed)
    from worker.engine.parallel.start import start  # noqa: PLC0415

    setup = Setup(
        weights=weights,
        degree=settings.tensor_parallel_degree,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        trust_remote_code=settings.trust_remote_code,
        fully_sharded=settings.fully_sharded_loras,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        lora_dtype=settings.lora_dtype,
        memory_share=settings.memory_share,
    )
    on_gpu = device.type == "cuda"
    return start(
        setup,
        tuner=_tuner(settings, device) if settings.lora_enabled and on_gpu else None,
        measure=measure_costs if settings.lora_enabled and not on_gpu else None,
    )


def _lora_dtype(settings: Settings, base: BaseModel) -> torch.dtype:
    if settings.lora_dtype == "auto":
        return product_dtype(base.dtype, base.device)
    dtype: torch.dtype = getattr(torch, settings.lora_dtype)
    return dtype


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


async def _serve(
    intake: Intake, owned: set[asyncio.Task[None]], signals: "_Signals", drain_timeout_seconds: float
) -> None:
    """Take messages until told to stop, or until something that must live has died; then drain.

    Raises what it died of.
    """
    polling = asyncio.create_task(intake.run(signals.stop), name="intake")
    stopping = asyncio.create_task(signals.stop.wait(), name="stop")
    hurrying = asyncio.create_task(signals.hurry.wait(), name="hurry")
    try:
        ended, _ = await asyncio.wait({polling, stopping, *owned}, return_when=asyncio.FIRST_COMPLETED)
        broken = [task for task in ended if task.exception() is not None]
        signals.stop.set()
        logger.info("draining", extra={"timeout_seconds": drain_timeout_seconds})
        drained = await intake.drain(0 if broken else drain_timeout_seconds, signals.hurry)
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


def _warn_about(info: QueueInfo, settings: Settings) -> None:
    """Say at the start what about the queue will hurt later."""
    if info.max_receive_count is None:
        logger.warning("the queue has no redrive policy: a message that always fails comes back for ever")
    elif settings.dead_letter == "store" and settings.dead_letter_prefix is None:
        logger.warning("dead_letter is store, and there is no place to store: set dead_letter_uri")


def flow_of(settings: Settings, core: Core) -> FlowControl:
    """How much of the rows an engine may have at work."""
    return FlowControl(
        max_rows=settings.in_flight_rows,
        max_tokens=settings.max_in_flight_tokens or core.cache_tokens * _CACHES_AHEAD,
        max_bytes=settings.max_in_flight_bytes,
    )


def _runner(
    settings: Settings,
    info: QueueInfo,
    rows: RowRunner,
    objects: S3Store,
    queue: SqsQueue,
    *,
    metrics: Metrics,
) -> Runner:
    committer = Committer(objects, provenance(settings))
    splitter = Splitter(objects, committer, queue, rows_per_part=settings.rows_per_part)
    return Runner(_limits(settings, info), rows, committer, splitter, metrics, store=objects)


def _limits(settings: Settings, info: QueueInfo) -> JobLimits:
    return JobLimits(
        output_prefixes=settings.output_prefixes,
        max_rows_per_job=settings.max_rows_per_job,
        dead_letter_prefix=settings.dead_letter_prefix if settings.dead_letter == "store" else None,
        max_receive_count=info.max_receive_count,
        # `enqueue` puts files where their results go.
        input_prefixes=settings.input_prefixes and settings.input_prefixes + settings.output_prefixes,
    )


def provenance(settings: Settings) -> Provenance:
    """What this process says of itself in manifests."""
    return Provenance(
        worker=f"{socket.gethostname()}-{os.getpid()}",
        base_model=str(settings.model),
        software_version=f"loramill {importlib.metadata.version('loramill')}",
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


async def _watch_idleness(intake: Intake, seconds: float | None, stop: asyncio.Event) -> None:
    """Set `stop` once the queue has been empty for `seconds`; never, when that is None."""
    if seconds is None:
        await stop.wait()
        return
    while (left := seconds - intake.idle_seconds) > 0:  # noqa: ASYNC110 (what is waited for is time)
        await asyncio.sleep(min(1.0, left))
    logger.info("idle", extra={"seconds": seconds})
    stop.set()
