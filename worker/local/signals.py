"""Ctrl-C and SIGTERM while a command works, with and without an event loop."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The first SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class Interruptible:
    """The first signal in the block raises Interrupted, the second ends the process: `with Interruptible()`.

    From the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._drop: Callable[[], object] | None = None
        self._told: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._received) for number in _NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """As `asyncio.run`: the work is cancelled and cleans up before Interrupted is raised."""
        try:
            return asyncio.run(self._watched(work))
        except asyncio.CancelledError:
            if self._told is None:
                raise
            raise Interrupted(self._told) from None

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._drop = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return await work
        finally:
            self._drop = None

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        for each in _NUMBERS:
            signal.signal(each, signal.SIG_DFL)
        self._told = number
        if self._drop is None:
            raise Interrupted(number)
        self._drop()
