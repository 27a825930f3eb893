"""What every queue keeps: SQS by two servers, and the double.

Where a server departs from SQS, the test says so, and fails when it no longer does.
"""

import asyncio

import pytest

from tests.sync import servers
from worker.errors import QueueRefused
from worker.transport.lease import LeaseKeeper
from worker.transport.queue import SqsQueue

WORLDS = {"memory": (), "moto": (), "ministack": servers.NEEDS_MINISTACK}


def worlds(*names: str, **departures: str) -> pytest.MarkDecorator:
    """Run the test in the worlds `names`. `departures`: those that break this rule of SQS, and how."""
    kinds = (AssertionError, QueueRefused)
    broken = {name: [pytest.mark.xfail(reason=how, raises=kinds)] for name, how in departures.items()}
    params = [pytest.param(name, marks=[*WORLDS[name], *broken.get(name, [])]) for name in names]
    return pytest.mark.parametrize("run_queue", params, indirect=True)


def departs(**departures: str) -> pytest.MarkDecorator:
    return worlds(*WORLDS, **departures)


def test_message_arrives_with_its_attributes(run_queue):
    async def scenario(world):
        sent_id = await world.queue.send("hëllo", {"adapter": "sql", "n": "2"})
        [delivery] = await world.queue.receive(10, 0)
        assert (delivery.message_id, delivery.body) == (sent_id, "hëllo")
        assert delivery.attributes == {"adapter": "sql", "n": "2"}
        assert delivery.receive_count == 1
        assert delivery.sent_at >= 1_000_000

    run_queue(scenario)


def test_empty_queue_gives_nothing(run_queue):
    async def scenario(world):
        assert await world.queue.receive(10, 0) == []

    run_queue(scenario)


def test_receive_never_exceeds_its_limit(run_queue):
    async def scenario(world):
        for number in range(5):
            await world.queue.send(str(number))
        first = await world.queue.receive(3, 0)
        rest = await world.queue.receive(10, 0)
        assert len(first) == 3
        assert sorted(delivery.body for delivery in first + rest) == ["0", "1", "2", "3", "4"]

    run_queue(scenario)


def test_long_poll_brings_a_message_sent_meanwhile(run_queue):
    async def scenario(world):
        poll = asyncio.create_task(world.queue.receive(1, 5))
        await world.pass_time(0.2)
        assert not poll.done()
        await world.queue.send("late")
        [delivery] = await poll
        assert delivery.body == "late"

    run_queue(scenario)


def test_message_in_flight_is_not_delivered_again(run_queue):
    async def scenario(world):
        await world.queue.send("once")
        assert await world.queue.receive(1, 0)
        assert await world.queue.receive(1, 0) == []

    run_queue(scenario)


def test_visibility_timeout_brings_a_message_back_with_a_new_receipt(run_queue):
    async def scenario(world):
        await world.queue.send("again")
        [first] = await world.queue.receive(1, 0)
        await world.pass_time(1.15)
        [second] = await world.queue.receive(1, 0)
        assert second.message_id == first.message_id
        assert second.receipt != first.receipt
        assert second.receive_count == 2
        assert second.sent_at == first.sent_at

    run_queue(scenario, visibility_seconds=1)


def test_extended_message_stays_invisible(run_queue):
    async def scenario(world):
        await world.queue.send("kept")
        [delivery] = await world.queue.receive(1, 0)
        outcome = await world.queue.extend([delivery.receipt], 30)
        await world.pass_time(1.15)
        assert not outcome.lost
        assert not outcome.failed
        assert await world.queue.receive(1, 0) == []

    run_queue(scenario, visibility_seconds=1)


def test_batches_of_more_than_ten_are_all_served(run_queue):
    async def scenario(world):
        for number in range(23):
            await world.queue.send(str(number))
        receipts = []
        while batch := await world.queue.receive(10, 0):
            receipts += [delivery.receipt for delivery in batch]
        assert len(receipts) == 23
        extended = await world.queue.extend([*receipts, "no-such-receipt"], 60)
        assert extended.lost == {"no-such-receipt"}
        deleted = await world.queue.delete(receipts)
        assert not deleted.lost
        assert not deleted.failed
        info = await world.queue.describe()
        assert (info.messages, info.in_flight) == (0, 0)

    run_queue(scenario)


