import hashlib
import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from worker.wire import encode_rows as encode_job_rows
from worker.wire import tally
from worker.wire.results import Tally, Usage, total

fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

KEYS = ["id", "index", "adapter", "adapter_version", "generated_text", "finish_reason", "usage", "error"]


def encode_rows(results):
    job = Job(id="j", rows=(), output=Output("s3://b/x/"), digest="", created_at=0.0)
    return encode_job_rows(job, results, base_model="m")


def good(index=0, *, adapter=None, version=None, text="out", details=False, tokens=None):
    row = Row(index=index, id=f"r{index}", text="in", adapter=adapter, params=SamplingParams(details=details))
    return RowResult(
        row=row,
        adapter_version=version,
        text=text,
        finish_reason=FinishReason.EOS_TOKEN,
        prompt_tokens=3,
        completion_tokens=2,
        tokens=tokens,
    )


def bad(index=0, code="internal", *, retryable=False):
    failure = Failure(code, "why", retryable)
    return RowResult(row=Row(index=index, id=f"r{index}", text="in", adapter="fr"), failure=failure)


def lines(results):
    data = encode_rows(results)
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def test_a_line_has_every_field_in_the_specs_order():
    (line,) = lines([good(adapter="fr", version="v1")])
    assert list(line) == KEYS
    assert line == {
        "id": "r0",
        "index": 0,
        "adapter": "fr",
        "adapter_version": "v1",
        "generated_text": "out",
        "finish_reason": "eos_token",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "error": None,
    }


def test_the_base_model_is_an_empty_name():
    (line,) = lines([good()])
    assert (line["adapter"], line["adapter_version"]) == ("", None)


def test_an_error_is_a_line_too():
    (line,) = lines([bad(code="oom", retryable=True)])
    assert list(line) == KEYS
    assert (line["generated_text"], line["finish_reason"]) == (None, "error")
    assert line["error"] == {"code": "oom", "message": "why", "retryable": True}


def test_a_row_that_was_never_readable_keeps_its_failure():
    row = Row(index=0, id="0", failure=Failure("invalid_line", "no"))
    (line,) = lines([RowResult(row=row)])
    assert line["error"]["code"] == "invalid_line"


def test_details_only_when_asked_for():
    tokens = (TokenDetail(5, "o", -0.5), TokenDetail(6, "ut", -1.5))
    assert "details" not in lines([good(tokens=tokens)])[0]
    assert lines([good(details=True, tokens=tokens)])[0]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 2,
        "inputs": "in",
        "tokens": [{"id": 5, "text": "o", "log_prob": -0.5}, {"id": 6, "text": "ut", "log_prob": -1.5}],
    }


def test_prefill_and_top_tokens_only_when_there_are_some():
    tokens = (TokenDetail(5, "o", -0.5), TokenDetail(6, "ut", -1.5))
    prefill = (TokenDetail(1, "i", None), TokenDetail(2, "n", -2.5))
    likely = (tokens[:1], tokens[::-1])
    result = good(details=True, tokens=tokens)
    (line,) = lines([msgspec.structs.replace(result, prefill=prefill, top_tokens=likely)])
    assert list(line["details"]) == [
        "finish_reason", "generated_tokens", "inputs", "prefill", "tokens", "top_tokens",
    ]  # fmt: skip
    assert line["details"]["prefill"] == [
        {"id": 1, "text": "i", "log_prob": None},
        {"id": 2, "text": "n", "log_prob": -2.5},
    ]
    assert [[own["id"] for own in place] for place in line["details"]["top_tokens"]] == [[5], [6, 5]]
    (line,) = lines([msgspec.structs.replace(result, prefill=(), top_tokens=())])
    assert (line["details"]["prefill"], line["details"]["top_tokens"]) == ([], [])


@pytest.mark.parametrize("log_prob", [None, float("-inf"), -0.5])
def test_any_log_prob_is_a_line_that_tally_reads(log_prob):
    tokens = (TokenDetail(5, "o", log_prob),)
    result = msgspec.structs.replace(good(details=True, tokens=tokens), prefill=tokens, top_tokens=(tokens,))
    assert tally(encode_rows([result])).completed == 1


