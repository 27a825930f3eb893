"""Result lines on their way to the store: few of them in memory, many of them in a file."""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from worker.jobs import Job, RowResult
from worker.transport.store import Store, StoredObject
from worker.wire.output import EncodedLine, LineWriter
from worker.wire.results import Tally

_BLOCK_BYTES = 1 << 20
JSONL = "application/jsonl"


class Spool:
    """The lines of one result file, in the order in which their results come: `with Spool(...) as spool`.

    Up to 1 MiB of them is in memory, the rest in a file without a name in `folder` (None is the system's
    folder for such), of which nothing is left when the process dies.
    """

    def __init__(self, job: Job, *, base_model: str, folder: Path | None = None) -> None:
        self._writer = LineWriter(job, base_model=base_model)
        self._folder = folder
        self._pending = bytearray()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def tally(self) -> Tally:
        """Of the lines so far."""
        return self._writer.tally

    def encode(self, result: RowResult) -> EncodedLine:
        """What `add` takes."""
        return self._writer.encode(result)

    async def add(self, line: EncodedLine) -> None:
        """One more line. Raises OSError when the disk takes no more."""
        self._writer.add(line)
        self._pending += line.encoded
        if len(self._pending) >= _BLOCK_BYTES:
            await asyncio.to_thread(self._write)

    async def put_if_absent(self, store: Store, uri: str, metadata: Mapping[str, str]) -> StoredObject:
        """Store all lines; raises as the store's methods of that name do."""
        if self._file is None:
            return await store.put_if_absent(uri, bytes(self._pending), JSONL, metadata)
        await asyncio.to_thread(self._write)
        return await store.put_file_if_absent(uri, self._file, JSONL, metadata)

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with the spool)
        self._file.write(self._pending)
        self._file.flush()
        self._pending.clear()
