import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker import wire
from worker.errors import InvalidMessage
from worker.jobs import Delivery, Failure, Output
from worker.wire.enqueue import MAX_BODY_BYTES

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

PREFIXES = ("s3://bucket/results/",)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


def read(body):
    delivery = Delivery(message_id="m", body=body, receipt="r", sent_at=1.0)
    return wire.decode(delivery, output_prefixes=PREFIXES, max_rows=100, now=1.0)


def test_only_what_is_said_is_written():
    assert json.loads(wire.encode_job("x")) == {"version": 1, "inputs": "x"}


NAMES = st.from_regex(r"\A([A-Za-z0-9][A-Za-z0-9._-]{0,20})?\Z")
"""Adapter names, and "" for the base model."""


@fuzzed
@given(
    st.lists(TEXT, min_size=1, max_size=4).flatmap(
        lambda inputs: st.tuples(st.just(inputs), st.lists(NAMES, min_size=len(inputs), max_size=len(inputs)))
    ),
    st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_what_is_encoded_is_decoded(rows, metadata):
    inputs, adapters = rows
    job = read(
        wire.encode_job(
            inputs,
            id="a",
            adapters=adapters,
            parameters={"seed": 5},
            ids=[f"r{n}" for n in range(len(inputs))],
            output=Output(uri="s3://bucket/results/x/"),
            ttl_seconds=9,
            metadata=metadata,
        )
    )
    assert [row.text for row in job.rows] == inputs
    assert [row.adapter or "" for row in job.rows] == adapters
    assert [row.id for row in job.rows] == [f"r{n}" for n in range(len(inputs))]
    assert {row.params.seed for row in job.rows} == {5}
    assert (job.id, job.expires_at, job.metadata) == ("a", 10.0, metadata)
    assert job.output == Output(uri="s3://bucket/results/x/")


def test_row_objects_pass_through():
    (row,) = read(wire.encode_job([{"id": "a", "messages": [{"role": "user", "content": "hi"}]}])).rows
    assert row.messages[0].content == "hi"


def test_the_size_limit_is_sqs():
    frame = len(wire.encode_job(""))
    assert len(wire.encode_job("x" * (MAX_BODY_BYTES - frame))) == MAX_BODY_BYTES
    with pytest.raises(InvalidMessage, match=f"{MAX_BODY_BYTES + 1} bytes; it may have {MAX_BODY_BYTES}"):
        wire.encode_job("x" * (MAX_BODY_BYTES - frame + 1))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "inputs",
    ["\ud800", [object()], [{"a": 10**5000}], nested(100_000), [{"a": float("nan")}]],
    ids=["surrogate", "object", "huge", "deep", "nan"],
)
def test_what_json_cannot_hold_is_refused(inputs):
    with pytest.raises(InvalidMessage, match="cannot be written as JSON"):
        wire.encode_job(inputs)


def test_a_dead_letter_keeps_the_message_whole():
    delivery = Delivery(
        message_id="m",
        body='\ud800 é "',
        receipt="r",
        receive_count=3,
        sent_at=1.5,
        attributes={"adapter": "fr"},
    )
    letter = json.loads(wire.encode_dead_letter(delivery, Failure("invalid_message", "why"), now=9.0))
    assert letter == {
        "message_id": "m",
        "error": {"code": "invalid_message", "message": "why", "retryable": False},
        "sent_at": 1.5,
        "dead_at": 9.0,
        "receive_count": 3,
        "attributes": {"adapter": "fr"},
        "body": '\ud800 é "',
    }
