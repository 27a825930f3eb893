"""The adapter management API as its clients see it."""

import asyncio
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_sync.uris import S3Prefix
from tests.glue.registering import MODEL, Client, Scene, refused, run
from tests.glue.support import until
from tests.sync.builders import WEIGHTS, Bucket, weights
from tests.test_docs import README, blocks
from worker.errors import OutOfMemory
from worker.http import adapters_api, codes, requests, server

BOTH = ["", f"/models/{MODEL}"]
ALIAS = {"X-Amzn-SageMaker-Adapter-Alias": "visible"}


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def serve(scene, scenario, **options):
    """Run `scenario(client)` against a server of this scene."""

    async def main():
        async with scene.serving(**options) as client:
            await scenario(client)

    run(main)


@pytest.mark.parametrize("prefix", BOTH)
def test_the_life_of_an_adapter(scene, prefix):
    async def scenario(api: Client):
        src = scene.source("a", fill=1)
        said = await api("POST", f"{prefix}/adapters", name="a", src=src, pin="yes", color="red")
        assert (said.status, said.body) == (200, {"status": "Adapter a registered"})

        told = await api("GET", f"{prefix}/adapters/a")
        version = scene.version("a")
        assert (told.status, told.body) == (
            200,
            {
                "name": "a",
                "src": src,
                "preload": True,
                "pin": True,
                "options": {"color": "red"},
                "tier": "cpu",
                "version": version,
                "rank": 4,
                "bytes": 128,
                "requests": 0,
                "note": None,
            },
        )
        assert (await api("GET", f"{prefix}/adapters")).body == {"adapters": [told.body]}

        scene.source("a", fill=2)
        said = await api("POST", f"{prefix}/adapters/a/update", src=src, pin="0", preload="FALSE")
        assert (said.status, said.body) == (200, {"status": "Adapter a updated"})
        after = (await api("GET", f"{prefix}/adapters/a")).body
        assert after["version"] != version
        assert (after["pin"], after["preload"], after["options"]) == (False, False, {"color": "red"})

        said = await api("DELETE", f"{prefix}/adapters/a")
        assert (said.status, said.body) == (200, {"status": "Adapter a unregistered"})
        assert refused(await api("GET", f"{prefix}/adapters/a"), 404, "The adapter a was not found")
        assert (await api("GET", f"{prefix}/adapters")).body == {"adapters": []}

    serve(scene, scenario)


@pytest.mark.parametrize("prefix", BOTH)
def test_an_unknown_adapter_is_not_found_by_any_call(scene, prefix):
    async def scenario(api: Client):
        for method, target in (
            ("GET", "/adapters/x"),
            ("DELETE", "/adapters/x"),
            ("POST", "/adapters/x/update?pin=true"),
        ):
            assert refused(await api(method, prefix + target), 404, "The adapter x was not found")

    serve(scene, scenario)


def test_another_model_is_not_found(scene):
    async def scenario(api: Client):
        for method, target in (
            ("GET", "/adapters"),
            ("POST", "/adapters"),
            ("GET", "/adapters/x"),
            ("DELETE", "/adapters/x"),
            ("POST", "/adapters/x/update"),
        ):
            answer = await api(method, f"/models/other{target}")
            assert refused(answer, 404, "The model other was not found")
        assert refused(
            await api("GET", f"/models/{MODEL.upper()}/adapters"), 404, "The model LLAMA was not found"
        )

    serve(scene, scenario)


