"""The real client of the queue, and what each fault on the way does to it."""

import asyncio

import pytest

from tests.faults.kinds import Fault
from tests.faults.plans import Rule
from worker.errors import QueueUnavailable
from worker.transport.clients import Clients
from worker.transport.lease import LeaseKeeper
from worker.transport.queue import Outcome, SqsQueue

REFUSALS = [Fault.THROTTLE, Fault.ERROR, Fault.UNAVAILABLE, Fault.DROP]
LOST_ANSWERS = [Fault.LATE_ERROR, Fault.LATE_DROP]
FOREVER = 1000


def play(url, scenario, *, max_attempts=2, visibility_seconds=30):
    async def at_once(_):
        pass

    async def main():
        async with Clients(max_attempts=max_attempts) as clients:
            await scenario(SqsQueue(clients, url, visibility_seconds=visibility_seconds, sleep=at_once))

    asyncio.run(asyncio.wait_for(main(), 60))


async def taken(queue, count=1):
    """So many messages, sent and received."""
    for number in range(count):
        await queue.send(str(number))
    found = []
    while len(found) < count:
        found += await queue.receive(10, 1)
    return found


async def left(queue):
    info = await queue.describe()
    return info.messages + info.in_flight


@pytest.mark.parametrize("fault", [*REFUSALS, Fault.DELAY])
def test_fault_that_passes_is_not_noticed(fault, queue_url, proxy):
    async def scenario(queue):
        (delivery,) = await taken(queue)
        assert await queue.extend([delivery.receipt], 30) == Outcome()
        assert await queue.delete([delivery.receipt]) == Outcome()
        assert await left(queue) == 0

    operations = [
        "SendMessage", "ReceiveMessage", "ChangeMessageVisibilityBatch", "DeleteMessageBatch",
        "GetQueueAttributes",
    ]  # fmt: skip
    proxy.plan.rules += [Rule(fault, operation) for operation in operations]
    play(queue_url, scenario)
    assert proxy.injected == {fault: 5}


@pytest.mark.parametrize("fault", LOST_ANSWERS)
def test_what_was_done_though_its_answer_was_lost_may_be_done_again(fault, queue_url, proxy):
    async def scenario(queue):
        first, second = await taken(queue, 2)
        assert await queue.extend([first.receipt], 30) == Outcome()
        await queue.release(second.receipt, 20)
        assert await queue.delete([first.receipt]) == Outcome()
        assert await left(queue) == 1

    proxy.plan.rules += [
        Rule(fault, operation) for operation in ("ChangeMessageVisibilityBatch", "DeleteMessageBatch")
    ]
    play(queue_url, scenario)
    assert proxy.injected == {fault: 2}


@pytest.mark.parametrize("fault", LOST_ANSWERS)
def test_release_whose_answer_was_lost_is_no_error(fault, queue_url, proxy):
    """The second try finds the message visible, or with somebody else: it is back."""

    async def scenario(queue):
        (delivery,) = await taken(queue)
        proxy.plan.rules.append(Rule(fault, "ChangeMessageVisibilityBatch"))
        await queue.release(delivery.receipt, 0)
        (again,) = await queue.receive(1, 0)
        assert again.receive_count == 2

    play(queue_url, scenario)


def test_send_whose_answer_was_lost_is_two_messages(queue_url, proxy):
    """Hence a job's own id, not its message, says which job it is."""

    async def scenario(queue):
        await queue.send("x")
        found = await queue.receive(10, 0) + await queue.receive(10, 0)
        assert len({one.message_id for one in found}) == 2

    proxy.plan.rules.append(Rule(Fault.LATE_ERROR, "SendMessage"))
    play(queue_url, scenario)


def test_messages_whose_receive_was_lost_come_back_when_their_visibility_ends(queue_url, proxy):
    async def scenario(queue):
        await queue.send("x")
        with pytest.raises(QueueUnavailable):
            await queue.receive(1, 0)
        (delivery,) = await queue.receive(1, 20)
        assert delivery.receive_count == 2

    proxy.plan.rules.append(Rule(Fault.LATE_DROP, "ReceiveMessage"))
    play(queue_url, scenario, max_attempts=1, visibility_seconds=2)


