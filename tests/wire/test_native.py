import json
import time

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import ForbiddenOutput, InvalidMessage, JobError
from worker.jobs import Delivery, Job, Output, Task
from worker.wire.enqueue import MAX_BODY_BYTES
from worker.wire.native import FIELDS, decode, salvage
from worker.wire.parameters import NAMES
from worker.wire.source import PART_FIELDS

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

PREFIXES = ("s3://bucket/results/",)
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"


def delivery(body, *, attributes=None, sent_at=100.0):
    text = body if isinstance(body, str) else json.dumps(body)
    return Delivery(message_id="m-1", body=text, receipt="r", sent_at=sent_at, attributes=attributes or {})


def read(body, *, prefixes=PREFIXES, max_rows=100, now=7.0, **about) -> Job:
    return decode(delivery(body, **about), output_prefixes=prefixes, max_rows=max_rows, now=now)


def refused(body, **about) -> str:
    with pytest.raises(InvalidMessage) as caught:
        read(body, **about)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_a_whole_job():
    job = read(
        {
            "version": 1,
            "id": "job.1_A-b",
            "inputs": ["x", "y"],
            "adapters": ["fr", ""],
            "parameters": {"max_new_tokens": 5},
            "task": "generate",
            "ids": ["a", "b"],
            "output": {"uri": "s3://bucket/results/mine", "format": "native"},
            "ttl_seconds": 60,
            "metadata": {"who": "me"},
        }
    )
    assert (job.id, job.output) == ("job.1_A-b", Output(uri="s3://bucket/results/mine/"))
    assert [(row.id, row.text, row.adapter) for row in job.rows] == [("a", "x", "fr"), ("b", "y", None)]
    assert (job.created_at, job.expires_at, job.metadata) == (100.0, 160.0, {"who": "me"})


def test_the_least_job():
    job = read({"inputs": "x"})
    assert (job.id, job.output, job.expires_at) == ("m-1", Output(uri="s3://bucket/results/"), None)


def test_null_counts_as_absent():
    absent = read({"inputs": "x"})
    assert read({"inputs": "x", **dict.fromkeys((FIELDS | PART_FIELDS) - {"inputs"})}) == absent


def test_now_stands_in_for_a_missing_sent_timestamp():
    job = read({"inputs": "x", "ttl_seconds": 1}, sent_at=0.0)
    assert (job.created_at, job.expires_at) == (7.0, 8.0)


@pytest.mark.parametrize(
    "body", ["", " ", "x", "[]", '"x"', "5", "null", "{", '{"inputs":"x"}}', "\ufeff{}", "\x00"]
)
def test_a_body_that_is_no_json_object_is_refused(body):
    assert "JSON" in refused(body)


