"""What is taken from the queue and when, against polls that the test answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.glue.support import VISIBILITY, World, body_of, until
from tests.glue.test_runner import HangingBridge, row_runner
from worker.delivery import intake as intake_module
from worker.delivery.intake import Intake
from worker.errors import EngineFailed, QueueRefused, QueueUnavailable
from worker.jobs import Delivery
from worker.metrics import Metrics
from worker.transport.lease import Lease, LeaseKeeper
from worker.transport.memory import MemoryQueue


class AnsweredQueue(MemoryQueue):
    """A queue whose polls wait for an answer: messages to take, or an error."""

    def __init__(self) -> None:
        super().__init__(visibility_seconds=VISIBILITY)
        self.polls = 0
        self.pending = 0
        self.cancelled = 0
        self._answers: asyncio.Queue[int | Exception] = asyncio.Queue()

    def answer(self, what: int | Exception) -> None:
        self._answers.put_nowait(what)

    async def receive(self, limit: int, wait_seconds: float) -> list[Delivery]:
        self.polls += 1
        self.pending += 1
        try:
            what = await self._answers.get()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.pending -= 1
        if isinstance(what, Exception):
            raise what
        return await super().receive(what, 0) if what else []


class HeldRunner:
    """In the place of Runner: holds every delivery until told what becomes of it."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.go = asyncio.Event()
        self.outcome: Exception | None = None

    async def handle(self, lease: Lease) -> None:
        self.leases.append(lease)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await lease.release(0)
            raise
        if self.outcome is not None:
            await lease.release(0)
            raise self.outcome
        await lease.ack()


class Scene:
    """An intake at work; `rows` is what it is told to be in flight."""

    def __init__(self, keeper: LeaseKeeper, queue: AnsweredQueue, runner: Any, max_rows: int) -> None:
        self.queue, self.runner = queue, runner
        self.rows: Callable[[], int] = lambda: len(keeper.open_leases)
        self.keeper = keeper
        self.metrics = Metrics(CollectorRegistry())
        self.stop = asyncio.Event()
        self.intake = Intake(
            queue,
            keeper,
            runner,
            self.metrics,
            room=lambda: max(0, max_rows - self.rows()),
            max_messages=max_rows,
        )
        self.running = asyncio.create_task(self.intake.run(self.stop))

    async def visible(self) -> int:
        return (await self.queue.describe()).messages


@asynccontextmanager
async def scene(max_rows: int = 4, messages: int = 0, runner: Any = None) -> AsyncIterator[Scene]:
    queue = AnsweredQueue()
    for number in range(messages):
        await queue.send(body_of(f"j{number}"))
    async with LeaseKeeper(queue, VISIBILITY) as keeper:
        one = Scene(keeper, queue, runner or HeldRunner(), max_rows)
        try:
            yield one
        finally:
            one.running.cancel()
            await asyncio.gather(one.running, return_exceptions=True)
            await one.intake.drain(0, asyncio.Event())


async def turns(count: int = 50) -> None:
    """Let everybody run who can."""
    for _ in range(count):
        await asyncio.sleep(0)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_no_poll_begins_while_enough_rows_are_at_work():
    async def scenario() -> None:
        async with scene(max_rows=2, messages=3) as on:
            await until(lambda: on.queue.pending == 1)
            on.queue.answer(2)
            await until(lambda: len(on.runner.leases) == 2)
            await turns()
            assert on.queue.polls == 1
            on.runner.go.set()
            await until(lambda: on.queue.polls == 2)
            assert on.metrics.received._value.get() == 2

    run(scenario)


def test_polling_goes_on_as_rows_end_though_their_message_has_not():
    async def scenario() -> None:
        async with scene(max_rows=2, messages=1) as on:
            at_work = 5
            on.rows = lambda: at_work
            on.queue.answer(1)
            await turns()
            assert on.queue.polls <= 1
            at_work = 1
            await until(lambda: on.queue.polls >= 1 and on.queue.pending == 1)

    run(scenario)


def test_messages_that_have_not_said_how_many_rows_they_have_count_too():
    async def scenario() -> None:
        async with scene(max_rows=3, messages=9) as on:
            on.rows = lambda: 0
            for _ in range(9):
                on.queue.answer(1)
            await until(lambda: len(on.runner.leases) == 3)
            await turns()
            assert (on.queue.polls, len(on.runner.leases)) == (3, 3)

    run(scenario)


def test_the_rows_of_a_message_count_before_the_next_poll():
    async def scenario() -> None:
        world = World()
        world.rows = row_runner(world, HangingBridge())
        async with scene(max_rows=3, runner=world.runner) as on:
            on.rows = lambda: world.rows.in_flight
            for number in range(5):
                await on.queue.send(body_of(f"j{number}", inputs=["x"] * 3))
                on.queue.answer(1)
            await until(lambda: world.rows.in_flight >= 3)
            await turns()
            assert on.queue.polls == 1
            assert world.rows.in_flight == 3

    run(scenario)


def test_the_rows_of_a_message_count_while_the_store_is_slow():
    async def scenario() -> None:
        world = World()
        world.rows = row_runner(world, HangingBridge())
        reached, never = asyncio.Event(), asyncio.Event()

        async def slow(step: str) -> None:
            if step == "get manifest.json?":
                reached.set()
                await never.wait()

        world.watch(slow)
        async with scene(max_rows=3, runner=world.runner) as on:
            on.rows = lambda: world.rows.in_flight
            for number in range(3):
                await on.queue.send(body_of(f"j{number}", inputs=["x"] * 40))
                on.queue.answer(1)
            await reached.wait()
            await turns()
            assert on.queue.polls == 1, "120 rows are held where 3 are enough"

    run(scenario)


