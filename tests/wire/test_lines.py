"""Lines of files in any format: whatever a line holds, it is a row and never the end of a job."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker import wire
from worker.jobs import FinishReason, Given, Job, Output, RowResult, Task
from worker.wire import bedrock_rows, native_rows, openai_rows
from worker.wire.lines import FORMATS, read_line
from worker.wire.output import FORMATS as OUTPUTS
from worker.wire.parameters import NAMES

fuzzed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NATIVE = {"id": "a", "input": "hi", "adapter": "pirate", "parameters": {"seed": 5}}
OPENAI = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": "pirate", "prompt": "hi", "seed": 5},
}
BEDROCK = {"recordId": "a", "modelInput": {"prompt": "hi", "adapter": "pirate"}}
LINES = {"native": NATIVE, "openai": OPENAI, "bedrock": BEDROCK}


def encoded(item):
    return json.dumps(item).encode()


@pytest.mark.parametrize("said", ["auto", None])
@pytest.mark.parametrize("name", LINES)
def test_each_format_is_known_by_its_fields(name, said):
    row = read_line(encoded(LINES[name]), 0, Given(), said or name)
    assert (row.id, row.text, row.adapter, row.failure) == ("a", "hi", "pirate", None)


@pytest.mark.parametrize("name", LINES)
def test_line_in_another_format_than_was_said_fails_by_what_it_has(name):
    for other in LINES.keys() - {name}:
        row = read_line(encoded(LINES[other]), 4, Given(), name)
        assert row.failure.code == "invalid_line"
        assert row.failure.message.startswith("the row's ")


def test_a_text_by_itself_is_a_native_row():
    assert read_line(b'"hi"', 4, Given()).text == "hi"
    assert read_line(b'"hi"', 4, Given()).id == "4"


def test_what_the_job_says_is_for_lines_too():
    row = read_line(encoded(NATIVE), 0, Given(parameters={"seed": 1, "top_k": 2}, override="green"))
    assert (row.params.seed, row.params.top_k, row.adapter) == (5, 2, "green")
    scored = read_line(b'{"input":"a","target":"b"}', 0, Given(task=Task.SCORE))
    assert (scored.task, scored.target, scored.failure) == (Task.SCORE, "b", None)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b'{"input":"\xff"}',
        b'{"input":"\\ud800"}',
        b'{"input":NaN}',
        b"{}x",
    ],
)
def test_line_that_is_no_json_is_an_error_of_that_row(line):
    for name in FORMATS:
        row = read_line(line, 7, Given(), name)
        assert (row.index, row.id, row.failure.code) == (7, "7", "invalid_line")
        assert "is not JSON" in row.failure.message


def test_byte_order_mark_before_the_first_line_is_passed_over():
    assert read_line(b'\xef\xbb\xbf{"input":"a"}', 0, Given()).text == "a"
    assert read_line(b'\xef\xbb\xbf{"input":"a"}', 1, Given()).failure is not None


@pytest.mark.parametrize("depth", [100, 300, 900, 990, 1000, 100_000])
def test_nesting_at_any_depth_is_read_or_refused(depth):
    nested = b"[" * depth + b"]" * depth
    for line in (
        nested,
        b'{"input":%s}' % nested,
        b'{"custom_id":"a","body":%s}' % nested,
        b'{"recordId":"a","modelInput":%s}' % nested,
        b'{"recordId":"a","modelInput":{"prompt":%s}}' % nested,
    ):
        assert read_line(line, 0, Given()).failure.code == "invalid_line"


WORDS = sorted(
    native_rows.FIELDS
    | openai_rows.FIELDS
    | openai_rows.CHAT_NAMES
    | openai_rows.COMPLETION_NAMES
    | bedrock_rows.FIELDS
    | {"max_gen_len", "role", "content", "type", "text"}
    | NAMES
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["POST", *openai_rows.URLS, "pirate", "base"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=10,
)
PROMPTS = st.fixed_dictionaries({"prompt": JSON}) | st.fixed_dictionaries({"messages": JSON})
BODIES = st.tuples(PROMPTS, st.dictionaries(st.sampled_from(WORDS), JSON, max_size=3)).map(
    lambda parts: {"model": "pirate"} | parts[1] | parts[0]
)
REQUESTS = st.builds(
    lambda url, body: {"custom_id": "a", "method": "POST", "url": url, "body": body},
    st.sampled_from(sorted(openai_rows.URLS)),
    BODIES,
)
RECORDS = BODIES.map(lambda body: {"recordId": "a", "modelInput": body})
GIVEN = st.builds(
    Given,
    adapter=SCALARS,
    override=st.none() | st.text(max_size=5),
    parameters=JSON,
    task=st.sampled_from(list(Task)),
    base_models=st.none() | st.just(frozenset({"base"})),
)


def check_any(line, said, name="auto"):
    row = read_line(line, 5, said, name)
    assert sum(part is not None for part in (row.text, row.tokens, row.messages, row.failure)) == 1
    assert (row.index, row.task) == (5, said.task)
    assert row.failure is None or len(row.failure.message) <= 1000
    done = RowResult(
        row=row, text="x", finish_reason=FinishReason.LENGTH, prompt_tokens=1, failure=row.failure
    )
    for output in OUTPUTS:
        job = Job(id="j", rows=(row,), output=Output("s3://b/", output), digest="", created_at=0.0)
        counted = wire.tally(wire.encode_rows(job, [done, done], base_model="base"), output)
        assert (counted.rows, counted.completed) == (2, 0 if row.failure else 2)
        assert set(counted.errors) == ({row.failure.code} if row.failure else set())


@fuzzed
@given(st.binary(), st.sampled_from(FORMATS))
def test_any_bytes_are_a_row_with_a_line_in_every_output(line, name):
    check_any(line, Given(), name)


@fuzzed
@given(JSON, GIVEN, st.sampled_from(FORMATS))
def test_any_json_is_a_row_with_a_line_in_every_output(item, said, name):
    check_any(encoded(item), said, name)


@fuzzed
@given(REQUESTS | RECORDS, GIVEN)
def test_any_request_and_any_record_is_a_row_with_a_line_in_every_output(item, said):
    check_any(encoded(item), said)


@fuzzed
@given(REQUESTS | RECORDS)
def test_rows_of_a_message_are_read_as_lines_are(item):
    line = read_line(encoded(item), 0, Given())
    try:
        body = json.dumps({"inputs": [item]}, allow_nan=False)
    except ValueError:
        return
    delivery = wire.native.Delivery(message_id="m", body=body, receipt="r")
    (row,) = wire.decode(delivery, output_prefixes=["s3://b/"], max_rows=1, now=0.0).rows
    assert row == line
