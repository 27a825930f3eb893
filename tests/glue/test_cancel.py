"""A job that its sender took back: rows not started fail by that, and the others keep their answers."""

import asyncio

import pytest

from tests.glue.support import PREFIX, VISIBILITY, World, until
from tests.glue.test_runner import AnsweringBridge, row_runner
from worker import wire
from worker.errors import StoreUnavailable
from worker.jobs import Completion, InferenceRequest, Output
from worker.sender.follow import cancel
from worker.wire.manifest import Status

OUTPUT = Output(PREFIX)
ROWS = 9


class Gate(AnsweringBridge):
    """Answers when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0
        self.open = asyncio.Event()

    async def submit(self, request: InferenceRequest, adapter: object = None, *_: object) -> Completion:
        self.begun += 1
        await self.open.wait()
        return await super().submit(request, adapter)


def codes(world: World, job_id: str = "j") -> list[str | None]:
    return [line["error"] and line["error"]["code"] for line in world.results(job_id)]


def test_job_that_was_cancelled_before_its_start_runs_no_row():
    async def scenario() -> None:
        world, bridge = World(), Gate()
        world.rows = row_runner(world, bridge)
        await world.send(inputs=["x"] * ROWS)
        assert await cancel(world.store, OUTPUT, "j")
        assert await world.handle_next()
        assert codes(world) == ["cancelled"] * ROWS
        manifest = world.manifest("j")
        assert (manifest.status, manifest.request_counts.failed) == (Status.CANCELLED, ROWS)
        assert bridge.begun == 0
        assert await world.left() == 0
        assert not await cancel(world.store, OUTPUT, "j"), "it has ended"

    asyncio.run(scenario())


def test_rows_at_work_are_ended_and_no_more_are_started():
    async def scenario() -> None:
        world, bridge = World(), Gate()
        world.rows = row_runner(world, bridge, max_at_once=2)
        await world.send(inputs=["x"] * ROWS)
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)
            handling = asyncio.create_task(world.runner.handle(lease))
            await until(lambda: bridge.begun == 2)
            await cancel(world.store, OUTPUT, "j")
            await world.clock.advance(VISIBILITY / 2)
            bridge.open.set()
            await handling
        assert bridge.begun == 2
        assert codes(world) == [None, None, *["cancelled"] * (ROWS - 2)]
        assert world.manifest("j").status is Status.CANCELLED
        assert await world.left() == 0

    asyncio.run(scenario())


def test_another_jobs_wish_and_a_store_in_trouble_change_nothing():
    async def scenario() -> None:
        world, bridge = World(), Gate()
        world.rows = row_runner(world, bridge)
        await world.send(inputs=["x"] * 3)
        await cancel(world.store, OUTPUT, "another")
        heads = []

        async def head(uri: str) -> None:
            if uri == wire.cancel_uri(OUTPUT, "j"):
                heads.append(uri)
            if len(heads) > 1:
                raise StoreUnavailable("throttled")

        world.store.head = head
        async with world.keeper() as keeper:
            lease = await world.receive(keeper)
            handling = asyncio.create_task(world.runner.handle(lease))
            await until(lambda: bridge.begun == 3)
            for _ in range(4):
                await world.clock.advance(VISIBILITY / 3)
            bridge.open.set()
            await handling
        assert len(heads) > 3
        assert codes(world) == [None] * 3

    asyncio.run(scenario())


@pytest.mark.parametrize("cancelled", [False, True])
def test_nobody_goes_on_looking_when_the_job_has_ended(cancelled):
    async def scenario() -> None:
        world, bridge = World(), AnsweringBridge()
        world.rows = row_runner(world, bridge)
        await world.send()
        if cancelled:
            await cancel(world.store, OUTPUT, "j")
        before = asyncio.all_tasks()
        assert await world.handle_next()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before

    asyncio.run(scenario())