def test_missing_parameters_are_named(scene):
    async def scenario(api: Client):
        assert refused(await api("POST", "/adapters?src=/x"), 400, "The parameter name is required")
        assert refused(await api("POST", "/adapters?name=a"), 400, "The parameter src is required")
        assert refused(await api("POST", "/adapters?name=&src=/x"), 400, "The parameter name is required")

    serve(scene, scenario)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("preload=maybe", "The parameter preload is 'maybe'; it must be true or false (1, 0, yes, no)"),
        ("pin=", "The parameter pin is ''; it must be true or false (1, 0, yes, no)"),
        ("pin=true&pin=false", "The parameter pin is given twice"),
        ("src=", "The parameter src is empty"),
        ("x=%ff", "The query is not UTF-8"),
        ("&".join(f"o{n}=1" for n in range(101)), "The query has more than 100 parameters"),
    ],
)
def test_parameters_are_read_strictly_and_change_nothing_when_they_are_wrong(scene, query, says):
    async def scenario(api: Client):
        await scene.registry.register("a", scene.source("a"))
        before = await scene.registry.describe("a")
        assert refused(await api("POST", f"/adapters/a/update?{query}"), 400, says)
        assert await scene.registry.describe("a") == before

    serve(scene, scenario)


def test_calls_without_parameters_take_none(scene):
    async def scenario(api: Client):
        await scene.registry.register("a", scene.source("a"))
        says = "The parameter force is not known here"
        for method, target in (("GET", "/adapters"), ("GET", "/adapters/a"), ("DELETE", "/adapters/a")):
            assert refused(await api(method, f"{target}?force=1"), 400, says)
        assert scene.version("a")

    serve(scene, scenario)


def test_a_name_that_is_taken_is_a_conflict_that_changes_nothing(scene):
    async def scenario(api: Client):
        path = scene.mirrored("m")
        src, other = scene.source("a", fill=1), scene.source("b", fill=2)
        await api("POST", "/adapters", name="a", src=src)
        before = (await api("GET", "/adapters")).body
        kind = "IllegalArgumentException"
        answer = await api("POST", "/adapters", name="a", src=other)
        assert refused(answer, 409, "The adapter a is registered already", kind)
        answer = await api("POST", "/adapters", name="m", src=other)
        assert refused(answer, 409, f"The adapter m is in the adapters folder already, from {path}", kind)
        says = f"The adapter m was not registered here: change or delete its upload, {path}"
        assert refused(await api("DELETE", "/adapters/m"), 409, says, kind)
        assert refused(await api("POST", "/adapters/m/update", src=other), 409, says, kind)
        assert (await api("GET", "/adapters")).body == before

    serve(scene, scenario)


def test_two_registrations_of_one_name_at_once_have_one_winner(scene):
    async def scenario(api: Client):
        sources = [scene.source(f"s{n}", fill=n) for n in range(5)]
        answers = await asyncio.gather(*(api("POST", "/adapters", name="a", src=src) for src in sources))
        assert sorted(answer.status for answer in answers) == [200, 409, 409, 409, 409]
        winner = next(src for src, answer in zip(sources, answers, strict=True) if answer.status == 200)
        assert (await api("GET", "/adapters/a")).body["src"] == winner

    serve(scene, scenario)


def test_a_delete_during_a_load_comes_after_it(scene):
    async def scenario(api: Client):
        scene.loader.may_load.clear()
        registering = asyncio.create_task(api("POST", "/adapters", name="a", src=scene.source("a")))
        await until(lambda: scene.loader.loading)
        deleting = asyncio.create_task(api("DELETE", "/adapters/a"))
        assert (await api("GET", "/adapters")).body == {"adapters": []}, "others are answered meanwhile"
        scene.loader.may_load.set()
        assert (await registering).status == 200
        assert (await deleting).body == {"status": "Adapter a unregistered"}
        assert (await api("GET", "/adapters/a")).status == 404

    serve(scene, scenario)


def test_a_client_that_goes_away_does_not_stop_half_a_registration(scene):
    async def scenario(api: Client):
        scene.loader.may_load.clear()
        registering = asyncio.create_task(api("POST", "/adapters", name="a", src=scene.source("a")))
        await until(lambda: scene.loader.loading)
        registering.cancel()
        await asyncio.gather(registering, return_exceptions=True)
        scene.loader.may_load.set()
        await until(lambda: scene.registry.find("a") is not None)

    serve(scene, scenario)


