"""The mirror inside the worker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from adapters_sync.inventory import Limits
from adapters_sync.metrics import SyncMetrics
from adapters_sync.options import MirrorOptions
from adapters_sync.reconcile import Mirror, open_mirror
from worker.errors import SettingsError
from worker.settings import Settings


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


def follow(mirror: Mirror, registry: CollectorRegistry) -> asyncio.Task[None]:
    """Have it mirror until the task is cancelled, and tell `registry` of it."""
    metrics, stop = SyncMetrics(registry), asyncio.Event()
    return asyncio.create_task(mirror.run(stop, metrics.observe, metrics.count_event), name="mirror")
