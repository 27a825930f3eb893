"""The proxy does what its faults say, and leaves the rest as it is."""

import asyncio
import contextlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.faults.kinds import Fault
from tests.faults.plans import Rule
from tests.faults.receipts import Receipts

KEY = "out/a key/ü?x#y"
BEFORE = [Fault.THROTTLE, Fault.ERROR, Fault.UNAVAILABLE, Fault.DROP, Fault.ABORTED]
AFTER = [Fault.LATE_ERROR, Fault.LATE_DROP]


def fail(call, **request):
    """The code of the error, or the name of the exception where there was no answer."""
    with pytest.raises((ClientError, BotoCoreError)) as caught:
        call(**request)
    if isinstance(caught.value, ClientError):
        return caught.value.response["Error"]["Code"]
    return type(caught.value).__name__


def receive(sqs, queue_url, **options):
    return sqs.receive_message(QueueUrl=queue_url, **options).get("Messages", [])


def test_objects_pass_unharmed_both_ways(s3, bucket, proxy):
    body = bytes(range(256)) * 1000
    s3.put_object(Bucket=bucket, Key=KEY, Body=body, Metadata={"a": "b"})
    found = s3.get_object(Bucket=bucket, Key=KEY, Range="bytes=10-99")
    assert (found["Body"].read(), found["Metadata"]) == (body[10:100], {"a": "b"})
    assert s3.head_object(Bucket=bucket, Key=KEY)["ContentLength"] == len(body)
    (listed,) = s3.list_objects_v2(Bucket=bucket, Prefix="out/a ")["Contents"]
    assert listed["Key"] == KEY
    s3.delete_object(Bucket=bucket, Key=KEY)
    assert fail(s3.get_object, Bucket=bucket, Key=KEY) == "NoSuchKey"
    assert fail(s3.head_object, Bucket=bucket, Key=KEY) == "404"
    assert (proxy.calls["PutObject"], proxy.calls["GetObject"]) == (1, 2)
    assert not proxy.injected


def test_messages_pass_unharmed_both_ways(sqs, queue_url):
    attributes = {"adapter": {"DataType": "String", "StringValue": "red"}}
    sqs.send_message(QueueUrl=queue_url, MessageBody="hello ü", MessageAttributes=attributes)
    (message,) = receive(sqs, queue_url, VisibilityTimeout=30, MessageAttributeNames=["All"])
    assert (message["Body"], message["MessageAttributes"]) == ("hello ü", attributes)
    entries = [{"Id": "0", "ReceiptHandle": message["ReceiptHandle"]}]
    changed = sqs.change_message_visibility_batch(
        QueueUrl=queue_url, Entries=[{**entries[0], "VisibilityTimeout": 0}]
    )
    assert changed["Successful"] == [{"Id": "0"}]
    assert receive(sqs, queue_url)
    assert sqs.delete_message_batch(QueueUrl=queue_url, Entries=entries)["Successful"] == [{"Id": "0"}]


def test_a_long_poll_brings_what_is_sent_meanwhile(sqs, queue_url):
    threading.Timer(0.5, lambda: sqs.send_message(QueueUrl=queue_url, MessageBody="late")).start()
    (message,) = receive(sqs, queue_url, WaitTimeSeconds=20)
    assert message["Body"] == "late"


def test_queues_are_named_as_the_client_reaches_them(queue_url, proxy):
    assert queue_url.startswith(proxy.endpoint)


@pytest.mark.parametrize("fault", BEFORE)
def test_fault_before_the_call_leaves_nothing_done(fault, s3, bucket, proxy):
    proxy.plan.rules.append(Rule(fault, "PutObject"))
    code = fail(s3.put_object, Bucket=bucket, Key="k", Body=b"x")
    assert code == {
        Fault.THROTTLE: "SlowDown",
        Fault.ERROR: "InternalError",
        Fault.UNAVAILABLE: "ServiceUnavailable",
        Fault.DROP: "ConnectionClosedError",
        Fault.ABORTED: "OperationAborted",
    }.get(fault)
    assert fail(s3.head_object, Bucket=bucket, Key="k") == "404"
    assert (proxy.injected, proxy.written) == ({fault: 1}, {})


