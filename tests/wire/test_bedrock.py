"""Bedrock's batch files: records in, records out."""

import json

import pytest

from worker import wire
from worker.errors import LoramillError
from worker.jobs import (
    ChatMessage,
    Failure,
    FinishReason,
    Given,
    Job,
    Output,
    Row,
    RowResult,
    SamplingParams,
    Task,
)
from worker.wire.lines import read_line

JOB = Job(id="j", rows=(), output=Output("s3://b/x/", "bedrock"), digest="", created_at=5.0)
LLAMA = {"prompt": "Roses are red,", "max_gen_len": 64, "temperature": 0.5, "top_p": 0.9}
MISTRAL = {"prompt": "<s>[INST] Hi [/INST]", "max_tokens": 50, "stop": ["x"], "temperature": 0.7, "top_k": 50}
CHAT = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 9}


def read(model_input, given=Given(), record_id="CALL0000001", **more) -> Row:  # noqa: B008 (it is frozen)
    item = {"recordId": record_id, "modelInput": model_input, **more}
    return read_line(json.dumps(item).encode(), 3, given)


def good(model_input, **about) -> Row:
    row = read(model_input, **about)
    assert row.failure is None, row.failure
    return row


def result(row, **changes):
    return RowResult(
        **{
            "row": row,
            "text": "violets are",
            "finish_reason": FinishReason.LENGTH,
            "prompt_tokens": 5,
            "completion_tokens": 3,
        }
        | changes
    )


def line(one):
    data = wire.encode_rows(JOB, [one], base_model="base")
    assert data.count(b"\n") == 1
    return json.loads(data)


def test_llamas_record():
    row = good(LLAMA)
    assert (row.id, row.text, row.adapter) == ("CALL0000001", LLAMA["prompt"], None)
    assert row.params == SamplingParams(max_new_tokens=64, temperature=0.5, top_p=0.9, do_sample=True)
    assert good({"prompt": "a"}).params == SamplingParams(
        max_new_tokens=512, temperature=0.5, top_p=0.9, do_sample=True
    ), "Bedrock's defaults"
    assert not good(LLAMA | {"temperature": 0}).params.do_sample


def test_mistrals_record():
    assert good(MISTRAL).params == SamplingParams(
        max_new_tokens=50, temperature=0.7, top_p=0.9, top_k=50, do_sample=True, stop_sequences=("x",)
    )


def test_record_of_messages():
    row = good(CHAT | {"temperature": 0})
    assert row.messages == (ChatMessage("user", "hi"),)
    assert row.params == SamplingParams(max_new_tokens=9)


def test_adapter_is_named_in_the_record_or_by_the_job():
    assert good(LLAMA | {"adapter": "pirate"}).adapter == "pirate"
    assert good(LLAMA, given=Given(adapter="robot")).adapter == "robot"
    assert good(LLAMA | {"adapter": "pirate"}, given=Given(adapter="robot")).adapter == "pirate"
    assert good(LLAMA | {"adapter": ""}, given=Given(adapter="robot")).adapter is None
    assert good(LLAMA | {"adapter": "pirate"}, given=Given(override="green")).adapter == "green"


