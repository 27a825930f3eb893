"""What answers rows: the base model and its adapters in the worker's own engine, or a custom handler."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from adapters_sync.inventory import Limits
from adapters_sync.layout import BaseModel as AdapterBase
from adapters_sync.layout import MirrorPaths, write_base_model
from adapters_sync.metrics import SyncMetrics
from adapters_sync.options import MirrorOptions
from adapters_sync.reconcile import Mirror, open_mirror
from worker.adapters.directory import AdapterDirectory
from worker.adapters.places import reading
from worker.adapters.registry import AdapterRegistry
from worker.adapters.shelf import VersionShelf
from worker.bridge import Bridge
from worker.core import Core, build_core, flow_of
from worker.custom.adapters import HandlerAdapters
from worker.custom.formatters import Formatters
from worker.custom.handler import CustomHandler
from worker.custom.opening import find_entry_point, make_handler, open_formatters, warn_of_code
from worker.custom.rows import HandlerRows
from worker.delivery.flow import FlowControl
from worker.delivery.rows import RowRunner
from worker.engine.adapter import Target
from worker.engine.base_model import load_outline, resolve_device
from worker.engine.discovery import foresee
from worker.errors import LoramillError, SettingsError
from worker.http.adapters_api import Registry
from worker.http.formatting import BodyFormatting
from worker.http.generation import CallLimits, Generation
from worker.http.handler_api import HandlerApi
from worker.http.inference_api import InferenceApi
from worker.http.models_api import ModelsApi
from worker.http.workflows_api import WorkflowsApi
from worker.model_source import fetch_model_folder, fetch_weights, local_properties
from worker.settings import Settings, handler_options
from worker.stats import Exporter
from worker.transport.store import S3Store
from worker.transport.tree import MARKER
from worker.workflows.files import fetch_workflow
from worker.workflows.registry import Workflows

logger = logging.getLogger(__name__)


class Side(NamedTuple):
    """What answers rows."""

    rows: RowRunner
    registry: Registry | None
    """None when no adapters are served."""
    wait: Callable[[], Awaitable[None]]
    """Raises when it can serve no more."""
    export: Callable[[], None]


class Place(NamedTuple):
    """Where a side is set up: what is there before it, and outlives it."""

    settings: Settings
    objects: S3Store
    registry: CollectorRegistry
    exporter: Exporter
    owned: set[asyncio.Task[None]]
    """Tasks that must live as long as the worker."""
    calls: InferenceApi
    chains: WorkflowsApi
    models: ModelsApi
    only_workflows: bool
    """Whether nobody named the model itself."""


async def engine_side(place: Place, stack: AsyncExitStack, mirror: Mirror | None) -> Side:
    """The base model and its adapters, in the worker's own engine."""
    settings, objects = place.settings, place.objects
    weights = await fetch_weights(settings, objects, _logging_bytes())
    formatters = await _formatters(place, stack, weights)
    if mirror is not None:
        # The first pass has to know what adapters must fit. It is at work while the weights are loaded.
        await asyncio.to_thread(_tell_mirrors_beforehand, settings, weights)
        place.owned.add(_mirroring(mirror, SyncMetrics(place.registry), asyncio.Event()))
    if not settings.custom_code:
        await asyncio.to_thread(find_entry_point, settings, settings.model_dir or Path(weights))  # says so
    core = await stack.enter_async_context(_core(settings, weights))
    await asyncio.to_thread(_tell_mirrors, settings, core.targets)
    bridge = await stack.enter_async_context(
        Bridge(
            core.engine,
            core.store,
            place.exporter.step,
            on_row=place.exporter.row,
            max_passed_over=settings.max_passed_over,
        )
    )
    registered = await _registered(settings, bridge, place.owned, formatters)
    place.chains.workflows = workflows = await _workflows(settings, registered, objects)
    if place.only_workflows and len(workflows.of_settings) == 1:
        (place.calls.plain,) = workflows.of_settings
    place.calls.workflows = place.models.workflows = workflows
    adapters = AdapterDirectory(
        settings.adapters_path if settings.lora_enabled else None,
        settings.adapter_wait_seconds,
        on_missing=mirror.wake if mirror is not None else lambda: None,
        registered=registered.find if registered is not None else lambda _: None,
    )
    rows = RowRunner(
        bridge,
        core.base.tokenizer,
        adapters,
        flow_of(settings, core),
        own_tokenizer=core.tokenizers.of,
        workflow=workflows.find,
        formatters=formatters,
    )
    if registered is not None:
        place.calls.adapters = registered.names
    formatting = None if formatters is None else BodyFormatting(formatters, adapters)
    place.calls.generation = _generation(settings, rows, workflows, formatting)

    def export() -> None:
        place.exporter.store(core.store.stats())
        place.exporter.waiting(adapters.num_waiting, bridge.num_waiting_for_room)
        if formatters is not None:
            place.exporter.handler(formatters.num_restarts)

    return Side(rows, registered, bridge.wait, export)


