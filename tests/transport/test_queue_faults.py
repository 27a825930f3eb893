"""What no emulator does: partial failures, throttling, refusals in the middle."""

import asyncio
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError

from worker.errors import QueueRefused, QueueUnavailable
from worker.transport.queue import SqsQueue


class Service:
    """Answers batch calls from a script: receipt -> the codes it fails with, one for each call."""

    def __init__(
        self, script: dict[str, list[str]] | None = None, down: dict[str, str] | None = None
    ) -> None:
        self.script = script or {}
        self.down = down or {}
        self.batches: list[list[str]] = []

    async def _batch(self, QueueUrl, Entries):  # noqa: N803 (the SDK's names)
        receipts = [entry["ReceiptHandle"] for entry in Entries]
        self.batches.append(receipts)
        await asyncio.sleep(0)
        for receipt in receipts:
            if receipt in self.down:
                raise ClientError({"Error": {"Code": self.down[receipt]}}, "Batch")
        failed = [
            {"Id": entry["Id"], "Code": self.script[entry["ReceiptHandle"]].pop(0), "SenderFault": True}
            for entry in Entries
            if self.script.get(entry["ReceiptHandle"])
        ]
        return {"Successful": [], "Failed": failed}

    change_message_visibility_batch = _batch
    delete_message_batch = _batch


def play(service: Service, scenario) -> list[float]:
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    queue = SqsQueue(SimpleNamespace(acks=service), "https://queue", sleep=nap)
    asyncio.run(scenario(queue))
    return naps


@pytest.mark.parametrize(
    "code",
    [
        "ReceiptHandleIsInvalid",
        "MessageNotInflight",
        "AWS.SimpleQueueService.MessageNotInflight",
        "InvalidParameterValue",
    ],
)
def test_receipts_that_are_no_longer_good_are_lost(code):
    async def scenario(queue):
        outcome = await queue.extend(["good", "gone"], 30)
        assert (outcome.lost, outcome.failed) == ({"gone"}, {})

    play(Service({"gone": [code]}), scenario)


def test_entries_that_fail_for_other_reasons_may_be_tried_again():
    async def scenario(queue):
        outcome = await queue.extend(["a", "b", "c"], 30)
        assert (outcome.lost, outcome.failed) == ({"c"}, {"b": "InternalError"})

    play(Service({"b": ["InternalError"], "c": ["ReceiptHandleIsInvalid"]}), scenario)


def test_throttled_batch_fails_alone():
    async def scenario(queue):
        receipts = [str(number) for number in range(25)]
        outcome = await queue.extend(receipts, 30)
        assert set(outcome.failed) == set(receipts[10:20])

    service = Service(down={"12": "RequestThrottled"})
    play(service, scenario)
    assert sorted(len(batch) for batch in service.batches) == [5, 10, 10]


def test_refusal_is_raised_after_all_batches_have_ended():
    async def scenario(queue):
        with pytest.raises(QueueRefused):
            await queue.extend([str(number) for number in range(25)], 30)
        assert len(asyncio.all_tasks()) == 1

    play(Service(down={"2": "AccessDenied"}), scenario)


def test_delete_tries_only_the_failed_again():
    async def scenario(queue):
        outcome = await queue.delete(["a", "b", "c"])
        assert (outcome.lost, outcome.failed) == ({"c"}, {})

    service = Service({"b": ["InternalError"], "c": ["ReceiptHandleIsInvalid"]})
    naps = play(service, scenario)
    assert service.batches == [["a", "b", "c"], ["b"]]
    assert len(naps) == 1


def test_delete_gives_up_after_three_tries_and_says_which():
    async def scenario(queue):
        outcome = await queue.delete(["a", "b"])
        assert outcome.failed == {"b": "InternalError"}

    service = Service({"b": ["InternalError"] * 10})
    naps = play(service, scenario)
    assert len(service.batches) == 3
    assert all(nap > 0 for nap in naps)


def test_delete_outlives_a_throttled_call():
    class Once(Service):
        async def delete_message_batch(self, QueueUrl, Entries):  # noqa: N803
            self.down = {} if self.batches else {"a": "ThrottlingException"}
            return await self._batch(QueueUrl, Entries)

    async def scenario(queue):
        assert not (await queue.delete(["a"])).failed

    play(Once(), scenario)


def test_release_that_failed_is_unavailable_and_a_lost_one_is_not():
    async def scenario(queue):
        await queue.release("gone", 0)
        with pytest.raises(QueueUnavailable):
            await queue.release("busy", 0)

    play(Service({"gone": ["ReceiptHandleIsInvalid"], "busy": ["InternalError"]}), scenario)


def test_binary_attributes_are_left_out_and_empty_answers_are_understood():
    message = {
        "MessageId": "id",
        "Body": "body",
        "ReceiptHandle": "receipt",
        "Attributes": {"SentTimestamp": "1700000000123", "ApproximateReceiveCount": "4"},
        "MessageAttributes": {
            "text": {"DataType": "String", "StringValue": "x"},
            "blob": {"DataType": "Binary", "BinaryValue": b"x"},
        },
    }
    answers = [{"Messages": [message]}, {}]
    asked = []

    async def receive_message(**request):
        asked.append(request)
        return answers.pop(0)

    async def main():
        clients = SimpleNamespace(polls=SimpleNamespace(receive_message=receive_message))
        queue = SqsQueue(clients, "https://queue", visibility_seconds=120)
        [delivery] = await queue.receive(10, 0.2)
        assert (delivery.sent_at, delivery.receive_count) == (1700000000.123, 4)
        assert delivery.attributes == {"text": "x"}
        assert await queue.receive(1, 99) == []

    asyncio.run(main())
    assert [request["WaitTimeSeconds"] for request in asked] == [1, 20]
    assert asked[0]["VisibilityTimeout"] == 120
    assert asked[0]["MaxNumberOfMessages"] == 10
