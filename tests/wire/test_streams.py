"""Streamed answers, as clients of DJL Serving and of OpenAI read them."""

import json
from typing import Any

import pytest

from worker.jobs import Delta, Failure, FinishReason, Origin, Row, RowResult, SamplingParams, TokenDetail
from worker.wire.streams import Events, Lines, Streamed

TOKENS = [("Be", -0.5), ("es", -0.25), (" b", -1.0), ("uzz", -2.0)]


def deltas(*texts: str) -> list[Delta]:
    """Of the first tokens, where not every text is certain at once."""
    return [Delta("r", number, TOKENS[number][1], text) for number, text in enumerate(texts)]


def result(**changes: Any) -> RowResult:
    row = Row(id="0", index=0, text="What?", params=SamplingParams(details=True))
    fields = {
        "row": row,
        "text": "Bees buzz",
        "finish_reason": FinishReason.EOS_TOKEN,
        "prompt_tokens": 2,
        "completion_tokens": 4,
        "tokens": tuple(TokenDetail(number, *token) for number, token in enumerate(TOKENS)),
    }
    return RowResult(**{**fields, **changes})


def streamed(stream: Streamed, found: RowResult, *said: Delta) -> str:
    return b"".join([*(stream.token(delta) for delta in said), stream.end(found)]).decode()


def events(text: str) -> list[Any]:
    """The objects of server-sent events."""
    found = text.split("\n\n")
    assert found[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in found[:-2]]


def test_a_line_for_each_token_and_the_text_in_the_last():
    text = streamed(Lines(), result(), *deltas("Be", "", "es b"))
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["token"] for line in lines] == [
        {"id": 0, "text": "Be", "log_prob": -0.5},
        {"id": 1, "text": "", "log_prob": -0.25},
        {"id": 2, "text": "es b", "log_prob": -1.0},
        {"id": 3, "text": "uzz", "log_prob": -2.0},
    ]
    assert [line.keys() for line in lines[:3]] == [{"token"}] * 3
    assert lines[3]["generated_text"] == "Bees buzz"
    assert lines[3]["details"] == {"finish_reason": "eos_token", "generated_tokens": 4, "inputs": "What?"}


def test_the_last_line_has_what_else_was_asked_for():
    likely = ((TokenDetail(0, "Be", -0.5),),) * 4
    found = result(top_tokens=likely, prefill=(TokenDetail(9, "What?", None),))
    details = json.loads(streamed(Lines(), found).splitlines()[-1])["details"]
    assert [len(details["top_tokens"]), details["prefill"][0]["text"]] == [4, "What?"]


def test_a_full_text_is_in_the_last_line_alone():
    row = Row(id="0", index=0, text="What?", params=SamplingParams(details=True, return_full_text=True))
    found = result(row=row, text="What?Bees buzz")
    lines = [json.loads(line) for line in streamed(Lines(), found, *deltas("Be", "es", " b")).splitlines()]
    assert "".join(line["token"]["text"] for line in lines) == "Bees buzz"
    assert lines[-1]["generated_text"] == "What?Bees buzz"


def test_a_row_that_fails_on_the_way_says_so_in_the_last_line():
    found = result(text=None, tokens=None, failure=Failure("oom", "no memory", retryable=True))
    first, last = streamed(Lines(), found, *deltas("Be")).splitlines()
    assert json.loads(first)["token"]["text"] == "Be"
    assert json.loads(last) == {"error": {"code": "oom", "message": "no memory", "retryable": True}}


def chat(found: RowResult, *said: Delta, with_usage: bool = False) -> list[Any]:
    stream = Events(found.row, number="7", created=5, base_model="m", with_usage=with_usage)
    return events(streamed(stream, found, *said))


def asked(**fields: Any) -> RowResult:
    return result(row=Row(id="0", index=0, origin=Origin(format="openai", model="m"), **fields))


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_chat_is_chunks_with_the_role_in_the_first(with_usage):
    found = asked(messages=(), adapter="pirate")
    chunks = chat(found, *deltas("Be", "", "es b"), with_usage=with_usage)
    if with_usage:
        *chunks, last = chunks
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    for chunk in chunks:
        head = {name: chunk[name] for name in ("id", "object", "created", "model")}
        assert head == {
            "id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 5, "model": "pirate"
        }  # fmt: skip
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in choices[1:]] == [
        {"content": "Be"}, {"content": "es b"}, {"content": "uzz"}, {},
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["stop"]


def test_a_completion_is_chunks_of_its_text():
    chunks = chat(asked(text="What?"), *deltas("Be", "es"))
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Be", "es", " buzz", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 3 + ["stop"]


def test_a_chat_that_fails_on_the_way_ends_with_its_error():
    found = asked(messages=())
    failed = result(row=found.row, failure=Failure("timeout", "it took too long"))
    *_, last = chat(failed, *deltas("Be"))
    assert last == {"error": {"code": "timeout", "message": "it took too long"}}


def test_what_no_delta_told_is_told_at_the_end():
    """As of a workflow, whose last answer comes whole."""
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chat(asked(messages=()))] == [
        "", "Bees buzz", None,
    ]  # fmt: skip
