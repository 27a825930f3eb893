"""The line before the host tier: rows pass each other there, and so many of them at most."""

import asyncio
from pathlib import Path

import pytest
import torch

from worker.adapters.room import AdapterRoom
from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.lora_store import LoRAStore
from worker.errors import EngineFailed
from worker.jobs import AdapterKey

A, B, C, D = (AdapterKey(name, "1") for name in "abcd")


class Scene:
    """Rows that take their adapter, and note who has got it."""

    def __init__(self, places=2, max_passed_over=2):
        half = torch.zeros(1, 8)
        self.store = LoRAStore(
            lambda key, _: LoRAWeights(key, {"q": LoRAPair(half, half.T)}), max_cpu_loras=places
        )
        self.asked = 0
        self.room = AdapterRoom(self.store, max_passed_over, self.ask)
        self.got = []
        self.tasks = []

    def ask(self):
        self.asked += 1

    async def row(self, key, *, interactive=False):
        await self.room.reserve(key, interactive=interactive)
        self.store.load(key, Path())
        self.got.append(key)

    async def come(self, *keys):
        self.tasks += [asyncio.create_task(self.row(key)) for key in keys]
        await self.settle()
        return self.tasks[-len(keys) :]

    async def call(self, *keys):
        self.tasks += [asyncio.create_task(self.row(key, interactive=True)) for key in keys]
        await self.settle()

    async def end(self, *keys):
        for key in keys:
            self.room.release(key)
        await self.settle()

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)

    def new(self):
        got, self.got = self.got, []
        return got


@pytest.fixture
def scene():
    return Scene()


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 10))


def test_row_waits_until_an_adapter_is_idle(scene):
    async def scenario():
        await scene.come(A, B, C)
        assert scene.new() == [A, B]
        assert scene.room.num_waiting == 1
        await scene.end(B)
        assert scene.new() == [C]
        assert scene.room.num_waiting == 0

    run(scenario())


def test_rows_of_resident_adapters_pass_the_first_so_often_and_no_more(scene):
    async def scenario():
        await scene.come(A, B, C)
        scene.new()
        await scene.come(A, A, A, A)
        assert scene.new() == [A, A], "max_passed_over is 2"
        assert scene.room.num_waiting == 3
        await scene.end(A, A, A)
        assert scene.new() == [C], "the one that waited comes before those who came later"
        await scene.end(B)
        assert scene.new() == [A, A]

    run(scenario())


def test_new_adapters_stand_in_line(scene):
    async def scenario():
        await scene.come(A, B, C, D, C)
        assert scene.new() == [A, B]
        await scene.end(A)
        assert scene.new() == [C, C], "rows of one adapter come in together"
        await scene.end(C)
        assert scene.new() == [], "one of them is still at work"
        await scene.end(C)
        assert scene.new() == [D]

    run(scenario())


def test_cancelled_row_leaves_the_line_and_what_it_was_given(scene):
    async def scenario():
        await scene.come(A, B)
        (c,) = await scene.come(C)
        (d,) = await scene.come(D)
        c.cancel()
        await scene.settle()
        assert scene.room.num_waiting == 1
        scene.room.release(A)  # lets D in, which is cancelled before it hears of it
        d.cancel()
        await scene.settle()
        assert scene.room.num_waiting == 0
        assert D not in scene.store
        scene.new()
        await scene.come(C)
        assert scene.new() == [C]

    run(scenario())


def test_cancelled_first_lets_the_next_in(scene):
    async def scenario():
        await scene.come(A, B)
        (c,) = await scene.come(C)
        await scene.come(A, A, A)
        assert scene.new() == [A, B, A, A]
        c.cancel()
        await scene.settle()
        assert scene.new() == [A]

    run(scenario())


def test_unpinning_makes_room():
    scene = Scene(places=2)

    async def scenario():
        await scene.come(A, B)
        assert scene.store.pin(A)
        await scene.end(A)
        await scene.come(C)
        assert scene.new() == [A, B]
        scene.store.unpin(A)
        scene.room.let_in()
        await scene.settle()
        assert scene.new() == [C]

    run(scenario())


def test_trying_never_passes_anybody(scene):
    async def scenario():
        assert scene.room.try_reserve(A)
        await scene.come(B, C)
        assert not scene.room.try_reserve(A), "somebody waits"
        assert not scene.room.try_reserve(D)

    run(scenario())


def test_closing_tells_everybody(scene):
    async def scenario():
        await scene.come(A, B)
        tasks = await scene.come(C, D, C)
        scene.room.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 3
        with pytest.raises(EngineFailed):
            await scene.room.reserve(A)
        assert not scene.room.try_reserve(A)
        await scene.end(A, B)  # what is at work still ends

    run(scenario())


def test_interactive_rows_go_before_those_that_wait_and_have_room_made(scene):
    async def scenario():
        await scene.come(A, B, C)
        await scene.call(D)
        assert scene.new() == [A, B]
        assert scene.asked
        await scene.come(A)
        assert scene.new() == [], "nobody takes more of what an interactive row waits for"
        await scene.end(A)
        assert scene.new() == [D]
        await scene.end(B)
        assert scene.new() == [C]
        await scene.end(C)
        await scene.end(D)
        assert scene.new() == [A]
        assert scene.room.num_waiting == 0

    run(scenario())


def test_interactive_rows_pass_the_first_of_the_queue_a_bounded_number_of_times(scene):
    async def scenario():
        await scene.come(A, B, C)
        await scene.call(D, D, D)
        assert scene.new() == [A, B]
        await scene.end(A)
        assert scene.new() == [D, D], "two may pass"
        asked = scene.asked
        await scene.call(D)
        assert (scene.new(), scene.asked) == ([], asked), "it is C's turn: no room is made for others"
        await scene.end(D, B)
        assert scene.new() == [C, D, D]

    run(scenario())


def test_interactive_rows_that_are_cancelled_hold_nobody_up(scene):
    async def scenario():
        await scene.come(A, B)
        await scene.call(C)
        await scene.come(A)
        assert scene.new() == [A, B]
        scene.tasks[-2].cancel()
        await scene.settle()
        assert scene.new() == [A]
        assert scene.room.num_waiting == 0

    run(scenario())


def test_interactive_rows_are_told_when_the_engine_has_stopped(scene):
    async def scenario():
        await scene.come(A, B)
        await scene.call(C)
        scene.room.close()
        await scene.settle()
        with pytest.raises(EngineFailed):
            await scene.tasks[-1]

    run(scenario())
