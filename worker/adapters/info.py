"""What is told about an adapter: what was said about it, what is on the disk, what is in memory."""

import asyncio

import msgspec

from adapters_sync.layout import AdapterFolder
from worker.adapters.folder_view import Checks
from worker.adapters.registrations import Registration
from worker.adapters.residents import Loader, key_of
from worker.custom.formatters import Code


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter, as list and describe tell it."""

    name: str
    src: str
    preload: bool
    pin: bool
    options: dict[str, str]
    tier: str
    """gpu, cpu or disk: the fastest place that holds it."""
    version: str | None
    rank: int | None
    bytes: int | None
    """Of its weights in memory; None while they are not there."""
    requests: int | None
    """Rows that ended with this version since the worker began."""
    note: str | None = None
    """What somebody should know about it."""


class Teller:
    """Asks `loader` about adapters in memory, and the files about the rest; `code` has notes of its own."""

    def __init__(self, loader: Loader, code: Code, max_rank: int | None = None) -> None:
        self._loader = loader
        self._code = code
        self._checks = Checks(max_rank)

    async def tell(
        self, said: Registration, src: str, folder: AdapterFolder | None, note: str | None
    ) -> AdapterInfo:
        """All about one adapter. `folder` None is one whose version on the disk cannot be used."""
        details = None if folder is None else self._loader.details(key_of(folder))
        rank, fault = (None if details is None else details.rank), None
        if rank is None and folder is not None:
            rank, fault = await asyncio.to_thread(self._checks.of, folder)
        if note is None and folder is not None:
            note = await asyncio.to_thread(self._code.note, folder)
        return AdapterInfo(
            name=said.name,
            src=src,
            preload=said.preload,
            pin=said.pin,
            options=said.options,
            tier="disk" if folder is None else self._loader.tier(key_of(folder)),
            version=said.version if folder is None else folder.version,
            rank=rank,
            bytes=None if details is None else details.num_bytes,
            requests=None if folder is None else self._loader.requests(key_of(folder)),
            note=note or fault,
        )
