"""OpenAI's batch files: their own examples in, their own shapes out."""

import json

import pytest

from worker import wire
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
    TokenDetail,
)
from worker.wire.lines import read_line

BASE = Given(base_models=frozenset({"gpt-3.5-turbo-0125", "base"}))
JOB = Job(id="j", rows=(), output=Output("s3://b/x/", "openai"), digest="", created_at=1711471533.7)

# As in https://platform.openai.com/docs/guides/batch, to the letter.
OFFICIAL = (
    b'{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": '
    b'"gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are a helpful assistant."},'
    b'{"role": "user", "content": "Hello world!"}],"max_tokens": 1000}}'
)
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "base", "prompt": "Say"}
URL = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


def request(asked, **changes):
    url = URL["messages" if "messages" in asked else "prompt"]
    return {"custom_id": "a", "method": "POST", "url": url, "body": asked} | changes


def read(item, given=BASE, index=0) -> Row:
    return read_line(item if isinstance(item, bytes) else json.dumps(item).encode(), index, given)


def good(body, **more) -> Row:
    row = read(request(body | more))
    assert row.failure is None, row.failure
    return row


def refused(body, **more) -> Failure:
    row = read(request(body | more))
    assert row.failure is not None
    assert (row.id, row.origin.format) == ("a", "openai")
    assert len(row.failure.message) < 300
    return row.failure


def test_the_official_request_is_read():
    row = read(OFFICIAL)
    assert (row.id, row.adapter, row.failure) == ("request-1", None, None)
    assert row.messages == (
        ChatMessage("system", "You are a helpful assistant."),
        ChatMessage("user", "Hello world!"),
    )
    assert row.params == SamplingParams(max_new_tokens=1000, do_sample=True, temperature=1.0)


def test_defaults_are_openais():
    assert good(CHAT).params.do_sample
    assert good(CHAT).fills, "a chat answer may be as long as the model allows"
    assert (good(TEXT).params.max_new_tokens, good(TEXT).fills) == (16, False)
    assert good(CHAT, temperature=0).params == SamplingParams()


def test_model_is_the_base_models_name_or_an_adapters():
    assert good(CHAT).adapter is None
    assert good(CHAT, model="pirate").adapter == "pirate"
    failure = refused(CHAT, model="meta/llama")
    assert (failure.code, "'meta/llama' is not registered" in failure.message) == ("adapter_not_found", True)
    assert "body.model is null" in refused(CHAT, model=None).message
    assert "body.model is 5" in refused(CHAT, model=5).message


def test_the_jobs_adapter_is_for_rows_that_name_the_base_and_an_attribute_wins_over_all():
    job = Given(adapter="robot", base_models=BASE.base_models)
    assert [read(request(CHAT | {"model": name}), job).adapter for name in ("base", "pirate")] == [
        "robot",
        "pirate",
    ]
    header = Given(override="green", base_models=BASE.base_models)
    assert [read(request(CHAT | {"model": name}), header).adapter for name in ("base", "pirate")] == [
        "green"
    ] * 2