def test_no_receipts_is_no_call(run_queue):
    async def scenario(world):
        assert not (await world.queue.extend([], 30)).failed
        assert not (await world.queue.delete([])).failed

    run_queue(scenario)


def test_released_message_is_visible_at_once(run_queue):
    async def scenario(world):
        await world.queue.send("back")
        [first] = await world.queue.receive(1, 0)
        await world.queue.release(first.receipt, 0)
        [second] = await world.queue.receive(1, 0)
        assert second.receive_count == 2

    run_queue(scenario)


def test_release_with_delay_hides_the_message_that_long(run_queue):
    async def scenario(world):
        await world.queue.send("back")
        [delivery] = await world.queue.receive(1, 0)
        await world.queue.release(delivery.receipt, 1)
        assert await world.queue.receive(1, 0) == []
        await world.pass_time(1.15)
        assert len(await world.queue.receive(1, 0)) == 1

    run_queue(scenario)


def test_release_of_a_lost_receipt_is_no_error(run_queue):
    async def scenario(world):
        await world.queue.release("no-such-receipt", 0)

    run_queue(scenario)


def test_deleted_message_never_returns(run_queue):
    async def scenario(world):
        await world.queue.send("done")
        [delivery] = await world.queue.receive(1, 0)
        assert not (await world.queue.delete([delivery.receipt])).lost
        await world.pass_time(1.15)
        assert await world.queue.receive(1, 0) == []

    run_queue(scenario, visibility_seconds=1)


def test_deleting_twice_is_no_error(run_queue):
    async def scenario(world):
        await world.queue.send("done")
        [delivery] = await world.queue.receive(1, 0)
        await world.queue.delete([delivery.receipt])
        again = await world.queue.delete([delivery.receipt])
        assert not again.failed
        # Which of the two is said is up to the service.
        assert again.lost == ({delivery.receipt} if run_queue.kind == "ministack" else set())

    run_queue(scenario)


def test_deleted_message_cannot_be_extended(run_queue):
    async def scenario(world):
        await world.queue.send("done")
        [delivery] = await world.queue.receive(1, 0)
        await world.queue.delete([delivery.receipt])
        assert (await world.queue.extend([delivery.receipt], 30)).lost == {delivery.receipt}

    run_queue(scenario)


def test_message_moves_to_dead_letters_after_its_last_receive(run_queue):
    async def scenario(world):
        sent_id = await world.queue.send("poison", {"adapter": "sql"})
        for count in (1, 2):
            [delivery] = await world.queue.receive(1, 0)
            assert delivery.receive_count == count
            await world.queue.release(delivery.receipt, 0)
        assert await world.queue.receive(1, 0) == []
        [dead] = await world.dead_letters.receive(1, 0)
        assert (dead.message_id, dead.body, dead.attributes) == (sent_id, "poison", {"adapter": "sql"})

    run_queue(scenario, max_receives=2)


def test_description_tells_settings_and_counts(run_queue):
    async def scenario(world):
        for number in range(3):
            await world.queue.send(str(number))
        await world.queue.receive(1, 0)
        info = await world.queue.describe()
        assert (info.visibility_timeout_seconds, info.max_receive_count) == (45, 7)
        assert (info.messages, info.in_flight) == (2, 1)
        assert info.dead_letter_arn.startswith("arn:aws:sqs:")
        plain = await world.dead_letters.describe()
        assert (plain.max_receive_count, plain.dead_letter_arn) == (None, None)

    run_queue(scenario, visibility_seconds=45, max_receives=7)


def test_group_id_is_taken_by_a_standard_queue(run_queue):
    async def scenario(world):
        await world.queue.send("fair", group_id="tenant")
        assert len(await world.queue.receive(1, 0)) == 1

    run_queue(scenario)


KEEPS_RECEIPTS = "goes on taking a receipt after the message was received again"


