"""What of a request reaches a handler, and what is refused before it."""

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from tests.custom.conftest import MODELS, handler_of
from tests.glue.support import until
from worker.errors import HandlerBusy
from worker.http.handler_api import HandlerApi
from worker.http.inference_api import HttpLimits, InferenceApi
from worker.http.server import Apis, serving
from worker.metrics import Metrics

LARGEST = 100_000


@asynccontextmanager
async def served(reason: str | None = None, token: str | None = None):
    """A client, and the API with the unruly handler behind it."""
    async with handler_of(MODELS / "unruly") as handler:
        registry = CollectorRegistry()
        api = InferenceApi("unruly", HttpLimits(100, 64 << 20), lambda: reason, Metrics(registry))
        async with (
            serving("127.0.0.1", 0, registry, lambda: reason, token=token, apis=Apis(calls=api)) as port,
            aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client,
        ):
            api.handler = HandlerApi(handler, LARGEST)
            client.api = api
            yield client, handler


def ask(headers=None, body=b"", path="/invocations?how=ready", **settings):
    async def play():
        async with served(**settings) as (client, _), client.post(path, data=body, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None)

    return asyncio.run(play())


def test_headers_are_properties_but_the_token() -> None:
    headers = {
        "Authorization": "Bearer secret",
        "X-Mine": "1",
        "X-Amzn-SageMaker-Custom-Attributes": "a=1; b=2=3;c",
    }
    status, said = ask(headers, token="secret")
    properties = said["properties"]
    assert status == 200
    assert (properties["X-Mine"], properties["a"], properties["b"]) == ("1", "1", "2=3")
    assert "requestId" in properties
    assert not {name for name in properties if name.lower() in {"authorization", "c"}}


@pytest.mark.parametrize(
    ("headers", "path", "status", "words"),
    [
        ({"handler": "leave"}, "/invocations", 400, "handler can't be overridden"),
        ({"Batch_Size": "999999999"}, "/invocations", 400, "can't be overridden"),
        ({"Model_Dir": "/etc"}, "/invocations", 400, "can't be overridden"),
        ({"device_id": "7"}, "/invocations", 400, "can't be overridden"),
        ({"X-Amzn-SageMaker-Custom-Attributes": "handler=leave"}, "/invocations", 400, "overridden"),
        ({}, "/predictions/other", 404, "The model other was not found"),
        ({}, "/invocations?how=%ff", 400, "not UTF-8"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "/invocations", 400, "cannot be read"),
    ],
)
def test_what_no_handler_may_be_sent(headers, path, status, words) -> None:
    found, said = ask(headers, b"no form", path)
    assert (found, said["code"]) == (status, status)
    assert words in said["message"]


def test_a_body_beyond_the_limit_is_refused() -> None:
    assert ask(body=b"x" * 100_000)[0] == 200  # more than the rest of the server takes
    status, said = ask(body=b"x" * 100_001)
    assert status == 413
    assert "100000 bytes" in said["message"]


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def form(parts: int, name_length: int, data: bytes = b"") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
    return b"".join(head % (b"n" * name_length) + data + b"\r\n" for _ in range(parts)) + b"--x--\r\n"


def test_a_form_is_bounded_in_all_that_it_has() -> None:
    assert ask(FORM, form(500, 4))[0] == 200
    for body in (form(50, 4000), form(1, 4, b"x" * 100_001)):
        status, said = ask(FORM, body)
        assert (status, "100000 bytes" in said["message"]) == (413, True)
    status, said = ask(FORM, form(1001, 1))
    assert (status, said["message"]) == (400, "The form has over 1000 parts")


def test_a_client_that_goes_away_leaves_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = asyncio.Event()

    async def never(*_, **__):
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()

    async def play():
        async with served() as (client, handler):
            monkeypatch.setattr(handler, "call", never)
            with pytest.raises(TimeoutError):
                await client.post("/invocations", timeout=aiohttp.ClientTimeout(total=0.3))
            async with asyncio.timeout(10):
                await gone.wait()

    asyncio.run(play())


def test_a_client_that_does_not_read_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.http.streaming._WRITE_SECONDS", 0.2)

    async def play():
        async with served() as (client, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", client._base_url.port, limit=1024)
            writer.write(b"POST /invocations?how=endless HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            await until(lambda: client.api.num_calls == 1)
            await until(lambda: client.api.num_calls == 0)
            assert not reader.at_eof()  # it has a beginning of it, and never asked for more
            writer.close()

    asyncio.run(play())


def test_not_ready_and_too_busy_are_503(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(reason="draining")[0] == 503

    async def full(*_):
        raise HandlerBusy("1000 calls wait for the custom handler")

    async def play():
        async with served() as (client, handler):
            monkeypatch.setattr(handler, "call", full)
            async with client.post("/invocations") as answer, client.get("/ping") as ping:
                return answer.status, await answer.json(content_type=None), ping.status

    status, said, ping = asyncio.run(play())
    assert (status, ping) == (503, 200)
    assert said["message"] == "1000 calls wait for the custom handler"


def test_a_header_that_was_said_twice_is_sent_once() -> None:
    async def play():
        async with served() as (client, _), client.post("/invocations?how=twice") as answer:
            return answer.status, answer.headers.getall("Content-Type")

    assert asyncio.run(play()) == (404, ["application/json"])


def test_a_page_in_a_browser_may_not_ask() -> None:
    status, said = ask({"Origin": "https://evil.example"})
    assert status == 403
    assert "token" in json.dumps(said)