@pytest.mark.parametrize("fault", [*REFUSALS, *LOST_ANSWERS])
def test_fault_that_lasts_is_unavailable(fault, queue_url, proxy):
    async def scenario(queue):
        deliveries = await taken(queue, 2)
        receipts = [one.receipt for one in deliveries]
        for operation in (
            "SendMessage", "ReceiveMessage", "ChangeMessageVisibilityBatch", "DeleteMessageBatch",
            "GetQueueAttributes",
        ):  # fmt: skip
            proxy.plan.rules.append(Rule(fault, operation, times=FOREVER))
        for call in (queue.send("x"), queue.receive(1, 0), queue.release(receipts[0], 5), queue.describe()):
            with pytest.raises(QueueUnavailable):
                await call
        assert set((await queue.extend(receipts, 30)).failed) == set(receipts)
        assert set((await queue.delete(receipts)).failed) == set(receipts)

    play(queue_url, scenario, max_attempts=1)


def test_entry_that_failed_in_a_batch_is_tried_again_alone(queue_url, proxy):
    async def scenario(queue):
        deliveries = await taken(queue, 5)
        receipts = [one.receipt for one in deliveries]
        outcome = await queue.extend(receipts, 30)
        assert list(outcome.failed.values()) == ["InternalError"]
        assert await queue.delete(receipts) == Outcome()
        assert await left(queue) == 0

    proxy.plan.rules += [
        Rule(Fault.PARTIAL, "ChangeMessageVisibilityBatch"),
        Rule(Fault.PARTIAL, "DeleteMessageBatch"),
        Rule(Fault.LATE_PARTIAL, "DeleteMessageBatch"),
    ]
    play(queue_url, scenario)
    assert proxy.injected == {Fault.PARTIAL: 2, Fault.LATE_PARTIAL: 1}
    assert proxy.calls["DeleteMessageBatch"] == 3


def test_message_given_to_two_is_lost_to_the_first_at_its_next_heartbeat(queue_url, proxy):
    async def scenario(queue):
        async with LeaseKeeper(queue, 9) as keeper:
            await queue.send("x")
            first, second = [keeper.open((await queue.receive(1, 0))[0]) for _ in range(2)]
            await asyncio.wait_for(first.wait_lost(), 20)
            assert not second.lost
            await second.ack()
            assert await left(queue) == 0

    proxy.plan.rules.append(Rule(Fault.DUPLICATE, "ReceiveMessage"))
    play(queue_url, scenario, visibility_seconds=9)


def test_ack_by_a_stale_receipt_leaves_the_message_to_its_new_holder(queue_url, proxy):
    async def scenario(queue):
        async with LeaseKeeper(queue, 30) as keeper:
            await queue.send("x")
            first, second = [keeper.open((await queue.receive(1, 0))[0]) for _ in range(2)]
            await first.ack()  # the service says that it deleted it
            assert await left(queue) == 1
            await second.ack()
            assert await left(queue) == 0

    proxy.plan.rules.append(Rule(Fault.DUPLICATE, "ReceiveMessage"))
    play(queue_url, scenario)


def test_lease_outlives_heartbeats_that_fail_now_and_then(queue_url, proxy):
    async def scenario(queue):
        async with LeaseKeeper(queue, 12) as keeper:
            (delivery,) = await taken(queue)
            lease = keeper.open(delivery)
            proxy.plan.rules += [
                Rule(fault, "ChangeMessageVisibilityBatch")
                for fault in (Fault.THROTTLE, Fault.LATE_ERROR, Fault.PARTIAL, Fault.DROP, Fault.LATE_PARTIAL)
            ]
            while proxy.injected.total() < 5:  # noqa: ASYNC110 (the proxy has a loop of its own)
                await asyncio.sleep(0.05)
            assert not lease.lost
            assert keeper.stats.extend_failures > 0
            await lease.ack()

    play(queue_url, scenario, max_attempts=1, visibility_seconds=12)