@pytest.mark.parametrize(
    "body",
    [
        "\ud800",
        '{"inputs":"\ud800"}',
        '{"inputs":"\\ud800"}',
        '{"inputs":NaN}',
        '{"ttl_seconds":1e999}',
        '{"ttl_seconds":' + "9" * 4299 + "}",
        '{"ttl_seconds":' + "9" * 100_000 + "}",
        "[" * 500_000,
        '{"inputs":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_hostile_bodies_are_refused_like_any_other(body):
    refused(body)


@pytest.mark.parametrize("depth", [100, 300, 900, 990, 1000, 2000])
def test_nesting_at_any_depth_is_read_or_refused(depth):
    nested = "[" * depth + "]" * depth
    for body in ('{"inputs":["x",%s]}', '{"inputs":"x","parameters":{"seed":%s}}', '{"inputs":"x","id":%s}'):
        try:
            read(body % nested)
        except JobError:
            salvage(delivery(body % nested), PREFIXES)


def test_the_size_limit_counts_bytes_and_attributes():
    frame = len('{"inputs":""}')
    full = '{"inputs":"%s"}' % ("x" * (MAX_BODY_BYTES - frame))
    assert len(read(full).rows[0].text) == MAX_BODY_BYTES - frame
    assert refused(full + " ") == f"the message has {MAX_BODY_BYTES + 1} bytes; it may have {MAX_BODY_BYTES}"
    assert "may have" in refused(full, attributes={"a": ""})
    assert "may have" in refused('{"inputs":"%s"}' % ("é" * (MAX_BODY_BYTES // 2)))


def test_an_attribute_that_is_no_utf8_is_refused():
    assert "UTF-8" in refused({"inputs": "x"}, attributes={"adapter": "\ud800"})


@pytest.mark.parametrize("job_id", ["a", "A.z_0-9", "...", "x" * 128])
def test_good_ids(job_id):
    assert read({"inputs": "x", "id": job_id}).id == job_id


@pytest.mark.parametrize("job_id", ["", ".", "..", "a/b", "a b", "é", "a\n", "x" * 129, 5, True, [], {}])
def test_bad_ids(job_id):
    assert refused({"inputs": "x", "id": job_id}).startswith("id is ")


@pytest.mark.parametrize("version", [0, 2, "1", True, [1]])
def test_other_versions_are_refused(version):
    assert refused({"inputs": "x", "version": version}).endswith("it must be 1")


def test_a_score_is_written_in_lines_of_our_own_alone():
    body = {"inputs": "x", "task": "score", "output": {"uri": "s3://bucket/results/"}}
    assert [row.task for row in read(body).rows] == [Task.SCORE]
    assert [row.task for row in read({**body, "task": "generate"}).rows] == [Task.GENERATE]
    for name in ("openai", "bedrock"):
        body["output"]["format"] = name
        assert refused(body) == (
            f"task is score and output.format is {name}, which has no place for scores; it must be native"
        )


@pytest.mark.parametrize("task", ["chat", 5, ["generate"]])
def test_other_tasks_are_refused(task):
    assert refused({"inputs": "x", "task": task}).endswith("it must be generate or score")


def test_a_message_with_its_rows_is_no_part():
    assert refused({"inputs": "x", "part": 0, "parts": 2}).startswith("field part is for the messages of the")
    assert refused({"inputs": "x", "digest": "a"}).startswith("field digest is for the messages of the parts")


def test_an_unknown_field_is_refused_with_the_nearest_known_one():
    assert refused({"inputs": "x", "adapter": "y"}) == (
        "field 'adapter' is unknown; the nearest known name is adapters"
    )
    assert "'Records' is unknown" in refused({"Records": []})


@pytest.mark.parametrize("ttl", [1e-9, 1, 1_000_000_000])
def test_good_ttls(ttl):
    assert read({"inputs": "x", "ttl_seconds": ttl}).expires_at == 100.0 + ttl


@pytest.mark.parametrize("ttl", [0, -1, 1_000_000_001, 10**400, "5", True, []])
def test_bad_ttls(ttl):
    assert "above 0 and at most 1000000000" in refused({"inputs": "x", "ttl_seconds": ttl})


def test_metadata_at_its_limits():
    most = {f"{n:064d}": "v" * 512 for n in range(16)}
    assert read({"inputs": "x", "metadata": most}).metadata == most
    for bad in ({**most, "k": ""}, {"k" * 65: ""}, {"k": "v" * 513}, {"k": 5}, {"k": None}, [], "x"):
        assert "metadata" in refused({"inputs": "x", "metadata": bad})


# Adapters by attribute


@pytest.mark.parametrize("name", [ADAPTER_HEADER, ADAPTER_HEADER.lower(), ADAPTER_HEADER.upper()])
def test_the_header_wins_over_the_attribute_and_the_body_in_any_case(name):
    body = {"inputs": ["x", "y"], "adapters": ["a", "b"]}
    assert [row.adapter for row in read(body, attributes={"Adapter": "q"}).rows] == ["q", "q"]
    for attributes in ({name: "h"}, {"adapter": "q", name: "h"}, {name: "h", "adapter": "q"}):
        assert [row.adapter for row in read(body, attributes=attributes).rows] == ["h", "h"]


def test_an_empty_attribute_is_the_base_model():
    assert read({"inputs": "x", "adapters": "a"}, attributes={"adapter": ""}).rows[0].adapter is None


def test_two_spellings_that_disagree_are_refused():
    assert "different values" in refused({"inputs": "x"}, attributes={"adapter": "a", "Adapter": "b"})
    job = read({"inputs": "x"}, attributes={"adapter": "a", "Adapter": "a"})
    assert job.rows[0].adapter == "a"


def test_other_attributes_are_not_ours():
    assert read({"inputs": "x"}, attributes={"trace": "1"}).rows[0].adapter is None


# Digests


def test_the_digest_is_of_what_was_asked_for():
    body = {"inputs": ["x"], "parameters": {"seed": 1, "top_k": 2}, "id": "a"}
    digest = read(body).digest
    reordered = {"id": "b", "parameters": {"top_k": 2, "seed": 1}, "inputs": ["x"]}
    assert read({**reordered, "ttl_seconds": 5, "metadata": {"a": "b"}}, sent_at=5.0).digest == digest
    assert len(digest) == 64
    for other in (
        {"inputs": ["y"]},
        {"parameters": {"seed": 2, "top_k": 2}},
        {"adapters": "fr"},
        {"task": "score"},
        {"ids": ["a"]},
        {"output": {"uri": "s3://bucket/results/x/"}},
    ):
        assert read({**body, **other}).digest != digest
    assert read(body, attributes={"adapter": "fr"}).digest != digest


def test_the_digest_takes_integers_of_any_size():
    assert read('{"inputs":"x","parameters":{"seed":%s}}' % ("9" * 400)).rows[0].failure is not None


# Salvage


def test_a_refused_job_still_has_its_id_and_output():
    for body in ({"id": "a", "inputs": []}, {"id": "a", "x": 1}, {"id": "a", "inputs": "x", "task": "sing"}):
        assert salvage(delivery(body), PREFIXES) == ("a", Output(uri="s3://bucket/results/"))
    place = {"uri": "s3://bucket/results/x"}
    assert salvage(delivery({"output": place}), PREFIXES) == ("m-1", Output(uri="s3://bucket/results/x/"))


def test_a_bad_id_is_replaced_by_the_messages():
    assert salvage(delivery({"id": "../x", "inputs": "x"}), PREFIXES)[0] == "m-1"


@pytest.mark.parametrize("body", ["", "x", "[]", "[" * 100_000, "\ud800"])
def test_no_output_is_known_of_what_is_no_job(body):
    assert salvage(delivery(body), PREFIXES) == ("m-1", None)


def test_a_forbidden_output_is_never_written_to():
    body = {"id": "a", "inputs": "x", "output": {"uri": "s3://evil/"}}
    with pytest.raises(ForbiddenOutput):
        read(body)
    assert salvage(delivery(body), PREFIXES) == ("a", None)
    assert salvage(delivery({"id": "a"}), ("s3://a/", "s3://b/")) == ("a", None)


# Anything at all

WORDS = sorted(FIELDS | PART_FIELDS | NAMES | {"uri", "format", "messages", "role", "content", "adapter"})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just("s3://bucket/results/")
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


ROW_FIELDS = [
    "id",
    "input",
    "target",
    "messages",
    "parameters",
    "custom_id",
    "body",
    "recordId",
    "modelInput",
]


def check_any(body):
    one = delivery(body)
    try:
        job = decode(one, output_prefixes=PREFIXES, max_rows=3, now=1.0)
    except JobError:
        job_id, output = salvage(one, PREFIXES)
        assert job_id
        assert output is None or output.uri.startswith(PREFIXES)
        return
    assert [row.index for row in job.rows] == list(range(len(job.rows)))
    for row in job.rows:
        assert sum(part is not None for part in (row.text, row.tokens, row.messages, row.failure)) == 1
        assert row.task is Task.SCORE or row.target is None
    msgspec.json.encode(job)


@fuzzed
@given(st.text())
def test_any_text_is_read_or_refused(body):
    check_any(body)


@fuzzed
@given(st.binary())
def test_any_bytes_are_read_or_refused(data):
    check_any(data.decode("utf-8", "surrogateescape"))


@fuzzed
@given(JSON)
def test_any_json_is_read_or_refused(value):
    check_any(json.dumps(value))


@fuzzed
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON), JSON)
def test_any_job_is_read_or_refused(fields, inputs):
    check_any(json.dumps({**fields, "inputs": inputs}))


@fuzzed
@given(
    st.lists(st.dictionaries(st.sampled_from(ROW_FIELDS), JSON), max_size=3),
    st.sampled_from(["generate", "score"]),
)
def test_any_row_objects_are_read_or_refused(rows, task):
    check_any(json.dumps({"inputs": rows, "task": task}))


def test_ten_thousand_wrong_names_do_not_hold_up_the_heartbeats():
    body = {"inputs": [{"input": "", "parameters": {f"p{n:06}": 1}} for n in range(10_000)]}
    started = time.process_time()
    job = read(body, max_rows=10_000)
    assert time.process_time() - started < 2
    assert all(row.failure for row in job.rows)
