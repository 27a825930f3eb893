"""How much is at work, and whether there is room for more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FlowControl:
    """Counts tokens and bytes from when they are taken to when they are done.

    Rows of large jobs begin by turns, at most `max_rows` of all of them together, and none while as many
    tokens are at work as may be: so a job that comes later, large or small, waits for so many and no more.
    """

    def __init__(self, *, max_rows: int, max_tokens: int, max_bytes: int) -> None:
        self.max_rows = max_rows
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self.tokens = 0
        """Of the rows that were begun: prompts, and the most they may generate."""
        self.num_bytes = 0
        """Of messages."""
        self._turns = asyncio.Semaphore(max_rows)
        self._less = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether no more messages are to be taken, for their tokens or bytes."""
        return self.tokens >= self._max_tokens or self.num_bytes >= self._max_bytes

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have one row of a large job at work in the block."""
        async with self._turns:
            while self.tokens >= self._max_tokens:
                self._less.clear()
                await self._less.wait()
            yield

    def take(self, *, tokens: int = 0, num_bytes: int = 0) -> None:
        """So much more is at work."""
        self.tokens += tokens
        self.num_bytes += num_bytes

    def give_back(self, *, tokens: int = 0, num_bytes: int = 0) -> None:
        """So much is done."""
        self.tokens -= tokens
        self.num_bytes -= num_bytes
        self._less.set()