@pytest.mark.parametrize("fault", AFTER)
def test_late_fault_hides_what_was_done(fault, s3, bucket, proxy):
    proxy.plan.rules.append(Rule(fault, "PutObject"))
    assert fail(s3.put_object, Bucket=bucket, Key="k", Body=b"x") in {
        "InternalError",
        "ConnectionClosedError",
    }
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"x"
    assert (proxy.injected, proxy.written) == ({fault: 1}, {f"{bucket}/k": 1})


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.THROTTLE, "RequestThrottled"),
        (Fault.ERROR, "InternalFailure"),
        (Fault.LATE_ERROR, "InternalFailure"),
    ],
)
def test_the_queue_fails_in_its_own_words(fault, code, sqs, queue_url, proxy):
    proxy.plan.rules.append(Rule(fault, "SendMessage"))
    assert fail(sqs.send_message, QueueUrl=queue_url, MessageBody="x") == code
    assert len(receive(sqs, queue_url)) == fault.is_late


def test_conflict_is_for_conditional_writes(s3, bucket, proxy):
    proxy.plan.rules.append(Rule(Fault.CONFLICT, "PutObject"))
    request = {"Bucket": bucket, "Key": "k", "Body": b"x", "IfNoneMatch": "*"}
    assert fail(s3.put_object, **request) == "ConditionalRequestConflict"
    s3.put_object(**request)
    assert fail(s3.put_object, **request) == "PreconditionFailed"


def test_truncated_body_is_shorter_than_its_head_says(s3, bucket, proxy):
    s3.put_object(Bucket=bucket, Key="k", Body=b"x" * 100_000)
    proxy.plan.rules.append(Rule(Fault.TRUNCATE, "GetObject"))
    answer = s3.get_object(Bucket=bucket, Key="k")
    assert answer["ContentLength"] == 100_000
    with pytest.raises(BotoCoreError):
        answer["Body"].read()
    assert proxy.injected == {Fault.TRUNCATE: 1}


def test_delayed_call_is_done_late(sqs, queue_url, proxy):
    proxy.delay_seconds = (0.5, 0.6)
    proxy.plan.rules.append(Rule(Fault.DELAY, "SendMessage"))
    began = time.monotonic()
    sqs.send_message(QueueUrl=queue_url, MessageBody="x")
    assert time.monotonic() - began >= 0.5
    assert proxy.injected == {Fault.DELAY: 1}


@pytest.mark.parametrize("fault", [Fault.PARTIAL, Fault.LATE_PARTIAL])
def test_one_entry_of_a_batch_is_said_to_have_failed(fault, sqs, queue_url, proxy):
    proxy.plan.rules.append(Rule(fault, "SendMessageBatch"))
    entries = [{"Id": str(number), "MessageBody": "x"} for number in range(3)]
    answer = sqs.send_message_batch(QueueUrl=queue_url, Entries=entries)
    assert (len(answer["Successful"]), len(answer["Failed"])) == (2, 1)
    assert answer["Failed"][0]["Code"] == "InternalError"
    found = receive(sqs, queue_url, MaxNumberOfMessages=10)
    assert len(found) == (3 if fault is Fault.LATE_PARTIAL else 2)


def test_duplicate_is_given_to_two(sqs, queue_url, proxy):
    sqs.send_message(QueueUrl=queue_url, MessageBody="x")
    proxy.plan.rules.append(Rule(Fault.DUPLICATE, "ReceiveMessage"))
    first, second = (receive(sqs, queue_url, VisibilityTimeout=30) for _ in range(2))
    assert first[0]["MessageId"] == second[0]["MessageId"]
    assert first[0]["ReceiptHandle"] != second[0]["ReceiptHandle"]
    assert receive(sqs, queue_url) == []
    assert proxy.injected == {Fault.DUPLICATE: 1}


def test_a_receive_that_brings_nothing_is_no_duplicate(sqs, queue_url, proxy):
    proxy.plan.rules.append(Rule(Fault.DUPLICATE, "ReceiveMessage"))
    assert receive(sqs, queue_url) == []
    assert not proxy.injected