async def _formatters(place: Place, stack: AsyncExitStack, weights: str) -> Formatters | None:
    """What rows go through beside the engine, ready."""
    folder = None
    if place.settings.custom_code:
        folder = await fetch_model_folder(place.settings, place.objects, _logging_bytes())
    opened = open_formatters(place.settings, folder, weights=weights, environ=os.environ)
    formatters = await stack.enter_async_context(opened)
    if formatters is not None:
        place.owned.add(asyncio.create_task(formatters.wait(), name="formatters"))
    return formatters


@asynccontextmanager
async def _core(settings: Settings, weights: str) -> AsyncIterator[Core]:
    core = await asyncio.to_thread(build_core, settings, weights)
    try:
        yield core
    finally:
        await asyncio.to_thread(core.close)


async def custom_handler(
    settings: Settings, objects: S3Store, properties: str | None
) -> CustomHandler | None:
    """The handler that comes with the model, not started yet; None when the engine serves."""
    if not settings.custom_code:
        return None
    folder = await fetch_model_folder(settings, objects, _logging_bytes())
    text = properties if properties is not None else local_properties(settings)
    function = handler_options(os.environ, text).get("handler", "handle")
    entry_point = await asyncio.to_thread(find_entry_point, settings, folder, function)
    if entry_point is None or folder is None:
        return None
    device = await asyncio.to_thread(resolve_device, settings.device)
    return make_handler(
        settings,
        folder,
        entry_point,
        model_id=await fetch_weights(settings, objects, _logging_bytes()) if settings.model_id else None,
        device_id="-1" if device.type == "cpu" else str(device.index or 0),
        environ=os.environ,
        properties=text,
    )


async def handler_side(
    place: Place, stack: AsyncExitStack, mirror: Mirror | None, custom: CustomHandler
) -> Side:
    """A custom handler in the engine's place."""
    settings = place.settings
    if settings.workflows:
        raise SettingsError(["workflows: a custom handler answers, and has none; leave it unset"])
    place.chains.refusal = "A custom handler answers, and has no workflows"
    if mirror is not None:
        place.owned.add(_mirroring(mirror, SyncMetrics(place.registry), asyncio.Event()))

    async def fetch(uri: str, folder: Path) -> str:
        with reading(f"src is {uri!r}"):
            await place.objects.download_tree(uri.rstrip("/") + "/", folder)
        return (folder / MARKER).read_text(encoding="ascii").strip()

    await stack.enter_async_context(custom)
    adapters, registered = None, settings.registered_path
    if settings.lora_enabled and settings.adapters_path is not None and registered is not None:
        adapters = HandlerAdapters(custom, settings.adapters_path, registered, fetch)
        await adapters.start()
        place.owned.add(asyncio.create_task(adapters.run(), name="handler-adapters"))
    flow = FlowControl(
        max_rows=settings.in_flight_rows,
        max_tokens=settings.in_flight_rows,  # no row of a handler's counts any
        max_bytes=settings.max_in_flight_bytes,
    )
    rows = HandlerRows(custom, adapters, flow)
    place.calls.handler = HandlerApi(custom, settings.http_max_body_bytes)
    return Side(rows, adapters, custom.wait, lambda: place.exporter.handler(custom.num_restarts))