@departs(moto=KEEPS_RECEIPTS)
def test_stale_receipt_deletes_nothing(run_queue):
    async def scenario(world):
        await world.queue.send("again")
        [first] = await world.queue.receive(1, 0)
        await world.pass_time(1.15)
        [second] = await world.queue.receive(1, 0)
        assert (await world.queue.delete([first.receipt])).lost == {first.receipt}
        await world.queue.release(second.receipt, 0)
        assert len(await world.queue.receive(1, 0)) == 1

    run_queue(scenario, visibility_seconds=1)


@departs(moto=KEEPS_RECEIPTS)
def test_stale_receipt_changes_no_visibility(run_queue):
    async def scenario(world):
        await world.queue.send("again")
        [first] = await world.queue.receive(1, 0)
        await world.pass_time(1.15)
        await world.queue.receive(1, 0)
        assert (await world.queue.extend([first.receipt], 60)).lost == {first.receipt}
        await world.queue.release(first.receipt, 0)
        assert await world.queue.receive(1, 0) == []

    run_queue(scenario, visibility_seconds=1)


NEVER_LOOKS = "does not look whether the message is in flight"


@departs(moto=NEVER_LOOKS, ministack=NEVER_LOOKS)
def test_message_visible_again_cannot_be_extended(run_queue):
    async def scenario(world):
        await world.queue.send("again")
        [delivery] = await world.queue.receive(1, 0)
        await world.pass_time(1.15)
        assert (await world.queue.extend([delivery.receipt], 60)).lost == {delivery.receipt}

    run_queue(scenario, visibility_seconds=1)


@departs(
    moto="counts the 12 h from when the message was sent, and fails the whole batch",
    ministack="has no limit of 12 h",
)
def test_visibility_never_passes_twelve_hours(run_queue):
    async def scenario(world):
        await world.queue.send("long")
        [delivery] = await world.queue.receive(1, 0)
        assert not (await world.queue.extend([delivery.receipt], 43_200)).lost
        await world.pass_time(1)
        assert (await world.queue.extend([delivery.receipt], 43_200)).lost

    run_queue(scenario)


servers_only = worlds("moto", "ministack")
"""The double has neither FIFO queues nor another queue that could be missing."""


@servers_only
def test_fifo_queue_takes_equal_messages_of_a_group(run_queue):
    async def scenario(world):
        queue = await world.new_fifo()
        await queue.send("same", group_id="tenant")
        await queue.send("same", group_id="tenant")
        assert len(await queue.receive(10, 0)) == 2

    run_queue(scenario)


@servers_only
def test_missing_queue_is_refused(run_queue):
    async def scenario(world):
        missing = SqsQueue(world.queue._clients, world.queue._url + "-missing")
        with pytest.raises(QueueRefused):
            await missing.receive(1, 0)
        with pytest.raises(QueueRefused):
            await missing.extend(["receipt"], 30)
        with pytest.raises(QueueRefused):
            await missing.delete(["receipt"])
        with pytest.raises(QueueRefused):
            await missing.send("body")
        with pytest.raises(QueueRefused):
            await missing.describe()

    run_queue(scenario)


@servers_only
def test_visibility_asked_for_at_receive_wins_over_the_queues_own(run_queue):
    async def scenario(world):
        short = SqsQueue(world.queue._clients, world.queue._url, visibility_seconds=1)
        await short.send("soon")
        assert await short.receive(1, 0)
        await world.pass_time(1.15)
        assert len(await short.receive(1, 0)) == 1

    run_queue(scenario)


@servers_only
def test_heartbeat_keeps_a_message_of_a_real_queue(run_queue):
    async def scenario(world):
        await world.queue.send("slow work")
        async with LeaseKeeper(world.queue, 1) as keeper:
            lease = keeper.open((await world.queue.receive(1, 0))[0])
            await world.pass_time(1.2)
            assert await world.queue.receive(1, 0) == []
            await lease.ack()
            assert keeper.stats.extended >= 2
        info = await world.queue.describe()
        assert (info.messages, info.in_flight) == (0, 0)

    run_queue(scenario, visibility_seconds=1)