def test_stale_receipt_changes_nothing_and_deletes_nothing(sqs, queue_url, proxy):
    sqs.send_message(QueueUrl=queue_url, MessageBody="x")
    proxy.plan.rules.append(Rule(Fault.DUPLICATE, "ReceiveMessage"))
    stale, fresh = (receive(sqs, queue_url, VisibilityTimeout=30)[0]["ReceiptHandle"] for _ in range(2))

    def change(receipt, seconds):
        entries = [{"Id": "0", "ReceiptHandle": receipt, "VisibilityTimeout": seconds}]
        answer = sqs.change_message_visibility_batch(QueueUrl=queue_url, Entries=entries)
        return [entry["Code"] for entry in answer.get("Failed", [])]

    def delete(receipt):
        entries = [{"Id": "0", "ReceiptHandle": receipt}]
        return sqs.delete_message_batch(QueueUrl=queue_url, Entries=entries).get("Failed", [])

    assert change(stale, 0) == ["InvalidParameterValue"]
    assert delete(stale) == []
    assert receive(sqs, queue_url) == []
    assert change(fresh, 0) == []
    assert change(fresh, 30) == ["MessageNotInflight"]
    assert delete(receive(sqs, queue_url)[0]["ReceiptHandle"]) == []
    assert change(fresh, 0) != []


def test_messages_are_hidden_no_longer_than_is_allowed(sqs, queue_url, proxy):
    proxy.longest_hidden_seconds = 0
    sqs.send_message(QueueUrl=queue_url, MessageBody="x")
    (message,) = receive(sqs, queue_url, VisibilityTimeout=30)
    entries = [{"Id": "0", "ReceiptHandle": message["ReceiptHandle"], "VisibilityTimeout": 900}]
    sqs.change_message_visibility_batch(QueueUrl=queue_url, Entries=entries)
    assert receive(sqs, queue_url)


def test_of_many_conditional_writes_one_wins(s3, bucket, proxy):
    def put(number):
        with contextlib.suppress(s3.exceptions.ClientError):
            return s3.put_object(Bucket=bucket, Key="k", Body=str(number).encode(), IfNoneMatch="*")

    with ThreadPoolExecutor(8) as threads:
        assert sum(answer is not None for answer in threads.map(put, range(24))) == 1
    assert proxy.written == {f"{bucket}/k": 1}


def test_nothing_is_lost_when_many_send_and_delete_at_once(sqs, queue_url):
    def send(number):
        sqs.send_message(QueueUrl=queue_url, MessageBody=str(number))
        return take()

    def take():
        found = receive(sqs, queue_url)
        entries = [{"Id": "0", "ReceiptHandle": message["ReceiptHandle"]} for message in found]
        if entries:
            sqs.delete_message_batch(QueueUrl=queue_url, Entries=entries)
        return [message["Body"] for message in found]

    with ThreadPoolExecutor(8) as threads:
        deleted = list(itertools.chain.from_iterable(threads.map(send, range(60))))
    while found := take():
        deleted += found
    assert sorted(deleted, key=int) == [str(number) for number in range(60)]


def test_a_gate_holds_a_call_until_it_is_opened(s3, bucket, proxy):
    seen, opened = [], threading.Event()

    async def gate(call):
        seen.append((call.operation, call.target, call.port > 0))
        await asyncio.to_thread(opened.wait, 20)

    proxy.gate = gate
    with ThreadPoolExecutor(1) as threads:
        put = threads.submit(s3.put_object, Bucket=bucket, Key="k", Body=b"x")
        with pytest.raises(TimeoutError):
            put.result(0.5)
        opened.set()
        put.result(20)
    assert seen == [("PutObject", f"{bucket}/k", True)]


def test_receipts_are_good_until_the_visibility_ends_or_somebody_else_has_one():
    now = [0.0]
    receipts = Receipts(lambda: now[0])
    receipts.received("m", "first", 30)
    assert not receipts.is_stale("first")
    assert not receipts.is_over("first")
    receipts.changed("first", 10)
    now[0] = 10.0
    assert receipts.is_over("first")
    receipts.received("m", "second", None)
    assert receipts.is_stale("first")
    assert not receipts.is_over("second")
    assert not receipts.is_stale("unknown")
    assert not receipts.is_over("unknown")
