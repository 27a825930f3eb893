"""Answers that are streamed, over a real engine and a real connection."""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import pytest

from tests.glue.calling import Worker, calling, make_core, serve
from tests.glue.support import until
from tests.glue.test_workflow_calls import written
from worker.errors import EngineFailed

LONG = {"max_new_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def core(base):
    return make_core(base)


@pytest.fixture
def run(core, adapter_paths, tmp_path):
    def go(scenario, **options):
        serve(core, adapter_paths[0].parent, tmp_path, scenario, **options)

    return go


@asynccontextmanager
async def asked(
    worker: Worker, body: dict[str, Any], target: str = "/invocations"
) -> AsyncIterator[aiohttp.ClientResponse]:
    url = f"http://127.0.0.1:{worker.port}{target}"
    async with worker._session.post(url, json={"stream": True, **body}) as answer:
        yield answer


async def lines_of(worker: Worker, body: dict[str, Any], target: str = "/invocations") -> list[Any]:
    async with asked(worker, body, target) as answer:
        assert (answer.status, answer.content_type) == (200, "application/jsonlines")
        return [json.loads(line) for line in (await answer.text()).splitlines()]


async def events_of(worker: Worker, body: dict[str, Any], target: str) -> list[Any]:
    async with asked(worker, body, target) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        *events, done, end = (await answer.text()).split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def steps(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """The engine makes as many steps as are released."""
    allowed, step, over = threading.Semaphore(0), worker.core.engine.step, threading.Event()

    def held():
        assert over.is_set() or allowed.acquire(timeout=30)
        return step()

    monkeypatch.setattr(worker.core.engine, "step", held)
    yield allowed
    over.set()
    allowed.release(1000)


@pytest.mark.parametrize("adapter", ["", "a0", "a1"])
def test_lines_are_the_answer_token_by_token(run, adapter):
    async def scenario(worker: Worker):
        body = {"inputs": "one", "adapters": adapter, "parameters": {**LONG, "details": True}}
        whole = (await worker.invoke(body)).body
        lines = await lines_of(worker, body)
        assert len(lines) == 60
        assert "".join(line["token"]["text"] for line in lines) == whole["generated_text"]
        assert [line["token"]["id"] for line in lines] == [
            token["id"] for token in whole["details"]["tokens"]
        ]
        assert [line.get("generated_text") for line in lines] == [None] * 59 + [whole["generated_text"]]
        details = lines[-1]["details"]
        assert details == {"finish_reason": "length", "generated_tokens": 60, "inputs": "one"}
        assert worker.metric('loramill_http_rows_total{outcome="completed"}') == 2

    run(scenario)


def test_a_token_is_sent_before_the_next_is_computed(run, monkeypatch):
    async def scenario(worker: Worker):
        with steps(worker, monkeypatch) as allowed:
            allowed.release()
            async with asked(worker, {"inputs": "one", "parameters": LONG}) as answer:
                for _ in range(5):
                    line = json.loads(await answer.content.readline())
                    assert line.keys() == {"token"}
                    allowed.release()
            # The client has gone without having read the rest.
        await worker.settled()

    run(scenario)


def test_a_row_that_is_refused_before_its_first_token_has_the_status_of_a_call(run):
    async def scenario(worker: Worker):
        for body, target, status, says in (
            (
                {"inputs": "one", "adapters": "nobody"},
                "/invocations",
                424,
                "Adapter nobody is not registered",
            ),
            ({"inputs": "x" * 200}, "/invocations", 400, "The prompt has 200 tokens"),
            ({"model": "nobody", "prompt": "x"}, "/v1/completions", 404, "Adapter nobody is not registered"),
        ):
            async with asked(worker, body, target) as answer:
                assert (answer.status, answer.content_type) == (status, "application/json")
                assert (await answer.json())["message"].startswith(says)
        assert worker.metric('loramill_http_rows_total{outcome="adapter_not_found"}') == 2

    run(scenario)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"inputs": ["one"]}, "Stream is true; that is for inputs of one text, to be gone on with"),
        ({"inputs": "one", "task": "score"}, "Stream is true; that is for inputs of one text"),
        ({"inputs": "one", "stream": "yes"}, "Stream is 'yes'; it must be true or false"),
        ({"model": "tiny", "prompt": "x", "stream": 1}, "Stream is 1; it must be true or false"),
        ({"model": "tiny", "prompt": "x", "logprobs": 1}, "Logprobs is there, and stream is true"),
        ({"model": "tiny", "prompt": "x", "echo": True}, "Echo is there, and stream is true"),
        ({"model": "tiny", "prompt": "x", "stream_options": {"n": 1}}, "Stream_options must be an object"),
        (
            {"model": "tiny", "prompt": "x", "stream_options": {"include_usage": 1}},
            "Include_usage is 1; it must be true or false",
        ),
        (
            {"model": "tiny", "prompt": "x", "stream": False, "stream_options": {"include_usage": True}},
            "Stream_options must be an object with include_usage, where stream is true",
        ),
    ],
)
def test_what_cannot_be_streamed_is_told(run, body, says):
    async def scenario(worker: Worker):
        async with asked(worker, body) as answer:
            assert answer.status == 400
            assert (await answer.json())["message"].startswith(says)

    run(scenario)


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/invocations"])
@pytest.mark.parametrize("model", ["tiny", "a1"])
def test_a_chat_is_streamed_as_openais_is(run, target, model):
    async def scenario(worker: Worker):
        body = {"model": model, "messages": [{"role": "user", "content": "who"}], "max_tokens": 20, "seed": 3}
        whole = (await worker.invoke(body, target)).body
        body["stream_options"] = {"include_usage": True}
        *chunks, usage = await events_of(worker, body, target)
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert {chunk["model"] for chunk in chunks} == {whole["model"]}
        said = [chunk["choices"][0] for chunk in chunks]
        assert said[0]["delta"]["role"] == "assistant"
        text = "".join(one["delta"].get("content", "") for one in said)
        assert text == whole["choices"][0]["message"]["content"]
        assert said[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert usage["usage"] == whole["usage"]

    run(scenario)


def test_a_completion_is_streamed_up_to_its_stop_sequence(run):
    async def scenario(worker: Worker):
        body = {"model": "a0", "prompt": "one", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        whole = (await worker.invoke(body, "/v1/completions")).body["choices"][0]["text"]
        stop = next(whole[at : at + 3] for at in range(8, len(whole)) if whole[at : at + 3].isprintable())
        chunks = await events_of(worker, body | {"stop": [stop]}, "/v1/completions")
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == whole[: whole.index(stop)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    run(scenario)


def test_a_row_that_ends_in_time_out_says_so_in_the_last_line(run, monkeypatch):
    async def scenario(worker: Worker):
        with steps(worker, monkeypatch) as allowed:
            allowed.release(3)
            lines = await lines_of(worker, {"inputs": "one", "parameters": LONG})
            assert [line.keys() for line in lines] == [{"token"}] * 3 + [{"error"}]
            assert lines[-1]["error"]["code"] == "timeout"
        await worker.settled()
        assert worker.metric('loramill_http_rows_total{outcome="timeout"}') == 1

    run(scenario, timeout_seconds=1.0)


def test_an_engine_that_breaks_breaks_the_connection(core, adapter_paths, tmp_path, monkeypatch):
    def broken():
        raise EngineFailed("it is broken")

    async def main():
        async with calling(core, adapter_paths[0].parent, tmp_path) as worker:
            with steps(worker, monkeypatch) as allowed:
                allowed.release(2)
                async with asked(worker, {"inputs": "one", "parameters": LONG}) as answer:
                    await answer.content.readline()
                    monkeypatch.setattr(worker.core.engine, "take_deltas", broken)
                    allowed.release()
                    with pytest.raises(aiohttp.ClientPayloadError):
                        await answer.text()
        for name in [*core.engine._sequences]:
            core.engine.abort(name)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_workflow_answers_in_one_line(core, adapter_paths, tmp_path):
    async def scenario(worker: Worker):
        assert (await worker("POST", "/workflows", url=written(tmp_path))).status == 200
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 6}}
        whole = (await worker.invoke(body, "/predictions/polite")).body["generated_text"]
        (line,) = await lines_of(worker, body, "/predictions/polite")
        assert line["generated_text"] == whole
        chat = {
            "model": "polite",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 6,
            "seed": 1,
        }
        whole = (await worker.invoke(chat, "/v1/chat/completions")).body["choices"][0]["message"]["content"]
        chunks = await events_of(worker, chat, "/v1/chat/completions")
        assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks][1:] == [whole, None]

    (tmp_path / "adapters").mkdir()
    for name, path in zip(("pirate", "robot"), adapter_paths, strict=False):
        shutil.copytree(path, tmp_path / name)
    serve(core, tmp_path / "adapters", tmp_path, scenario)


def test_streams_and_whole_answers_side_by_side_are_what_they_are_alone(run):
    async def scenario(worker: Worker):
        bodies = [
            {"inputs": text, "adapters": adapter, "parameters": {"max_new_tokens": 20, "ignore_eos": True}}
            for text in ("one", "two")
            for adapter in ("", "a0", "a1", "a2")
        ]
        alone = [(await worker.invoke(body)).body["generated_text"] for body in bodies]
        streams = asyncio.gather(*(lines_of(worker, body) for body in bodies))
        job = asyncio.create_task(worker.job(["job"] * 4, adapters="a3", parameters=LONG))
        together = [lines[-1]["generated_text"] for lines in await streams]
        assert together == alone
        assert all(result.failure is None for result in await job)

    run(scenario)


def test_a_client_that_goes_has_its_row_dropped(run, monkeypatch):
    async def scenario(worker: Worker):
        async with asked(worker, {"inputs": "one", "parameters": {**LONG, "max_new_tokens": 100}}) as answer:
            await answer.content.readline()
            answer.close()
        await until(lambda: not worker.bridge._flights)
        assert worker.metric("loramill_adapter_rows_total") == 0  # it did not end

    run(scenario)
