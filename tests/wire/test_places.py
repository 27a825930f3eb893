import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import ForbiddenOutput, InvalidMessage, JobError
from worker.jobs import Job, Output, Part
from worker.wire.places import (
    MAX_PREFIX_BYTES,
    cancel_uri,
    dead_letter_uri,
    manifest_uri,
    part_number,
    parts_uri,
    read_output,
    result_uri,
    summary_uri,
    tally_uri,
)

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

PREFIXES = ("s3://bucket/results/", "s3://other/")


@pytest.mark.parametrize(
    ("uri", "read"),
    [
        ("s3://bucket/results/", "s3://bucket/results/"),
        ("s3://bucket/results", "s3://bucket/results/"),
        ("s3://bucket/results/a/b", "s3://bucket/results/a/b/"),
        ("s3://other/", "s3://other/"),
        ("s3://other", "s3://other/"),
        ("s3://other/..a/b..", "s3://other/..a/b../"),
        ("s3://other/%2e%2e/é ", "s3://other/%2e%2e/é /"),
    ],
)
def test_a_uri_under_a_prefix_is_accepted_and_ends_with_a_slash(uri, read):
    assert read_output({"uri": uri}, PREFIXES) == Output(uri=read, format="native")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/",
        "s3://bucket/result",
        "s3://bucket/results-evil/",
        "s3://bucket/results/../secret/",
        "s3://bucket/results/..",
        "s3://bucket/results/./a/",
        "s3://bucket/results//a/",
        "s3://bucket/results//",
        "s3://other.evil/",
        "s3://otherevil/a/",
        "s3://",
        "s3:///bucket/results/",
    ],
)
def test_a_uri_outside_every_prefix_is_forbidden(uri):
    with pytest.raises(ForbiddenOutput, match=r"output\.uri"):
        read_output({"uri": uri}, PREFIXES)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/results/",
        [],
        {},
        {"uri": None},
        {"uri": 5},
        {"uri": "S3://bucket/results/"},
        {"uri": "https://bucket/results/"},
        {"uri": "s3://bucket/results/\n/"},
        {"uri": "s3://bucket/results/\x00"},
        {"uri": "s3://other/\ud800"},
        {"uri": "s3://other/", "url": "x"},
        {"uri": "s3://other/", "format": "csv"},
        {"uri": "s3://other/", "format": []},
    ],
)
def test_what_is_no_output_is_an_invalid_message(value):
    with pytest.raises(InvalidMessage, match="output"):
        read_output(value, PREFIXES)


@pytest.mark.parametrize("name", ["native", "openai", "bedrock"])
def test_the_format_is_one_that_results_can_have(name):
    assert read_output({"uri": "s3://other/", "format": name}, PREFIXES) == Output("s3://other/", name)
    with pytest.raises(InvalidMessage, match="is 'auto'; it must be native, openai or bedrock"):
        read_output({"uri": "s3://other/", "format": "auto"}, PREFIXES)


def test_the_length_of_a_uri_at_its_limit():
    longest = "s3://other/" + "x" * (MAX_PREFIX_BYTES - len("s3://other//")) + "/"
    assert read_output({"uri": longest}, PREFIXES).uri == longest
    with pytest.raises(InvalidMessage, match=f"has {MAX_PREFIX_BYTES + 1} bytes; it may have"):
        read_output({"uri": longest[:-1] + "x/"}, PREFIXES)


def test_an_absent_output_is_the_only_prefix():
    assert read_output(None, PREFIXES[:1]) == Output(uri="s3://bucket/results/")
    for prefixes in ((), PREFIXES):
        with pytest.raises(InvalidMessage, match=f"the worker has {len(prefixes)} output prefixes"):
            read_output(None, prefixes)


def test_a_prefix_without_a_slash_allows_nothing():
    with pytest.raises(ForbiddenOutput):
        read_output({"uri": "s3://bucket/results-evil/"}, ["s3://bucket/results"])


def test_where_things_lie():
    job = Job(id="j-1", rows=(), output=Output(uri="s3://b/x/"), digest="", created_at=0)
    assert result_uri(job) == "s3://b/x/j-1/results-00000-of-00001.jsonl"
    part = msgspec.structs.replace(job, part=Part(number=2, count=3, first_row=20, rows=10))
    assert result_uri(part) == "s3://b/x/j-1/results-00002-of-00003.jsonl"
    assert parts_uri(job.output, "j-1") == "s3://b/x/j-1/parts.json"
    assert tally_uri(part) == "s3://b/x/j-1/tally-00002-of-00003.json"
    assert part_number(tally_uri(part), job.output, "j-1") == (2, 3)
    assert part_number(result_uri(part), job.output, "j-1") is None
    evil = "s3://b/x/j-1/tally-evil/tally-00000-of-00003.json"
    assert part_number(evil, job.output, "j-1") is None, "another job's"
    bedrock = Job(id="j-1", rows=(), output=Output("s3://b/x/", "bedrock"), digest="", created_at=0)
    assert result_uri(bedrock) == "s3://b/x/j-1/results-00000-of-00001.jsonl.out"
    assert summary_uri(bedrock) == "s3://b/x/j-1/manifest.json.out"
    assert manifest_uri(job.output, "j-1") == "s3://b/x/j-1/manifest.json"
    assert cancel_uri(job.output, "j-1") == "s3://b/x/j-1/cancel"
    assert dead_letter_uri("s3://b/d/", "m-1") == "s3://b/d/m-1.json"
    with pytest.raises(AssertionError):
        result_uri(msgspec.structs.replace(job, part=Part(number=3, count=3, rows=1)))


@fuzzed
@given(st.text() | st.text(alphabet="s3:/.bucketrlo").map(lambda text: "s3://bucket/results/" + text))
def test_whatever_is_accepted_lies_under_a_prefix(uri):
    try:
        output = read_output({"uri": uri}, PREFIXES)
    except JobError:
        return
    assert output.uri.startswith(PREFIXES)
    assert output.uri.endswith("/")
    assert not {"..", ".", ""} & set(output.uri[len("s3://") : -1].split("/"))
