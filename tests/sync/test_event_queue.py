"""The queue of S3 events: SQS by two servers, and the one in memory by the same rules."""

import asyncio
import time

import pytest

from adapters_sync.errors import QueueUnavailable, SettingsError
from adapters_sync.event_queue import MAX_POLL_SECONDS, EventMessage, connect_queue
from tests.sync import servers
from tests.sync.builders import FakeTime
from tests.sync.memory_queue import MemoryQueue

SERVERS = ("moto", pytest.param("ministack", marks=servers.NEEDS_MINISTACK))


@pytest.fixture(params=SERVERS)
def event_queue(request, make_event_queue):
    return make_event_queue(request.param)


@pytest.fixture(params=["memory", *SERVERS])
def with_queue(request, make_event_queue):
    """Run some work with a queue and the way to send to it."""
    server = None if request.param == "memory" else make_event_queue(request.param)

    def run(work):
        async def main():
            if server is None:
                queue = MemoryQueue(FakeTime())
                return await work(queue, queue.send)
            async with connect_queue(server.url) as queue:
                return await work(queue, server.send)

        return asyncio.run(main())

    return run


def test_a_message_is_received_once_and_gone_when_deleted(with_queue):
    async def work(queue, send):
        send("one", "two")
        messages = [*await queue.receive(1), *await queue.receive(1)]
        assert sorted(one.body for one in messages) == ["one", "two"]
        assert len({one.receipt for one in messages}) == 2
        await queue.delete(messages)
        assert await queue.receive(1) == []

    with_queue(work)


def test_ten_messages_come_at_most(with_queue):
    async def work(queue, send):
        send(*[f"{number}" for number in range(13)])
        first = await queue.receive(1)
        assert len(first) == 10
        return first + await queue.receive(1)

    assert sorted(int(one.body) for one in with_queue(work)) == [*range(13)]


def test_a_poll_ends_when_something_comes(with_queue):
    async def work(queue, send):
        started = time.monotonic()
        poll = asyncio.create_task(queue.receive(MAX_POLL_SECONDS))
        await asyncio.sleep(0.1)
        send("late")
        assert [one.body for one in await poll] == ["late"]
        return time.monotonic() - started

    assert with_queue(work) < MAX_POLL_SECONDS / 2


def test_a_poll_that_brings_nothing_lasts_its_time(event_queue):
    async def main():
        async with connect_queue(event_queue.url) as queue:
            started = time.monotonic()
            assert await queue.receive(1) == []
            return time.monotonic() - started

    assert asyncio.run(main()) > 0.9


def test_the_url_is_the_queues_own(with_queue):
    async def work(queue, send):
        return queue.url

    assert with_queue(work).startswith("http")


def failure(url, call):
    async def main():
        async with connect_queue(url) as queue:
            with pytest.raises(QueueUnavailable) as caught:
                await call(queue)
            return str(caught.value)

    return asyncio.run(main())


CALLS = {
    "receive": lambda queue: queue.receive(1),
    "delete": lambda queue: queue.delete([EventMessage("x", "receipt")]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_queue_that_is_not_there_is_unavailable(event_queue, call):
    event_queue.delete()
    assert "NonExistentQueue" in failure(event_queue.url, CALLS[call])


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_cannot_be_reached_is_unavailable(event_queue, monkeypatch, call):
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in failure(event_queue.url, CALLS[call])


def test_a_message_that_was_not_deleted_is_not_passed_over(event_queue, monkeypatch):
    async def failing(**kwargs):
        return {"Failed": [{"Id": "0", "Code": "InternalError", "SenderFault": False}]}

    async def delete(queue):
        monkeypatch.setattr(queue._client, "delete_message_batch", failing)
        await queue.delete([EventMessage("x", "receipt")])

    assert "InternalError" in failure(event_queue.url, delete)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("AWS_DEFAULT_REGION", None, "region"), ("AWS_ENDPOINT_URL_SQS", "nonsense", "nonsense")],
)
def test_what_no_client_can_be_made_with_is_a_mistake_in_settings(
    event_queue, monkeypatch, tmp_path, name, value, said
):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)

    async def main():
        async with connect_queue(event_queue.url):
            pass

    with pytest.raises(SettingsError, match=f"adapters_events_queue_url: .*{said}"):
        asyncio.run(main())


def test_without_a_url_there_is_no_queue():
    async def main():
        async with connect_queue(None) as queue:
            return queue

    assert asyncio.run(main()) is None
