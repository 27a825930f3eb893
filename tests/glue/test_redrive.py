"""Dead letters go back to their queue, each once, and are the same jobs there."""

import asyncio
import json

import msgspec
import pytest

from worker.errors import QueueRefused, QueueUnavailable
from worker.sender.redrive import redrive
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


def test_messages_keep_their_group_and_their_attributes():
    async def scenario(dead_letters, queue):
        await dead_letters.send('{"input": {"uri": "s3://b/k"}}', {"adapter": "x"}, "tenant")
        await redrive(dead_letters, queue)
        (delivery,) = await everything(queue)
        assert (delivery.group_id, delivery.attributes) == ("tenant", {"adapter": "x"})
        assert "id" in json.loads(delivery.body)

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


def test_message_that_cannot_be_sent_stays_and_costs_the_others_nothing():
    async def scenario(dead_letters, queue):
        for number in range(25):
            await dead_letters.send(f"{number}")
        send = queue.send

        async def picky(body, attributes=None, group_id=None):
            if body in {"3", "17"}:
                raise QueueRefused("InvalidMessageContents")
            return await send(body, attributes, group_id)

        queue.send = picky
        with pytest.raises(QueueUnavailable, match=r"23 messages were moved, 2 were not: .*InvalidMessage"):
            await redrive(dead_letters, queue)
        assert len(await everything(queue)) == 23
        assert (await dead_letters.describe()).in_flight == 2

    play(scenario)


def test_queue_that_takes_nothing_is_not_asked_for_ever():
    async def scenario(dead_letters, queue):
        for _ in range(30):
            await dead_letters.send("x")
        asked = []

        async def send(*_):
            asked.append(1)
            raise QueueRefused("AccessDenied")

        queue.send = send
        with pytest.raises(QueueUnavailable, match="0 messages were moved, 10 were not"):
            await redrive(dead_letters, queue)
        assert len(asked) == 10
        info = await dead_letters.describe()
        assert info.messages + info.in_flight == 30

    play(scenario)


def test_message_that_could_not_be_deleted_is_told_and_sent_once():
    async def scenario(dead_letters, queue):
        first = await dead_letters.send("x")

        async def delete(receipts):
            return Outcome(failed=dict.fromkeys(receipts, "InternalError"))

        dead_letters.delete = delete
        with pytest.raises(QueueUnavailable, match=f"{first}: it was sent and could not be deleted"):
            await redrive(dead_letters, queue)
        assert len(await everything(queue)) == 1

    play(scenario)


@pytest.mark.parametrize("again", ["the receipt was lost", "it died anew"])
def test_message_that_comes_again_is_not_sent_again(again):
    """What was sent and not deleted is seen once more; what is dead again at once has its new id."""

    async def scenario(dead_letters, queue):
        await dead_letters.send("x")
        delete, send = dead_letters.delete, queue.send
        attempts = []

        async def lose(receipts):
            if again == "the receipt was lost" and not attempts:
                attempts.append(1)
                for receipt in receipts:
                    await dead_letters.release(receipt, 0)
                return Outcome(lost=frozenset(receipts))
            return await delete(receipts)

        async def die(body, attributes=None, group_id=None):
            name = await send(body, attributes, group_id)
            if again == "it died anew":
                (message,) = queue._messages.values()
                del queue._messages[name]
                dead_letters.adopt(message)
            return name

        dead_letters.delete, queue.send = lose, die
        assert await redrive(dead_letters, queue) == 1
        assert len(await everything(queue)) == (again == "the receipt was lost")

    play(scenario)


def test_body_changes_in_nothing_but_the_id():
    async def scenario(dead_letters, queue):
        body = ' {"inputs": ["\\uffff", 1e300, 12345678901234567890123],"id":null }\n'
        first = await dead_letters.send(body)
        await redrive(dead_letters, queue)
        (delivery,) = await everything(queue)
        assert delivery.body == f'{body.rstrip()[:-1]},"id":"{first}"}}'
        assert msgspec.json.decode(delivery.body)["id"] == first

    play(scenario)


def test_body_that_has_no_room_for_the_id_goes_as_it_is():
    async def scenario(dead_letters, queue):
        body = json.dumps({"inputs": "x" * (1_048_576 - 20)})
        await dead_letters.send(body, {"a": "b"})
        await redrive(dead_letters, queue)
        (delivery,) = await everything(queue)
        assert delivery.body == body

    play(scenario)