@pytest.mark.parametrize("alias", [{}, ALIAS, {name.lower(): value for name, value in ALIAS.items()}])
def test_the_alias_replaces_the_name_in_messages(scene, alias):
    shown = "visible" if alias else "hidden"

    async def scenario(api: Client):
        async def said(method: str, target: str, **query: str) -> str:
            body = (await api(method, target, headers=alias, **query)).body
            return body.get("status") or body["message"]

        src = scene.source("x")
        assert await said("DELETE", "/adapters/hidden") == f"The adapter {shown} was not found"
        assert await said("POST", "/adapters", name="hidden", src=src) == f"Adapter {shown} registered"
        assert (
            await said("POST", "/adapters", name="hidden", src=src)
            == f"The adapter {shown} is registered already"
        )
        scene.loader.places = 0
        scene.loader.memory.clear()
        assert (
            await said("POST", "/adapters/hidden/update?pin=1")
            == f"Adapter {shown} finds no room in host memory"
        )
        assert await said("POST", "/adapters/hidden/update?pin=0") == f"Adapter {shown} updated"
        assert await said("DELETE", "/adapters/hidden") == f"Adapter {shown} unregistered"

    serve(scene, scenario)


def test_an_alias_leaves_other_words_alone(scene):
    async def scenario(api: Client):
        src = scene.source("a", r=0)
        answer = await api("POST", "/adapters", headers=ALIAS, name="a", src=src)
        assert answer.body["message"] == "adapter_config.json: r is 0; it must be 1 or more"

    serve(scene, scenario)


def test_pages_hold_every_adapter_once_and_in_order(scene):
    async def scenario(api: Client):
        for n in (3, 1, 4, 0, 2):
            scene.mirrored(f"m{n}")
        for n in (6, 5):
            await api("POST", "/adapters", name=f"m{n}", src=scene.source(f"m{n}"), preload="false")
        found, token, pages = [], None, 0
        while True:
            page = (
                await api("GET", "/adapters", limit="3", **({"next_page_token": token} if token else {}))
            ).body
            found += [one["name"] for one in page["adapters"]]
            pages += 1
            token = page.get("nextPageToken")
            if token is None:
                break
            assert token == str(3 * pages)
        assert (found, pages) == ([f"m{n}" for n in range(7)], 3)
        everything = (await api("GET", "/adapters")).body
        assert [one["name"] for one in everything["adapters"]] == found
        assert "nextPageToken" not in everything
        assert "nextPageToken" not in (await api("GET", "/adapters?limit=7")).body
        assert (await api("GET", "/adapters?next_page_token=7")).body == {"adapters": []}
        assert (await api("GET", "/adapters?next_page_token=999999999")).body == {"adapters": []}

    serve(scene, scenario)


@pytest.mark.parametrize("limit", ["0", "-1", "101", "ten", "", "1.0", "+1", " 1", "1e1", "٣", "9" * 30])
def test_a_bad_limit_is_refused(scene, limit):
    async def scenario(api: Client):
        says = f"The parameter limit is {limit!r}; it must be a whole number from 1 to 100"
        assert refused(await api("GET", "/adapters", limit=limit), 400, says)

    serve(scene, scenario)


@pytest.mark.parametrize("token", ["-1", "x", "", "1" * 10])
def test_a_bad_page_token_is_refused(scene, token):
    async def scenario(api: Client):
        says = f"The parameter next_page_token is {token!r}; it must be a whole number of at least 0"
        assert refused(await api("GET", "/adapters", next_page_token=token), 400, says)

    serve(scene, scenario)


def test_a_page_has_a_hundred_at_most(scene):
    async def scenario(api: Client):
        for n in range(102):
            scene.mirrored(f"m{n:03}")
        page = (await api("GET", "/adapters")).body
        assert (len(page["adapters"]), page["nextPageToken"]) == (100, "100")

    serve(scene, scenario)


