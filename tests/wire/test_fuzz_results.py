"""Result files, and what lies beside them, after some damage: read, or refused by an error of ours."""

import contextlib
import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.poison.mutations import garbled, mutated
from worker import wire
from worker.errors import LoramillError
from worker.jobs import (
    Failure,
    FinishReason,
    Job,
    Output,
    Row,
    RowResult,
    SamplingParams,
    Score,
    Task,
    TokenDetail,
)
from worker.wire.manifest import CommittedPart, OutputFile, summarize
from worker.wire.output import LineReader
from worker.wire.places import FORMATS
from worker.wire.split import InputFile, Slice

fuzzed = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
RANDOM = st.randoms(use_true_random=False)
TOKENS = (TokenDetail(1, "a", -0.5), TokenDetail(2, "\ufffd", None))
ROWS = (
    Row(index=0, id="a", text="a", adapter="red", params=SamplingParams(details=True, top_n_tokens=2)),
    Row(index=1, id="b", tokens=(1, 2), failure=Failure("oom", "why", retryable=True)),
    Row(index=2, id="c", text="c"),
)


def job(name):
    return Job(id="j", rows=ROWS, output=Output("s3://b/", name), digest="d", created_at=1.0)


def lines(name):
    """A result file with a row of every kind."""
    done = {"text": "x", "finish_reason": FinishReason.LENGTH, "prompt_tokens": 3, "completion_tokens": 2}
    results = [
        RowResult(row=ROWS[0], adapter_version="v1", tokens=TOKENS, top_tokens=(TOKENS, TOKENS), **done),
        RowResult(row=ROWS[1], failure=ROWS[1].failure),
        RowResult(row=ROWS[2], **done),
    ]
    return wire.encode_rows(job(name), results, base_model="base")


FILES = {name: lines(name) for name in FORMATS}
_FILE = OutputFile("s3://b/j/r", "e", "0", 3)
_TALLY = wire.tally(FILES["native"])
_MANIFEST = summarize(
    job("native"),
    [(_FILE, _TALLY)],
    base_model="base",
    worker="w",
    started_at=1.5,
    finished_at=2.0,
    software_version="v",
)
_SPLIT = wire.Split(
    job_id="j",
    digest="d",
    input=InputFile("s3://b/in", "e"),
    rows=3,
    parts=(Slice(0, 9, 0, 2), Slice(9, 20, 2, 1)),
    created_at=1.0,
)
_PART = CommittedPart(digest="d", output=_FILE, tally=_TALLY)
RECORDS = {
    "manifest": (wire.encode_manifest(_MANIFEST), wire.encode_manifest, wire.decode_manifest),
    "split": (wire.encode_split(_SPLIT), wire.encode_split, wire.decode_split),
    "tally": (wire.encode_part_tally(_PART), wire.encode_part_tally, wire.decode_part_tally),
}


def encoded(text):
    """Its bytes, lone surrogates and all."""
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", FORMATS)
@fuzzed
@given(rng=RANDOM, which=st.integers(0, 2), times=st.integers(1, 3))
def test_a_result_file_with_a_wrong_line_is_added_up_or_refused(name, rng, which, times):
    good = FILES[name].splitlines()
    good[which] = encoded(mutated(json.loads(good[which]), rng, times))
    with contextlib.suppress(LoramillError):
        assert wire.tally(b"\n".join(good) + b"\n", name).rows >= 0


@pytest.mark.parametrize("name", FORMATS)
@fuzzed
@given(rng=RANDOM, data=st.binary(max_size=4), at=st.integers(0, 2000))
def test_a_result_file_with_other_bytes_in_it_is_added_up_or_refused(name, rng, data, at):
    whole = FILES[name]
    for damaged in (
        whole[:at] + data + whole[at:],
        whole[:at] + data + whole[at + len(data) :],
        garbled(whole.decode(), rng).encode(),
        data,
    ):
        with contextlib.suppress(LoramillError):
            wire.tally(damaged, name)


@pytest.mark.parametrize("kind", RECORDS)
@fuzzed
@given(rng=RANDOM, times=st.integers(1, 3))
def test_a_record_with_mistakes_is_read_or_refused(kind, rng, times):
    good, encode, decode = RECORDS[kind]
    with contextlib.suppress(LoramillError):
        read = decode(encoded(mutated(json.loads(good), rng, times)))
        assert decode(encode(read)) == read


@pytest.mark.parametrize("kind", RECORDS)
@fuzzed
@given(data=st.binary(max_size=4) | st.just(b"9" * 5_000), at=st.integers(0, 2000))
def test_a_record_with_other_bytes_in_it_is_read_or_refused(kind, data, at):
    good, _, decode = RECORDS[kind]
    for damaged in (good[:at] + data + good[at:], good[:at] + data, data):
        with contextlib.suppress(LoramillError):
            decode(damaged)


DEEP = b'{"later":' * 100_000


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_nested_too_deeply_is_refused(kind):
    _, _, decode = RECORDS[kind]
    with pytest.raises(LoramillError):
        decode(DEEP)


@pytest.mark.parametrize("name", FORMATS)
def test_a_result_line_nested_too_deeply_is_refused(name):
    with pytest.raises(LoramillError):
        wire.tally(DEEP + b"\n", name)
    with pytest.raises(LoramillError):
        LineReader(name).feed(DEEP + b"\n")


@pytest.mark.parametrize("name", FORMATS)
@fuzzed
@given(cuts=st.lists(st.integers(0, 2000), max_size=5))
def test_a_result_file_adds_up_however_it_comes(name, cuts):
    whole, reader = FILES[name], LineReader(name)
    for start, stop in pairwise([0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]):
        reader.feed(whole[start:stop])
    assert reader.finish() == wire.tally(whole, name)


@fuzzed
@given(
    text=st.text(alphabet=st.characters(), max_size=9),
    log_probs=st.lists(st.floats(max_value=0, width=32), max_size=3),
    failure=st.none()
    | st.builds(Failure, st.text(max_size=5), st.text(alphabet=st.characters(), max_size=9)),
)
def test_any_score_is_a_line_that_tally_reads(text, log_probs, failure):
    row = Row(index=0, id=text or "a", text=text, task=Task.SCORE, params=SamplingParams(details=True))
    tokens = tuple(TokenDetail(1, text, one) for one in log_probs)
    result = RowResult(row=row, score=Score(tuple(log_probs), is_greedy=True), tokens=tokens, failure=failure)
    body = wire.encode_rows(job("native"), [result], base_model="base")
    assert wire.tally(body).failed == (failure is not None)
    assert body.count(b"\n") == 1
