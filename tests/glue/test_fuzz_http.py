"""The whole HTTP side under requests of any kind: raw bytes against a real server over a real engine."""

import asyncio
import json
import re
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.glue.calling import MODEL, Worker, calling, make_core

ALLOWED = {200, 400, 401, 403, 404, 405, 408, 409, 411, 413, 415, 417, 422, 424, 503, 504, 507}
"""What an answer may say; above all not 500."""
PLAIN = {"/live", "/ready", "/metrics"}
SECRET = re.compile(r"Traceback|File \"|\.py\b|site-packages|/tmp/|0x[0-9a-f]{6}")

names = st.sampled_from(["a0", "a1", "nobody", "", "..", "a0/x", "é", "\x00", "a" * 300, MODEL, "other"])
segments = st.one_of(
    st.sampled_from([
        "invocations", "predictions", "ping", "models", "adapters", "update", "metrics", "live", "ready",
        "v1", "chat", "completions", "%2e%2e", "%2F", "%ff", "%00", "", ".", "..", "{}", "%7B%7D", "a%20b",
        "%zz",
    ]),
    names.map(lambda name: "".join(f"%{byte:02x}" for byte in name.encode())),
)  # fmt: skip
paths = st.one_of(
    st.lists(segments, max_size=5).map(lambda found: "/" + "/".join(found)),
    st.sampled_from(["/invocations", f"/predictions/{MODEL}", "/ping", "/adapters", "/adapters/a0", "*"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(lambda text: "/" + text),
)
queries = st.one_of(
    st.just(""),
    st.lists(
        st.tuples(
            st.sampled_from(["adapter", "model_name", "name", "src", "limit", "pin", "next_page_token", "x"]),
            names | st.sampled_from(["1", "true", "-1", "%ff", "s3://no/where"]),
        ),
        max_size=3,
    ).map(lambda found: "?" + "&".join(f"{name}={value}" for name, value in found)),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map(lambda text: "?" + text),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
parameters = st.dictionaries(
    st.sampled_from(
        ["max_new_tokens", "temperature", "top_k", "top_p", "seed", "details", "stop_sequences", "logit_bias",
         "top_n_tokens", "decoder_input_details", "return_full_text", "ignore_eos", "do_sample", "min_p"]
    ),
    st.one_of(st.integers(0, 6), st.booleans(), st.floats(0, 2), anything),
    max_size=4,
)  # fmt: skip
rows = st.one_of(
    st.text(max_size=20),
    st.fixed_dictionaries(
        {},
        optional={
            "input": st.text(max_size=9) | st.lists(st.integers(-1, 300), max_size=5),
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=5)}), max_size=2
            ),
            "adapter": names,
            "target": st.text(max_size=4),
            "parameters": parameters,
            "id": st.text(max_size=2),
        },
    ),
    anything,
)
bodies = st.one_of(
    st.fixed_dictionaries(
        {"inputs": rows | st.lists(rows, max_size=4)},
        optional={
            "adapters": names | st.lists(names | st.none(), max_size=4),
            "parameters": parameters | st.lists(parameters, max_size=3),
            "task": st.sampled_from(["generate", "score", "x", None]),
            "ids": st.lists(st.text(max_size=3), max_size=4),
            "stream": scalars,
            "model": names,
        },
    ),
    anything,
)
payloads = st.one_of(bodies.map(lambda body: json.dumps(body).encode()), st.binary(max_size=60))
headers = st.lists(
    st.tuples(
        st.sampled_from(
            ["Content-Type", "X-Amzn-SageMaker-Adapter-Identifier", "X-Amzn-SageMaker-Adapter-Alias",
             "Authorization", "Origin", "Content-Encoding", "Expect", "Range", "Accept",
             "x-amzn-sagemaker-adapter-identifier"]
        ),
        names.filter(lambda name: "\x00" not in name)
        | st.sampled_from(["application/json", "text/plain", "a/b; charset=x"])
        | st.sampled_from(["gzip", "deflate", "br", "100-continue", ";"]),
    ),
    max_size=3,
)  # fmt: skip
framings = st.sampled_from(
    ["length"] * 6 + ["chunked", "chunked", "none", "long", "short", "bad chunk", "both", "cut"]
)
methods = st.sampled_from(["POST"] * 6 + ["GET", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "QUERY"])


