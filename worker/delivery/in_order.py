"""What is done in any order, passed on in one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class InOrder(Generic[T]):
    """Gives `emit` the items by their numbers, from 0 and without a gap, one at a time.

    Nobody may begin with an item that is `max_ahead` or more beyond the next to be passed on: those wait in
    `room`, since what is done early is kept until its turn.
    """

    def __init__(self, emit: Callable[[T], Awaitable[None]], *, max_ahead: int) -> None:
        self._emit = emit
        self._max_ahead = max_ahead
        self._done: dict[int, T] = {}
        self._next = 0
        self._emitting = False
        self._moved = asyncio.Event()

    @property
    def passed_on(self) -> int:
        return self._next

    async def room(self, number: int) -> None:
        """Return when item `number` may be begun."""
        while number >= self._next + self._max_ahead:
            self._moved.clear()
            await self._moved.wait()

    async def put(self, number: int, item: T) -> None:
        """An item is done. Whoever finds that nobody is passing on passes on all that can be."""
        self._done[number] = item
        if self._emitting:
            return
        self._emitting = True
        try:
            while self._next in self._done:
                await self._emit(self._done.pop(self._next))
                self._next += 1
                self._moved.set()
        finally:
            self._emitting = False