@pytest.mark.parametrize(
    ("model_input", "words"),
    [
        (None, "modelInput is null"),
        ("x", "modelInput is text"),
        ({}, "modelInput has neither prompt nor messages"),
        ({"prompt": "a", "messages": []}, "modelInput has both prompt and messages"),
        ({"prompt": 5}, "modelInput.prompt is a number"),
        ({"prompt": "a", "adapter": 5}, "modelInput.adapter is 5"),
        ({"prompt": "a", "max_gen_len": 5, "max_tokens": 5}, "'max_gen_len' is unknown"),
        ({"prompt": "a", "max_gen_len": 0}, "max_gen_len is 0; it must be a whole number from 1"),
        ({"prompt": "a", "top_k": -2}, "top_k is -2"),
        ({"prompt": "a", "max_tokens_to_sample": 5}, "'max_tokens_to_sample' is unknown"),
        ({"inputText": "a"}, "modelInput has neither prompt nor messages"),
        ({**CHAT, "anthropic_version": "bedrock-2023-05-31"}, "'anthropic_version' is unknown"),
        ({**CHAT, "model": "x"}, "parameter model is not a record's"),
        ({**CHAT, "max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_record_that_is_not_served_fails_alone_and_is_repeated(model_input, words):
    row = read(model_input)
    assert words in row.failure.message
    written = line(RowResult(row=row))
    assert list(written) == ["recordId", "modelInput", "error", "served"]
    assert (written["recordId"], written["modelInput"]) == ("CALL0000001", model_input)
    assert written["error"]["errorCode"] == 400
    assert written["error"]["errorMessage"].startswith(f"{row.failure.code}: ")


def test_record_without_an_id_is_called_by_its_index():
    assert read(LLAMA, record_id=None).id == "3"
    assert "recordId is 5" in read(LLAMA, record_id=5).failure.message
    assert (
        "'recordid' is unknown; the nearest known name is recordId" in read(LLAMA, recordid=1).failure.message
    )


def test_what_a_job_says_for_native_rows_is_not_passed_over():
    assert "cannot be scored" in read(LLAMA, given=Given(task=Task.SCORE)).failure.message
    assert "the job has parameters" in read(LLAMA, given=Given(parameters={"seed": 1})).failure.message


@pytest.mark.parametrize(
    ("model_input", "output"),
    [
        (
            LLAMA,
            {
                "generation": "violets are",
                "prompt_token_count": 5,
                "generation_token_count": 3,
                "stop_reason": "length",
            },
        ),
        (MISTRAL, {"outputs": [{"text": "violets are", "stop_reason": "length"}]}),
    ],
)
def test_answer_has_the_shape_of_the_question(model_input, output):
    assert line(result(good(model_input))) == {
        "recordId": "CALL0000001",
        "modelInput": model_input,
        "modelOutput": output,
        "served": {
            "adapter": "",
            "adapter_version": None,
            "usage": {"prompt_tokens": 5, "completion_tokens": 3},
        },
    }


def test_answer_to_messages_is_a_chat_completion():
    written = line(result(good(CHAT | {"adapter": "pirate"}), adapter_version="v1"))
    assert written["modelOutput"]["object"] == "chat.completion"
    assert written["modelOutput"]["choices"][0]["message"]["content"] == "violets are"
    assert written["served"]["adapter_version"] == "v1"


def test_what_was_sent_is_repeated_to_the_last_digit():
    line_of_file = b'{"recordId":"a","modelInput":{"prompt":"\\u00e9 \\n","temperature":0.10,"adapter":null}}'
    row = read_line(line_of_file, 0, Given())
    assert line(result(row))["modelInput"] == {"prompt": "é \n", "temperature": 0.1, "adapter": None}


def test_native_rows_are_repeated_as_their_prompt():
    assert line(result(Row(index=0, id="r", text="a")))["modelInput"] == {"prompt": "a"}
    chat = line(result(Row(index=0, id="r", messages=(ChatMessage("user", "a"),))))
    assert chat["modelInput"] == {"messages": [{"role": "user", "content": "a"}]}
    assert chat["modelOutput"]["object"] == "chat.completion"
    failed = line(RowResult(row=Row(index=0, id="r", failure=Failure("invalid_line", "no"))))
    assert failed["modelInput"] is None


def test_text_that_cannot_be_written_is_a_line_all_the_same():
    assert line(result(good(LLAMA), text="\ud800"))["modelOutput"]["generation"] == "?"
    assert line(result(good(CHAT), text="\ud800"))["modelOutput"]["choices"][0]["message"]["content"] == "?"
    failed = line(result(good(LLAMA), failure=Failure("oom", "\ud800", retryable=True)))
    assert failed["error"] == {"errorCode": 500, "errorMessage": "oom: ?"}


def test_file_adds_up_and_bedrocks_manifest_says_so():
    rows = [
        result(good(LLAMA | {"adapter": "pirate"}), adapter_version="v1"),
        result(good(MISTRAL)),
        result(good(CHAT), failure=Failure("oom", "why", retryable=True)),
        RowResult(row=read({})),
    ]
    counted = wire.tally(wire.encode_rows(JOB, rows, base_model="base"), "bedrock")
    assert (counted.rows, counted.completed, counted.errors) == (4, 2, {"oom": 1, "invalid_line": 1})
    assert counted.adapters == {"pirate": ("v1",)}
    assert json.loads(wire.encode_summary(counted)) == {
        "totalRecordCount": 4,
        "processedRecordCount": 4,
        "successRecordCount": 2,
        "errorRecordCount": 2,
        "inputTokenCount": 15,
        "outputTokenCount": 9,
    }


@pytest.mark.parametrize(
    "data", [b"x", b"{}\n", b"[]", b"\xff", b'{"recordId":"a","modelInput":{},"served":{}}']
)
@pytest.mark.parametrize("name", ["openai", "bedrock"])
def test_what_is_no_result_file_is_not_added_up(name, data):
    with pytest.raises(LoramillError, match="not a result file"):
        wire.tally(data, name)
