"""Dead letters go back to their queue, each once, and are the same jobs there."""

import asyncio
import json

import pytest

from worker.errors import QueueUnavailable
from worker.redrive import redrive
from worker.transport.memory import ManualClock, MemoryQueue
from worker.transport.queue import Outcome


def world() -> tuple[MemoryQueue, MemoryQueue]:
    clock = ManualClock(1_000_000.0)
    return tuple(MemoryQueue(clock=clock, sleep=clock.sleep) for _ in range(2))


def play(scenario) -> None:
    dead_letters, queue = world()

    async def main():
        await asyncio.wait_for(_ticking(scenario(dead_letters, queue), dead_letters), 20)

    asyncio.run(main())


async def _ticking(scenario, queue):
    """Let time pass while the scenario waits for it."""
    task = asyncio.ensure_future(scenario)
    while not task.done():
        await queue._clock.advance(0.1)
        await asyncio.sleep(0)
    await task


async def everything(queue) -> list:
    found = []
    while deliveries := await queue.receive(10, 0):
        found += deliveries
    return found


def test_all_messages_are_moved_with_their_attributes():
    async def scenario(dead_letters, queue):
        bodies = [json.dumps({"id": f"job-{number}", "inputs": "x"}) for number in range(25)]
        for body in bodies:
            await dead_letters.send(body, {"adapter": "pirate"})
        counts = []
        assert await redrive(dead_letters, queue, on_moved=counts.append) == 25
        assert counts == [10, 20, 25]
        moved = await everything(queue)
        assert sorted(delivery.body for delivery in moved) == sorted(bodies)
        assert all(delivery.attributes == {"adapter": "pirate"} for delivery in moved)
        assert (await dead_letters.describe()).messages == (await dead_letters.describe()).in_flight == 0

    play(scenario)


def test_job_without_an_id_goes_on_being_the_job_of_its_first_message():
    async def scenario(dead_letters, queue):
        first = await dead_letters.send('{"inputs": ["a", "b"], "adapters": "x"}')
        await redrive(dead_letters, queue)
        (delivery,) = await everything(queue)
        assert delivery.message_id != first
        assert json.loads(delivery.body) == {"inputs": ["a", "b"], "adapters": "x", "id": first}

    play(scenario)


@pytest.mark.parametrize(
    "body", ["not JSON", "[]", '"text"', "{}", '{"Records": []}', "[" * 100_000, '{"inputs": 1, "id": "own"}']
)
def test_any_other_message_is_moved_as_it_is(body):
    async def scenario(dead_letters, queue):
        await dead_letters.send(body)
        assert await redrive(dead_letters, queue) == 1
        (delivery,) = await everything(queue)
        assert delivery.body == body

    play(scenario)


@pytest.mark.parametrize("limit", [1, 10, 13])
def test_no_more_are_moved_than_asked_for(limit):
    async def scenario(dead_letters, queue):
        for _ in range(20):
            await dead_letters.send("x")
        assert await redrive(dead_letters, queue, limit=limit) == limit
        assert len(await everything(queue)) == limit
        assert (await dead_letters.describe()).messages == 20 - limit

    play(scenario)


def test_message_that_could_not_be_sent_stays_where_it_was():
    async def scenario(dead_letters, queue):
        await dead_letters.send("x")

        async def send(*_):
            raise QueueUnavailable("throttled")

        queue.send = send
        with pytest.raises(QueueUnavailable):
            await redrive(dead_letters, queue)
        assert (await dead_letters.describe()).in_flight == 1

    play(scenario)


def test_message_that_could_not_be_deleted_is_told():
    async def scenario(dead_letters, queue):
        await dead_letters.send("x")

        async def delete(receipts):
            return Outcome(failed=dict.fromkeys(receipts, "InternalError"))

        dead_letters.delete = delete
        with pytest.raises(QueueUnavailable, match="1 messages were moved and could not be deleted"):
            await redrive(dead_letters, queue)

    play(scenario)
