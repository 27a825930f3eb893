"""Which messages are about keys under our prefix."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_sync.errors import UnreadableEvent
from adapters_sync.events import concerns
from adapters_sync.uris import S3Prefix
from tests.sync.events import by_eventbridge, by_sns, from_s3

OURS = S3Prefix("bucket", "models/llama 3/adapters/")
KEY = "models/llama 3/adapters/sql/a+b 100%.json"
TEST_EVENT = json.dumps({
    "Service": "Amazon S3", "Event": "s3:TestEvent", "Time": "2014-10-13T15:57:02.089Z", "Bucket": "bucket",
    "RequestId": "5582815E1AEA5ADF", "HostId": "8cLeGAmw098X5cv4Zkwcmo8vvZa3eH3eKxsPzbB9wrR",
})  # fmt: skip

WAYS = {
    "s3": from_s3,
    "sns": lambda *place, **more: by_sns(from_s3(*place, **more)),
    "eventbridge": by_eventbridge,
    "eventbridge-sns": lambda *place, **more: by_sns(by_eventbridge(*place, **more)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("removed", [False, True])
def test_a_key_under_the_prefix_counts_whatever_way_its_event_came(way, removed):
    assert concerns(WAYS[way]("bucket", KEY, removed=removed), OURS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("bucket", "key"),
    [
        ("another", KEY),
        ("bucket", "models/llama 3/adapters-old/sql/x.json"),
        ("bucket", "models/llama 3/config.json"),
        ("bucket", "models/llama+3/adapters/sql/x.json"),
        ("bucket", "models/llama%203/adapters/sql/x.json"),
        ("bucket", ""),
    ],
)
def test_other_keys_do_not(way, bucket, key):
    assert not concerns(WAYS[way](bucket, key), OURS)


def test_one_key_among_others_is_enough():
    records = [json.loads(from_s3("bucket", key))["Records"][0] for key in ("x", KEY, "y")]
    assert concerns(json.dumps({"Records": records}), OURS)
    assert not concerns(json.dumps({"Records": records[::2]}), OURS)


@pytest.mark.parametrize("body", [TEST_EVENT, by_sns(TEST_EVENT), '{"Records": []}'])
def test_what_names_no_key_does_not_count_and_is_no_mistake(body):
    assert not concerns(body, OURS)


GARBAGE = {
    "empty": "",
    "not-json": "upload done",
    "truncated": from_s3("bucket", KEY)[:-2],
    "null": "null",
    "list": f"[{from_s3('bucket', KEY)}]",
    "object": "{}",
    "deep": "[" * 100_000,
    "deep-inside": '{"x":' + "[" * 100_000,
    "half-a-surrogate": '"\ud800"',
    "job": '{"inputs": ["Who goes there?"], "adapters": "pirate"}',
    "records-number": '{"Records": 3}',
    "record-of-another-service": '{"Records": [{"eventSource": "aws:ses", "ses": {}}]}',
    "key-number": '{"Records": [{"s3": {"bucket": {"name": "bucket"}, "object": {"key": 3}}}]}',
    "no-bucket": '{"Records": [{"s3": {"object": {"key": "x"}}}]}',
    "detail-of-another-service": '{"source": "aws.ec2", "detail": {"instance-id": "i-1"}}',
    "sns-of-people": by_sns("hello"),
    "sns-in-sns": by_sns(by_sns(from_s3("bucket", KEY))),
    "subscription": json.dumps({
        "Type": "SubscriptionConfirmation", "Message": "You have chosen to subscribe to the topic",
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_named_as_such(kind):
    with pytest.raises(UnreadableEvent) as caught:
        concerns(GARBAGE[kind], OURS)
    assert str(caught.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.text() | st.sampled_from(["Records", "Message", "Event", "detail", "s3", "bucket", "object"]),
            inner,
        )
    ),
)


@given(st.text() | _JSON.map(json.dumps))
def test_no_text_does_more_harm_than_that(body):
    with contextlib.suppress(UnreadableEvent):
        assert not concerns(body, OURS)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_every_key_under_the_prefix_is_found_encoded_or_not(path):
    key = OURS.prefix + path
    assert all(concerns(way("bucket", key), OURS) for way in WAYS.values())
