"""What the adapter management API was told, in a file, so that a restart does not forget it."""

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """What was said about one adapter: where it comes from, and whether it is kept in memory."""

    name: str
    src: str | None = None
    """None for an adapter of the adapters folder, of which only the other fields were said here."""
    version: str | None = None
    """What a registered one is now; None with `src`."""
    preload: bool = False
    pin: bool = False
    options: dict[str, str] = {}


class _Book(msgspec.Struct, frozen=True):
    registrations: tuple[Registration, ...] = ()


def read_book(path: Path) -> tuple[Registration, ...]:
    """The registrations in a file; none when there is no such file. Blocking.

    Raises OSError, and msgspec.DecodeError for a file that is not ours.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    return msgspec.json.decode(data, type=_Book).registrations


def write_book(path: Path, registrations: Iterable[Registration]) -> None:
    """Replace the file, in one step and on the disk before it returns. Blocking. Raises OSError."""
    book = _Book(tuple(sorted(registrations, key=lambda one: one.name)))
    replace_file(path, msgspec.json.format(msgspec.json.encode(book), indent=1) + b"\n")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step and to the disk before it returns. Blocking. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
