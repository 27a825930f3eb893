"""Rows and calls are answered by a custom handler, in the engine's place."""

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path

from adapters_sync.reconcile import Mirror
from worker.adapters.places import reading
from worker.answerer import Answerer, Foundation
from worker.custom.adapters import HandlerAdapters
from worker.custom.handler import CustomHandler
from worker.custom.opening import find_entry_point, make_handler
from worker.custom.rows import HandlerRows
from worker.delivery.flow import FlowControl
from worker.engine.base_model import resolve_device
from worker.http.handler_api import HandlerApi
from worker.model_source import fetch_model_folder, fetch_weights, local_properties, logging_bytes
from worker.own_mirror import follow
from worker.settings import Settings, handler_options
from worker.transport.store import S3Store
from worker.transport.tree import MARKER


async def custom_handler(
    settings: Settings, objects: S3Store, properties: str | None
) -> CustomHandler | None:
    """The handler that comes with the model, not started yet; None when the engine serves."""
    if not settings.custom_code:
        return None
    folder = await fetch_model_folder(settings, objects, logging_bytes())
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
        model_id=await fetch_weights(settings, objects, logging_bytes()) if settings.model_id else None,
        device_id="-1" if device.type == "cpu" else str(device.index or 0),
        environ=os.environ,
        properties=text,
    )


async def handler_side(
    foundation: Foundation, stack: AsyncExitStack, mirror: Mirror | None, custom: CustomHandler
) -> Answerer:
    """A custom handler in the engine's foundation."""
    settings = foundation.settings
    if mirror is not None:
        foundation.owned.add(follow(mirror, foundation.registry))

    async def fetch(uri: str, folder: Path) -> str:
        with reading(f"src is {uri!r}"):
            await foundation.objects.download_tree(uri.rstrip("/") + "/", folder)
        return (folder / MARKER).read_text(encoding="ascii").strip()

    await stack.enter_async_context(custom)
    adapters, registered = None, settings.registered_path
    if settings.lora_enabled and settings.adapters_path is not None and registered is not None:
        adapters = HandlerAdapters(custom, settings.adapters_path, registered, fetch)
        await adapters.start()
        foundation.owned.add(asyncio.create_task(adapters.run(), name="handler-adapters"))
    flow = FlowControl(
        max_rows=settings.in_flight_rows,
        max_tokens=settings.in_flight_rows,  # no row of a handler's counts any
        max_bytes=settings.max_in_flight_bytes,
    )
    workflows = await foundation.open_workflows(adapters, bare=True)
    rows = HandlerRows(custom, adapters, flow, workflow=workflows.find)
    foundation.calls.handler = HandlerApi(custom, settings.http_max_body_bytes)
    return Answerer(rows, adapters, custom.wait, lambda: foundation.exporter.handler(custom.num_restarts))
