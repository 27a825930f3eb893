"""Rows are answered by the base model and its adapters, in the worker's own engine."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

from adapters_sync.inventory import Limits
from adapters_sync.reconcile import Mirror
from worker.adapters.directory import AdapterDirectory
from worker.adapters.registry import AdapterRegistry
from worker.adapters.shelf import VersionShelf
from worker.answerer import Answerer, Foundation
from worker.bridge import Bridge
from worker.core import Core, build_core, flow_of
from worker.custom.formatters import Formatters
from worker.custom.opening import find_entry_point, open_formatters, warn_of_code
from worker.delivery.rows import EngineRows
from worker.http.formatting import BodyFormatting
from worker.http.generation import CallLimits, Generation
from worker.model_source import fetch_model_folder, fetch_weights, logging_bytes
from worker.own_mirror import follow
from worker.settings import Settings
from worker.tell_mirrors import tell_mirrors, tell_mirrors_beforehand
from worker.workflows.registry import Workflows


async def engine_side(foundation: Foundation, stack: AsyncExitStack, mirror: Mirror | None) -> Answerer:
    """The base model and its adapters, in the worker's own engine."""
    settings, objects = foundation.settings, foundation.objects
    weights = await fetch_weights(settings, objects, logging_bytes())
    formatters = await _formatters(foundation, stack, weights)
    if mirror is not None:
        # The first pass has to know what adapters must fit. It is at work while the weights are loaded.
        await asyncio.to_thread(tell_mirrors_beforehand, settings, weights)
        foundation.owned.add(follow(mirror, foundation.registry))
    if not settings.custom_code:
        await asyncio.to_thread(find_entry_point, settings, settings.model_dir or Path(weights))  # says so
    core = await stack.enter_async_context(_core(settings, weights))
    await asyncio.to_thread(tell_mirrors, settings, core.targets)
    outlasting = stack.enter_context(ExitStack())  # the bridge: its end is what late calls should be told of
    bridge = await stack.enter_async_context(
        Bridge(
            core.engine,
            core.store,
            foundation.exporter.step,
            on_row=foundation.exporter.row,
            max_passed_over=settings.max_passed_over,
        )
    )
    registered = await _registered(settings, bridge, foundation.owned, formatters)
    workflows = await foundation.open_workflows(registered)
    adapters = AdapterDirectory(
        settings.adapters_path if settings.lora_enabled else None,
        settings.adapter_wait_seconds,
        on_missing=mirror.wake if mirror is not None else lambda: None,
        registered=registered.find if registered is not None else lambda _: None,
    )
    rows = EngineRows(
        bridge,
        core.base.tokenizer,
        adapters,
        flow_of(settings, core),
        own_tokenizer=core.tokenizers.of,
        workflow=workflows.find,
        formatters=formatters,
    )
    outlasting.callback(rows.close)
    if registered is not None:
        foundation.calls.adapters = registered.names
    formatting = None if formatters is None else BodyFormatting(formatters, adapters)
    foundation.calls.generation = _generation(settings, rows, workflows, formatting)

    def export() -> None:
        foundation.exporter.store(core.store.stats())
        foundation.exporter.waiting(adapters.num_waiting, bridge.num_waiting_for_room)
        if formatters is not None:
            foundation.exporter.handler(formatters.num_restarts)

    return Answerer(rows, registered, bridge.wait, export)


async def _formatters(foundation: Foundation, stack: AsyncExitStack, weights: str) -> Formatters | None:
    """What rows go through beside the engine, ready."""
    folder = None
    if foundation.settings.custom_code:
        folder = await fetch_model_folder(foundation.settings, foundation.objects, logging_bytes())
    opened = open_formatters(foundation.settings, folder, weights=weights, environ=os.environ)
    formatters = await stack.enter_async_context(opened)
    if formatters is not None:
        foundation.owned.add(asyncio.create_task(formatters.wait(), name="formatters"))
    return formatters


@asynccontextmanager
async def _core(settings: Settings, weights: str) -> AsyncIterator[Core]:
    core = await asyncio.to_thread(build_core, settings, weights)
    try:
        yield core
    finally:
        await asyncio.to_thread(core.close)


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
    registry = AdapterRegistry(folder, shelf, bridge, formatters, max_rank=settings.max_lora_rank)
    await registry.start()
    owned.add(asyncio.create_task(registry.run(), name="registry"))
    return registry


def _generation(
    settings: Settings, rows: EngineRows, workflows: Workflows, formatting: BodyFormatting | None
) -> Generation:
    """The base model and its adapters, as what can be called."""
    limits = CallLimits(settings.http_max_rows, settings.http_timeout_seconds)
    return Generation(rows.answer, limits, settings.model_names, workflows.knows, formatting)
