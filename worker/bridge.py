"""asyncio on one side, the engine's thread on the other."""

import asyncio
import itertools
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Self

from adapters_sync.layout import AdapterFolder
from worker.adapters.room import AdapterRoom
from worker.engine.adapter_loader import weights_bytes
from worker.engine.engine import Engine, StepStats
from worker.engine.lora_store import LoRAStore
from worker.errors import AdapterStoreFull, EngineFailed, LoramillError, OutOfMemory, RowFailed
from worker.jobs import AdapterKey, Completion, Delta, InferenceRequest, OnDelta

logger = logging.getLogger(__name__)


_OFTEN = 3
"""A row of the queue that had to begin anew so often, for room in host memory, is kept in its turn."""
_MOST_COUNTED = 10_000
"""Adapter versions whose rows are counted; the counts of those that came first go first."""

Tier = Literal["gpu", "cpu", "disk"]


class AdapterDetails(NamedTuple):
    """What is known about an adapter in memory."""

    rank: int
    num_bytes: int


class _Flight:
    """A request inside the engine, and who waits for it; who hears of no completion has to begin anew."""

    __slots__ = ("future", "on_delta", "request", "times")

    def __init__(
        self,
        request: InferenceRequest,
        future: asyncio.Future[Completion | None],
        on_delta: OnDelta,
        times: int = 0,
    ) -> None:
        self.request = request
        self.future = future
        self.on_delta = on_delta
        self.times = times
        """It has begun anew."""


