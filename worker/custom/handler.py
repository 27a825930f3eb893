"""A custom handler: calls to it, one at a time or in batches, and a process that is replaced when it dies."""

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Self

from worker.custom.answers import Answer, failure, merged, parted
from worker.custom.messages import MAX_MESSAGE_BYTES, Begin, Call, Content, Head, Loaded, Piece
from worker.custom.process import HandlerProcess
from worker.errors import EngineFailed, HandlerBusy, HandlerDied, ModelError

logger = logging.getLogger(__name__)

MAX_WAITING = 1000
PASSES = 16
_STARTS = 4
"""Tries to start a process again before the worker gives up."""
_PAUSE_SECONDS = 1.0


class _Waiting:
    """A call, and who waits for its answer."""

    __slots__ = ("call", "future")

    def __init__(self, call: Call, future: asyncio.Future[Answer]) -> None:
        self.call = call
        self.future = future


class CustomHandler:
    """Runs a handler in a process of its own: `async with CustomHandler(begin, ...) as handler`.

    The first call of every process is one of `begin.properties["handler"]` without content, but with the
    properties `options`. Calls of that function that wait at the same time go together, `batch_size` at most;
    when a batch fails, ends the process or is too large to be sent, its calls are made one by one, so that
    one of them fails and no other.
    `start_seconds` is for loading and the first call together, `call_seconds` for each call that follows.
    """

    def __init__(
        self,
        begin: Begin,
        options: Mapping[str, str],
        *,
        environ: Mapping[str, str],
        batch_size: int = 1,
        call_seconds: float = 120.0,
        start_seconds: float = 240.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._begin = begin
        self._options = dict(options)
        self._environ = environ
        self._batch_size = batch_size
        self._call_seconds = call_seconds
        self._start_seconds = start_seconds
        self._sleep = sleep
        self._process: HandlerProcess | None = None
        self._told: dict[str, Call] = {}
        """By adapter, what a new process must be told."""
        self._waiting: deque[_Waiting] = deque()
        self._urgent: deque[_Waiting] = deque()
        self._passes = 0
        """Urgent calls that went first since one that is not had its turn."""
        self._some = asyncio.Event()
        self._ended = False
        self.num_restarts = 0
        self.on_lost: Callable[[str, str, bool], None] = lambda *_: None
        """Told of each adapter that a new process did not take: its name, why, and whether it ended that."""

    @property
    def function(self) -> str:
        """The name of the function that answers requests."""
        return self._begin.properties["handler"]

    @property
    def has_ended(self) -> bool:
        """Whether nothing will be answered any more."""
        return self._ended

    async def __aenter__(self) -> Self:
        """Raises ModelError with the handler's reason when it cannot be loaded, or its first call fails."""
        try:
            await self._start()
        except HandlerDied as error:
            raise ModelError(
                f"the custom handler {self._begin.entry_point} did not start: {error}"
            ) from error
        self._running = asyncio.create_task(self._run(), name="custom-handler")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = True  # whoever is told that a call failed may ask
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        self._end(HandlerDied("the handler has been stopped"))
        if self._process is not None:
            await self._process.close()

    async def wait(self) -> None:
        """Raise EngineFailed when the handler cannot be started any more."""
        await asyncio.shield(self._running)

    async def call(
        self, function: str, properties: Mapping[str, str], content: Content, *, urgent: bool = True
    ) -> Answer:
        """What a function of the handler answers; a failure of its own is an answer too.

        Of what waits, what is urgent goes first, PASSES calls at most before one that is not. Raises
        HandlerDied when the process ended at this call or was too slow, and HandlerBusy.
        """
        if self._ended:
            raise HandlerDied("the handler has been stopped")
        if urgent and len(self._urgent) >= MAX_WAITING:
            raise HandlerBusy(f"{MAX_WAITING} calls wait for the custom handler")
        call = Call(function, {"requestId": uuid.uuid4().hex, **properties}, content)
        waiting = _Waiting(call, asyncio.get_running_loop().create_future())
        (self._urgent if urgent else self._waiting).append(waiting)
        self._some.set()
        return await waiting.future

    def remember(self, adapter: str, call: Call) -> None:
        """Make this call first of all when the process has to be started again."""
        self._told[adapter] = call

    def forget(self, adapter: str) -> None:
        self._told.pop(adapter, None)

    # One task at work.

    async def _run(self) -> None:
        try:
            while True:
                await self._some.wait()
                calls = self._next()
                if calls:
                    await self._serve(calls)
                elif not self._waiting and not self._urgent:
                    self._some.clear()
        except Exception as error:
            self._end(HandlerDied(f"the handler cannot be started: {error}"))
            raise

    def _next(self) -> list[_Waiting]:
        """The call whose turn it is, and those behind it that may go with it."""
        line = (
            self._urgent if self._urgent and (not self._waiting or self._passes < PASSES) else self._waiting
        )
        taken: list[_Waiting] = []
        while line and len(taken) < self._batch_size:
            first = line[0]
            if first.future.done():  # whoever waited has gone
                line.popleft()
            elif first.call.function == self.function or not taken:
                taken.append(line.popleft())
                if first.call.function != self.function:
                    break
            else:
                break
        self._passes = self._passes + len(taken) if line is self._urgent else 0
        return taken

    async def _serve(self, calls: list[_Waiting]) -> None:
        try:
            failed = await self._try(calls)
            if failed is not None and len(calls) == 1:
                _settle_all(calls, failed)
            elif failed is not None:
                for one in calls:
                    if not one.future.done():
                        await self._serve([one])
        except BaseException as error:
            _settle_all(calls, HandlerDied(str(error) or "the handler has been stopped"))
            raise

    async def _try(self, calls: list[_Waiting]) -> Answer | HandlerDied | None:
        """Make calls together; returns how all of them failed, if they did. Raises EngineFailed."""
        if self._process is None or self._process.has_ended:  # it may die between calls, too
            await self._bury()
            await self._start_again()
        try:
            async with _within(self._call_seconds, "the handler did not answer"):
                return await self._ask(calls)
        except HandlerDied as error:
            logger.warning("the custom handler has ended: %s", error, extra={"calls": len(calls)})
            await self._bury()
            return error
        except ValueError as error:  # too long to be sent
            return Answer(failure(str(error), 413, "request too large"))

    async def _ask(self, calls: list[_Waiting]) -> Answer | None:
        """Make calls together; returns the failure of a whole batch."""
        assert self._process is not None
        is_batch = len(calls) > 1
        await self._process.send(merged([one.call for one in calls]) if is_batch else calls[0].call)
        head = await self._process.receive()
        if not isinstance(head, Head):
            raise HandlerDied("the handler's process sent a piece of a stream that it had not begun")
        if head.streams:
            await self._pass_on(head, calls)
        elif is_batch and Answer(head).is_failure:
            return Answer(head)
        else:
            for one, part in zip(calls, parted(head, len(calls)), strict=True):
                _settle(one.future, Answer(part))
        return None

    async def _pass_on(self, head: Head, calls: list[_Waiting]) -> None:
        """Hand the pieces of a stream on as they come. Nobody may be there any more to take them."""
        stream: asyncio.Queue[bytes | HandlerDied | None] = asyncio.Queue()
        if len(calls) > 1:
            _settle_all(calls, Answer(failure("a batch cannot be answered with a stream")))
        else:
            _settle(calls[0].future, Answer(head, _pieces(stream)))
        try:
            await self._stream(stream)
        except HandlerDied as error:
            stream.put_nowait(error)
            raise
        except asyncio.CancelledError:
            stream.put_nowait(HandlerDied("the stream was cut short"))
            raise

    async def _stream(self, stream: asyncio.Queue[bytes | HandlerDied | None]) -> None:
        assert self._process is not None
        total = 0
        while True:
            piece = await self._process.receive()
            if not isinstance(piece, Piece):
                raise HandlerDied("the handler's process sent something else than the rest of a stream")
            if piece.data:
                stream.put_nowait(piece.data)
            total += len(piece.data)
            if total > MAX_MESSAGE_BYTES:
                raise HandlerDied(f"a stream has more than {MAX_MESSAGE_BYTES} bytes")
            if piece.is_last:
                broken = None if piece.error is None else HandlerDied(f"the stream failed: {piece.error}")
                stream.put_nowait(broken)
                return

    # The process.

    async def _start(self) -> None:
        """Start a process, and have the handler make itself ready. Raises HandlerDied."""
        async with _within(self._start_seconds, "the handler was not ready"):
            self._process, loaded = await HandlerProcess.start(self._begin, self._environ)
            try:
                await self._initialise(loaded)
            except BaseException:
                await self._bury()
                raise

    async def _initialise(self, loaded: Loaded) -> None:
        assert self._process is not None
        if loaded.error is not None:
            raise HandlerDied(loaded.error)
        answer = await self._ask_alone(Call(self.function, self._options))
        if answer.is_failure:
            raise HandlerDied(f"its first call, for initialisation, failed: {answer.status} {answer.reason}")
        logger.info("the custom handler is ready", extra={"entry_point": self._begin.entry_point})

    async def _start_again(self) -> None:
        """Raises EngineFailed when it does not start any more."""
        for number in range(_STARTS):
            self.num_restarts += 1
            try:
                await self._start()
                await self._tell_adapters()
            except HandlerDied as error:
                await self._bury()
                logger.warning("the custom handler did not start again: %s", error)
                if number == _STARTS - 1:
                    raise EngineFailed(f"the custom handler does not start any more: {error}") from error
                await self._sleep(_PAUSE_SECONDS * 2**number)
            else:
                return

    async def _tell_adapters(self) -> None:
        for name, call in list(self._told.items()):
            try:
                async with _within(self._call_seconds, "the handler did not answer"):
                    answer = await self._ask_alone(call)
            except HandlerDied as error:
                self.forget(name)  # or it would do so every time
                self.on_lost(name, str(error), True)
                logger.warning("an adapter ended the handler", extra={"adapter": name, "reason": str(error)})
                raise
            if answer.is_failure:
                self.forget(name)
                self.on_lost(name, answer.reason, False)
                extra = {"adapter": name, "reason": answer.reason}
                logger.warning("an adapter was not registered again", extra=extra)

    async def _ask_alone(self, call: Call) -> Answer:
        """Call a function that does not answer with a stream."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        await self._ask([_Waiting(call, future)])
        answer = future.result()
        if answer.pieces is not None:
            return Answer(Head(code=answer.status, message=answer.message))
        return answer

    async def _bury(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.kill()

    def _end(self, error: HandlerDied) -> None:
        """Nobody will be answered any more."""
        self._ended = True
        for line in (self._urgent, self._waiting):
            while line:
                _settle(line.popleft().future, error)


@contextlib.asynccontextmanager
async def _within(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise HandlerDied(f"{what} within {seconds:g} s") from error


async def _pieces(stream: asyncio.Queue[bytes | HandlerDied | None]) -> AsyncIterator[bytes]:
    while (piece := await stream.get()) is not None:
        if isinstance(piece, HandlerDied):
            raise piece
        yield piece


def _settle_all(calls: list[_Waiting], outcome: Answer | Exception) -> None:
    for one in calls:
        _settle(one.future, outcome)


def _settle(future: asyncio.Future[Answer], outcome: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Answer):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
