"""Many messages sent at once: all of them, in as few calls as the service allows."""

import asyncio
import json

import pytest

from worker.errors import QueueUnavailable
from worker.transport.queue import MAX_BATCH_BYTES, Outgoing, SqsQueue, _batches


def test_all_are_sent_with_their_attributes_and_groups(run_queue):
    async def scenario(world):
        sent = [Outgoing(f"m{n}", {"adapter": f"a{n}"} if n % 2 else {}, "tenant") for n in range(23)]
        await world.queue.send_all(sent)
        got = {}
        while deliveries := await world.queue.receive(10, 0):
            got |= {one.body: one.attributes for one in deliveries}
        assert got == {one.body: one.attributes for one in sent}

    run_queue(scenario)


def test_a_message_s_group_comes_with_it(run_queue):
    async def scenario(world):
        await world.queue.send("m", group_id="tenant")
        (delivery,) = await world.queue.receive(1, 1)
        assert delivery.group_id in {"tenant", None}
        assert delivery.group_id == "tenant" or run_queue.kind not in {"memory", "moto"}

    run_queue(scenario)


def test_batches_are_of_ten_and_of_a_mebibyte():
    small = [Outgoing("x") for _ in range(25)]
    assert [len(batch) for batch in _batches(small)] == [10, 10, 5]
    large = [Outgoing("x" * (MAX_BATCH_BYTES // 2)) for _ in range(3)]
    assert [len(batch) for batch in _batches(large)] == [2, 1]
    mixed = [Outgoing("x" * (MAX_BATCH_BYTES - 9), {"a": "b"}), Outgoing("yy")]
    assert [len(batch) for batch in _batches(mixed)] == [1, 1]
    assert list(_batches([])) == []


class Half:
    """An SQS client that refuses some entries, as often as it is told."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.sent: list[str] = []

    async def send_message_batch(self, QueueUrl, Entries):  # noqa: N803 (the SDK's names)
        failed = []
        for at, entry in enumerate(Entries):
            if at % 2 and self.refusals:
                failed.append({"Id": entry["Id"], "Code": "InternalError", "SenderFault": False})
            else:
                self.sent.append(entry["MessageBody"])
        self.refusals = max(0, self.refusals - 1)
        return {"Failed": failed}


def play(client) -> None:
    class Clients:
        acks = client

    async def sleep(_):
        await asyncio.sleep(0)

    messages = [Outgoing(json.dumps(n)) for n in range(15)]
    asyncio.run(SqsQueue(Clients(), "https://q", sleep=sleep).send_all(messages))


def test_what_a_batch_did_not_take_is_sent_again_and_the_rest_is_not():
    client = Half(2)
    play(client)
    assert sorted(map(int, client.sent)) == list(range(15))


def test_what_is_never_taken_is_told():
    with pytest.raises(QueueUnavailable, match="messages could not be sent: InternalError"):
        play(Half(100))
