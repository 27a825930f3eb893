"""Calls of the model over HTTP, over a real engine."""

import asyncio
import gzip
import json
import re
import shlex
import shutil
import threading

import pytest

from tests.glue.calling import MODEL, Worker, make_core, serve
from tests.glue.registering import refused
from tests.glue.support import until
from tests.test_docs import README, blocks
from worker.errors import EngineFailed
from worker.http import inference_api
from worker.http.generation import STATUSES
from worker.wire.calls import FIELDS

FAILED = "FailedDependencyException"
HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
LONG = {"max_new_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def core(tmp_path_factory, base):
    return make_core(base)


@pytest.fixture
def run(core, adapter_paths, tmp_path):
    def go(scenario, **options):
        serve(core, adapter_paths[0].parent, tmp_path, scenario, **options)

    return go


async def said_by(worker: Worker, text: str, adapter: str | None, **parameters) -> str:
    (result,) = await worker.job([text], adapters=adapter, parameters=parameters)
    assert result.failure is None
    return result.text


@pytest.mark.parametrize(
    "target", ["/invocations", f"/predictions/{MODEL}", f"/invocations?model_name={MODEL}"]
)
def test_answers_are_those_of_a_job_one_for_each_input(run, target):
    async def scenario(worker: Worker):
        body = {
            "inputs": ["one", "two", "two"],
            "adapters": ["a0", "", "a1"],
            "parameters": {"max_new_tokens": 9},
        }
        answer = await worker.invoke(body, target)
        assert answer.status == 200
        expected = [
            await said_by(worker, text, adapter, max_new_tokens=9)
            for text, adapter in (("one", "a0"), ("two", None), ("two", "a1"))
        ]
        assert answer.body == [{"generated_text": text} for text in expected]
        assert len(set(expected)) == 3

    run(scenario)


def test_a_single_text_is_answered_by_an_object_and_plain_text_is_a_single_text(run):
    async def scenario(worker: Worker):
        expected = {"generated_text": await said_by(worker, "one", None)}
        assert (await worker.invoke({"inputs": "one"})).body == expected
        assert (await worker.invoke({"inputs": ["one"]})).body == [expected]
        for content_type in ("text/plain", "text/plain; charset=utf-8"):
            answer = await worker("POST", "/invocations", {"Content-Type": content_type}, b"one")
            assert (answer.status, answer.body) == (200, expected)
        expected = {"generated_text": await said_by(worker, "one", "a2")}
        answer = await worker("POST", "/invocations?adapter=a2", {"Content-Type": "text/plain"}, b"one")
        assert answer.body == expected

    run(scenario)


def test_the_adapter_of_the_header_wins_over_that_of_the_query_over_that_of_the_body(run):
    async def scenario(worker: Worker):
        says = {name: await said_by(worker, "one", name or None) for name in ("", "a0", "a1", "a2")}
        assert len(set(says.values())) == 4

        async def text(target, **headers):
            answer = await worker.invoke({"inputs": "one", "adapters": "a0"}, target, **headers)
            return answer.body["generated_text"]

        assert await text("/invocations") == says["a0"]
        assert await text("/invocations?adapter=a1") == says["a1"]
        assert await text("/invocations?adapter=") == says[""]
        for name in (HEADER, HEADER.lower(), HEADER.upper()):
            assert await text("/invocations?adapter=a1", **{name: "a2"}) == says["a2"]
            assert await text("/invocations?adapter=a1", **{name: ""}) == says[""]

    run(scenario)


def test_a_list_of_adapters_has_null_and_empty_for_the_base_model(run):
    async def scenario(worker: Worker):
        says = await said_by(worker, "one", None)
        answer = await worker.invoke({"inputs": ["one"] * 2, "adapters": ["", None]})
        assert answer.body == [{"generated_text": says}] * 2
        answer = await worker.invoke({"inputs": ["one"] * 3, "adapters": ["a0", "a1"]})
        assert refused(answer, 400, "Number of adapters is not equal to the number of inputs")

    run(scenario)


def test_rows_have_messages_parameters_and_details_of_their_own(run):
    async def scenario(worker: Worker):
        rows = [
            {
                "messages": [{"role": "user", "content": "who"}],
                "adapter": "a1",
                "parameters": {"max_new_tokens": 3},
            },
            {"input": "one", "parameters": {"decoder_input_details": True, "top_n_tokens": 2}},
        ]
        answer = await worker.invoke(
            {"inputs": rows, "parameters": {"max_new_tokens": 2, "ignore_eos": True}}
        )
        chat, one = answer.body
        assert set(chat) == {"generated_text"}
        details = one["details"]
        assert (details["finish_reason"], details["generated_tokens"], details["inputs"]) == (
            "length",
            2,
            "one",
        )
        assert [set(token) for token in details["tokens"]] == [{"id", "text", "log_prob"}] * 2
        assert [token["text"] for token in details["prefill"]] == list("one")
        assert details["prefill"][0]["log_prob"] is None
        assert [len(likely) for likely in details["top_tokens"]] == [2, 2]
        assert "".join(token["text"] for token in details["tokens"]) == one["generated_text"]

    run(scenario)


def test_scores_are_those_of_a_job(run):
    async def scenario(worker: Worker):
        rows = [{"input": "a b", "target": " c"}, "a whole text"]
        answer = await worker.invoke({"inputs": rows, "task": "score", "adapters": "a1"})
        results = await worker.job(rows, task="score", adapters="a1")
        for one, result in zip(answer.body, results, strict=True):
            assert one["token_logprobs"] == pytest.approx(result.score.log_probs, abs=1e-4)
        assert set(answer.body[0]) == {"logprob", "token_logprobs", "is_greedy"}

    run(scenario)


def test_sampling_without_a_seed_differs_from_call_to_call_and_with_one_does_not(run):
    async def scenario(worker: Worker):
        async def text(**parameters):
            body = {
                "inputs": "one",
                "parameters": {"do_sample": True, "temperature": 3.0, **LONG, **parameters},
            }
            return (await worker.invoke(body)).body["generated_text"]

        assert await text() != await text()
        assert await text(seed=4) == await text(seed=4)

    run(scenario)


def test_an_unknown_adapter_fails_its_row_at_once_and_names_no_other(run):
    async def scenario(worker: Worker):
        says = "Adapter nobody is not registered"
        answer = await worker.invoke({"inputs": ["one"] * 3, "adapters": ["a0", "nobody", "a1"]})
        first, second, third = answer.body
        assert second == {"error": {"code": "adapter_not_found", "message": says, "retryable": True}}
        assert set(first) == set(third) == {"generated_text"}
        assert refused(await worker.invoke({"inputs": "one", "adapters": "nobody"}), 424, says, FAILED)
        answer = await worker.invoke({"inputs": "one"}, **{HEADER: "../a0"})
        assert answer.status == 424
        assert "a1" not in json.dumps(answer.body)
        assert worker.metric('loramill_http_rows_total{outcome="adapter_not_found"}') == 3
        assert worker.metric('loramill_http_rows_total{outcome="completed"}') == 2

    run(scenario)


def test_an_adapter_that_cannot_be_used_fails_its_row_with_the_reason(run, adapter_paths, tmp_path, core):
    folder = tmp_path / "adapters"
    shutil.copytree(adapter_paths[0], folder / "bad")
    (folder / "bad" / "adapter_model.safetensors").write_bytes(b"no")

    async def scenario(worker: Worker):
        answer = await worker.invoke({"inputs": "one", "adapters": "bad"})
        assert (answer.status, answer.body["type"]) == (424, FAILED)
        assert "Adapter bad is invalid" in answer.body["message"]

    serve(core, folder, tmp_path, scenario)


def test_without_lora_only_the_base_answers(core, tmp_path):
    async def scenario(worker: Worker):
        assert (await worker.invoke({"inputs": "one"})).status == 200
        answer = await worker.invoke({"inputs": "one", "adapters": "a0"})
        assert refused(answer, 424, "Adapter a0 cannot be used: LoRA is not enabled", FAILED)

    serve(core, None, tmp_path, scenario)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "The body is not JSON"),
        (b"", "The body is not JSON"),
        (b'{"inputs": "\xff"}', "The body is not JSON"),
        (b"[" * 100_000, "The body is"),
        (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "The body is nested too deeply"),
        (b"[]", "The body is JSON and not an object"),
        ({}, "Inputs is absent"),
        ({"inputs": []}, "Inputs has 0 rows; it must have from 1 to 64"),
        ({"inputs": ["x"] * 65}, "Inputs has 65 rows; it must have from 1 to 64"),
        ({"inputs": "x", "adapter": "a0"}, "Field 'adapter' is unknown; the nearest known name is adapters"),
        ({"inputs": "x", "task": "sing"}, "Task is 'sing'; it must be generate or score"),
        ({"inputs": "x", "task": ["score"]}, "Task is a list of 1; it must be generate or score"),
        ({"inputs": "x", "parameters": {"max_tokens": 3}}, "parameter 'max_tokens' is unknown"),
        ({"inputs": "x" * 200}, "The prompt has 200 tokens"),
        ({"inputs": ["x", "y"], "ids": ["1", "1"]}, "Row id '1' is used 2 times"),
    ],
)
def test_a_body_that_is_wrong_is_told_why(run, body, says):
    async def scenario(worker: Worker):
        answer = await worker.invoke(body)
        assert (answer.status, answer.body["code"], answer.body["type"]) == (400, 400, "BadRequestException")
        assert answer.body["message"].startswith(says)

    run(scenario)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/json;charset=UTF-8", 200),
        ("Application/JSON", 200),
        ("application/json; charset=latin-1", 415),
        ("application/json; charset=nonsense", 415),
        ("text/csv", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data", 415),
        ("", 415),
    ],
)
def test_content_types_that_are_not_served_are_refused(run, content_type, status):
    async def scenario(worker: Worker):
        answer = await worker.invoke({"inputs": "one"}, **{"Content-Type": content_type})
        assert answer.status == status, answer.body
        assert status == 200 or answer.body["code"] == 415

    run(scenario)


