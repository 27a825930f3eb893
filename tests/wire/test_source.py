"""Jobs whose rows lie in an object, and the messages of their parts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import wire
from worker.errors import ForbiddenInput, InvalidMessage, LoramillError
from worker.jobs import Delivery, Job, Part, Source, Task
from worker.wire.native import located
from worker.wire.source import encode_part, part_of, read_source
from worker.wire.split import InputFile, Slice, Split, decode_split, encode_split

PREFIXES = ("s3://out/",)
URI = "s3://in/rows.jsonl"
ETAG = "0123"


def decode(body: dict[str, object] | str, attributes: dict[str, str] | None = None, **more: object) -> Job:
    text = body if isinstance(body, str) else json.dumps(body)
    delivery = Delivery(message_id="m", body=text, receipt="r", sent_at=500.0, attributes=attributes or {})
    return wire.decode(delivery, output_prefixes=PREFIXES, max_rows=10, now=0.0, **more)


def refused(body: dict[str, object], **more: object) -> str:
    with pytest.raises(InvalidMessage) as caught:
        decode(body, **more)
    return str(caught.value)


SPLIT = Split(
    job_id="j",
    digest="d" * 64,
    input=InputFile(URI, ETAG),
    rows=30,
    parts=(Slice(0, 100, 0, 10), Slice(100, 250, 10, 20)),
    created_at=5.0,
)


def test_a_message_may_name_the_object_that_its_rows_are_in():
    job = decode(
        {
            "id": "j",
            "input": {"uri": URI, "etag": f'"{ETAG}"', "format": "openai", "range": [10, 99]},
            "adapters": "pirate",
            "parameters": {"seed": 1},
        },
        {"adapter": "robot"},
    )
    assert job.source == Source(uri=URI, etag=ETAG, format="openai", start=10, stop=100)
    assert (job.rows, job.part, job.num_rows, job.place) == ((), None, 0, (0, 1))
    assert (job.given.adapter, job.given.override, job.given.parameters) == ("pirate", "robot", {"seed": 1})


def test_a_packed_object_is_known_by_its_name():
    assert decode({"input": {"uri": URI + ".gz"}}).source.is_packed
    assert not decode({"input": {"uri": URI}}).source.is_packed


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (5, "input is 5; it must be an object with a uri"),
        ({}, "input.uri is null"),
        ({"uri": "s3://in"}, "input.uri is 's3://in'; it must be text of the form s3://bucket/key"),
        ({"uri": "s3:///x"}, "input.uri is"),
        ({"uri": "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/x/y"}, "input.uri is"),
        ({"uri": "https://in/x"}, "input.uri is"),
        ({"uri": "s3://in/" + "x" * 1025}, "its key may have 1024 bytes"),
        ({"uri": "s3://in/\0"}, "its key may have"),
        ({"uri": URI, "url": 1}, "input: 'url' is unknown; the nearest known name is uri"),
        ({"uri": URI, "etag": 5}, "input.etag is 5"),
        ({"uri": URI, "etag": '""'}, "input.etag is"),
        ({"uri": URI, "etag": "a\nb"}, "input.etag is"),
        ({"uri": URI, "format": "csv"}, "input.format is 'csv'; it must be auto, native, openai or bedrock"),
        ({"uri": URI, "range": [5]}, "input.range is a list of 1; it must be the numbers of"),
        ({"uri": URI, "range": [5, 4]}, "input.range is"),
        ({"uri": URI, "range": [-1, 4]}, "input.range is"),
        ({"uri": URI, "range": [False, True]}, "input.range is"),
        ({"uri": URI, "range": [0, 1 << 70]}, "input.range is"),
    ],
)
def test_what_is_no_input_is_refused_with_its_reason(value, says):
    assert says in refused({"input": value})


def test_rows_are_in_the_message_or_in_the_object():
    assert "the message has input and inputs" in refused({"input": {"uri": URI}, "inputs": "x"})
    assert "the message has input and ids" in refused({"input": {"uri": URI}, "ids": ["x"]})
    assert "for an input it must be one text" in refused({"input": {"uri": URI}, "adapters": ["x"]})
    assert "for an input it must be one object" in refused({"input": {"uri": URI}, "parameters": [{}]})


def test_only_what_lies_under_an_input_prefix_is_read_where_there_are_any():
    assert read_source({"uri": URI}, ["s3://in/"]).uri == URI
    with pytest.raises(ForbiddenInput, match=r"the input is 's3://in/rows\.jsonl', which is not under"):
        read_source({"uri": URI}, ["s3://in/rows/", "s3://other/"])


def test_another_version_of_the_object_is_another_job():
    job = decode({"id": "j", "input": {"uri": URI}})
    assert (
        located(job, "a").digest
        == located(decode({"id": "j", "input": {"uri": URI, "etag": "a"}}), "a").digest
    )
    assert located(job, "a").digest != located(job, "b").digest
    assert located(job, "a").source.etag == "a"
    for other in ({"range": [0, 5]}, {"format": "openai"}, {"uri": URI + "l"}):
        assert decode({"id": "j", "input": {"uri": URI} | other}).digest != job.digest


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_s_message_says_the_same_job_and_its_own_rows(number):
    sent = decode(
        {
            "id": "j",
            "input": {"uri": URI},
            "task": "score",
            "adapters": "",
            "parameters": {"details": True},
            "output": {"uri": "s3://out/x"},
            "ttl_seconds": 60,
            "metadata": {"a": "b"},
        },
        {"adapter": "robot"},
    )
    part = part_of(located(sent, ETAG), SPLIT, number)
    read = decode(encode_part(part), {"adapter": part.given.override or ""})
    assert json.loads(encode_part(read)) == json.loads(encode_part(part))
    assert read.part == Part(
        number=number, count=2, first_row=SPLIT.parts[number].first_row, rows=SPLIT.parts[number].rows
    )
    assert (read.id, read.digest, read.given, read.output) == (part.id, part.digest, part.given, part.output)
    assert (read.created_at, read.expires_at, read.metadata) == (500.0, 560.0, {"a": "b"})
    assert read.given.task is Task.SCORE
    assert read.source == Source(
        uri=URI, etag=ETAG, start=SPLIT.parts[number].start, stop=SPLIT.parts[number].stop
    )


PART = json.loads(encode_part(part_of(located(decode({"id": "j", "input": {"uri": URI}}), ETAG), SPLIT, 1)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"part": None}, "part is null; in the message of a part it must be a whole number from 0"),
        ({"part": 2}, "parts is 2; in the message of a part it must be a whole number from 3"),
        ({"part": -1}, "part is -1"),
        ({"part": True}, "part is true"),
        ({"parts": 100_000}, "parts is 100000"),
        ({"digest": "x"}, "digest is 'x'; in the message of a part it must be a SHA-256 in hex"),
        ({"digest": None}, "digest is null"),
        ({"created_at": "x"}, "created_at is 'x'; in the message of a part it must be a Unix time"),
        ({"created_at": 1e300}, "created_at is"),
        ({"input": PART["input"] | {"rows": 0}}, "input.rows is 0"),
        ({"input": PART["input"] | {"first_row": -1}}, "input.first_row is -1"),
        ({"input": PART["input"] | {"range": None}}, "must have input.range and input.etag"),
        ({"input": PART["input"] | {"etag": None}}, "must have input.range and input.etag"),
        ({"input": {"uri": URI}, "part": None, "parts": None}, "field created_at is for the messages of the"),
    ],
)
def test_a_part_that_contradicts_itself_is_refused(change, says):
    assert says in refused(PART | change)


def test_a_part_too_large_for_a_message_is_refused():
    job = decode({"id": "j", "input": {"uri": URI}, "parameters": {"stop_sequences": ["x" * 1_048_400]}})
    with pytest.raises(InvalidMessage, match="it may have 1048576"):
        encode_part(part_of(located(job, ETAG), SPLIT, 0))


def test_how_a_job_was_split_is_read_as_it_was_written():
    assert decode_split(encode_split(SPLIT)) == SPLIT


@given(st.binary())
def test_what_is_no_split_is_refused_by_a_typed_error(data):
    with pytest.raises(LoramillError):
        decode_split(data)