def test_stop_never_cancels_a_poll_and_gives_back_what_it_brings():
    async def scenario() -> None:
        async with scene(messages=1) as on:
            await until(lambda: on.queue.pending == 1)
            on.stop.set()
            await turns()
            assert not on.running.done()
            on.queue.answer(1)
            await on.running
            assert on.queue.cancelled == 0
            assert on.runner.leases == []
            assert await on.visible() == 1, "visible again at once"
            assert on.keeper.stats.released == 1
            assert on.queue.polls == 1

    run(scenario)


def test_stop_while_paused_ends_without_another_poll():
    async def scenario() -> None:
        async with scene(max_rows=1, messages=1) as on:
            on.queue.answer(1)
            await until(lambda: len(on.runner.leases) == 1)
            on.stop.set()
            await on.running
            assert on.queue.polls == 1

    run(scenario)


def test_drain_waits_for_the_deliveries_at_work():
    async def scenario() -> None:
        async with scene(messages=2) as on:
            on.queue.answer(2)
            await until(lambda: len(on.runner.leases) == 2)
            on.stop.set()
            draining = asyncio.create_task(on.intake.drain(30, asyncio.Event()))
            await turns()
            assert not draining.done()
            on.runner.go.set()
            assert await draining
            assert on.keeper.stats.acked == 2
            on.queue.answer(0)

    run(scenario)


def test_drain_gives_back_what_did_not_end_in_time():
    async def scenario() -> None:
        async with scene(messages=2) as on:
            on.queue.answer(2)
            await until(lambda: len(on.runner.leases) == 2)
            on.stop.set()
            assert not await on.intake.drain(0.02, asyncio.Event())
            assert on.keeper.stats.released == 2
            assert await on.visible() == 2
            assert on.keeper.open_leases == ()

    run(scenario)


def test_a_second_signal_ends_the_drain_at_once():
    async def scenario() -> None:
        async with scene(messages=1) as on:
            on.queue.answer(1)
            await until(lambda: len(on.runner.leases) == 1)
            hurry = asyncio.Event()
            draining = asyncio.create_task(on.intake.drain(3600, hurry))
            await turns()
            hurry.set()
            assert not await draining
            assert await on.visible() == 1

    run(scenario)


def test_drain_with_nothing_at_work_returns_at_once():
    async def scenario() -> None:
        async with scene() as on:
            assert await on.intake.drain(3600, asyncio.Event())

    run(scenario)


def test_a_queue_that_cannot_be_reached_is_polled_again(monkeypatch):
    monkeypatch.setattr(intake_module, "_RETRY_SECONDS", 0.0)

    async def scenario() -> None:
        async with scene(messages=1) as on:
            for _ in range(3):
                on.queue.answer(QueueUnavailable("down"))
            on.queue.answer(1)
            await until(lambda: len(on.runner.leases) == 1)
            assert on.queue.polls >= 4

    run(scenario)


def test_a_queue_that_refuses_ends_the_run():
    async def scenario() -> None:
        async with scene() as on:
            on.queue.answer(QueueRefused("no such queue"))
            with pytest.raises(QueueRefused):
                await on.running

    run(scenario)


def test_a_delivery_that_meets_a_broken_engine_ends_the_run():
    async def scenario() -> None:
        async with scene(max_rows=1, messages=1) as on:
            on.queue.answer(1)
            await until(lambda: len(on.runner.leases) == 1)
            on.runner.outcome = EngineFailed("gone")
            on.runner.go.set()
            with pytest.raises(EngineFailed, match="gone"):
                await on.running
            assert on.queue.polls == 1

    run(scenario)


def test_an_error_of_ours_in_one_delivery_does_not_stop_the_others(caplog):
    async def scenario() -> None:
        async with scene(messages=2) as on:
            on.queue.answer(1)
            await until(lambda: len(on.runner.leases) == 1)
            on.runner.outcome = ZeroDivisionError("bug")
            on.runner.go.set()
            await until(lambda: on.keeper.stats.released == 1)
            on.runner.outcome = None
            on.queue.answer(1)
            await until(lambda: on.keeper.stats.acked == 1)

    run(scenario)
    assert "an error of ours" in caplog.text


def test_idle_time_counts_from_the_last_message_and_not_while_one_is_at_work(monkeypatch):
    now = 100.0
    monkeypatch.setattr(intake_module, "time", SimpleNamespace(monotonic=lambda: now))

    async def scenario() -> None:
        nonlocal now
        async with scene(messages=1) as on:
            now += 5
            assert on.intake.idle_seconds == 0, "before the first answer nobody knows"
            on.queue.answer(1)
            await until(lambda: len(on.runner.leases) == 1)
            now += 5
            assert on.intake.idle_seconds == 0
            on.runner.go.set()
            await until(lambda: on.keeper.stats.acked == 1)
            await turns()
            now += 7
            assert on.intake.idle_seconds == 7

    run(scenario)


def test_a_queue_that_cannot_be_reached_is_not_an_empty_queue(monkeypatch):
    """Otherwise `--exit-when-idle` ends well during an outage, the queue full of work."""
    now = 100.0
    monkeypatch.setattr(intake_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(intake_module, "_RETRY_SECONDS", 0.0)

    async def scenario() -> None:
        nonlocal now
        async with scene(messages=1) as on:
            await until(lambda: on.queue.polls == 1)
            now += 5
            on.queue.answer(QueueUnavailable("down"))
            await until(lambda: on.queue.polls == 2)
            assert on.intake.idle_seconds == 0

    run(scenario)