def test_paths_and_methods_that_are_not_there(run):
    async def scenario(worker: Worker):
        answer = await worker.invoke({"inputs": "x"}, "/predictions/other")
        assert refused(answer, 404, "The model other was not found")
        answer = await worker.invoke({"inputs": "x"}, "/invocations?model_name=a%2Fb")
        assert refused(answer, 404, "The model a/b was not found")
        for target in ("/predictions", "/predictions/", "/predictions/tiny/1/x", "/invocations/x", "/ping/x"):
            answer = await worker.invoke({"inputs": "x"}, target)
            assert refused(answer, 404, "Requested resource is not found", "ResourceNotFoundException")
        for method, target in (("GET", "/invocations"), ("PUT", "/predictions/tiny"), ("POST", "/ping")):
            answer = await worker(method, target)
            assert (answer.status, answer.body["type"]) == (405, "MethodNotAllowedException")
            assert answer.headers["Allow"]
        answer = await worker.invoke({"inputs": "x"}, "/invocations?adaptor=a0")
        assert refused(answer, 400, "The parameter adaptor is not known here")
        answer = await worker.invoke({"inputs": "x"}, "/invocations?adapter=a0&adapter=a1")
        assert refused(answer, 400, "The parameter adapter is given twice")

    run(scenario)