@asynccontextmanager
async def open_mirror_of(settings: Settings) -> AsyncIterator[Mirror | None]:
    """The mirror inside the worker, if settings ask for it."""
    if not settings.sync:
        yield None
        return
    if settings.mirror_uri is None or settings.adapters_path is None:
        raise SettingsError(["adapters_uri: sync is on and there is nothing to mirror; give --adapters-uri"])
    options = MirrorOptions(
        interval_seconds=settings.sync_interval_seconds,
        settle_seconds=settings.settle_seconds,
        limits=Limits(rank=settings.max_lora_rank, code=settings.custom_code),
    )
    opened = open_mirror(
        settings.mirror_uri, settings.adapters_path, options, settings.adapters_events_queue_url
    )
    async with opened as mirror:
        yield mirror


def _mirroring(mirror: Mirror, metrics: SyncMetrics, stop: asyncio.Event) -> asyncio.Task[None]:
    return asyncio.create_task(mirror.run(stop, metrics.observe, metrics.count_event), name="mirror")


async def _registered(
    settings: Settings, bridge: Bridge, owned: set[asyncio.Task[None]], formatters: Formatters | None
) -> AdapterRegistry | None:
    """What was registered over HTTP, loaded again; None when no adapters are served."""
    folder, place = settings.adapters_path, settings.registered_path
    if not settings.lora_enabled or folder is None or place is None:
        return None
    limits = Limits(rank=settings.max_lora_rank, code=formatters is not None)
    shelf = VersionShelf(place, mirrored=folder, limits=limits)
    if formatters is None:
        await asyncio.to_thread(warn_of_code, folder)
    registry = AdapterRegistry(folder, shelf, bridge, formatters)
    await registry.start()
    owned.add(asyncio.create_task(registry.run(), name="registry"))
    return registry


async def _workflows(settings: Settings, adapters: AdapterRegistry | None, store: S3Store) -> Workflows:
    """Those that were registered before, and those of the settings.

    Raises LoramillError for one of the settings that cannot be served.
    """
    urls = {url for url in (settings.model, settings.model_id) if url is not None}
    place = settings.registered_path
    folder = None if place is None else place.parent / "workflows"
    workflows = Workflows(adapters, urls, settings.model_names, folder)
    await workflows.start()
    for url in settings.workflows:
        try:
            await workflows.serve(await fetch_workflow(url, store))
        except LoramillError as error:
            raise LoramillError(f"workflows: {url}: {error}") from error
    return workflows


def _generation(
    settings: Settings, rows: RowRunner, workflows: Workflows, formatting: BodyFormatting | None
) -> Generation:
    """The base model and its adapters, as what can be called."""
    limits = CallLimits(settings.http_max_rows, settings.http_timeout_seconds)
    return Generation(rows.answer, limits, settings.model_names, workflows.knows, formatting)


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
        modules={
            name: (one.in_features, one.out_features)
            for name, one in targets.items()
            if not one.refused and not one.is_embedding
        },
        refused={name: one.refused for name, one in targets.items() if one.refused},
        max_lora_rank=settings.max_lora_rank,
        vocabularies={
            name: (one.num_tokens, one.in_features if one.is_head else one.out_features)
            for name, one in targets.items()
            if one.has_tokens and not one.fixed
        },
        lora_extra_vocab_size=settings.lora_extra_vocab_size,
    )
    try:
        if settings.sync:
            place.mkdir(parents=True, exist_ok=True)  # no pass has made it before the first
        if os.access(place, os.W_OK):  # else no mirror writes there either
            write_base_model(paths, told)
    except OSError as error:
        logger.warning("cannot tell mirrors what adapters must fit", extra={"reason": str(error)})


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