@pytest.mark.parametrize("reason", ["loading the model", "draining"])
def test_nothing_is_managed_while_the_worker_is_not_ready(scene, reason):
    async def scenario(api: Client):
        scene.reason = reason
        for method, target in (
            ("GET", "/adapters"),
            ("POST", "/adapters?name=a&src=/x"),
            ("DELETE", "/adapters/a"),
        ):
            says = f"The worker is not ready: {reason}"
            assert refused(await api(method, target), 503, says, "ServiceUnavailableException")
        assert (await api("GET", "/live")).status == 200

    serve(scene, scenario)


@pytest.mark.parametrize("reason", [None, "loading the model"])
def test_lora_off_is_said_to_every_call(scene, reason):
    scene.lora, scene.reason = False, reason

    async def scenario(api: Client):
        for method, target in (
            ("GET", "/adapters"),
            ("POST", "/adapters"),
            ("GET", f"/models/{MODEL}/adapters/x"),
            ("DELETE", "/adapters/x"),
            ("POST", "/adapters/x/update"),
        ):
            assert refused(await api(method, target), 400, "LoRA is not enabled.")

    serve(scene, scenario)


@pytest.mark.parametrize(
    ("target", "allowed"),
    [("/adapters", {"GET", "POST"}), ("/adapters/a", {"GET", "DELETE"}), ("/adapters/a/update", {"POST"})],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_wrong_methods_are_refused_and_the_right_ones_named(scene, target, allowed, method):
    async def scenario(api: Client):
        answer = await api(method, target)
        if method in allowed:
            assert answer.status != 405
            return
        says = f"The method {method} is not allowed here"
        assert refused(answer, 405, says, "MethodNotAllowedException")
        assert set(answer.headers["Allow"].split(", ")) == allowed

    serve(scene, scenario)


@pytest.mark.parametrize(
    "target",
    ["/models", "/models/", "/models/llama", "/models/llama/x", "/adapters/a/b", "/adapters/a/update/x"],
)
def test_unknown_routes_below_the_prefixes_are_json_too(scene, target):
    async def scenario(api: Client):
        says = "Requested resource is not found"
        assert refused(await api("GET", target), 404, says, "ResourceNotFoundException")

    serve(scene, scenario)


def test_other_routes_are_as_they_were(scene):
    async def scenario(api: Client):
        assert (await api("GET", "/ready")).body == "ready\n"
        assert (await api("GET", "/metrics")).status == 200
        assert (await api("POST", "/metrics")).status == 405
        assert (await api("GET", "/adaptersx")).status == 404
        answer = await api("GET", "/nowhere")
        assert refused(answer, 404, "Requested resource is not found", "ResourceNotFoundException")

    serve(scene, scenario)


@pytest.mark.parametrize("failing", ["invalid", "full", "disk", "memory", "no memory"])
def test_failure_to_load_is_told_by_the_call_that_caused_it(scene, failing, monkeypatch):
    async def scenario(api: Client):
        src = scene.source("a")
        expected = 400 if failing == "invalid" else 507
        if failing == "no memory":
            monkeypatch.setattr(scene.loader, "preload", _no_memory)
        if failing == "invalid":
            scene.loader.bad["a"] = "rank 32 of module x is not between 1 and max_lora_rank 16"
        if failing in {"full", "memory"}:
            scene.loader.places = 0
        if failing == "disk":
            monkeypatch.setattr("worker.adapters.registrations.replace_file", _disk_full)
        answer = await api("POST", "/adapters", name="a", src=src)
        assert (answer.status, answer.body["code"]) == (expected, expected)
        if expected == 507:
            assert answer.body["type"] == "WlmOutOfMemoryException"
        else:
            assert answer.body["message"] == scene.loader.bad["a"]
        assert (await api("GET", "/adapters/a")).status == 404

    serve(scene, scenario)


async def _no_memory(*_, **__):
    raise OutOfMemory("Adapter a finds no memory: Cannot allocate memory")


def _disk_full(*_):
    raise OSError(28, "No space left on device")


def test_an_adapter_in_s3_is_registered_and_updated(bucket, scene):
    async def scenario(api: Client):
        bucket.put_adapter("there", fill=1)
        src = f"{bucket.uri}there/"
        assert (await api("POST", "/adapters", name="a", src=src)).status == 200
        assert (await api("GET", "/adapters/a")).body["src"] == src
        bucket.put_adapter("there", fill=2)
        assert (await api("POST", "/adapters/a/update", src=src)).status == 200
        assert (scene.registry.find("a").path / WEIGHTS).read_bytes() == weights(2)
        answer = await api("POST", "/adapters", name="b", src=f"{bucket.uri}nothing/")
        assert refused(answer, 400, f"there is nothing under {bucket.uri}nothing/")
        answer = await api("POST", "/adapters", name="b", src="s3://no-such-bucket-at-all/x/")
        assert (answer.status, answer.body["type"]) == (503, "ServiceUnavailableException")

    serve(scene, scenario)


@pytest.mark.parametrize(
    "src",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3:///prefix/",
        "s3://bucket/../x/",
        "s3://bucket//x/",
        "S3://bucket/x/",
        "https://example.org/a",
        "relative/path",
        "../a",
        "/tmp/../etc",
        "file://elsewhere/a",
        "file:relative",
        "file:///a/%2e%2e/b",
        "file:///a%00b",
        "file:///%ff",
        "file:///a?x=1",
        "file://[",
        "/no/such/folder",
        "/a\0b",
        "/" + "x" * 5000,
        "/etc",
        "/etc/passwd",
        "/proc/self/mem",
    ],
)
def test_a_source_that_is_none_is_refused(scene, src):
    async def scenario(api: Client):
        answer = await api("POST", "/adapters", name="a", src=src)
        assert (answer.status, answer.body["type"]) == (400, "BadRequestException")
        assert (await api("GET", "/adapters")).body == {"adapters": []}

    serve(scene, scenario)