def test_ping_and_calls_say_why_the_worker_is_not_ready(run):
    async def scenario(worker: Worker):
        assert (await worker("GET", "/ping")).body == {"status": "Healthy"}
        worker.reason = "draining"
        for answer in (await worker("GET", "/ping"), await worker.invoke({"inputs": "x"})):
            assert refused(answer, 503, "The worker is not ready: draining", "ServiceUnavailableException")
            assert answer.headers["Retry-After"]
        worker.reason = None

    run(scenario)


def test_all_but_ping_asks_for_the_token(run):
    async def scenario(worker: Worker):
        assert (await worker("GET", "/ping")).status == 200
        answer = await worker.invoke({"inputs": "x"})
        assert refused(answer, 401, "a bearer token is required", "UnauthorizedException")
        answer = await worker.invoke({"inputs": "x"}, Authorization="Bearer s3cret")
        assert answer.status == 200

    run(scenario, token="s3cret")


def test_a_page_in_a_browser_may_not_call(run):
    async def scenario(worker: Worker):
        answer = await worker.invoke({"inputs": "x"}, Origin="https://example.com")
        assert answer.status == 403

    run(scenario)


def hold(worker: Worker, monkeypatch) -> threading.Event:
    """The engine makes no step until the event is set."""
    gate, step = threading.Event(), worker.core.engine.step

    def held():
        assert gate.wait(30)
        return step()

    monkeypatch.setattr(worker.core.engine, "step", held)
    return gate


