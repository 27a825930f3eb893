"""What is done in any order is passed on in one, and nobody gets too far ahead."""

import asyncio
import random

import pytest

from worker.delivery.flow import FlowControl
from worker.delivery.in_order import InOrder


@pytest.mark.parametrize("seed", range(20))
def test_items_come_by_their_numbers_and_one_at_a_time(seed):
    async def scenario() -> None:
        chance, passed, at_work = random.Random(seed), list[int](), 0

        async def emit(item: int) -> None:
            nonlocal at_work
            at_work += 1
            assert at_work == 1
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            passed.append(item)
            at_work -= 1

        in_order = InOrder(emit, max_ahead=100)

        async def do(number: int) -> None:
            for _ in range(chance.randrange(9)):
                await asyncio.sleep(0)
            await in_order.put(number, number * 2)

        await asyncio.gather(*(do(number) for number in range(50)))
        assert passed == [number * 2 for number in range(50)]
        assert in_order.passed_on == 50

    asyncio.run(scenario())


def test_nobody_begins_too_far_ahead_of_the_one_that_is_awaited():
    async def scenario() -> None:
        async def emit(_: int) -> None:
            await asyncio.sleep(0)

        in_order = InOrder(emit, max_ahead=3)
        for number in range(3):
            await asyncio.wait_for(in_order.room(number), 1)
        early = asyncio.create_task(in_order.room(3))
        for number in (2, 1):
            await in_order.put(number, number)
            await asyncio.sleep(0)
        assert not early.done()
        await in_order.put(0, 0)
        await asyncio.wait_for(early, 1)

    asyncio.run(scenario())


def test_what_cannot_be_passed_on_is_told_to_whoever_passes_on():
    async def scenario() -> None:
        async def emit(_: int) -> None:
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            await InOrder(emit, max_ahead=3).put(0, 0)

    asyncio.run(scenario())


def test_large_jobs_take_turns():
    async def scenario() -> None:
        flow, began = FlowControl(max_rows=2, max_tokens=100, max_bytes=100), list[str]()

        async def job(name: str) -> None:
            for _ in range(20):
                async with flow.turn():
                    began.append(name)
                    await asyncio.sleep(0)

        await asyncio.gather(*(job("a") for _ in range(4)), job("b"))
        assert "b" in began[:10]
        assert began.index("b") < 10
        assert began[: 5 * 20 // 2].count("b") >= 8, "as many turns as any other that wanted one"

    asyncio.run(scenario())


def test_no_turn_begins_while_too_many_tokens_are_at_work():
    async def scenario() -> None:
        flow = FlowControl(max_rows=9, max_tokens=100, max_bytes=100)
        flow.take(tokens=100)
        assert flow.is_full

        async def one() -> None:
            async with flow.turn():
                pass

        waiting = asyncio.create_task(one())
        for _ in range(9):
            await asyncio.sleep(0)
        assert not waiting.done()
        flow.give_back(tokens=1)
        await asyncio.wait_for(waiting, 1)
        assert not flow.is_full
        flow.take(num_bytes=100)
        assert flow.is_full
        await asyncio.wait_for(one(), 1), "bytes hold back messages and no rows"

    asyncio.run(scenario())
