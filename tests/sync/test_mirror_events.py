"""A mirror with a queue of S3 events: an upload is served in seconds, though the interval is an hour."""

import asyncio
from collections import Counter

import pytest

from adapters_sync import pace, reconcile
from adapters_sync.events import EventOutcome
from adapters_sync.layout import AdapterState, resolve, scan
from adapters_sync.options import Clock, MirrorOptions
from adapters_sync.reconcile import Mirror, open_mirror
from tests.sync.builders import World, adapter_files
from tests.sync.event_sender import WAYS
from tests.sync.events import from_s3
from tests.sync.memory_queue import MemoryQueue
from tests.sync.memory_s3 import MemoryBucket

HOUR = 3600.0
PATIENCE_SECONDS = 60


@pytest.fixture
def s3(make_bucket, tmp_path, monkeypatch):
    """A server's, and a mirror that rests less between its passes."""
    monkeypatch.setattr(pace, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(reconcile, "LEAST_SECONDS", 0.1)
    return World(make_bucket("moto"), tmp_path)


class Run:
    """A mirror at work; each of `steps` is taken after the first pass that finds its condition true."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.stop = asyncio.Event()
        self.passes = []
        self.outcomes = Counter()

    def on_pass(self, report):
        self.passes.append(report)
        while self.steps and self.steps[0][0]():
            self.steps.pop(0)[1]()
        if not self.steps:
            self.stop.set()

    def on_event(self, outcome):
        self.outcomes[outcome] += 1

    async def until_done(self, mirror):
        await asyncio.wait_for(mirror.run(self.stop, self.on_pass, self.on_event), PATIENCE_SECONDS)
        return self


def at_work(world, queue_url, *steps, **options):
    """Run the real thing until all steps are taken."""

    async def main():
        told = MirrorOptions(**({"interval_seconds": HOUR} | options))
        run = Run(*steps)
        async with open_mirror(world.bucket.uri, world.adapters_dir, told, queue_url) as mirror:
            return await run.until_done(mirror)

    return asyncio.run(main())


def always():
    return True


def served(world, name):
    return lambda: resolve(world.adapters_dir, name) is not None


def nothing():
    pass


@pytest.mark.parametrize("way", WAYS)
def test_an_upload_and_its_removal_are_seen_at_once_whatever_way_events_come(s3, event_queue, way):
    event_queue.hear_of(s3.bucket, way)
    s3.bucket.put_adapter("stays", fill=2)

    run = at_work(
        s3,
        event_queue.url,
        (always, lambda: s3.bucket.put_adapter("sql")),
        (served(s3, "sql"), lambda: s3.bucket.remove_adapter("sql")),
        (lambda: not served(s3, "sql")(), nothing),
        settle_seconds=0.3,
    )
    assert run.outcomes[EventOutcome.HINT] >= 2
    assert run.outcomes[EventOutcome.UNREADABLE] == 0
    assert [one.name for one in scan(s3.adapters_dir)] == ["stays"]


def test_a_plain_upload_is_served_after_the_settle_time(s3, event_queue):
    event_queue.hear_of(s3.bucket)

    def upload():
        for path, data in adapter_files().items():
            s3.bucket.put(f"sql/{path}", data)

    run = at_work(s3, event_queue.url, (always, upload), (served(s3, "sql"), nothing), settle_seconds=1)
    states = [one.state for report in run.passes for one in report.adapters]
    assert states[-1] is AdapterState.READY
    assert set(states[:-1]) == {AdapterState.PENDING}


def test_garbage_is_cleared_away_and_does_not_hide_what_comes_after(s3, event_queue):
    event_queue.hear_of(s3.bucket)
    event_queue.send("garbage", "[" * 10_000, '{"inputs": "x"}')
    run = at_work(
        s3, event_queue.url, (always, lambda: s3.bucket.put_adapter("sql")), (served(s3, "sql"), nothing)
    )
    assert run.outcomes[EventOutcome.UNREADABLE] == 3
    assert run.outcomes[EventOutcome.OTHER] == 1, "S3's test of the queue"
    assert event_queue.left() <= 3, "at most the upload's own, the last of which may be on their way"


def test_a_queue_that_is_not_there_leaves_the_mirror_to_its_interval(s3, event_queue, caplog):
    event_queue.delete()
    steps = (always, lambda: s3.bucket.put_adapter("sql")), (served(s3, "sql"), nothing)
    at_work(s3, event_queue.url, *steps, interval_seconds=1)
    assert "the queue of S3 events cannot be read" in caplog.messages


def in_memory(world, queue, *steps):
    """The same with a bucket, a queue and a clock in memory: only sleeps of up to a second ever end."""

    async def sleep(seconds):
        await world.time.sleep(seconds) if seconds <= 1 else await asyncio.Event().wait()

    async def main():
        clock = Clock(now=world.time.read, monotonic=world.time.read, sleep=sleep, random=lambda: 0.5)
        run = Run(*steps)
        async with world.bucket.connect() as remote:
            mirror = Mirror(
                remote, world.adapters_dir, MirrorOptions(interval_seconds=HOUR), clock, events=queue
            )
            return await run.until_done(mirror)

    return asyncio.run(main())


@pytest.fixture
def queue(world):
    return MemoryQueue(world.time, call_seconds=0.02)


@pytest.fixture
def listings(monkeypatch):
    """One item for each listing."""
    found, real = [], MemoryBucket.list

    async def counted(self):
        found.append(self)
        return await real(self)

    monkeypatch.setattr(MemoryBucket, "list", counted)
    return found


@pytest.mark.parametrize("seconds", [0, 3])
def test_a_burst_of_events_is_a_few_listings(world, queue, listings, seconds):
    def upload():
        for number in range(500):
            key = f"{world.bucket.source.prefix}a{number}/adapter_config.json"
            event = from_s3(world.bucket.source.bucket, key)
            queue.send(event, after_seconds=seconds * number / 500)
        world.bucket.put_adapter("a1")

    run = in_memory(world, queue, (always, upload), (queue.idle.is_set, nothing))
    assert run.outcomes == {EventOutcome.HINT: 500}
    assert 2 <= len(listings) <= 6
    assert resolve(world.adapters_dir, "a1") is not None
    assert queue.taken == {}