def test_more_calls_or_rows_than_may_be_at_work_are_refused_to_be_tried_again(run, monkeypatch):
    async def scenario(worker: Worker):
        gate = hold(worker, monkeypatch)
        first = asyncio.create_task(worker.invoke({"inputs": ["x"] * 3}))
        await until(lambda: worker.generation.num_rows == 3)
        answer = await worker.invoke({"inputs": ["x"] * 2})
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert answer.body["message"] == "The worker is busy: 3 rows of calls are at work, and there may be 4"
        second = asyncio.create_task(worker.invoke({"inputs": "x"}))
        await until(lambda: worker.generation.num_rows == 4)
        answer = await worker.invoke({"inputs": "x"})
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert answer.body["message"] == "The worker is busy: 2 calls are at work, as many as there may be"
        gate.set()
        assert [(await one).status for one in (first, second)] == [200, 200]
        assert (await worker.invoke({"inputs": ["x"] * 4})).status == 200

    run(scenario, max_rows=4, max_calls=2)


def test_a_row_that_takes_too_long_is_given_up(run, monkeypatch):
    async def scenario(worker: Worker):
        gate = hold(worker, monkeypatch)
        answer = await worker.invoke({"inputs": "x"})
        says = "The row did not end within 0.2 s"
        assert refused(answer, 504, says, "GatewayTimeoutException")
        answer = await worker.invoke({"inputs": ["x"]})
        assert answer.body == [{"error": {"code": "timeout", "message": says, "retryable": True}}]
        gate.set()

    run(scenario, timeout_seconds=0.2)


def test_the_rows_of_a_client_that_goes_away_are_dropped(run, monkeypatch):
    async def scenario(worker: Worker):
        gate = hold(worker, monkeypatch)
        _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        body = json.dumps({"inputs": ["x", "y"], "adapters": ["a0", None], "parameters": LONG}).encode()
        head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: len(worker.bridge._flights) == 2)
        writer.close()
        gate.set()
        await until(lambda: worker.calls.num_calls == 0)
        await worker.settled()
        assert worker.metric("loramill_adapter_rows_total") == 0
        assert worker.metric('loramill_http_requests_total{route="invocations",status="499"}') == 1

    run(scenario)


