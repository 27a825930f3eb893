"""How results and progress look on a terminal, and elsewhere.

What draws on terminals is imported there: most mirrors run without one, and start sooner so.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from adapters_sync.report import PassReport
from adapters_sync.state import AdapterStatus
from adapters_sync.survey import AdapterLine, Survey

COLUMNS = ("name", "version", "rank", "size", "tier", "state", "reason")
_DIGITS = 12


def report_lines(report: PassReport) -> list[str]:
    """One line for each adapter and one for all."""
    counts = ", ".join(
        f"{count} {what}"
        for what, count in (
            ("adapters", len(report.adapters)),
            ("published", len(report.published)),
            ("deleted", len(report.deleted)),
            ("bytes fetched", report.fetched_bytes),
        )
    )
    return [*map(_line, report.adapters), counts]


def _line(adapter: AdapterStatus) -> str:
    version = adapter.version[:_DIGITS] if adapter.version else "-"
    name = _printable(adapter.name)
    reason = f"  {adapter.reason}" if adapter.reason else ""
    return f"{adapter.state:<8} {version:<12}  {name}{reason}"


def show_survey(survey: Survey) -> None:
    """A table on a terminal; elsewhere a line for each adapter, its columns between tabs, sizes in bytes."""
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 (a terminal)
        from rich.filesize import decimal  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(*COLUMNS, box=None, pad_edge=False)
        for line in survey.adapters:
            size = "-" if line.bytes is None else decimal(line.bytes)
            table.add_row(*(Text(cell) for cell in _cells(line, size)))
        Console().print(table)
    else:
        for line in survey.adapters:
            size = "-" if line.bytes is None else str(line.bytes)
            sys.stdout.write("\t".join(_cells(line, size)) + "\n")


def _cells(line: AdapterLine, size: str) -> list[str]:
    return [
        _printable(line.name),
        line.version[:_DIGITS] if line.version else "-",
        "-" if line.rank is None else str(line.rank),
        size,
        _printable(line.tier or "-"),
        line.state,
        _printable(line.reason or "-"),
    ]


def _printable(text: str) -> str:
    """Text from outside on one line and without control characters."""
    return text.encode("unicode_escape").decode()


@contextmanager
def showing_progress(sizes: Mapping[str, int]) -> Iterator[Callable[[str, int], None]]:
    """Show an upload on stderr: a bar on a terminal, a line for each finished file elsewhere.

    Yields what is to be told a path and how many more of its bytes were sent.
    """
    if sys.stderr.isatty():
        from rich import progress  # noqa: PLC0415 (a terminal)
        from rich.console import Console  # noqa: PLC0415

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("uploading", total=sum(sizes.values()))
            yield lambda path, count: bar.advance(task, count)
    else:
        left = dict(sizes)
        yield lambda path, count: _plain_line(left, path, count, len(sizes))


def _plain_line(left: dict[str, int], path: str, count: int, files: int) -> None:
    left[path] -= count
    if left[path] <= 0:
        del left[path]
        sys.stderr.write(f"uploaded {path} ({files - len(left)} of {files})\n")