def test_order_is_kept_and_no_rows_are_no_bytes():
    assert [line["id"] for line in lines([good(2), bad(0), good(1)])] == ["r2", "r0", "r1"]
    assert encode_rows([]) == b""


@fuzzed
@given(st.text(alphabet=st.characters(), max_size=20) | st.text(alphabet="\ud800\n\r\u2028\x00x"))
def test_any_text_is_one_line_that_tally_reads(text):
    data = encode_rows([good(text=text, details=True, tokens=(TokenDetail(1, text, float("-inf")),))])
    assert data.count(b"\n") == 1
    assert json.loads(data)["generated_text"] == text.encode("utf-8", "replace").decode()


def test_tally_adds_up_a_file():
    data = encode_rows(
        [
            good(0, adapter="fr", version="v1"),
            good(1, adapter="fr", version="v2"),
            good(2),
            bad(3, "oom"),
            bad(4, "expired"),
            bad(5, "oom"),
        ]
    )
    assert tally(data) == Tally(
        rows=6,
        completed=3,
        errors={"oom": 2, "expired": 1},
        usage=Usage(9, 6),
        adapters={"fr": ("v1", "v2")},
        sha256=hashlib.sha256(data).hexdigest(),
    )
    assert tally(data).failed == 3


def test_tally_of_nothing():
    assert tally(b"") == Tally(sha256=hashlib.sha256(b"").hexdigest())


@pytest.mark.parametrize("data", [b"x", b"{}\n", b"[]", b'{"id":1}', b"\xff\xfe", b"[" * 100_000])
def test_tally_of_something_else_is_an_error(data):
    with pytest.raises(LoramillError, match="not a result file"):
        tally(data)


@fuzzed
@given(
    st.lists(st.sampled_from([good(adapter="a", version="v"), good(), bad(code="oom"), bad()])),
    st.integers(0, 9),
)
def test_the_total_of_parts_is_the_tally_of_the_whole(results, cut):
    parts = [tally(encode_rows(results[:cut])), tally(encode_rows(results[cut:]))]
    whole = tally(encode_rows(results))
    assert total(parts) == msgspec.structs.replace(whole, sha256="")


# Scores

SCORE_KEYS = [
    "id", "index", "adapter", "adapter_version", "logprob", "token_logprobs", "is_greedy",
    "finish_reason", "usage", "error",
]  # fmt: skip


def scored(*log_probs, is_greedy=False, failure=None, **params):
    row = Row(
        index=0,
        id="r0",
        text="in",
        target="out",
        task=Task.SCORE,
        adapter="fr",
        params=SamplingParams(**params),
    )
    return RowResult(
        row=row,
        adapter_version="v1",
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=9,
        score=None if failure else Score(log_probs, is_greedy),
        tokens=tuple(TokenDetail(5, "o", log_prob) for log_prob in log_probs),
        failure=failure,
    )


def test_a_score_stands_in_the_place_of_the_text():
    (line,) = lines([scored(-0.25, -1.5, is_greedy=True)])
    assert list(line) == SCORE_KEYS
    assert (line["logprob"], line["token_logprobs"], line["is_greedy"]) == (-1.75, [-0.25, -1.5], True)
    assert (line["finish_reason"], line["usage"]) == ("length", {"prompt_tokens": 9, "completion_tokens": 0})


def test_a_row_that_could_not_be_scored_has_the_same_fields():
    (line,) = lines([scored(failure=Failure("oom", "why"))])
    assert list(line) == SCORE_KEYS
    assert (line["logprob"], line["token_logprobs"], line["is_greedy"]) == (None, None, None)
    assert (line["finish_reason"], line["error"]["code"]) == ("error", "oom")


def test_details_of_a_score_are_the_tokens_that_were_scored():
    details = lines([scored(-0.25, details=True)])[0]["details"]
    assert details == {
        "finish_reason": "length",
        "generated_tokens": 0,
        "inputs": "in",
        "tokens": [{"id": 5, "text": "o", "log_prob": -0.25}],
    }


def test_scores_add_up_as_other_rows_do():
    counted = tally(encode_rows([scored(-0.5), scored(failure=Failure("oom", "why"))]))
    assert (counted.rows, counted.completed, counted.errors) == (2, 1, {"oom": 1})
    assert counted.usage == Usage(18, 0)
    assert counted.adapters == {"fr": ("v1",)}