def test_a_body_is_bounded_in_size_and_time(run):
    async def scenario(worker: Worker):
        answer = await worker.invoke({"inputs": "x" * 1000})
        assert refused(answer, 413, "The body is too large: it may have 1000 bytes")
        packed = gzip.compress(json.dumps({"inputs": "x" * 1_000_000}).encode())
        assert len(packed) < 1100
        answer = await worker.invoke(packed, **{"Content-Encoding": "gzip"})
        assert answer.status == 413
        head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for rest, status in (
            (b"Content-Length: 100\r\n\r\n{", 408),
            (b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", 408),
            (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{", 400),
            (b"Content-Length: 2000\r\n\r\n{", 413),
        ):
            assert (await send(worker.port, head + b"Connection: close\r\n" + rest)) == status, rest

    run(scenario, max_body_bytes=1000, body_seconds=0.2)


async def send(port: int, request: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()


def test_an_engine_that_has_stopped_is_told_of(run, monkeypatch):
    async def scenario(worker: Worker):
        async def gone(*_):
            raise EngineFailed("the engine failed: secret words")

        monkeypatch.setattr(worker.bridge, "submit", gone)
        answer = await worker.invoke({"inputs": ["x", "y"]})
        says = "The worker is not ready: the engine has stopped"
        assert refused(answer, 503, says, "ServiceUnavailableException")

    run(scenario)


def test_a_mistake_of_ours_shows_nothing_of_itself(run, monkeypatch):
    async def scenario(worker: Worker):
        async def broken(*_):
            raise ValueError("secret words")

        monkeypatch.setattr(worker.generation, "answer", broken)
        answer = await worker.invoke({"inputs": "x"})
        assert (answer.status, answer.body["type"]) == (500, "InternalServerException")
        assert "secret" not in json.dumps(answer.body)

    run(scenario)


def test_calls_run_beside_a_job_and_both_say_what_they_say_alone(run):
    async def scenario(worker: Worker):
        inputs = [f"row {number}" for number in range(24)]
        adapters = [f"a{number % 6}" for number in range(24)]
        alone = [await said_by(worker, "call", adapter) for adapter in adapters[:6]]
        expected = [result.text for result in await worker.job(inputs, adapters=adapters)]
        job = asyncio.create_task(worker.job(inputs, adapters=adapters))
        called = []
        for _ in range(3):
            answer = await worker.invoke({"inputs": ["call"] * 6, "adapters": adapters[:6]})
            called.append([one.get("generated_text") for one in answer.body])
        assert called == [alone] * 3
        assert [result.text for result in await job] == expected

    run(scenario)


def test_the_examples_of_the_readme_are_answered(core, adapter_paths, tmp_path):
    for name, path in zip(("pirate", "robot"), adapter_paths, strict=False):
        shutil.copytree(path, tmp_path / "adapters" / name)
    block = next(block for block in blocks("sh") if block.startswith("here="))
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("curl")]

    async def scenario(worker: Worker):
        answers = [await curl(worker, *command) for command in commands]
        assert [answer.status for answer in answers] == [200] * len(commands)
        ping, single, several, plain, header, chat, like_djl, models, streamed, scored = [
            one.body for one in answers
        ]
        assert ping == {"status": "Healthy"}
        assert set(single) == set(plain) == {"generated_text"}
        assert [set(one) for one in several] == [{"generated_text"}] * 2
        texts = [one["generated_text"][:8] for one in (*several, plain)]
        assert texts[0] == texts[2] != texts[1]
        assert header["details"]["inputs"] == "Who goes there?"
        assert header["generated_text"] != plain["generated_text"]
        assert scored[0]["logprob"] < 0
        assert json.loads(streamed.splitlines()[-1])["generated_text"] == header["generated_text"]
        assert (chat["object"], chat["model"]) == ("chat.completion", "pirate")
        assert like_djl["choices"] == chat["choices"]
        assert [one["id"] for one in models["data"]] == ["llama", "pirate", "robot"]

    serve(core, tmp_path / "adapters", tmp_path, scenario, model="llama")


async def curl(worker: Worker, *said: str):
    """What the command of this name would do."""
    target, *options = (option for option in said if option != "-N")
    headers, data = {}, None
    for flag, value in zip(options[::2], options[1::2], strict=True):
        assert flag in {"-H", "-d"}
        if flag == "-d":
            data = value.encode()
        else:
            name, _, said = value.partition(": ")
            headers[name] = said
    assert target.startswith("$here/")
    return await worker("GET" if data is None else "POST", target.removeprefix("$here"), headers, data)


def test_the_readme_names_every_route_field_and_error():
    text = README.read_text().partition("\n## Calling over HTTP\n")[2].partition("\n## ")[0]
    routes = re.findall(r"`([A-Z]+ /\S+)`", text)
    documented = re.findall(r"^ *([A-Z]+) +(/\S+)", str(inference_api.__doc__), re.MULTILINE)
    assert sorted(routes) == sorted(" ".join(one) for one in documented)
    assert all(f"`{field}`" in text for field in FIELDS)
    rows = re.findall(r"^\| ([0-9, ]+) \|", text, re.MULTILINE)
    told = {int(code) for row in rows for code in row.split(", ")}
    assert told == {*STATUSES.values(), 400, 401, 403, 404, 405, 408, 413, 415, 503}


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/invocations"])
def test_a_chat_of_openais_is_answered_as_one(run, target):
    async def scenario(worker: Worker):
        messages = [{"role": "user", "content": "who"}]
        body = {"model": "a1", "messages": messages, "max_tokens": 5, "temperature": 0, "logprobs": True}
        answer = await worker.invoke(body, target)
        assert answer.status == 200, answer.body
        (choice,) = answer.body["choices"]
        (result,) = await worker.job(
            [{"messages": messages}], adapters="a1", parameters={"max_new_tokens": 5}
        )
        assert choice["message"]["content"] == result.text
        assert len(choice["logprobs"]["content"]) == 5
        assert (answer.body["object"], answer.body["model"]) == ("chat.completion", "a1")
        assert answer.body["usage"]["completion_tokens"] == 5
        assert answer.body["system_fingerprint"] == result.adapter_version

    run(scenario)


def test_a_completion_of_openais_is_answered_as_one_by_the_base_or_the_adapter_of_the_header(run):
    async def scenario(worker: Worker):
        body = {"model": "org/tiny", "prompt": "one", "max_tokens": 7, "temperature": 0}
        for headers, adapter in (({}, None), ({HEADER: "a2"}, "a2")):
            answer = await worker.invoke(body, "/v1/completions", **headers)
            says = await said_by(worker, "one", adapter, max_new_tokens=7)
            assert (answer.status, answer.body["choices"][0]["text"]) == (200, says)

    run(scenario)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "nobody", "prompt": "x"}, 404, "Adapter nobody is not registered"),
        ({"model": "tiny", "prompt": "x", "n": 2}, 400, "parameter n is 2"),
        ({"model": 5, "prompt": "x"}, 400, "the row's body.model is 5"),
        ({"prompt": "x", "adapters": "nobody"}, 404, "Adapter nobody is not registered"),
        ({"prompt": "x", "adapters": ["a0"]}, 400, "the row's adapters is a list of 1; it must be text"),
        (
            {"model": "a0", "prompt": "x", "adapters": "a1"},
            400,
            "model is 'a0' and adapters 'a1'; they name two adapters",
        ),
        ({"model": "a0", "prompt": "x", "adapters": ["a0"]}, 400, "model is 'a0' and adapters a list of 1"),
        ({"model": "tiny"}, 400, "the row's body.prompt is null"),
        ({"model": "tiny", "inputs": "x"}, 400, "parameter 'inputs' is unknown"),
        ([], 400, "The body is JSON and not an object"),
    ],
)
def test_what_is_wrong_with_a_body_of_openais_is_told(run, body, status, says):
    async def scenario(worker: Worker):
        answer = await worker.invoke(body, "/v1/completions")
        assert (answer.status, answer.body["code"]) == (status, status)
        assert answer.body["message"].startswith(says)

    run(scenario)


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/invocations", f"/predictions/{MODEL}"])
def test_a_chat_names_its_adapter_as_djl_serving_s_do(run, target):
    async def scenario(worker: Worker):
        messages = [{"role": "user", "content": "who"}]
        inputs, parameters = [{"messages": messages}], {"max_new_tokens": 5}
        said = {}
        for name in ("", "a0", "a1", "a2"):
            (result,) = await worker.job(inputs, adapters=name or None, parameters=parameters)
            said[name] = result.text
        assert len(set(said.values())) == 4

        async def ask(query="", headers=None, **fields):
            body = {"messages": messages, "max_tokens": 5, "temperature": 0} | fields
            answer = await worker.invoke(body, target + query, **(headers or {}))
            assert answer.status == 200, answer.body
            return answer.body["choices"][0]["message"]["content"], answer.body["model"]

        assert await ask() == await ask(adapters="") == await ask(adapters=None) == (said[""], MODEL)
        for fields in ({}, {"model": MODEL}, {"model": "a0"}):
            assert await ask(adapters="a0", **fields) == (said["a0"], "a0")
        assert await ask("?adapter=a1", adapters="a0") == (said["a1"], "a1")
        assert await ask("?adapter=a1", {HEADER: "a2"}, adapters="a0") == (said["a2"], "a2")
        assert await ask("", {HEADER: ""}, adapters="a0") == (said[""], MODEL)

    run(scenario)


def test_models_are_the_base_and_its_adapters(run):
    async def scenario(worker: Worker):
        answer = await worker("GET", "/v1/models")
        assert [one["id"] for one in answer.body["data"]] == [MODEL, *(f"a{number}" for number in range(6))]
        assert {one.get("parent") for one in answer.body["data"]} == {None, MODEL}
        for target in ("/v1", "/v1/models/a0", "/v1/chat", "/v1/embeddings"):
            assert (await worker("GET", target)).status == 404, target
        assert (await worker("GET", "/v1/completions")).status == 405

    run(scenario)
