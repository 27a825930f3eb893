"""The HTTP side as probes and Prometheus see it."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from worker.errors import LoramillError
from worker.http.server import serving
from worker.metrics import Metrics


class Scene:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.reason: str | None = "loading the model"

    def serving(self, token: str | None = None, port: int = 0):
        return serving("127.0.0.1", port, self.registry, lambda: self.reason, token=token)


async def get(port: int, path: str, *, method: str = "GET", **headers: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://127.0.0.1:{port}{path}", headers=headers) as answer,
    ):
        return answer.status, await answer.text()


def run(scenario: Callable[[Scene], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(Scene()), 20))


def test_ready_says_why_not_until_it_is():
    async def scenario(scene: Scene) -> None:
        async with scene.serving() as port:
            assert await get(port, "/live") == (200, "live\n")
            assert await get(port, "/ready") == (503, "loading the model\n")
            scene.reason = None
            assert await get(port, "/ready") == (200, "ready\n")
            scene.reason = "draining"
            assert await get(port, "/ready") == (503, "draining\n")
            assert (await get(port, "/live"))[0] == 200

    run(scenario)


def test_metrics_are_those_of_the_registry():
    async def scenario(scene: Scene) -> None:
        async with scene.serving() as port:
            scene.metrics.received.inc(3)
            status, text = await get(port, "/metrics")
            assert status == 200
            assert "loramill_messages_received_total 3.0" in text

    run(scenario)


def test_a_token_guards_everything_but_the_probes():
    async def scenario(scene: Scene) -> None:
        async with scene.serving(token="s3cret") as port:
            assert (await get(port, "/live"))[0] == 200
            assert (await get(port, "/ready"))[0] == 503
            for path in ("/metrics", "/nowhere", "/ready/", "//ready", "/live/../metrics"):
                assert (await get(port, path))[0] == 401, path
            for wrong in ("s3cret", "Bearer ", "Bearer s3cre", "Bearer s3cret2", "bearer s3cret", "Bearer ü"):
                assert (await get(port, "/metrics", Authorization=wrong))[0] == 401, wrong
            status, text = await get(port, "/metrics", Authorization="Bearer s3cret")
            assert status == 200
            assert "s3cret" not in text
            assert (await get(port, "/nowhere", Authorization="Bearer s3cret"))[0] == 404

    run(scenario)


def test_only_reading_is_allowed():
    async def scenario(scene: Scene) -> None:
        async with scene.serving() as port:
            assert (await get(port, "/metrics", method="POST"))[0] == 405
            assert (await get(port, "/nowhere"))[0] == 404

    run(scenario)


def test_a_port_in_use_is_one_readable_error():
    async def scenario(scene: Scene) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(
                LoramillError, match=rf"^http_port: cannot listen on 127\.0\.0\.1:{port}: .+$"
            ):
                async with scene.serving(port=port):
                    pass

    run(scenario)


def test_a_host_that_is_not_ours_is_one_readable_error():
    async def scenario(scene: Scene) -> None:
        with pytest.raises(LoramillError, match="cannot listen on"):
            async with serving("192.0.2.1", 0, scene.registry, lambda: None):
                pass

    run(scenario)


def test_the_port_is_free_again_at_the_end():
    async def scenario(scene: Scene) -> None:
        async with scene.serving() as port:
            pass
        async with scene.serving(port=port) as again:
            assert again == port

    run(scenario)
