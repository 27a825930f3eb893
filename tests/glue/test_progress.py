"""How far a job is, as its sender sees it."""

import asyncio

import pytest

from tests.glue.support import PREFIX, World
from tests.glue.test_large_inputs import body, put_rows
from worker.jobs import Failure, Output
from worker.sender.follow import cancel
from worker.sender.progress import Observer, Progress, State
from worker.sender.show_progress import duration, lines

OUTPUT = Output(PREFIX)


def observer(world: World) -> Observer:
    return Observer(world.store, OUTPUT, "j", clock=world.clock)


def test_a_large_job_is_followed_from_its_split_to_its_end():
    async def scenario() -> None:
        world = World()
        watching = observer(world)
        assert (await watching.look()).state is State.UNSEEN
        await put_rows(world)
        await world.send(body())
        assert await world.handle_next()
        seen = await watching.look()
        assert (seen.state, seen.parts, seen.parts_done, seen.rows, seen.rows_done) == (
            State.RUNNING, 3, 0, 11, 0,
        )  # fmt: skip
        assert (seen.rows_per_second, seen.seconds_left) == (None, None)
        await world.clock.advance(8)
        assert await world.handle_next()
        seen = await watching.look()
        assert (seen.parts_done, seen.rows_done, seen.seconds, seen.rows_per_second) == (1, 4, 8.0, 0.5)
        assert seen.seconds_left == 14.0
        assert not seen.cancelled
        await cancel(world.store, OUTPUT, "j")
        assert (await watching.look()).cancelled
        await world.handle_all()
        seen = await watching.look()
        assert (seen.state, seen.parts, seen.rows, seen.rows_done) == (State.ENDED, 3, 11, 11)
        assert seen == await observer(world).look()

    asyncio.run(scenario())


def test_what_is_committed_is_read_once():
    async def scenario() -> None:
        world = World()
        await put_rows(world)
        await world.send(body())
        for _ in range(3):
            assert await world.handle_next()
        watching, steps = observer(world), world.record()
        await watching.look()
        assert steps.count("get tally") == 2
        assert steps.count("get parts.json") == 1
        await watching.look()
        assert steps.count("get tally") == 2
        assert steps.count("get parts.json") == 1

    asyncio.run(scenario())


def test_a_job_that_failed_says_why_and_whether_it_may_be_tried_again():
    async def scenario() -> None:
        world = World()
        for retryable in (True, False):
            failure = Failure("gave_up" if retryable else "invalid_message", "why", retryable)
            await world.committer.fail("j", OUTPUT, failure, 1.0, None)
            seen = await observer(world).look()
            assert seen.error == failure
            assert seen.status == "failed"
            assert seen.state is (State.UNSEEN if retryable else State.ENDED)
            text = dict(lines(seen))
            assert ("again" in text["error"]) == retryable
            assert text["state"] == "failed"

    asyncio.run(scenario())


def test_lines_say_what_is_known_and_nothing_else():
    unseen = Progress(job_id="j", state=State.UNSEEN)
    assert [name for name, _ in lines(unseen)] == ["job", "state"]
    running = Progress(
        job_id="j", state=State.RUNNING, parts=4, parts_done=1, rows=1000, rows_done=250, rows_failed=3,
        seconds=100.0, rows_per_second=2.5, seconds_left=300.0,
    )  # fmt: skip
    assert dict(lines(running)) == {
        "job": "j",
        "state": "running",
        "parts": "1 of 4",
        "rows": "250 of 1000 (25.0%), 3 failed",
        "time": "1 min 40 s",
        "rate": "2.5 rows/s",
        "time left": "5 min 0 s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 0 s"),
        (3599.9, "1 h 0 min"),
        (5400, "1 h 30 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations_are_in_two_units(seconds, text):
    assert duration(seconds) == text
