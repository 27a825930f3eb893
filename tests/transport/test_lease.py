"""Leases, with every race forced on a clock that stands still until told."""

import asyncio

import pytest

from worker.errors import LeaseLost, QueueRefused, QueueUnavailable
from worker.transport.lease import LeaseKeeper, LeaseState
from worker.transport.memory import ManualClock, MemoryQueue
from worker.transport.queue import Outcome

VISIBILITY = 30


class Wire:
    """A MemoryQueue behind a wire that can delay, fail and count calls."""

    def __init__(self, queue: MemoryQueue) -> None:
        self.queue = queue
        self.calls: list[tuple[str, int, int]] = []
        self.fail_next = 0
        self.fail_deletes = 0
        self.only_fail: set[str] | None = None
        self.broken: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()

    async def _pass(self) -> None:
        self.reached.set()
        if self.gate is not None:
            await self.gate.wait()

    async def extend(self, receipts, seconds):
        self.calls.append(("extend", len(receipts), seconds))
        if self.broken:
            raise self.broken
        if self.fail_next:
            self.fail_next -= 1
            failing = [receipt for receipt in receipts if self.only_fail is None or receipt in self.only_fail]
            rest = await self.queue.extend([r for r in receipts if r not in failing], seconds)
            return Outcome(rest.lost, dict.fromkeys(failing, "Throttled"))
        outcome = await self.queue.extend(receipts, seconds)
        await self._pass()
        return outcome

    async def delete(self, receipts):
        self.calls.append(("delete", len(receipts), 0))
        if self.fail_deletes:
            self.fail_deletes -= 1
            return Outcome(failed=dict.fromkeys(receipts, "Throttled"))
        outcome = await self.queue.delete(receipts)
        await self._pass()
        return outcome

    async def release(self, receipt, delay_seconds):
        self.calls.append(("release", 1, delay_seconds))
        if self.broken:
            raise self.broken
        await self.queue.release(receipt, delay_seconds)

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


class World:
    def __init__(self, visibility: int) -> None:
        self.clock = ManualClock(1000.0)
        self.queue = MemoryQueue(visibility_seconds=visibility, clock=self.clock, sleep=self.clock.sleep)
        self.wire = Wire(self.queue)
        self.keeper = LeaseKeeper(self.wire, visibility, clock=self.clock, sleep=self.clock.sleep)

    async def leases(self, count: int):
        for number in range(count):
            await self.queue.send(str(number))
        found = []
        while len(found) < count:
            found += [self.keeper.open(delivery) for delivery in await self.queue.receive(10, 0)]
        return found

    async def visible(self) -> int:
        return (await self.queue.describe()).messages


def play(scenario, visibility: int = VISIBILITY) -> None:
    async def main() -> None:
        world = World(visibility)
        async with world.keeper:
            await scenario(world)
        stats = world.keeper.stats
        assert stats.opened == stats.acked + stats.released + stats.lost, "every lease ends exactly once"

    asyncio.run(asyncio.wait_for(main(), 30))


def test_open_lease_outlives_many_visibility_timeouts():
    async def scenario(world):
        [lease] = await world.leases(1)
        await world.clock.advance(20 * VISIBILITY)
        assert not lease.lost
        assert await world.visible() == 0
        await lease.ack()
        assert world.keeper.stats.acked == 1

    play(scenario)


def test_all_leases_share_one_heartbeat_every_third_of_the_visibility():
    async def scenario(world):
        leases = await world.leases(25)
        await world.clock.advance(10.5)
        assert 1 <= world.wire.count("extend") <= 2
        assert world.wire.calls[0] == ("extend", 25, VISIBILITY)
        assert world.keeper.stats.extended >= 25
        for lease in leases:
            await lease.ack()

    play(scenario)


def test_acked_message_is_gone_and_its_heartbeat_over():
    async def scenario(world):
        [lease] = await world.leases(1)
        await lease.ack()
        await world.clock.advance(100)
        assert world.wire.count("extend") == 0
        assert await world.queue.receive(1, 0) == []
        assert not lease.lost

    play(scenario)


def test_released_message_comes_back_after_its_delay():
    async def scenario(world):
        [lease] = await world.leases(1)
        await lease.release(40)
        await world.clock.advance(39)
        assert await world.visible() == 0
        await world.clock.advance(2)
        assert await world.visible() == 1

    play(scenario)