class Bridge:
    """Runs `engine` on a thread of its own: `async with Bridge(engine, store) as bridge`.

    `on_step` is called on the event loop after every step, `on_row` for every completion. Adapters are
    loaded on threads of their own, `load_threads` at a time; while a row waits for its adapter, or for room
    in the host tier, the engine goes on with the rest. For that room at most `max_passed_over` rows that
    came later pass one that came earlier.

    Interactive requests go before the others, here as in the engine: they have a thread of their own for
    loading, and where host memory is full of adapters that rows of the queue have reserved, the rows of
    one of these have to begin anew. One row at a time that had to often enough is kept to its end.
    """

    def __init__(
        self,
        engine: Engine,
        store: LoRAStore,
        on_step: Callable[[StepStats], None] = lambda _: None,
        *,
        on_row: Callable[[AdapterKey | None, Completion], None] = lambda *_: None,
        max_passed_over: int = 256,
        load_threads: int = 4,
    ) -> None:
        self._engine = engine
        self._store = store
        self._on_step = on_step
        self._on_row = on_row
        self._room = AdapterRoom(store, max_passed_over, self._displace)
        self._displacing: set[str] = set()
        """Requests that the engine was told to drop, and that begin anew after that."""
        self._kept: _Flight | None = None
        """What is not displaced until its end."""
        self._loaders = ThreadPoolExecutor(load_threads, "adapter-loader")
        self._urgent_loader = ThreadPoolExecutor(1, "interactive-loader")
        self._inbox: queue.SimpleQueue[InferenceRequest | str | None] = queue.SimpleQueue()
        self._flights: dict[str, _Flight] = {}
        self._rows_of: Counter[AdapterKey] = Counter()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._over: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        # Whoever waits for nothing still must not see "exception was never retrieved".
        self._over.add_done_callback(lambda over: over.cancelled() or over.exception())
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop after the step under way; whoever still waits gets EngineFailed."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._end(EngineFailed("the engine has stopped"))
        for loaders in (self._loaders, self._urgent_loader):
            loaders.shutdown(wait=False, cancel_futures=True)

    async def wait(self) -> None:
        """Return when the engine has stopped; raise EngineFailed if it broke."""
        assert self._over is not None
        await asyncio.shield(self._over)

    async def submit(
        self,
        request: InferenceRequest,
        adapter: AdapterFolder | None = None,
        on_delta: OnDelta = lambda _: None,
    ) -> Completion:
        """Run one request and wait for its end. Cancelling the caller drops the request.

        `on_delta` is called for every token but the last of one that `streams`, which must be interactive:
        rows of the queue may begin anew.
        Raises RowError when the request or its adapter is refused, EngineFailed when the engine is gone.
        """
        assert request.interactive or not request.streams
        self._engine.check(request)
        if adapter is None:
            completion = await self._fly(request, on_delta)
            assert completion is not None
            return completion
        key, interactive = AdapterKey(adapter.name, adapter.version), request.interactive
        for times in itertools.count():
            expected_bytes = await self._expected_bytes(key, adapter.path)
            await self._room.reserve(key, expected_bytes, interactive=interactive)
            # From here on the release must happen once, and not before the engine let go of the weights.
            await self._load(key, adapter, interactive=interactive)
            completion = await self._fly(request, on_delta, times)
            if completion is not None:
                return completion
        raise AssertionError("nobody is displaced for ever")

    async def preload(self, adapter: AdapterFolder, *, pin: bool = False) -> None:
        """Bring an adapter into host memory, and with `pin` keep it there until `unpin`.

        Raises AdapterInvalid, AdapterStoreFull when there is no room beside adapters in use or pinned,
        OutOfMemory when the machine has none, RowFailed when the disk fails, and EngineFailed when the engine
        is gone.
        """
        key = AdapterKey(adapter.name, adapter.version)
        if self._over is None or self._over.done():
            raise EngineFailed("the engine has stopped")
        if not self._room.try_reserve(key, await self._expected_bytes(key, adapter.path)):
            raise AdapterStoreFull(f"Adapter {key.name} finds no room in host memory: all of it is in use")
        await self._load(key, adapter)
        try:
            if pin and not self._store.pin(key):
                raise AdapterStoreFull(
                    f"Adapter {key.name} cannot be pinned: no place in host memory would be left for others"
                )
        finally:
            self._room.release(key)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a row, prompt and answer together."""
        return self._engine.max_model_len

    @property
    def num_waiting_for_room(self) -> int:
        """Rows that wait until their adapter has room in host memory."""
        return self._room.num_waiting

    def unpin(self, key: AdapterKey) -> None:
        """Let an adapter leave host memory as others do; unknown ones are ignored."""
        self._store.unpin(key)
        self._room.let_in()

    def tier(self, key: AdapterKey) -> Tier:
        """The fastest place that holds an adapter: `gpu` is a slot, on whatever device."""
        if key in self._engine.resident_adapters:
            return "gpu"
        return "cpu" if self._store.loaded(key) is not None else "disk"

    def details(self, key: AdapterKey) -> AdapterDetails | None:
        """About an adapter in host memory; None if it is not there."""
        weights = self._store.loaded(key)
        return None if weights is None else AdapterDetails(weights.rank, weights.num_bytes)

    def requests(self, key: AdapterKey) -> int:
        """Rows that ended with an adapter since the worker began."""
        return self._rows_of[key]

    async def _expected_bytes(self, key: AdapterKey, folder: Path) -> int:
        """What an adapter that is not in memory may take: the size of its file."""
        return 0 if key in self._store else await asyncio.to_thread(weights_bytes, folder)

    async def _load(self, key: AdapterKey, adapter: AdapterFolder, *, interactive: bool = False) -> None:
        """Load a reserved adapter; if that fails it is released."""
        if self._store.loaded(key) is not None:
            self._store.load(key, adapter.path)  # at once; it counts
            return
        loaders = self._urgent_loader if interactive else self._loaders
        try:
            await self._loop.run_in_executor(loaders, self._store.load, key, adapter.path)
        except BaseException as exc:
            self._room.release(key)
            if isinstance(exc, OSError):
                raise RowFailed(f"Adapter {adapter.name} could not be read: {exc}") from exc
            if isinstance(exc, MemoryError):
                raise OutOfMemory(f"Adapter {adapter.name} finds no memory: {exc}") from exc
            raise

    async def _fly(self, request: InferenceRequest, on_delta: OnDelta, times: int = 0) -> Completion | None:
        """What comes of a request; None if it had to make room."""
        assert self._over is not None
        if self._over.done():
            self._let_go(request)
            raise EngineFailed("the engine has stopped")
        future: asyncio.Future[Completion | None] = self._loop.create_future()
        flight = self._flights[request.id] = _Flight(request, future, on_delta, times)
        self._inbox.put(request)
        self._room.ask_for_room()  # it could not be displaced while it was loaded
        try:
            return await flight.future
        except asyncio.CancelledError:
            self._inbox.put(request.id)  # the engine's answer to this settles the flight
            raise

    def _let_go(self, request: InferenceRequest) -> None:
        if request.adapter is not None:
            self._room.release(request.adapter)

    def _displace(self) -> None:
        """Have the rows of the queue that use one adapter begin anew, to make room in host memory.

        Of an adapter that nobody else uses, and the one with the fewest rows.
        """
        if self._displacing:
            return
        flights: dict[AdapterKey | None, list[_Flight]] = {}
        for flight in self._flights.values():
            if not flight.request.interactive and flight.request.adapter is not None:
                flights.setdefault(flight.request.adapter, []).append(flight)
        if self._kept is None:
            often = [flight for own in flights.values() for flight in own if flight.times >= _OFTEN]
            self._kept = max(often, key=lambda flight: flight.times, default=None)
        if self._kept is not None:
            flights.pop(self._kept.request.adapter, None)
        alone = [own for key, own in flights.items() if key and len(own) == self._store.users(key)]
        for flight in min(alone, key=len, default=[]):
            self._displacing.add(flight.request.id)
            self._inbox.put(flight.request.id)

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._take_in():
                completions, stats = self._engine.step()
                self._tell(self._settle_step, self._engine.take_deltas(), completions, stats)
        except Exception as exc:  # the top of the thread: whatever it is, the loop is told
            logger.exception("the engine failed")
            failure = exc if isinstance(exc, EngineFailed) else EngineFailed(f"the engine failed: {exc!r}")
            failure.__cause__ = exc if failure is not exc else exc.__cause__
            self._tell(self._break, failure)
        else:
            self._tell(self._stop)

    def _take_in(self) -> bool:
        """Take what came; wait for something while there is no work. False when told to stop."""
        while True:
            try:
                item = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, str):
                self._engine.abort(item)
                self._tell(self._settle, item, None)
            else:
                self._add(item)

    def _add(self, request: InferenceRequest) -> None:
        try:
            self._engine.add(request)
        except LoramillError as exc:
            self._tell(self._settle, request.id, exc)

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            logger.debug("the event loop is gone")

    # The event loop, told by the engine's thread.

    def _settle_step(self, deltas: list[Delta], completions: list[Completion], stats: StepStats) -> None:
        for delta in deltas:
            flight = self._flights.get(delta.request_id)
            if flight is not None and not flight.future.done():
                flight.on_delta(delta)
        for completion in completions:
            self._settle(completion.request_id, completion)
        self._on_step(stats)

    def _settle(self, request_id: str, outcome: Completion | Exception | None) -> None:
        """The engine has let go of a request. A request that just ended may be settled already."""
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        displaced = request_id in self._displacing
        self._displacing.discard(request_id)
        if flight is self._kept:
            self._kept = None
        self._let_go(flight.request)
        if isinstance(outcome, Completion):
            self._count(flight.request.adapter, outcome)
        if flight.future.done():
            return
        if isinstance(outcome, Completion):
            flight.future.set_result(outcome)
        elif isinstance(outcome, Exception):
            flight.future.set_exception(outcome)
        elif displaced:
            flight.future.set_result(None)
        else:
            flight.future.cancel()

    def _break(self, failure: EngineFailed) -> None:
        assert self._over is not None
        self._over.set_exception(failure)
        self._end(failure)

    def _end(self, failure: EngineFailed) -> None:
        """Nobody will be served any more."""
        for request_id in list(self._flights):
            self._settle(request_id, failure)
        self._room.close()

    def _count(self, key: AdapterKey | None, completion: Completion) -> None:
        if key is not None:
            self._rows_of[key] += 1
            if len(self._rows_of) > _MOST_COUNTED:
                del self._rows_of[next(iter(self._rows_of))]
        self._on_row(key, completion)

    def _stop(self) -> None:
        assert self._over is not None
        self._over.set_result(None)
