"""Which adapter a name means at this moment."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from adapters_sync.layout import (
    AdapterFolder,
    AdapterState,
    Hold,
    MirrorPaths,
    hold,
    is_adapter_name,
    read_state,
    resolve,
)
from worker.errors import AdapterInvalid, AdapterNotFound

_LOOK_EVERY_SECONDS = 0.25
_MOST_REMEMBERED = 1024
_MOST_TRIES = 5


class AdapterDirectory:
    """The adapters folder as rows see it. `folder` None means that LoRA is off.

    A name that is not there is waited for, since its upload may be on the way; rows that ask for the same
    name wait together, and for a while after the wait nobody waits for it again. `on_missing` is called
    once for each wait: a mirror can look at once. What `registered` has by a name is preferred to what the
    folder has: who registered a name first keeps it. It raises AdapterInvalid for one that cannot be used.
    """

    def __init__(
        self,
        folder: Path | None,
        wait_seconds: float,
        *,
        on_missing: Callable[[], None] = lambda: None,
        registered: Callable[[str], AdapterFolder | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._folder = folder
        self._wait_seconds = wait_seconds
        self._on_missing = on_missing
        self._registered = registered
        self._clock = clock
        self._sleep = sleep
        self._holds: dict[tuple[str, str], Hold] = {}
        """By name and version, those with users."""
        self._users: Counter[tuple[str, str]] = Counter()
        self._waits: dict[str, asyncio.Task[AdapterFolder]] = {}
        self.num_waiting = 0
        """Rows that wait for an adapter to come."""
        self._given_up: dict[str, float] = {}
        """Names that were waited for in vain, with the time from which on it is worth another wait."""

    async def find(self, name: str, waited_seconds: float = 0.0) -> AdapterFolder:
        """The current version. Raises AdapterNotFound, or AdapterInvalid with the mirror's reason.

        `waited_seconds` is taken off the wait: the caller has waited so long for other names. With infinity
        there is no wait, and nobody is told of the name.
        """
        if self._folder is None:
            raise AdapterNotFound(f"Adapter {name} cannot be used: LoRA is not enabled")
        found = await self._look(name)
        if found is not None:
            return found
        given_up = self._given_up.get(name, -math.inf) > self._clock()
        if given_up or math.isinf(waited_seconds) or not is_adapter_name(name):
            raise await self._not_there(name)
        wait = self._waits.get(name)
        if wait is None:
            wait = self._waits[name] = asyncio.create_task(self._wait(name), name=f"wait-for-{name}")
            wait.add_done_callback(lambda done: self._forget(name, done))
        self.num_waiting += 1
        try:
            return await asyncio.wait_for(asyncio.shield(wait), max(0.0, self._wait_seconds - waited_seconds))
        except TimeoutError:
            raise await self._not_there(name) from None
        finally:
            self.num_waiting -= 1

    @asynccontextmanager
    async def use(self, name: str, waited_seconds: float = 0.0) -> AsyncIterator[AdapterFolder]:
        """As `find`; the version stays on disk to the end of the block, whatever the mirror does."""
        folder = await self._take(name, waited_seconds)
        key = folder.name, folder.version
        try:
            yield folder
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._holds.pop(key).close()

    async def _take(self, name: str, waited_seconds: float) -> AdapterFolder:
        """Find a version and count one more user of it. Each version is held once for all its users."""
        for _ in range(_MOST_TRIES):
            folder = await self.find(name, waited_seconds)
            key = folder.name, folder.version
            if key not in self._holds:
                # Here, not on a thread, whose answer a cancelled row would leave behind.
                try:
                    self._holds[key] = hold(folder)
                except FileNotFoundError:
                    continue  # removed between the look and the hold: another one is there, or none
            self._users[key] += 1
            return folder
        raise await self._not_there(name)

    async def _look(self, name: str) -> AdapterFolder | None:
        assert self._folder is not None
        return self._registered(name) or await asyncio.to_thread(resolve, self._folder, name)

    async def _wait(self, name: str) -> AdapterFolder:
        assert self._folder is not None
        deadline = self._clock() + self._wait_seconds
        self._on_missing()
        while self._clock() < deadline:
            await self._sleep(_LOOK_EVERY_SECONDS)
            found = await self._look(name)
            if found is not None:
                return found
        self._give_up(name)
        raise await self._not_there(name)

    async def _not_there(self, name: str) -> AdapterInvalid | AdapterNotFound:
        assert self._folder is not None
        reason = await asyncio.to_thread(_reason, self._folder, name)
        if reason is not None:
            return AdapterInvalid(f"Adapter {name} is invalid: {reason}", "mirror")
        return AdapterNotFound(f"Adapter {name} is not registered")

    def _give_up(self, name: str) -> None:
        now = self._clock()
        if len(self._given_up) >= _MOST_REMEMBERED:
            self._given_up = {known: until for known, until in self._given_up.items() if until > now}
        if len(self._given_up) < _MOST_REMEMBERED:
            self._given_up[name] = now + self._wait_seconds

    def _forget(self, name: str, wait: asyncio.Task[AdapterFolder]) -> None:
        del self._waits[name]
        if not wait.cancelled():
            wait.exception()  # every waiter may have been cancelled


def _reason(folder: Path, name: str) -> str | None:
    """Why the mirror refused this adapter, if it did."""
    state = read_state(MirrorPaths(folder).state_file)
    status = None if state is None else state.find(name)
    return status.reason if status is not None and status.state is AdapterState.INVALID else None