@pytest.mark.parametrize("first", ["ack", "release"])
@pytest.mark.parametrize("second", ["ack", "release"])
def test_lease_ends_once(first, second):
    async def scenario(world):
        [lease] = await world.leases(1)
        await getattr(lease, first)()
        with pytest.raises(AssertionError, match=r"is (acked|released)"):
            await getattr(lease, second)()

    play(scenario)


def test_delivery_is_opened_once():
    async def scenario(world):
        [lease] = await world.leases(1)
        with pytest.raises(AssertionError, match="kept already"):
            world.keeper.open(lease.delivery)

    play(scenario)


def test_lost_lease_is_never_acked():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.fail_next = 1000
        await world.clock.advance(VISIBILITY + 1)
        assert lease.lost
        for _ in range(2):
            with pytest.raises(LeaseLost):
                await lease.ack()
        with pytest.raises(LeaseLost):
            await lease.release()
        assert world.wire.count("delete") == 0
        assert world.wire.count("release") == 0
        assert await world.visible() == 1

    play(scenario)


def test_lease_whose_receipt_went_stale_is_lost_at_the_next_heartbeat():
    async def scenario(world):
        [lease, other] = await world.leases(2)
        await world.queue.release(lease.delivery.receipt, 0)
        waiting = asyncio.create_task(lease.wait_lost())
        await world.clock.advance(11)
        assert waiting.done()
        assert lease.lost
        assert not other.lost
        await other.ack()

    play(scenario)


def test_failed_extension_is_tried_again_soon_and_for_that_lease_only():
    async def scenario(world):
        [lease, other] = await world.leases(2)
        world.wire.fail_next = 2
        world.wire.only_fail = {lease.delivery.receipt}
        await world.clock.advance(13)
        assert [call[1] for call in world.wire.calls][:3] == [2, 1, 1]
        assert world.keeper.stats.extend_failures == 2
        assert not lease.lost
        await world.clock.advance(15)
        assert not lease.lost
        await lease.ack()
        await other.ack()

    play(scenario)


def test_lease_is_lost_before_its_message_is_visible_again():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.fail_next = 1000
        while not lease.lost:
            await world.clock.advance(0.5)
        assert await world.visible() == 0
        assert world.clock() >= 1000 + VISIBILITY * 0.9

    play(scenario)


def test_lease_ends_by_the_clock_while_a_heartbeat_hangs():
    async def scenario(world):
        [lease] = await world.leases(1)
        waiting = asyncio.create_task(lease.wait_lost())
        world.wire.gate = asyncio.Event()
        await world.clock.advance(VISIBILITY)
        assert world.wire.reached.is_set()
        assert waiting.done()
        with pytest.raises(LeaseLost):
            await lease.ack()

    play(scenario)


def test_answer_of_a_late_heartbeat_does_not_raise_the_dead():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.gate = asyncio.Event()
        await world.clock.advance(VISIBILITY)
        assert lease.lost
        world.wire.gate.set()
        await world.clock.advance(1)
        assert lease.lost
        assert lease.state is LeaseState.LOST

    play(scenario)


def test_lease_seen_as_lost_stays_lost_when_the_loop_was_blocked():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.gate = asyncio.Event()
        await world.clock.advance(11)
        world.clock._now += VISIBILITY - 13  # past the old deadline, not past the one the answer would set
        assert lease.lost
        world.wire.gate.set()
        await world.clock.advance(0)  # the heartbeat's answer is read before any lease is looked over
        assert lease.lost

    play(scenario)


def test_overdue_lease_is_lost_even_before_the_keeper_ran():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.clock._now += VISIBILITY  # as when the event loop was blocked
        assert lease.lost
        with pytest.raises(LeaseLost):
            await lease.ack()
        assert world.wire.count("delete") == 0

    play(scenario)


def test_blocked_event_loop_shows_as_lag():
    async def scenario(world):
        [lease] = await world.leases(1)
        await world.clock.advance(0)
        world.clock._now += 12
        await world.clock.advance(1)
        assert 2 <= world.keeper.lag <= 8
        await lease.ack()
        await world.clock.advance(11)
        assert world.keeper.lag == 0

    play(scenario)


