"""What a job's message may be wrapped in."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import wire
from worker.errors import InvalidMessage, JobError
from worker.jobs import Delivery, Job
from worker.wire.envelopes import Pointer

OUTPUT = "s3://out/results/"
NATIVE = json.dumps({"id": "j", "inputs": ["a"]})


def delivery(body: object, **attributes: str) -> Delivery:
    text = body if isinstance(body, str) else json.dumps(body)
    return Delivery(message_id="m", body=text, receipt="r", attributes=attributes, group_id="g")


def jobs(body: object, **attributes: str) -> list[Job]:
    found = wire.unwrap(delivery(body, **attributes), [OUTPUT])
    return [wire.decode(one, output_prefixes=[OUTPUT], max_rows=10, now=1.0) for one in found]


def record(key: str = "a+b%2Bc.jsonl", event: str = "ObjectCreated:Put", **object_: Any) -> dict[str, Any]:
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventName": event,
        "s3": {"bucket": {"name": "in"}, "object": {"key": key, "size": 1, "eTag": "abc"} | object_},
    }


def bridged(key: str = "a+b%2Bc.jsonl", kind: str = "Object Created", **object_: Any) -> dict[str, Any]:
    return {
        "source": "aws.s3",
        "detail-type": kind,
        "detail": {"bucket": {"name": "in"}, "object": {"key": key, "etag": "abc"} | object_},
    }


def notified(message: object, **attributes: Any) -> dict[str, Any]:
    text = message if isinstance(message, str) else json.dumps(message)
    return {"Type": "Notification", "TopicArn": "t", "Message": text, "MessageAttributes": attributes}


def test_a_native_message_is_what_it_is():
    assert wire.unwrap(delivery(NATIVE)) == [delivery(NATIVE)]
    for body in ("not JSON", "[]", "5", "[" * 100_000):
        assert wire.unwrap(delivery(body)) == [delivery(body)]


def test_an_object_that_was_created_is_a_job_of_its_lines():
    (job,) = jobs({"Records": [record()]})
    assert (job.source.uri, job.source.etag, job.source.format) == ("s3://in/a b+c.jsonl", "abc", "auto")
    assert job.output.uri == OUTPUT


def test_eventbridge_does_not_encode_keys():
    (job,) = jobs(bridged())
    assert (job.source.uri, job.source.etag) == ("s3://in/a+b%2Bc.jsonl", "abc")


def test_the_same_version_of_an_object_is_the_same_job_by_whatever_way_it_is_told():
    told = [
        {"Records": [record("k", versionId="v1")]},
        {"Records": [record("k", "s3:ObjectCreated:CompleteMultipartUpload", versionId="v1")]},
        bridged("k", **{"version-id": "v1"}),
        notified(bridged("k", **{"version-id": "v1"})),
        notified({"Records": [record("k", versionId="v1")]}),
    ]
    assert len({jobs(body)[0].id for body in told}) == 1
    others = [{"Records": [record("k", versionId="v2")]}, {"Records": [record("k")]}, bridged("kk")]
    assert len({jobs(body)[0].id for body in [told[0], *others]}) == 4


def test_a_notification_is_what_was_published_with_its_attributes():
    attribute = {"adapter": {"Type": "String", "Value": "pirate"}, "odd": 5}
    (found,) = wire.unwrap(delivery(notified(NATIVE, **attribute), own="x"))
    assert found.body == NATIVE
    assert found.attributes == {"adapter": "pirate", "own": "x"}
    assert (found.message_id, found.receipt, found.group_id) == ("m", "r", "g")


@pytest.mark.parametrize(
    "body",
    [
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "in"},
        {"Records": []},
        {"Records": [record(event="ObjectRemoved:Delete")]},
        {"Records": [record("folder/")]},
        bridged(kind="Object Deleted"),
        bridged("folder/"),
        notified({"Service": "Amazon S3", "Event": "s3:TestEvent"}),
    ],
)
def test_what_speaks_of_no_new_object_is_no_job(body):
    assert wire.unwrap(delivery(body)) == []


def test_our_own_results_are_no_jobs():
    own = record("results/j/results-00000-of-00001.jsonl")
    own["s3"]["bucket"]["name"] = "out"
    assert jobs({"Records": [own, record("k")]})[0].source.uri == "s3://in/k"
    assert len(jobs({"Records": [own, record("k")]})) == 1


def test_several_records_are_several_jobs():
    found = jobs({"Records": [record("a"), record("b"), record("c", "ObjectRemoved:Delete")]})
    assert [job.source.uri for job in found] == ["s3://in/a", "s3://in/b"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"Records": 5}, "the event's Records is 5; it must be a list"),
        ({"Records": [5]}, "a record of the event is not about an object in S3"),
        ({"Records": [{"eventSource": "aws:sns"}]}, "a record of the event is not about an object in S3"),
        ({"Records": [record(5)]}, "the event's object has the key 5; it must be text"),
        ({"detail-type": "Object Created"}, "the EventBridge event is not about an object in S3"),
        (bridged(None), "the event's object has the key null"),
        (bridged() | {"source": "mine"}, "the EventBridge event is not about"),
        ({"Type": "Notification", "Message": 5}, "the SNS notification has no Message that is text"),
    ],
)
def test_an_envelope_that_is_damaged_is_told(body, says):
    with pytest.raises(InvalidMessage) as caught:
        wire.unwrap(delivery(body))
    assert says in str(caught.value)


@pytest.mark.parametrize("attribute", ["ExtendedPayloadSize", "SQSLargePayloadSize"])
@pytest.mark.parametrize("kind", ["software.amazon.payloadoffloading.PayloadS3Pointer", "com.amazon.x"])
def test_an_extended_client_s_message_points_to_its_body(attribute, kind):
    pointing = delivery([kind, {"s3BucketName": "b", "s3Key": "a/k"}], **{attribute: "9", "adapter": "x"})
    assert wire.find_pointer(pointing) == Pointer("s3://b/a/k")
    assert wire.with_body(pointing, NATIVE) == delivery(NATIVE, adapter="x")


@pytest.mark.parametrize(
    "body",
    [
        "x",
        [],
        ["x"],
        ["x", {}],
        ["x", {"s3BucketName": "b"}],
        ["x", {"s3BucketName": "", "s3Key": "k"}],
        ["x", {"s3BucketName": "a/b", "s3Key": "k"}],
    ],
)
def test_a_pointer_to_nothing_is_told(body):
    with pytest.raises(InvalidMessage, match="has the attribute ExtendedPayloadSize, and its body does not"):
        wire.find_pointer(delivery(body, ExtendedPayloadSize="9"))
    assert wire.find_pointer(delivery(body)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "Records",
                    "s3",
                    "bucket",
                    "name",
                    "object",
                    "key",
                    "eventName",
                    "detail-type",
                    "detail",
                    "source",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
)


@given(JSON, st.booleans())
def test_any_json_is_unwrapped_or_refused_by_a_typed_error(body, wrapped):
    with contextlib.suppress(JobError):
        jobs(notified(body) if wrapped else body)