def test_where_the_base_models_name_is_not_known_what_can_be_no_adapters_is_taken_for_it():
    somewhere = Given()
    assert read(request(CHAT | {"model": "meta/llama"}), somewhere).adapter is None
    assert read(request(CHAT | {"model": "pirate"}), somewhere).adapter == "pirate"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9, "do_sample": True}),
        ({"temperature": 0, "top_p": 0.9}, {"top_p": 0.9, "do_sample": False}),
        ({"stop": "x"}, {"stop_sequences": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop_sequences": ("x", "y")}),
        ({"seed": 7}, {"seed": 7}),
        ({"presence_penalty": 2, "frequency_penalty": -2}, {"presence_penalty": 2, "frequency_penalty": -2}),
        ({"logit_bias": {"50256": -100}}, {"logit_bias": ((50256, -100.0),)}),
        ({"logprobs": True}, {"details": True, "top_n_tokens": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"details": True, "top_n_tokens": 3}),
        ({"logprobs": False}, {"details": False}),
        ({"top_k": 5, "min_p": 0.1, "min_tokens": 2}, {"top_k": 5, "min_p": 0.1, "min_new_tokens": 2}),
        ({"n": 1, "stream": False, "response_format": {"type": "text"}}, {}),
        ({"user": "u", "metadata": {"a": "b"}, "store": True}, {}),
        ({"stop": None, "n": None, "tools": None, "functions": None}, {}),
    ],
)
def test_parameters_of_a_chat(said, meant):
    params = good(CHAT, **said).params
    assert {name: getattr(params, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number from 1"),
        (
            {"max_completion_tokens": 5, "max_tokens": 6},
            "max_tokens is 6; it must be absent, or what max_compl",
        ),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0"),
        ({"stop": ["x", 5]}, "stop[1] is 5"),
        ({"stop": ""}, "stop[0] is ''"),
        ({"seed": -1}, "seed is -1"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias's key is 'x'"),
        ({"logprobs": 1}, "logprobs is 1; it must be true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"top_logprobs": 2}, "top_logprobs is there without logprobs"),
        ({"n": 2}, "n is 2; it must be absent or 1"),
        ({"n": True}, "n is true; it must be absent or 1"),
        ({"stream": True}, "stream is true; it must be absent or false"),
        ({"stream_options": {}}, "stream_options is an object; it must be absent"),
        (
            {"response_format": {"type": "json_object"}},
            'response_format is an object; it must be absent or {"type"',
        ),
        ({"tools": []}, "'tools' is unknown"),
        ({"temprature": 1}, "'temprature' is unknown; the nearest known name is temperature"),
        ({"prompt": "x"}, "'prompt' is unknown"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens is 9; it must be at most max_tokens, 5"),
    ],
)
def test_what_a_chat_cannot_have_is_an_error_that_names_it_as_it_was_written(said, words):
    failure = refused(CHAT, **said)
    assert failure.code == "invalid_parameters"
    assert words in failure.message


def test_contents_may_be_parts_of_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert good(CHAT, messages=[{"role": "user", "content": parts}]).messages == (
        ChatMessage("user", "a\nb"),
    )
    assert good(CHAT, messages=[{"role": "assistant", "content": "a", "tool_calls": None}]).messages


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "content[0].type is 'image_url'",
        ),
        ({"role": "user", "content": ["a"]}, "content[0] is text; it must be an object"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text is null"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, "content[0]: 'x' is unknown"),
        ({"role": "assistant", "content": None}, "content is null"),
        ({"role": "user", "content": "a", "name": "Ann"}, "messages[0]: 'name' is unknown"),
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "messages[0]: 'tool_call_id' is unknown"),
    ],
)
def test_messages_that_are_not_served(message, words):
    failure = refused(CHAT, messages=[message])
    assert failure.code == "invalid_line"
    assert words in failure.message


@pytest.mark.parametrize("prompt", ["Say", ["Say"]])
def test_prompt_as_text(prompt):
    assert good(TEXT, prompt=prompt).text == "Say"


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
def test_prompt_as_token_ids(prompt):
    assert good(TEXT, prompt=prompt).tokens == (5, 6)


@pytest.mark.parametrize("prompt", [None, 5, ["a", "b"], [[1], [2]], [1, "a"], [[True]], {}])
def test_prompt_that_is_none_or_several(prompt):
    assert "the row's body.prompt is" in refused(TEXT, prompt=prompt).message


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 5, "return_full_text": False}),
        ({"echo": True}, {"return_full_text": True, "prompt_log_probs": False}),
        ({"logprobs": 3}, {"details": True, "top_n_tokens": 3, "prompt_log_probs": False}),
        ({"logprobs": 0, "echo": True}, {"details": True, "top_n_tokens": 0, "prompt_log_probs": True}),
        ({"best_of": 1, "suffix": ""}, {"details": False}),
    ],
)
def test_parameters_of_a_completion(said, meant):
    params = good(TEXT, **said).params
    assert {name: getattr(params, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"logprobs": 6}, "logprobs is 6; it must be a whole number from 0 to 5"),
        ({"logprobs": True}, "logprobs is true"),
        ({"logprobs": 1, "echo": True}, "logprobs is 1; it must be 0 with echo"),
        ({"echo": 1}, "echo is 1"),
        ({"best_of": 2}, "best_of is 2"),
        ({"suffix": "x"}, "suffix is 'x'; it must be absent or ''"),
        ({"max_completion_tokens": 5}, "'max_completion_tokens' is unknown"),
    ],
)
def test_what_a_completion_cannot_have(said, words):
    assert words in refused(TEXT, **said).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "GET"}, "method is 'GET'"),
        (
            {"url": "/v1/embeddings"},
            "url is '/v1/embeddings'; it must be /v1/chat/completions or /v1/completions",
        ),
        ({"url": []}, "url is a list of 0"),
        ({"body": "x"}, "body is text"),
        ({"custom": 1}, "'custom' is unknown; the nearest known name is custom_id"),
    ],
)
def test_requests_that_are_none(changes, words):
    row = read(request(CHAT, **changes))
    assert (row.failure.code, row.id) == ("invalid_line", "a")
    assert words in row.failure.message


@pytest.mark.parametrize("custom_id", [None, "", 5])
def test_request_without_an_id_is_called_by_its_index(custom_id):
    row = read(request(CHAT, custom_id=custom_id), index=7)
    assert row.id == "7"
    assert "custom_id" in row.failure.message


def test_what_a_job_says_for_native_rows_is_not_passed_over():
    assert "cannot be scored" in read(request(CHAT), Given(task=Task.SCORE)).failure.message
    failure = read(request(CHAT), Given(parameters={"seed": 5})).failure
    assert "the job has parameters, which are for native rows" in failure.message