@pytest.mark.parametrize(
    "name",
    ["..", ".", ".hidden", "a/b", "../a", "a b", "ü", "a\0", "a\n", "-a", "a" * 129, "%2e%2e", "\U0001f600"],
)
def test_a_name_that_is_none_is_refused_and_found_nowhere(scene, name):
    async def scenario(api: Client):
        scene.mirrored("a")
        answer = await api("POST", "/adapters", name=name, src=scene.source("x"))
        assert (answer.status, answer.body["type"]) == (400, "BadRequestException")
        assert repr(name) in answer.body["message"]
        encoded = "".join(f"%{byte:02x}" for byte in name.encode())
        for method, target in (("GET", ""), ("DELETE", ""), ("POST", "/update?pin=true")):
            answer = await api(method, f"/adapters/{encoded}{target}")
            assert refused(answer, 404, f"The adapter {name} was not found")
        assert [one.name for one in scene.folder.iterdir()] == ["a"]

    serve(scene, scenario)


def test_a_path_is_split_before_it_is_decoded(scene):
    async def scenario(api: Client):
        await scene.registry.register("a", scene.source("a"))
        assert refused(await api("GET", "/adapters/a%2Fupdate"), 404, "The adapter a/update was not found")
        says = "Requested resource is not found"
        assert refused(await api("GET", "/models/llama%2Fadapters"), 404, says, "ResourceNotFoundException")
        assert refused(await api("GET", "/models/x%2Fllama/adapters"), 404, "The model x/llama was not found")
        assert (await api("GET", "/adapters/%61")).body["name"] == "a"
        assert (await api("GET", "/%61dapters")).status == 404
        assert (await api("GET", "/adapters/")).body["adapters"]

    serve(scene, scenario)


# What a server on a network meets.