def test_ack_wins_over_a_heartbeat_that_finds_the_message_gone():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.gate = asyncio.Event()
        acking = asyncio.create_task(lease.ack())
        await world.wire.reached.wait()  # deleted; the answer is on its way
        await world.clock.advance(11)
        assert world.wire.count("extend") >= 1
        world.wire.gate.set()
        await acking
        assert world.keeper.stats.acked == 1
        assert not lease.lost

    play(scenario)


def test_release_waits_for_the_heartbeat_on_its_way():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.gate = asyncio.Event()
        await world.clock.advance(11)
        releasing = asyncio.create_task(lease.release(0))
        await world.clock.advance(0)
        assert world.wire.count("release") == 0
        world.wire.gate.set()
        await releasing
        await world.clock.advance(15)
        assert await world.visible() == 1, "no heartbeat may hide it again"

    play(scenario)


def test_ack_of_a_message_somebody_else_received_is_a_lost_lease():
    async def scenario(world):
        [lease] = await world.leases(1)
        await world.queue.release(lease.delivery.receipt, 0)
        await world.queue.receive(1, 0)
        with pytest.raises(LeaseLost):
            await lease.ack()
        assert lease.lost
        await world.clock.advance(VISIBILITY)
        assert await world.visible() == 1

    play(scenario)


def test_failed_ack_leaves_the_lease_open_to_try_again():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.fail_deletes = 1
        with pytest.raises(QueueUnavailable):
            await lease.ack()
        await world.clock.advance(3 * VISIBILITY)
        assert not lease.lost
        await lease.ack()
        assert await world.queue.receive(1, 0) == []

    play(scenario)


def test_cancelled_ack_leaves_the_lease_open():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.gate = asyncio.Event()
        acking = asyncio.create_task(lease.ack())
        await world.wire.reached.wait()
        acking.cancel()
        await asyncio.wait([acking])
        assert lease.state is LeaseState.OPEN
        await lease.release()

    play(scenario)


def test_release_without_a_queue_is_a_release_still():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.broken = QueueUnavailable("down")
        await lease.release()
        stats = world.keeper.stats
        assert (stats.released, stats.release_failures) == (1, 1)
        await world.clock.advance(VISIBILITY)
        assert await world.visible() == 1

    play(scenario)


def test_visibility_is_never_asked_for_beyond_twelve_hours():
    async def scenario(world):
        [lease] = await world.leases(1)
        await world.clock.advance(43_000)
        assert not lease.lost
        while not lease.lost:
            await world.clock.advance(3)
        held = world.clock() - 1000
        assert held < 43_200
        assert 0 < world.wire.calls[-1][2] < 3600
        assert all(seconds == 3600 for _, _, seconds in world.wire.calls[:-1])
        assert await world.visible() == 0, "lost before the message is visible"
        with pytest.raises(LeaseLost):
            await lease.ack()

    play(scenario, visibility=3600)


def test_broken_heartbeat_is_told_to_whoever_waits():
    async def scenario(world):
        [lease] = await world.leases(1)
        waiting = asyncio.create_task(world.keeper.wait())
        world.wire.broken = QueueRefused("access denied")
        await world.clock.advance(11)
        with pytest.raises(QueueRefused):
            await waiting
        await world.clock.advance(VISIBILITY)
        assert lease.lost, "leases end by the clock without heartbeats"

    play(scenario)


def test_release_goes_through_after_the_heartbeat_broke():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.broken = QueueRefused("access denied")
        await world.clock.advance(11)
        world.wire.broken = None
        await lease.release()
        assert await world.visible() == 1

    play(scenario)


def test_close_ends_the_wait_and_loses_what_is_open():
    async def scenario(world):
        [lease] = await world.leases(1)
        waiting = asyncio.create_task(world.keeper.wait())
        await world.clock.advance(0)
        await world.keeper.close()
        await waiting
        assert lease.lost
        await lease.wait_lost()

    play(scenario)


def test_ack_on_its_way_survives_the_close():
    async def scenario(world):
        [lease] = await world.leases(1)
        world.wire.gate = asyncio.Event()
        acking = asyncio.create_task(lease.ack())
        await world.wire.reached.wait()
        await world.keeper.close()
        world.wire.gate.set()
        await acking
        assert world.keeper.stats.acked == 1

    play(scenario)


def test_tasks_are_named():
    async def scenario(world):
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert {"lease-heartbeat", "lease-expiry"} <= names

    play(scenario)
