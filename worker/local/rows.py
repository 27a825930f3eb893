"""The rows of a file through the worker's engine, in this process."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, closing

import msgspec

from worker.adapters.directory import AdapterDirectory
from worker.bridge import Bridge
from worker.core import Core, flow_of
from worker.custom.opening import open_formatters
from worker.delivery.inputs import rows_of
from worker.delivery.row_runner import Hold
from worker.delivery.rows import EngineRows
from worker.jobs import Job, RowResult
from worker.local.input import LocalInput
from worker.model_source import local_weights
from worker.settings import Settings

_TELL_SECONDS = 0.5


async def run_rows(
    core: Core,
    settings: Settings,
    job: Job,
    source: LocalInput,
    *,
    emit: Callable[[RowResult], Awaitable[None]],
    on_left: Callable[[int], None],
) -> None:
    """Give `emit` a result for every row of the job, which is about `source`, in order.

    `on_left` is told now and then how many rows have no result yet; some that have may wait for their turn.
    Raises EngineFailed, InvalidInput when the file was changed, and what `emit` raises.
    """
    # Nobody uploads anything here: what is not there when a row comes is not waited for.
    adapters = AdapterDirectory(settings.adapters_path if settings.lora_enabled else None, wait_seconds=0)
    opened = open_formatters(
        settings, settings.model_dir, weights=local_weights(settings), environ=os.environ
    )
    bridging = Bridge(core.engine, core.store, max_passed_over=settings.max_passed_over)
    async with opened as formatters, bridging as bridge:
        runner = EngineRows(
            bridge,
            core.base.tokenizer,
            adapters,
            flow_of(settings, core),
            own_tokenizer=core.tokenizers.of,
            formatters=formatters,
        )
        given = msgspec.structs.replace(
            job.given, base_models=settings.model_names, keeps_raw=runner.keeps_raw
        )
        job = msgspec.structs.replace(job, given=given)
        with closing(runner), runner.hold() as hold:
            hold.take(job)
            async with _telling(hold, on_left), aclosing(rows_of(job, source)) as rows:
                await runner.run(hold, rows, lambda result: result, emit)


@asynccontextmanager
async def _telling(hold: Hold, on_left: Callable[[int], None]) -> AsyncIterator[None]:
    async def tell() -> None:
        while True:
            on_left(hold.left)
            await asyncio.sleep(_TELL_SECONDS)

    telling = asyncio.create_task(tell(), name="progress")
    try:
        yield
        on_left(hold.left)
    finally:
        telling.cancel()
