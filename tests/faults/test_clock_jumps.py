"""A wall clock that jumps: what it decides, which is the ttl of rows, and what it must not touch."""

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.glue.support import VISIBILITY, World, make_runner
from tests.glue.test_runner import LettersTokenizer
from worker.adapters.directory import AdapterDirectory
from worker.delivery.commit import Committer
from worker.delivery.runner import Runner
from worker.jobs import Completion, FinishReason, InferenceRequest
from worker.transport.lease import LeaseKeeper
from worker.wire.manifest import Status

ROWS = 6
TTL = 60
HOUR, DAY = 3600.0, 86_400.0


class JumpingBridge:
    """In the place of Bridge: answers every row, and before that calls `on_row` with its number."""

    def __init__(self, on_row: Callable[[int], None]) -> None:
        self.on_row = on_row
        self.started: list[int] = []

    async def submit(self, request: InferenceRequest, adapter: object = None, *_: object) -> Completion:
        number = int(bytes(request.prompt))
        self.started.append(number)
        self.on_row(number)
        return Completion(
            request_id=request.id,
            text="ok",
            token_ids=(1,),
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=1,
        )


class Skewed(World):
    """A world whose worker reads the time off a wall clock that is wrong by `skew`, one row at a time."""

    def __init__(self, jumps: Sequence[float] = ()) -> None:
        super().__init__()
        self.skew = 0.0
        self.committer = Committer(self.store, self.committer._provenance, clock=self.wall)
        self.bridge = JumpingBridge(lambda number: self.jump(jumps[number] if jumps else 0.0))
        adapters = AdapterDirectory(None, 30.0, clock=self.clock, sleep=self.clock.sleep)
        self.rows = make_runner(self.bridge, LettersTokenizer(), adapters, max_rows=1, clock=self.wall)

    def wall(self) -> float:
        return self.clock() + self.skew

    def jump(self, skew: float) -> None:
        self.skew = skew

    @property
    def runner(self) -> Runner:
        runner = super().runner
        runner._clock = self.wall
        return runner

    def states(self) -> list[str]:
        lines = self.results("j")
        assert [line["index"] for line in lines] == list(range(ROWS))
        return [line["error"]["code"] if line["error"] else line["generated_text"] for line in lines]


INPUTS = [str(number) for number in range(ROWS)]


@pytest.mark.parametrize("jumps", [[DAY] * ROWS, [-DAY] * ROWS, [HOUR, -HOUR] * (ROWS // 2)])
def test_jumps_change_no_row_of_a_job_without_a_ttl(jumps):
    async def scenario() -> None:
        world = Skewed(jumps)
        await world.send(inputs=INPUTS)
        await world.handle_next()
        assert world.states() == ["ok"] * ROWS
        assert world.manifest("j").status is Status.COMPLETED
        assert await world.left() == 0

    asyncio.run(scenario())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([-DAY, -1.0, 0.0, TTL - 1.0, TTL + 1.0, DAY]), min_size=ROWS, max_size=ROWS))
def test_a_row_expires_if_the_clock_says_so_when_it_is_to_start_and_else_it_runs(jumps):
    """Each row by itself; a row that has started is never taken back."""

    async def scenario() -> None:
        world = Skewed(jumps)
        await world.send(inputs=INPUTS, ttl_seconds=TTL)
        await world.handle_next()
        skew, wanted = 0.0, []
        for jump in jumps:
            late = skew > TTL
            wanted.append("expired" if late else "ok")
            skew = skew if late else jump  # only a row that starts makes the clock jump here
        assert world.states() == wanted
        assert world.bridge.started == [n for n, state in enumerate(wanted) if state == "ok"]
        manifest = world.manifest("j")
        assert manifest.status is (Status.EXPIRED if "expired" in wanted else Status.COMPLETED)
        assert manifest.request_counts.completed == wanted.count("ok")
        assert manifest.request_counts.failed == wanted.count("expired")

    asyncio.run(scenario())


@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_what_is_committed_stays_when_the_clock_jumps_before_a_second_delivery(jump):
    async def scenario() -> None:
        world = Skewed()
        for _ in range(2):
            await world.send(inputs=INPUTS, ttl_seconds=TTL)
        await world.handle_next()
        before = {uri: world.store.text(uri) for uri in world.store.uris}
        world.jump(jump)
        await world.handle_all()
        assert {uri: world.store.text(uri) for uri in world.store.uris} == before
        assert world.states() == ["ok"] * ROWS
        assert world.counted("duplicate") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_leases_know_nothing_of_the_wall_clock(jump):
    async def scenario() -> None:
        world = Skewed()
        await world.send(inputs=INPUTS)
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def hold_back(step: str) -> None:
            if step.startswith("put results"):
                reached.set()
                await go_on.wait()

        world.store.hook = hold_back
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)
            handling = asyncio.create_task(world.runner.handle(lease))
            await reached.wait()
            world.jump(jump)
            await world.clock.advance(3 * VISIBILITY)
            assert not lease.lost
            assert await world.queue.receive(1, 0) == [], "it is with us, and kept"
            go_on.set()
            await handling
        assert world.counted("committed") == 1
        assert await world.left() == 0

    asyncio.run(scenario())


def test_what_is_not_a_date_is_measured_on_the_monotonic_clock():
    for kept in (LeaseKeeper, AdapterDirectory):
        assert inspect.signature(kept).parameters["clock"].default is time.monotonic


@pytest.mark.parametrize(("skew", "state"), [(-HOUR, "ok"), (TTL - 1.0, "ok"), (TTL + 1.0, "expired")])
def test_ttl_is_counted_from_when_the_queue_says_that_the_message_was_sent(skew, state):
    """A worker whose clock is behind gives rows longer, and one whose clock is ahead gives them less."""

    async def scenario() -> None:
        world = Skewed([skew] * ROWS)
        world.jump(skew)
        await world.send(inputs=INPUTS, ttl_seconds=TTL)
        await world.handle_next()
        assert world.states() == [state] * ROWS
        assert world.manifest("j").created_at == world.clock()

    asyncio.run(scenario())