class Request:
    """What goes down the wire."""

    def __init__(self, method: str, target: str, said: list[tuple[str, str]], payload: bytes, framing: str):
        self.method = method
        self.path = target.partition("?")[0]
        self.cut = framing == "cut"
        if payload[:1] == b"{" and not any(name == "Content-Type" for name, _ in said):
            said = [*said, ("Content-Type", "application/json")]
        lines = [f"{name}: {value}" for name, value in said]
        body = payload
        if framing in {"length", "cut"}:
            lines.append(f"Content-Length: {len(payload)}")
        elif framing == "long":
            lines.append(f"Content-Length: {len(payload) + 5}")
        elif framing == "short":
            lines.append(f"Content-Length: {max(0, len(payload) - 5)}")
        elif framing in {"chunked", "bad chunk", "both"}:
            lines.append("Transfer-Encoding: chunked")
            lines += [f"Content-Length: {len(payload)}"] if framing == "both" else []
            size = f"{len(payload):x}" if framing == "chunked" else "zz"
            body = f"{size}\r\n".encode() + payload + b"\r\n0\r\n\r\n"
        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + "\r\n".join(lines)
        self.bytes = head.encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body
        if self.cut:
            self.bytes = self.bytes[: len(self.bytes) * 2 // 3]


requests = st.builds(
    Request,
    methods,
    st.tuples(paths, queries).map("".join),
    headers,
    payloads,
    framings,
)


async def send(port: int, request: Request) -> bytes:
    """The answer, all of it; empty where there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.bytes)
        if request.cut:
            return b""
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def check(request: Request, answered: bytes) -> None:
    if not answered:
        return
    head, _, body = answered.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split()[1])
    told = dict(line.lower().split(": ", 1) for line in lines)
    assert status in ALLOWED, (request.bytes, answered)
    text = body.decode("utf-8", "replace")
    assert request.path == "/metrics" or not SECRET.search(text.replace(request.path, "")), text
    if status < 400 or request.method == "HEAD" or request.path in PLAIN:
        return
    if told.get("content-type", "").startswith("text/plain"):
        assert status in {400, 417}, "only what is not HTTP is told so in plain text"
        return
    error: dict[str, Any] = json.loads(body)
    assert set(error) == {"code", "type", "message"}, error
    assert error["code"] == status
    assert error["message"]


@pytest.fixture(scope="module")
def fuzzed(base, adapter_paths, tmp_path_factory):
    """A loop with a worker in it, for all examples; looked at afterwards."""
    folder = tmp_path_factory.mktemp("fuzz")
    for path in adapter_paths[:2]:
        shutil.copytree(path, folder / "adapters" / path.name)
    limits = {"max_body_bytes": 100_000, "body_seconds": 0.1, "timeout_seconds": 20.0}
    with asyncio.Runner() as runner:
        context = calling(make_core(base), folder / "adapters", folder, **limits)
        worker: Worker = runner.run(context.__aenter__())
        yield runner, worker
        runner.run(worker.settled())
        runner.run(context.__aexit__(None, None, None))


@settings(
    max_examples=300,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(several=st.lists(requests, min_size=1, max_size=4))
def test_any_request_is_answered_in_the_words_of_the_api(fuzzed, several):
    runner, worker = fuzzed

    async def all_at_once() -> list[bytes]:
        return await asyncio.gather(*(send(worker.port, request) for request in several))

    for request, answered in zip(several, runner.run(all_at_once()), strict=True):
        check(request, answered)


def test_after_all_that_it_answers_and_its_books_are_clean(fuzzed):
    runner, worker = fuzzed

    async def scenario() -> None:
        await worker.settled()
        answer = await worker.invoke({"inputs": ["one", "two"], "adapters": ["a0", "a1"]})
        assert answer.status == 200
        assert [set(one) for one in answer.body] == [{"generated_text"}] * 2
        assert worker.metric("loramill_http_requests_total") > 50
        assert not worker.metric('loramill_http_requests_total{route="invocations",status="500"}')

    runner.run(scenario())
