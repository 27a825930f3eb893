"""A file of results while it is being made: what a run that was stopped leaves, the next one goes on with.

Beside OUT, until it is there:

    .OUT.partial         the lines so far, in order; the last may be torn
    .OUT.partial.json    what the run is about; locked by the one at work, and removed last

A line counts once its newline is written. OUT appears whole, after its manifest.
"""

import fcntl
import gzip
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from worker import wire
from worker.errors import InvalidMessage, LoramillError
from worker.wire.manifest import Manifest, OutputFile
from worker.wire.output import LineReader
from worker.wire.results import Tally

_CHUNK_BYTES = 1 << 20
_SHOWN = 40


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is about; one about the same may go on with its lines."""

    asked: dict[str, Any]
    """What the lines follow from, by names for people."""
    created_at: float
    """When it first began, in seconds since the epoch."""

    @property
    def digest(self) -> str:
        """Of `asked`: sha256 in hex."""
        return hashlib.sha256(msgspec.json.encode(self.asked, order="sorted")).hexdigest()


class LocalOutput:
    """The lines of `target` so far. Make one by `open_output`, and `begin`.

    Everything here blocks, and raises LoramillError where the disk fails.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        self.target = target
        self.rows = 0
        """Lines that are whole."""
        self._overwrite = overwrite
        self._format = "native"
        self._path = target.with_name(f".{target.name}.partial")
        self._about = target.with_name(f".{target.name}.partial.json")
        self._lock = _locked(self._about)
        self._lines = _opened(self._path, os.O_APPEND)

    def begin(self, asked: Mapping[str, Any], line_format: str, *, restart: bool = False) -> Run:
        """Go on with the lines that are there, all but a torn one, or begin anew.

        Raises InvalidMessage if they are about something else, unless `restart` gives them up.
        """
        self._format = line_format
        run = Run(asked=msgspec.json.decode(msgspec.json.encode(asked)), created_at=time.time())
        with _told(self.target):
            left = self._left()
            lines = 0 if restart else self._count_lines()
            if not lines:
                self._tell_anew(run)
                return run
            if left is None or left.asked != run.asked:
                raise InvalidMessage(
                    f"{self.target}: a run that was stopped left {lines} rows, but "
                    f"{_differences(left, run)}; go on as it began, or give it up with --restart"
                )
            self.rows, size = self._whole_lines()
            os.ftruncate(self._lines, size)
            return left

    def add(self, line: bytes) -> None:
        """One more line, with its newline; from now on a kill of this process does not lose it."""
        left = memoryview(line)
        with _told(self.target):
            while left:
                left = left[os.write(self._lines, left) :]
        self.rows += 1

    def sync(self) -> None:
        """From now on a loss of power does not lose them."""
        with _told(self.target):
            os.fsync(self._lines)

    def finish(self, summarize: Callable[[OutputFile, Tally], Manifest]) -> Manifest:
        """All lines are there: make them the target, and its manifest before, which `summarize` gives.

        Raises InvalidMessage if the target has come to be meanwhile, and is not to be overwritten.
        """
        self.refuse_what_exists()
        with _told(self.target):
            reader = LineReader(self._format)
            with self._path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    reader.feed(chunk)
            tally = reader.finish()
            os.fsync(self._lines)
            whole, sha256 = self._path, tally.sha256
            if self.target.name.endswith(".gz"):
                whole = self.target.with_name(f"{self._path.name}.gz")
                sha256 = _pack(self._path, whole)
            manifest = summarize(OutputFile(str(self.target), sha256, sha256, tally.rows), tally)
            _write_whole(manifest_path(self.target), wire.encode_manifest(manifest))
            whole.replace(self.target)
            _sync_folder(self.target.parent)
            self._remove()
        return manifest

    def refuse_what_exists(self) -> None:
        """Raise InvalidMessage if the target is there, and is not to be overwritten."""
        if self.target.exists() and not self._overwrite:
            raise InvalidMessage(f"--output {self.target}: it exists; --overwrite replaces it")

    def close(self) -> None:
        """Let others have it. Where no line was written, nothing stays."""
        if not os.fstat(self._lines).st_size:
            self._remove()
        os.close(self._lines)
        os.close(self._lock)

    def _remove(self) -> None:
        """What is locked goes last: until then nobody else begins."""
        self._path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def _tell_anew(self, run: Run) -> None:
        """In this order: never are lines of another run beside it."""
        os.ftruncate(self._lines, 0)
        os.fsync(self._lines)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, msgspec.json.format(msgspec.json.encode(run), indent=2) + b"\n", 0)
        os.fsync(self._lock)

    def _left(self) -> Run | None:
        """What the lines that are there are about, if that is known."""
        try:
            return msgspec.json.decode(self._about.read_bytes(), type=Run)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _count_lines(self) -> int:
        with self._path.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)

    def _whole_lines(self) -> tuple[int, int]:
        """How many result lines there are, and their bytes; what follows was torn by a crash."""
        reader, rows, size = LineReader(self._format), 0, 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    reader.feed(line)
                except LoramillError:
                    break
                rows, size = rows + 1, size + len(line)
        return rows, size


@contextmanager
def open_output(target: Path, *, overwrite: bool = False) -> Iterator[LocalOutput]:
    """What there is of `target`, for this process alone.

    Raises InvalidMessage if it exists and is not to be overwritten, or cannot be a file there, and
    LoramillError while another run makes it.
    """
    target = target.expanduser().resolve()
    if not target.parent.is_dir():
        raise InvalidMessage(f"--output {target}: {target.parent} is not a folder")
    if target.exists() and not target.is_file():
        raise InvalidMessage(f"--output {target}: it is there, and is not a regular file")
    with _told(target):
        output = LocalOutput(target, overwrite=overwrite)
    try:
        output.refuse_what_exists()
        yield output
    finally:
        output.close()


def manifest_path(target: Path) -> Path:
    """Where the manifest of a file of results lies."""
    return target.with_name(f"{target.name}.manifest.json")


def _locked(path: Path) -> int:
    """A descriptor of the file, new or not, that nobody else has."""
    while True:
        descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed it meanwhile.
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError as exc:
            os.close(descriptor)
            raise LoramillError(f"{path}: another run is at work on it") from exc
        os.close(descriptor)


def _opened(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)


def _differences(left: Run | None, run: Run) -> str:
    if left is None:
        return "nobody knows what it was about"
    names = [name for name in {**left.asked, **run.asked} if left.asked.get(name) != run.asked.get(name)]
    return ", ".join(
        f"{name} was {_shown(left.asked.get(name))} and is {_shown(run.asked.get(name))}" for name in names
    )


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _pack(path: Path, packed: Path) -> str:
    """Make `packed` of the file, the same bytes every time; returns their sha256."""
    with path.open("rb") as file, packed.open("wb") as target:
        with gzip.GzipFile(filename="", fileobj=target, mode="wb", compresslevel=6, mtime=0) as gzipped:
            shutil.copyfileobj(file, gzipped, _CHUNK_BYTES)
        target.flush()
        os.fsync(target.fileno())
    with packed.open("rb") as whole:
        return hashlib.file_digest(whole, "sha256").hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """The file appears with all of it, or stays what it was."""
    fresh = path.with_name(f".{path.name.removeprefix('.')}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise LoramillError(f"{exc.filename or target}: {exc.strerror}") from exc