# Results


def result(row, **changes):
    return RowResult(
        **{
            "row": row,
            "text": "2 + 2 equals 4.",
            "finish_reason": FinishReason.EOS_TOKEN,
            "prompt_tokens": 24,
            "completion_tokens": 8,
        }
        | changes
    )


def line(one):
    data = wire.encode_rows(JOB, [one], base_model="base")
    assert data.count(b"\n") == 1
    return json.loads(data)


def test_chat_answer_has_the_official_shape():
    """That of a line which the API wrote, in examples/data/batch_result.json of openai-api-rs."""
    row = read(OFFICIAL)
    assert line(result(row)) == {
        "id": "batch_req_j-0",
        "custom_id": "request-1",
        "response": {
            "status_code": 200,
            "request_id": "batch_req_j-0",
            "body": {
                "id": "chatcmpl-j-0",
                "object": "chat.completion",
                "created": 1711471533,
                "model": "gpt-3.5-turbo-0125",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "2 + 2 equals 4.", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 24, "completion_tokens": 8, "total_tokens": 32},
                "system_fingerprint": None,
            },
        },
        "error": None,
    }


def test_completion_has_the_official_shape():
    body = line(result(good(TEXT), finish_reason=FinishReason.LENGTH))["response"]["body"]
    assert (body["object"], body["id"]) == ("text_completion", "cmpl-j-0")
    assert body["choices"] == [
        {"text": "2 + 2 equals 4.", "index": 0, "logprobs": None, "finish_reason": "length"}
    ]


def test_native_rows_are_answered_by_the_endpoint_that_they_would_have_asked():
    native = [Row(index=0, id="r", text="a"), Row(index=0, id="r", messages=(ChatMessage("user", "a"),))]
    objects = [line(result(row))["response"]["body"]["object"] for row in native]
    assert objects == ["text_completion", "chat.completion"]
    assert line(result(native[0]))["response"]["body"]["model"] == "base"


def test_adapter_is_the_model_and_its_version_the_fingerprint():
    body = line(result(good(CHAT, model="pirate"), adapter_version="v1"))["response"]["body"]
    assert (body["model"], body["system_fingerprint"]) == ("pirate", "v1")


TOKENS = (TokenDetail(5, "o", -0.5), TokenDetail(6, "\ufffd", float("-inf")))
LIKELY = ((TOKENS[0],), (TokenDetail(7, "é", -0.1), TOKENS[1]))


def test_log_probs_of_a_chat():
    row = good(CHAT, logprobs=True, top_logprobs=2)
    choice = line(result(row, tokens=TOKENS, top_tokens=LIKELY))["response"]["body"]["choices"][0]
    first, second = choice["logprobs"]["content"]
    assert first == {
        "token": "o",
        "logprob": -0.5,
        "bytes": [111],
        "top_logprobs": [{"token": "o", "logprob": -0.5, "bytes": [111]}],
    }
    assert (second["logprob"], second["bytes"]) == (-9999.0, None)
    assert second["top_logprobs"][0] == {"token": "é", "logprob": -0.1, "bytes": [195, 169]}


def test_log_probs_of_a_completion_with_its_prompt():
    row = good(TEXT, logprobs=0, echo=True)
    prefill = (TokenDetail(1, "Sa", None), TokenDetail(2, "y", -2.5))
    choice = line(result(row, tokens=TOKENS[:1], prefill=prefill))["response"]["body"]["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["Sa", "y", "o"],
        "token_logprobs": [None, -2.5, -0.5],
        "top_logprobs": None,
        "text_offset": [0, 2, 3],
    }
    row = good(TEXT, logprobs=2)
    choice = line(result(row, tokens=TOKENS, top_tokens=LIKELY))["response"]["body"]["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"o": -0.5}, {"é": -0.1, "\ufffd": -9999.0}]


def test_failed_row_is_a_line_of_an_error_file():
    failed = result(good(CHAT), failure=Failure("prompt_too_long", "why"))
    assert line(failed) == {
        "id": "batch_req_j-0",
        "custom_id": "a",
        "response": None,
        "error": {"code": "prompt_too_long", "message": "why"},
    }
    expired = line(result(good(CHAT), failure=Failure("expired", "late")))
    assert expired["error"]["code"] == "batch_expired"


def test_file_adds_up():
    rows = [
        result(good(CHAT, model="pirate"), adapter_version="v1"),
        result(good(TEXT)),
        result(good(CHAT), failure=Failure("expired", "late")),
        result(read(request(CHAT, method="GET"))),
    ]
    counted = wire.tally(wire.encode_rows(JOB, rows, base_model="base"), "openai")
    assert (counted.rows, counted.completed) == (4, 2)
    assert counted.errors == {"expired": 1, "invalid_line": 1}
    assert (counted.usage.prompt_tokens, counted.usage.completion_tokens) == (48, 16)
    assert counted.adapters == {"pirate": ("v1",)}
