"""asyncio on one side, the engine's thread on the other."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Self

from adapters_sync.layout import AdapterFolder
from worker.engine.engine import Engine, StepStats
from worker.engine.lora_store import LoRAStore
from worker.errors import EngineFailed, LoramillError, RowFailed
from worker.jobs import AdapterKey, Completion, InferenceRequest

logger = logging.getLogger(__name__)


class _Flight:
    """A request inside the engine, and who waits for it."""

    __slots__ = ("future", "request")

    def __init__(self, request: InferenceRequest, future: asyncio.Future[Completion]) -> None:
        self.request = request
        self.future = future


class Bridge:
    """Runs `engine` on a thread of its own: `async with Bridge(engine, store) as bridge`.

    `on_step` is called on the event loop after every step. Loads happen on other threads; while a row
    waits for its adapter, or for room in the host tier, the engine goes on with the rest.
    """

    def __init__(
        self, engine: Engine, store: LoRAStore, on_step: Callable[[StepStats], None] = lambda _: None
    ) -> None:
        self._engine = engine
        self._store = store
        self._on_step = on_step
        self._inbox: queue.SimpleQueue[InferenceRequest | str | None] = queue.SimpleQueue()
        self._flights: dict[str, _Flight] = {}
        self._waiting_for_room: list[asyncio.Future[None]] = []
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

    async def wait(self) -> None:
        """Return when the engine has stopped; raise EngineFailed if it broke."""
        assert self._over is not None
        await asyncio.shield(self._over)

    async def submit(self, request: InferenceRequest, adapter: AdapterFolder | None = None) -> Completion:
        """Run one request and wait for its end. Cancelling the caller drops the request.

        Raises RowError when the request or its adapter is refused, EngineFailed when the engine is gone.
        """
        self._engine.check(request)
        if adapter is None:
            return await self._fly(request)
        key = AdapterKey(adapter.name, adapter.version)
        await self._reserve(key)
        # From here on the release must happen once, and not before the engine let go of the weights.
        try:
            await asyncio.to_thread(self._store.load, key, adapter.path)
        except BaseException as exc:
            self._release(key)
            if isinstance(exc, OSError):
                raise RowFailed(f"Adapter {adapter.name} could not be read: {exc}") from exc
            raise
        return await self._fly(request)

    async def _fly(self, request: InferenceRequest) -> Completion:
        assert self._over is not None
        if self._over.done():
            self._let_go(request)
            raise EngineFailed("the engine has stopped")
        flight = self._flights[request.id] = _Flight(request, self._loop.create_future())
        self._inbox.put(request)
        try:
            return await flight.future
        except asyncio.CancelledError:
            self._inbox.put(request.id)  # the engine's answer to this settles the flight
            raise

    async def _reserve(self, key: AdapterKey) -> None:
        assert self._over is not None
        while not self._store.reserve(key):
            if self._over.done():
                raise EngineFailed("the engine has stopped")
            room: asyncio.Future[None] = self._loop.create_future()
            self._waiting_for_room.append(room)
            await room

    def _release(self, key: AdapterKey) -> None:
        self._store.release(key)
        self._wake_those_waiting_for_room()

    def _wake_those_waiting_for_room(self) -> None:
        waiting, self._waiting_for_room = self._waiting_for_room, []
        for room in waiting:
            if not room.done():
                room.set_result(None)

    def _let_go(self, request: InferenceRequest) -> None:
        if request.adapter is not None:
            self._release(request.adapter)

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._take_in():
                completions, stats = self._engine.step()
                self._tell(self._settle_step, completions, stats)
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

    def _settle_step(self, completions: list[Completion], stats: StepStats) -> None:
        for completion in completions:
            self._settle(completion.request_id, completion)
        self._on_step(stats)

    def _settle(self, request_id: str, outcome: Completion | Exception | None) -> None:
        """The engine has let go of a request. A request that just ended may be settled already."""
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return
        self._let_go(flight.request)
        if flight.future.done():
            return
        if isinstance(outcome, Completion):
            flight.future.set_result(outcome)
        elif isinstance(outcome, Exception):
            flight.future.set_exception(outcome)
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
        self._wake_those_waiting_for_room()

    def _stop(self) -> None:
        assert self._over is not None
        self._over.set_result(None)
