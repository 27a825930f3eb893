"""`loramill status`: what is known of a job, for people or for machines, once or until it has ended."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from worker import wire
from worker.jobs import Output
from worker.sender.progress import Observer, Progress, State
from worker.transport.clients import Clients
from worker.transport.store import S3Store

_LOOK_EVERY_SECONDS = 2.0


async def follow(output: str, job_id: str, *, watch: bool, as_json: bool) -> Progress:
    """Print how far a job is; with `watch` again and again until it has ended. Returns the last."""
    console = Console()
    async with Clients() as clients:
        observer = Observer(S3Store(clients), Output(wire.as_folder(output)), job_id)
        with _printer(console, live=watch and console.is_terminal, as_json=as_json) as show:
            while True:
                seen = await observer.look()
                show(seen)
                if not watch or seen.state is State.ENDED:
                    return seen
                await asyncio.sleep(_LOOK_EVERY_SECONDS)


def _printer(
    console: Console, *, live: bool, as_json: bool
) -> AbstractContextManager[Callable[[Progress], Any]]:
    if as_json:
        return nullcontext(lambda seen: typer.echo(msgspec.json.encode(seen).decode()))
    if not live:
        return nullcontext(
            lambda seen: typer.echo("\n".join(f"{name:<10} {text}" for name, text in lines(seen)))
        )
    return _Rewriting(console)


class _Rewriting(AbstractContextManager[Callable[[Progress], Any]]):
    """Writes over what it wrote before."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> Callable[[Progress], Any]:
        self._live.start()
        return lambda seen: self._live.update(_table(seen))

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def _table(seen: Progress) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, text in lines(seen):
        table.add_row(name, text)
    return table


def lines(seen: Progress) -> list[tuple[str, str]]:
    """Names and values, of what is known."""
    found = [("job", seen.job_id), ("state", _state(seen))]
    if seen.error is not None:
        again = "; it may be tried again" if seen.error.retryable else ""
        found.append(("error", f"{seen.error.code}: {seen.error.message}{again}"))
    if seen.cancelled:
        found.append(("cancelled", "rows that were not started are not started any more"))
    if seen.rows is not None:
        share = f" ({100 * seen.rows_done / seen.rows:.1f}%)" if seen.rows else ""
        found.append(("parts", f"{seen.parts_done} of {seen.parts}"))
        found.append(("rows", f"{seen.rows_done} of {seen.rows}{share}, {seen.rows_failed} failed"))
    if seen.seconds is not None:
        found.append(("time", duration(seen.seconds)))
    if seen.rows_per_second is not None:
        found.append(("rate", f"{seen.rows_per_second:.1f} rows/s"))
    if seen.seconds_left:
        found.append(("time left", duration(seen.seconds_left)))
    return found


def duration(seconds: float) -> str:
    """In the two largest units."""
    whole = round(seconds)
    for size, unit, next_size, next_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{whole} s"


def _state(seen: Progress) -> str:
    if seen.state is State.UNSEEN and seen.status is None:
        return "unseen: it waits, runs in one part, or was never sent here"
    return seen.status or seen.state.value
