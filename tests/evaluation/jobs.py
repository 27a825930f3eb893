"""Rows through the queue and back: as many jobs as they need, and one result line for each."""

import asyncio
import io
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from worker import wire
from worker.errors import LoramillError
from worker.jobs import Output
from worker.sender.client import Order, send_job, write_job
from worker.sender.follow import fetch_results
from worker.wire.enqueue import MAX_BODY_BYTES

MAX_ROWS = 10_000
_OTHER_BYTES = 8192
"""Room in a message for what is not its rows."""

Row = Mapping[str, Any]


class Jobs:
    """Sends rows for one adapter, None being the base model, and waits for what becomes of them."""

    def __init__(
        self,
        queue_url: str,
        output: str,
        adapter: str | None = None,
        *,
        max_rows: int = MAX_ROWS,
        wait_seconds: float = 3600,
    ) -> None:
        self.queue_url = queue_url
        self.output = Output(wire.as_folder(output))
        self.adapter = adapter
        self.max_rows = max_rows
        self.wait_seconds = wait_seconds
        self.sent = 0
        """Messages so far."""

    def run(self, task: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The result line of each row. Raises LoramillError for a job or a row that failed."""
        return asyncio.run(self._run(task, rows))

    async def _run(self, task: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        adapters = None if self.adapter is None else [self.adapter]
        order = Order(adapters=adapters, task=task, output=self.output)
        written = [write_job(own, order, f"evaluation-{uuid.uuid4()}") for own in split(rows, self.max_rows)]
        for job in written:
            await send_job(self.queue_url, job.body)
            self.sent += 1
        lines: list[dict[str, Any]] = []
        for job in written:
            found = io.BytesIO()
            await fetch_results(self.output.uri, job.job_id, self.wait_seconds, found, digest=job.digest)
            lines += map(json.loads, found.getvalue().splitlines())
        for row, line in zip(rows, lines, strict=True):
            if line["error"] is not None:
                raise LoramillError(f"{line['error']['code']}: {line['error']['message']} (row {row})")
        return lines


def split(
    rows: Iterable[Row], max_rows: int = MAX_ROWS, max_bytes: int = MAX_BODY_BYTES - _OTHER_BYTES
) -> Iterator[list[Row]]:
    """The rows in order, in as few messages as the limits of one allow."""
    own: list[Row] = []
    size = 0
    for row in rows:
        more = len(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()) + 1
        if own and (len(own) == max_rows or size + more > max_bytes):
            yield own
            own, size = [], 0
        own.append(row)
        size += more
    if own:
        yield own
