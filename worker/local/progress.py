"""How far a run on this machine is, on stderr: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINE_SECONDS = 30.0


@contextmanager
def showing(what: str) -> Iterator[None]:
    """While something lasts that nobody can measure."""
    if sys.stderr.isatty():
        with Console(stderr=True).status(what):
            yield
    else:
        say(what)
        yield


@contextmanager
def showing_rows(done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told how many rows are done."""
    began, before = time.monotonic(), done
    if sys.stderr.isatty():
        columns = (
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("rows", total=total, completed=done)

            def advance(rows: int) -> None:
                nonlocal done
                done = rows
                bar.update(task, completed=rows)

            yield advance
    else:
        told = began

        def tell(rows: int) -> None:
            nonlocal done, told
            done, now = rows, time.monotonic()
            if now - told >= _LINE_SECONDS:
                told = now
                say(f"{rows} of {total} rows, {_rate(rows - before, now - began)}")

        yield tell
    say(f"{done} of {total} rows, {_rate(done - before, time.monotonic() - began)}")


def say(line: str) -> None:
    """A line of ours on stderr."""
    sys.stderr.write(f"loramill: {line}\n")


def _rate(rows: int, seconds: float) -> str:
    return f"{rows / max(seconds, 1e-3):.1f} rows/s"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} rows/s")
