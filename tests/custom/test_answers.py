"""Calls put together and answers taken apart; rows as requests and answers as lines. No process here."""

import json

import pytest

from worker.custom.answers import Answer, failure, merged, parted
from worker.custom.messages import MAX_MESSAGE_BYTES, Call, Head, frame, length_of
from worker.custom.package.djl_python import Input, Output, PairList, encode_decode
from worker.custom.rows import request_of, text_of
from worker.errors import HandlerRefusedRow, InvalidLine, OutOfMemory
from worker.jobs import ChatMessage, Row, SamplingParams, Task


def given(call: Call) -> Input:
    inputs = Input()
    inputs.properties.update(call.properties)
    for key, value in call.content:
        inputs.content.add(key, bytearray(value))
    return inputs


def test_a_batch_comes_apart_as_it_was_put_together() -> None:
    calls = [
        Call("handle", {"Content-Type": f"text/{n}"}, (("adapter", b"a"), (None, f"body {n}".encode())))
        for n in range(12)
    ]
    batch = given(merged(calls))
    assert (batch.is_batch(), batch.get_batch_size()) == (True, 12)
    found = batch.get_batches()
    assert [one.get_property("content-TYPE") for one in found] == [f"text/{n}" for n in range(12)]
    assert [one.get_as_string("data") for one in found] == [f"body {n}" for n in range(12)]
    assert {one.get_as_string("adapter") for one in found} == {"a"}


def test_each_of_a_batch_gets_its_own_answer_whatever_their_order() -> None:
    head = Head(properties={"x": "y"}, content=(("batch_1.data", b"one"), ("batch_0.", b"zero")))
    first, second = parted(head, 2)
    assert (first.content, second.content) == ((("data", b"zero"),), (("data", b"one"),))
    assert first.properties == {"x": "y"}


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (Head(content=(("batch_0.data", b""),)), "size mismatch"),
        (Head(content=(("data", b""), ("more", b""))), "batch output key"),
        (Head(content=(("batch_0.data", b""), ("batch_2.data", b""))), "batch output key"),
    ],
)
def test_an_answer_that_is_not_one_for_each_is_everybodys_failure(head: Head, words: str) -> None:
    answers = [Answer(part) for part in parted(head, 2)]
    assert all(answer.is_failure and words in answer.reason for answer in answers)


def test_a_message_beyond_the_limit_is_neither_sent_nor_waited_for() -> None:
    with pytest.raises(ValueError, match="it may have"):
        frame(Head(content=((None, bytes(MAX_MESSAGE_BYTES)),)))
    with pytest.raises(ValueError, match="it may have"):
        length_of(b"\xff\xff\xff\xff")


def row(**fields) -> Row:
    return Row(index=0, id="r", **fields)


def test_a_row_is_the_request_that_invocations_would_get() -> None:
    params = SamplingParams(max_new_tokens=5, prompt_log_probs=True, logit_bias=((7, 1.0),))
    properties, content = request_of(row(text="hello", adapter="red", params=params))
    inputs = given(Call("handle", properties, content))
    assert inputs.get_as_json() == {
        "inputs": "hello",
        "adapters": "red",
        "parameters": {"max_new_tokens": 5, "decoder_input_details": True, "logit_bias": {"7": 1.0}},
    }
    assert inputs.get_as_string("adapter") == "red"
    assert inputs.get_property("x-amzn-sagemaker-adapter-identifier") == "red"
    chat = row(messages=(ChatMessage("user", "hi"),))
    assert json.loads(request_of(chat)[1][-1][1]) == {"messages": [{"role": "user", "content": "hi"}]}
    assert json.loads(request_of(row(tokens=(1, 2)))[1][-1][1]) == {"inputs": [1, 2]}
    with pytest.raises(InvalidLine, match="score"):
        request_of(row(text="x", task=Task.SCORE))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"generated_text": "a"}', "a"),
        (b'[{"generated_text": "a", "details": {}}]', "a"),
        (b'[{"generated_text": "a"}, {"generated_text": "b"}]', None),
        (b'{"generated_text": 1}', None),
        (b'{"score": 0.5}', None),
        (b"plain", None),
        (b"", None),
        (b"[" * 100_000, None),
    ],
)
def test_what_becomes_the_generated_text(body: bytes, text: str | None) -> None:
    assert text_of(Answer(Head()), body) == (body.decode() if text is None else text)


def test_what_becomes_a_failed_row() -> None:
    with pytest.raises(OutOfMemory, match="too big"):
        text_of(Answer(failure("too big", 507)), b"")
    with pytest.raises(HandlerRefusedRow, match="invoke handler failure: no"):
        text_of(Answer(failure("no")), b"")
    with pytest.raises(HandlerRefusedRow, match="no text"):
        text_of(Answer(Head(properties={"Content-Type": "image/png"})), b"\xff")


def test_the_names_of_djl_python_do_what_they_do_there() -> None:
    pairs = PairList(pair_list=[("a", 1)])
    pairs.add("b", 2)
    pairs.add("c", None)
    pairs.add("first", 0, index=0)
    assert (pairs.get_keys(), pairs.get_values(), pairs.size()) == (["first", "a", "b"], [0, 1, 2], 3)
    assert (pairs.get("b"), pairs.get("z"), pairs.key_at(1), pairs.value_at(1)) == (2, None, "a", 1)
    inputs = Input()
    assert (inputs.is_empty(), inputs.get_as_bytes(), inputs.get_data()) == (True, None, None)
    inputs.properties["Content-Type"] = "application/json; charset=utf-8"
    inputs.content.add("data", b'{"inputs": [1]}')
    assert inputs.get_data() == encode_decode.decode(inputs, inputs.get_property("CONTENT-TYPE"))
    with pytest.raises(KeyError, match="requested data for key:z"):
        inputs.get_as_bytes("z")
    csv = Input()
    csv.content.add(None, b"inputs,more\na,b\n")
    assert encode_decode.decode(csv, "text/csv") == {"inputs": ["a"]}
    assert csv.get_as_csv() == [{"inputs": "a", "more": "b"}]


def test_an_output_is_put_together_as_djl_does() -> None:
    output = Output().add("text", key="k").add({"a": 1}, batch_index=3).add_property("x", 1).set_code(201)
    assert output.content.get_keys() == ["k", "batch_3."]
    assert (output.content.get("k"), output.get_property("x"), output.code) == (b"text", 1, 201)
    assert json.loads(output.content.value_at(1)) == {"a": 1}
    failed = json.loads(Output().error("why").content.value_at(0))
    assert failed == {"code": 424, "message": "invoke handler failure", "error": "why"}
    assert Output.binary_encode({"a": None}) == b"\x00\x01\x00\x00\x00\x01a\x00\x00\x00\x04None"
    done = []
    Output().finalize(done.append, 1).execute_finalize()
    assert done == [1]
