"""What the adapter management API was told, in a file, so that a restart does not forget it."""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from adapters_sync.layout import is_adapter_name
from worker.errors import InvalidRegistration, RegistryUnavailable, StorageFull, UnknownAdapter

REFRESH_SECONDS = 10.0
"""Between two looks at the adapters folder."""


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
    alias: str | None = None
    """What its users call it, for handlers."""


def changed(
    said: Registration,
    *,
    src: str | None = None,
    preload: bool | None = None,
    pin: bool | None = None,
    options: Mapping[str, str] | None = None,
    alias: str | None = None,
) -> Registration:
    """The registration with what is said now; what is None stays as it is, and so do other options."""
    return msgspec.structs.replace(
        said,
        src=said.src if src is None else src,
        preload=said.preload if preload is None else preload,
        pin=said.pin if pin is None else pin,
        options={**said.options, **(options or {})},
        alias=alias or said.alias,
    )


def check_name(name: str) -> None:
    """Raise InvalidRegistration unless an adapter may have this name."""
    if not is_adapter_name(name):
        raise InvalidRegistration(f"name is {name!r}; it must match [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}")


def unknown(name: str) -> UnknownAdapter:
    return UnknownAdapter(f"The adapter {name} was not found")


def page_of(names: Sequence[str], begin: int, limit: int) -> tuple[Sequence[str], int | None]:
    """The names from number `begin` on, and where the next page begins, if there is one."""
    end = begin + limit
    return names[begin:end], end if end < len(names) else None


class _Content(msgspec.Struct, frozen=True):
    registrations: tuple[Registration, ...] = ()


class Book:
    """The file, and the lock beside it of the one worker that writes. All methods but `close` block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = ExitStack()

    def take(self) -> None:
        """Become the only writer, until `close`. Raises RegistryUnavailable when another one is."""
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(_alone(folder / ".lock"))
        except BlockingIOError as error:
            raise RegistryUnavailable(
                f"another worker on this machine has the adapters registered in {folder}; "
                f"give this one a CACHE_DIR of its own"
            ) from error
        except OSError as error:
            raise RegistryUnavailable(f"{folder} cannot be used: {error}") from error

    def close(self) -> None:
        """Let another one write."""
        self._lock.close()

    def read(self) -> tuple[Registration, ...]:
        """What it says; nothing when there is no such file. Raises RegistryUnavailable for a damaged one."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Content).registrations
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RegistryUnavailable(f"{self._path} cannot be read: {error}") from error

    def write(self, registrations: Iterable[Registration]) -> None:
        """Replace the file, on the disk before it returns. Raises StorageFull, and it is as it was."""
        content = _Content(tuple(sorted(registrations, key=lambda one: one.name)))
        try:
            replace_file(self._path, msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
        except OSError as error:
            raise StorageFull(f"{self._path} cannot be written: {error}") from error


@contextmanager
def _alone(lock_file: Path) -> Iterator[None]:
    """Hold a lock, or raise BlockingIOError at once. The kernel frees it when the process dies."""
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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
