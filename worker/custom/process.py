"""The handler's process as the worker sees it: started, asked one thing at a time, and killed."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from worker.child import child_command
from worker.custom.messages import (
    LENGTH_BYTES,
    Begin,
    FromHandler,
    Loaded,
    ToHandler,
    frame,
    length_of,
    read_from_handler,
)
from worker.errors import HandlerDied

logger = logging.getLogger(__name__)

_MAX_LINE_BYTES = 16 << 10
_GOODBYE_SECONDS = 5.0
_PACKAGE = str(Path(__file__).parent / "package")
_PRIVATE = "LORAMILL_"
"""Variables that begin like this are the worker's own; a token is among them."""


class HandlerProcess:
    """A process with a handler in it. Every method that waits raises HandlerDied when the process is gone."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._ended = asyncio.create_task(process.wait(), name="handler-exit")
        self._logging = [
            asyncio.create_task(_log_lines(stream, name), name=f"handler-{name}")
            for stream, name in ((process.stdout, "stdout"), (process.stderr, "stderr"))
            if stream is not None
        ]

    @classmethod
    async def start(cls, begin: Begin, environ: Mapping[str, str]) -> tuple["HandlerProcess", Loaded]:
        """A process that has been told to load a handler, and what came of that."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *child_command("worker.custom.host", theirs.fileno(), os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                cwd=begin.folder,
                env=_environ(environ),
                start_new_session=True,
                limit=_MAX_LINE_BYTES,
            )
        except OSError as error:
            ours.close()
            raise HandlerDied(f"no process can be started: {error}") from error
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        handler = cls(process, reader, writer)
        try:
            await handler.send(begin)
            loaded = await handler.receive()
        except BaseException:
            await handler.kill()
            raise
        if isinstance(loaded, Loaded):
            return handler, loaded
        await handler.kill()
        raise HandlerDied("the handler's process said something else than that it was loaded")

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    async def send(self, message: ToHandler) -> None:
        self._writer.write(frame(message))
        with contextlib.suppress(ConnectionError):  # why it ended is told by `receive`
            await self._writer.drain()

    async def receive(self) -> FromHandler:
        """The next message. Raises HandlerDied also when what comes is none."""
        coming = asyncio.create_task(self._message())
        try:
            # A child that the handler left behind may hold the other end open.
            await asyncio.wait({coming, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                await asyncio.wait({coming}, timeout=1.0)  # its last words
            if not coming.done():
                raise HandlerDied(await self._why())
            return coming.result()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise HandlerDied(await self._why()) from error
        except (ValueError, msgspec.DecodeError) as error:
            raise HandlerDied(f"the handler's process sent what is no answer: {error}") from error
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def close(self) -> None:
        """Let the process end by itself, for a while."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ended), _GOODBYE_SECONDS)
        await self.kill()

    async def kill(self) -> None:
        """End the process, and whatever it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._ended
        self._writer.close()
        await asyncio.wait(self._logging, timeout=1.0)  # what it said last
        for task in self._logging:
            task.cancel()
        await asyncio.gather(*self._logging, return_exceptions=True)

    async def _message(self) -> FromHandler:
        head = await self._reader.readexactly(LENGTH_BYTES)
        return read_from_handler(await self._reader.readexactly(length_of(head)))

    async def _why(self) -> str:
        try:
            code = await asyncio.wait_for(asyncio.shield(self._ended), 1.0)
        except TimeoutError:
            return "the handler's process has closed its line to the worker"
        if code < 0:
            return f"the handler's process was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"the handler's process ended with exit code {code}"


def _environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The worker's variables but its own settings."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_PRIVATE)}
    paths = [_PACKAGE, *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


async def _log_lines(stream: asyncio.StreamReader, name: str) -> None:
    """Put what the handler says into the log, a line each; a line too long comes in pieces."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            line = error.partial
            if not line:
                return
        except asyncio.LimitOverrunError:
            line = await stream.read(_MAX_LINE_BYTES)
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            logger.info("handler: %s", text, extra={"stream": name})
