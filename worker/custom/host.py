"""The handler's own process, which `worker.custom.process` starts with a socket to the worker.

It loads the handler and calls its functions, one after the other, until the worker closes the socket.
"""

import asyncio
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from worker.custom.async_answers import as_stream, as_whole
from worker.custom.messages import (
    LENGTH_BYTES,
    Begin,
    Call,
    Content,
    FromHandler,
    Head,
    Loaded,
    Piece,
    ToHandler,
    frame,
    length_of,
    read_to_handler,
)
from worker.custom.package import djl_python
from worker.custom.package.djl_python import (
    Input,
    Output,
    encode_decode,
    input_parser,
    inputs,
    np_util,
    output_formatter,
    outputs,
    pair_list,
)

logger = logging.getLogger("djl_python")

PACKAGE = Path(djl_python.__file__).parents[1]
"""On PYTHONPATH, so that processes which the handler starts find `djl_python` too."""
_STARVED = ("CUDA error: out of memory", "No available memory for the cache blocks")
_STARVED_TYPES = ("OutOfMemoryError", "MemoryError")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(descriptor: int, worker_pid: int) -> None:
    """Serve until the worker is gone."""
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", level=logging.INFO)
    os.set_inheritable(descriptor, False)
    _die_with(worker_pid)
    with socket.socket(fileno=descriptor) as line:
        Host(line).run()


class Host:
    """One handler, called over `line`."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._module = ModuleType("nothing")
        self._common: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()  # for handlers whose functions are coroutines

    def run(self) -> None:
        while (message := self._receive()) is not None:
            if isinstance(message, Begin):
                self._send(self._load(message))
            else:
                self._answer(self._call(message))

    def _load(self, begin: Begin) -> Loaded:
        take_the_name_djl_python()
        self._common = {**begin.properties, "model_dir": begin.folder}
        sys.path.insert(0, begin.folder)
        try:
            self._module = _import(Path(begin.folder), begin.entry_point)
        except Exception as error:
            logger.exception("the handler could not be loaded")
            return Loaded(f"{type(error).__name__}: {error}")
        function = begin.properties["handler"]
        has_it = callable(getattr(self._module, function, None))
        return Loaded(None if has_it else f"it has no function {function}")

    def _call(self, call: Call) -> Output:
        given = Input()
        given.function_name = call.function
        given.properties.update({**call.properties, **self._common, "handler": call.function})
        for key, value in call.content:
            given.content.add(key, bytearray(value))
        try:
            function = getattr(self._module, call.function, None)
            if not callable(function):
                return Output().error(f"the handler has no function {call.function}")
            answer = function(given)
            if inspect.isawaitable(answer):
                answer = self._loop.run_until_complete(_awaited(answer))
            if inspect.isasyncgen(answer):
                return self._loop.run_until_complete(as_stream(answer))
            if isinstance(answer, Output):
                return as_whole(answer)
        except Exception as error:
            logger.exception("%s failed", call.function)
            return _failure(error)
        if answer is None:
            return Output(204, "No content")
        return Output().error(f"Invalid output type: {type(answer)}")

    def _answer(self, answer: Output) -> None:
        """Send an answer; one that cannot be sent becomes one that says so."""
        try:
            encoded = frame(_head(answer))
        except Exception as error:
            logger.exception("the answer cannot be sent")
            answer = _failure(error)
            encoded = frame(_head(answer))
        self._line.sendall(encoded)
        if answer.stream_content is not None:
            self._stream(answer)
        try:
            answer.execute_finalize()
        except Exception:
            logger.exception("the finalize function failed")

    def _stream(self, answer: Output) -> None:
        form = answer.stream_output_formatter
        try:
            for one in self._pieces(answer.stream_content):
                data = _as_bytes(one if form is None else form(one))
                self._send(Piece(data))
        except OSError:
            raise
        except Exception as error:
            logger.exception("the stream failed")
            self._send(Piece(is_last=True, error=str(error)[:_MOST_SAID] or type(error).__name__))
        else:
            self._send(Piece(is_last=True))

    def _pieces(self, stream: Any) -> Iterator[Any]:
        if not hasattr(stream, "__anext__"):
            yield from stream
            return
        while True:
            try:
                yield self._loop.run_until_complete(_awaited(anext(stream)))
            except StopAsyncIteration:
                return

    def _receive(self) -> ToHandler | None:
        head = self._read(LENGTH_BYTES)
        return None if head is None else read_to_handler(self._read(length_of(head)) or b"")

    def _read(self, count: int) -> bytes | None:
        """So many bytes; None when the worker has closed its end."""
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self._line.recv_into(view)
            if not got:
                return None
            view = view[got:]
        return bytes(data)

    def _send(self, message: FromHandler) -> None:
        self._line.sendall(frame(message))


_MOST_SAID = 10_000


def take_the_name_djl_python() -> None:
    """From now on in this process, `djl_python` is ours, also where another one is installed."""
    elsewhere = [path for path in sys.path if Path(path) != PACKAGE]
    if PathFinder.find_spec("djl_python", elsewhere) is not None:
        logger.warning("the djl_python that is installed here is not used: handlers get loramill's")
    sys.modules["djl_python"] = djl_python
    for module in (encode_decode, input_parser, inputs, np_util, output_formatter, outputs, pair_list):
        sys.modules[f"djl_python.{module.__name__.rpartition('.')[2]}"] = module


def _import(folder: Path, entry_point: str) -> ModuleType:
    """The handler's module. What it imports from its folder it finds there."""
    if not entry_point.endswith(".py"):
        return importlib.import_module(entry_point)
    path = folder / entry_point
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else "loramill_handler"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _failure(error: Exception) -> Output:
    said = str(error)[:_MOST_SAID]
    if type(error).__name__ in _STARVED_TYPES or any(words in said for words in _STARVED):
        return Output().error(said or type(error).__name__, code=507, message="out of memory")
    return Output().error(said or type(error).__name__)


def _head(answer: Output) -> Head:
    """Raises TypeError and ValueError for an answer that has wrong types in it."""
    code = answer.code
    if isinstance(code, bool) or not isinstance(code, int) or not 200 <= code <= 599:
        raise ValueError(f"the answer's code is {code!r}; it must be a whole number from 200 to 599")
    streams = answer.stream_content is not None
    pairs = [] if streams else zip(answer.content.keys, answer.content.values, strict=True)
    content: Content = tuple((None if key is None else str(key), _as_bytes(value)) for key, value in pairs)
    properties = {str(key): str(value) for key, value in answer.properties.items() if value is not None}
    return Head(code, str(answer.message or ""), properties, content, streams)


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return bytes(Output._encode_json(value))  # noqa: SLF001 (our own)


async def _awaited(answer: Any) -> Any:
    return await answer


def _die_with(worker_pid: int) -> None:
    """Have the kernel end this process with the worker, and before the worker when memory is short."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A supervisor may tell every process of a service to stop; the worker drains first, and then ends us.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    if os.getppid() != worker_pid:
        sys.exit("the worker is gone")  # before we could ask


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