def test_web_page_cannot_change_anything_without_a_token(scene):
    async def scenario(api: Client):
        page, says = {"Origin": "https://example.org"}, "requests of web pages need a bearer token"
        target = f"/adapters?name=a&src={scene.source('a')}"
        assert refused(await api("POST", target, headers=page), 403, says, "ForbiddenException")
        assert scene.registry.find("a") is None
        assert (await api("POST", target)).status == 200
        assert refused(await api("DELETE", "/adapters/a", headers=page), 403, says, "ForbiddenException")
        assert (await api("GET", "/adapters/a", headers=page)).status == 200

    serve(scene, scenario)


def test_the_whole_api_is_behind_the_token(scene):
    async def scenario(api: Client):
        for method, target in (
            ("GET", "/adapters"),
            ("POST", f"/adapters?name=a&src={scene.source('a')}"),
            ("GET", f"/models/{MODEL}/adapters/a"),
            ("DELETE", "/adapters/a"),
            ("POST", "/adapters/a/update"),
            ("PUT", "/models/nowhere"),
            ("GET", "//adapters"),
            ("GET", "/live/../adapters"),
        ):
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                answer = await api(method, target, headers=headers)
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                if not target.startswith(("//", "/live")):
                    assert refused(answer, 401, "a bearer token is required", "UnauthorizedException")
        assert scene.registry.find("a") is None
        answer = await api("GET", "/adapters", headers={"Authorization": "Bearer s3cret"})
        assert answer.body == {"adapters": []}

    serve(scene, scenario, token="s3cret")


def test_a_body_is_not_taken_for_parameters(scene):
    async def scenario(api: Client):
        answer = await api("POST", "/adapters", data=b"name=a&src=/x")
        assert refused(answer, 400, "The request has a body; parameters go into the query")
        answer = await api("POST", "/adapters", data=b"x" * (requests.MAX_BODY_BYTES + 1))
        says = f"The body is too large: it may have {requests.MAX_BODY_BYTES} bytes"
        assert refused(answer, 413, says)

    serve(scene, scenario)


async def ask(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, and read one answer and the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(first.split()[1]) if first else 0, headers, body
    finally:
        writer.close()


def test_a_body_that_does_not_come_is_not_waited_for(scene, monkeypatch):
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.05)

    async def scenario(api: Client):
        request = b"POST /adapters HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 10\r\n\r\nabc"
        status, _, body = await ask(api.port, request)
        assert (status, json.loads(body)["message"]) == (408, "The body did not come within 0.05 s")

    serve(scene, scenario)


@pytest.mark.parametrize("begun", [b"", b"GET /adapters HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_connection_that_does_not_send_the_head_of_a_request_is_closed(scene, monkeypatch, begun):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.05)

    async def scenario(api: Client):
        assert await ask(api.port, begun) == (0, {}, b"")

    serve(scene, scenario)


def test_a_head_without_end_is_refused(scene):
    async def scenario(api: Client):
        for line in (b"GET /adapters?" + b"x" * 70_000, b"GET /adapters HTTP/1.1\r\nX: " + b"x" * 70_000):
            status, _, _ = await ask(api.port, line + b" HTTP/1.1\r\n\r\n")
            assert status == 400

    serve(scene, scenario)


def test_a_mistake_of_ours_is_told_without_its_traceback(scene, monkeypatch, caplog):
    async def scenario(api: Client):
        async def broken(*_: int) -> None:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(scene.registry, "page", broken)
        answer = await api("GET", "/adapters")
        says = "The request failed by a mistake of the worker's; its log has more"
        assert refused(answer, 500, says, "InternalServerException")
        assert "secret" in caplog.text

    serve(scene, scenario)


_SEGMENTS = st.one_of(
    st.sampled_from(
        [
            "models",
            "adapters",
            MODEL,
            "a",
            "m",
            "update",
            "",
            ".",
            "..",
            "%2e%2e",
            "%2F",
            "%",
            "%ff",
            "%00",
            "a%0A",
        ]
    ),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="?#/"), max_size=12),
)
_QUERIES = st.one_of(
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#"), max_size=40),
    st.lists(
        st.tuples(
            st.sampled_from(["name", "src", "preload", "pin", "limit", "next_page_token", "x", "%ff"]),
            st.sampled_from(
                ["a", "m", "true", "0", "5", "-1", "", "/nowhere", "s3://x", "file:///x", "%00", "%ff"]
            ),
        ),
        max_size=5,
    ).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)),
)
_METHODS = st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "TRACE", "PROPFIND"])


