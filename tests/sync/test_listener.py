"""The listener: hints are gathered and passed on, and nothing that a queue does ends it."""

import asyncio
import logging
from collections import Counter
from itertools import pairwise

import msgspec
import pytest

from adapters_sync.event_queue import MAX_POLL_SECONDS
from adapters_sync.events import EventOutcome
from adapters_sync.listener import Listener, listening
from adapters_sync.uris import S3Prefix
from tests.sync.builders import FakeTime
from tests.sync.events import from_s3
from tests.sync.memory_queue import MemoryQueue, gone

SOURCE = S3Prefix("bucket", "model/adapters/")
HINT = from_s3("bucket", "model/adapters/sql/adapter_config.json")
OTHER = from_s3("bucket", "model/config.json")
START = FakeTime().seconds


class Heard:
    """A listener with its queue and its time, and what it did."""

    def __init__(self, call_seconds=0.0, chance=1.0):
        self.time = FakeTime()
        self.queue = MemoryQueue(self.time, call_seconds)
        self.outcomes = Counter()
        self.wakes = []
        self.sleeps = []
        self.clock = msgspec.structs.replace(self.time.clock, random=lambda: chance, sleep=self.sleep)

    async def sleep(self, seconds):
        self.sleeps.append(seconds)
        await self.time.sleep(seconds)

    def wake(self):
        self.wakes.append(self.time.seconds - START)

    def count(self, outcome):
        self.outcomes[outcome] += 1

    def listen(self):
        """Listen until nothing more is to come."""

        async def main():
            listener = Listener(self.queue, SOURCE, self.wake, self.count, self.clock)
            task = asyncio.create_task(listener.run())
            await asyncio.wait_for(self.queue.idle.wait(), 10)
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
        return self


@pytest.fixture
def heard():
    return Heard()


def test_a_hint_is_passed_on_after_a_second_and_deleted(heard):
    heard.queue.send(HINT, after_seconds=50)
    heard.listen()
    assert heard.wakes == [51]
    assert heard.outcomes == {EventOutcome.HINT: 1}
    assert heard.queue.taken == {}
    assert heard.queue.polls[-1] == MAX_POLL_SECONDS


def test_what_comes_within_the_second_is_gathered_and_what_comes_later_is_not(heard):
    for at in (10, 10.2, 10.9, 30, 30.5):
        heard.queue.send(HINT, after_seconds=at)
    assert heard.listen().wakes == [pytest.approx(11.9), 31.5]


def test_events_without_end_wake_about_once_a_second():
    heard = Heard(call_seconds=0.02)
    for number in range(1000):
        heard.queue.send(HINT, after_seconds=number * 0.01)
    heard.listen()
    assert 8 <= len(heard.wakes) <= 11
    assert all(later - earlier >= 1 for earlier, later in pairwise(heard.wakes))
    assert heard.wakes[-1] >= 9.99
    assert heard.outcomes == {EventOutcome.HINT: 1000}


def test_other_keys_wake_nobody_and_are_deleted(heard):
    heard.queue.send(*[OTHER] * 25)
    heard.listen()
    assert heard.wakes == []
    assert heard.outcomes == {EventOutcome.OTHER: 25}
    assert heard.queue.taken == {}


def test_garbage_is_counted_and_deleted_and_said_once_a_minute(heard, caplog):
    for at in range(100):
        heard.queue.send("garbage", after_seconds=at)
    heard.queue.send(HINT, after_seconds=99)
    heard.queue.send("garbage", after_seconds=1000)
    with caplog.at_level(logging.WARNING):
        heard.listen()
    assert heard.outcomes == {EventOutcome.UNREADABLE: 101, EventOutcome.HINT: 1}
    assert heard.queue.taken == {}
    assert heard.wakes == [100]
    assert [record.messages for record in caplog.records] == [1, 60, 40]
    assert "garbage" not in caplog.text


def test_a_queue_that_does_not_answer_is_asked_again_ever_more_rarely(heard, caplog):
    heard.queue.trouble += [gone()] * 9
    heard.queue.send(HINT)
    with caplog.at_level(logging.WARNING):
        heard.listen()
    waits = [2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert [seconds for seconds in heard.sleeps if seconds] == waits
    assert heard.wakes == [sum(waits) + 1]
    assert len(caplog.records) == 9
    assert "NonExistentQueue" in caplog.records[0].reason


def test_half_of_the_wait_is_left_to_chance():
    heard = Heard(chance=0.0)
    heard.queue.trouble += [gone()] * 7
    assert [seconds for seconds in heard.listen().sleeps if seconds] == [1, 2, 4, 8, 16, 30, 30]


def test_after_an_answer_the_waits_begin_anew(heard):
    heard.queue.trouble += [gone(), gone(), gone(), None, gone()]
    heard.queue.send(OTHER)
    heard.listen()
    assert [seconds for seconds in heard.sleeps if seconds] == [2, 4, 8, 2]


def test_a_hint_is_passed_on_before_the_wait_when_the_queue_fails_after_it(heard):
    heard.queue.send(HINT, after_seconds=5)
    heard.queue.delete_trouble.append(gone())
    heard.listen()
    assert heard.wakes == [5]
    assert list(heard.queue.taken.values()) == [HINT], "it comes again, which does no harm"


def test_a_mistake_of_ours_does_not_end_it(heard, caplog):
    heard.queue.trouble.append(ZeroDivisionError())
    heard.queue.send(HINT)
    with caplog.at_level(logging.ERROR):
        heard.listen()
    assert heard.wakes == [2 + 1]
    assert caplog.records[0].exc_info


def test_the_end_of_the_block_breaks_a_poll_off(heard):
    async def main():
        async with listening(heard.queue, SOURCE, heard.wake, heard.count, heard.clock):
            await asyncio.wait_for(heard.queue.idle.wait(), 10)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert heard.queue.polls == [MAX_POLL_SECONDS]


def test_without_a_queue_nobody_listens(heard):
    async def main():
        async with listening(None, SOURCE, heard.wake, heard.count, heard.clock):
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