def test_no_request_is_a_mistake_of_ours_and_every_answer_is_json(tmp_path):
    scene = Scene(tmp_path)
    scene.mirrored("m")
    with asyncio.Runner() as runner:
        serving = scene.serving()
        port = runner.run(serving.__aenter__()).port

        @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
        @given(
            method=_METHODS,
            first=st.sampled_from(["models", "adapters"]),
            rest=st.lists(_SEGMENTS, max_size=5),
            query=_QUERIES,
            alias=st.text(
                st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=9
            ),
        )
        def fuzz(method, first, rest, query, alias):
            target = "/".join(["", first, *rest]) + (f"?{query}" if query else "")
            request = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            request += f"X-Amzn-SageMaker-Adapter-Alias: {alias}\r\n\r\n"
            status, headers, body = runner.run(ask(port, request.encode("latin-1")))
            assert status in {200, 400, 404, 405, 409}, (status, request)
            assert headers["content-type"] == "application/json"
            assert b"Traceback" not in body
            if method != "HEAD":
                told = json.loads(body)
                assert status == 200 or (told["code"] == status and set(told) == {"code", "type", "message"})

        try:
            fuzz()
        finally:
            runner.run(serving.__aexit__(None, None, None))
    assert [one.name for one in scene.folder.iterdir()] == ["m"]


# The README.


def test_the_commands_of_the_readme_do_what_it_says(scene, s3, bucket):
    # `bucket` has the SDK talk to the server; the README's has a name of its own.
    elsewhere = Bucket(s3, "bucket")
    elsewhere.source = S3Prefix("bucket", "elsewhere/")
    s3.create_bucket(Bucket="bucket")
    elsewhere.put_adapter("pirate", fill=1)
    elsewhere.put_adapter("pirate-2", fill=2)
    robot = scene.source("robot")
    block = next(block for block in blocks("sh") if block.startswith("api="))
    commands = re.findall(r'^curl (?:-X (\w+) )?"\$api([^"]+)"$', block, re.MULTILINE)
    assert len(commands) == block.count("curl")

    async def scenario(api: Client):
        answers = []
        for method, target in commands:
            answers.append(await api(method or "GET", target.replace("/srv/adapters/robot", robot)))
        assert {answer.status for answer in answers} == {200}
        listed, described = answers[2].body, answers[3].body
        assert [one["name"] for one in listed["adapters"]] == ["pirate", "robot"]
        text = section("Managing adapters over HTTP")
        assert all(f"`{field}`" in text for field in described)
        assert [one.body["status"] for one in answers if "status" in one.body] == [
            "Adapter pirate registered",
            "Adapter robot registered",
            "Adapter pirate updated",
            "Adapter pirate unregistered",
        ]

    serve(scene, scenario)


def test_the_readme_names_every_route_and_every_error():
    text = section("Managing adapters over HTTP")
    routes = re.findall(r"^\| `([A-Z]+) (\S+)` \|", text, re.MULTILINE)
    documented = re.findall(
        r"^ {4}([A-Z]+) +\[/models/\{model\}\](\S+)", str(adapters_api.__doc__), re.MULTILINE
    )
    assert sorted(routes) == sorted(documented)
    rows = re.findall(r"^\| ([0-9, ]+) \|", text, re.MULTILINE)
    told = {int(code) for row in rows for code in row.split(", ")}
    assert told == {code for _, code in codes.CODES} | {401, 403, 405, 408, 413}


def section(title: str) -> str:
    return README.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
