"""Calls of a real worker over HTTP: beside its queue, and without one."""

import json
import shutil
import signal
import threading
import urllib.error
import urllib.request
from typing import Any

from tests.e2e.conftest import Mill, Process, wait_until
from tests.e2e.test_jobs import TOKENS, expected

PARAMETERS = {"max_new_tokens": TOKENS, "details": True}


def call(worker: Process, body: Any, path: str = "/invocations", **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{worker.port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"} | headers,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def test_a_worker_without_a_queue_answers_calls_until_it_is_told_to_stop(mill: Mill, base, adapter_paths):
    environ = {
        name: value
        for name, value in mill.environ.items()
        if not name.startswith("AWS_") and name not in {"LORAMILL_OUTPUT_PREFIXES", "LORAMILL_MODEL"}
    }
    folder = mill.folder / mill.new_name()
    (folder / "adapters").mkdir(parents=True)
    for name, path in adapter_paths.items():
        shutil.copytree(path, folder / "adapters" / name)
    flags = [
        "--model",
        str(base),
        "--adapters-dir",
        str(folder / "adapters"),
        "--cache-dir",
        str(folder / "c"),
    ]
    worker = Process(flags, environ, folder / "log")
    try:
        worker.wait_ready()
        assert worker.get("/ping")[0] == 200
        body = {"inputs": ["hello", "hello"], "adapters": ["red", None], "parameters": PARAMETERS}
        status, answer = call(worker, body)
        assert status == 200
        for one, path in zip(answer, (adapter_paths["red"], None), strict=True):
            ((tokens, text),) = expected(base, path, ["hello"])
            assert tokens_of(one) == tokens
            assert one["generated_text"] == text
        status, refused = call(worker, {"inputs": "x", "adapters": "nobody"})
        assert (status, refused["message"]) == (424, "Adapter nobody is not registered")
        assert worker.metric('loramill_http_rows_total{outcome="completed"}') == 2
        worker.popen.terminate()
        assert worker.end() == 0
        assert "Traceback" not in worker.text
    finally:
        worker.popen.kill()
        worker.popen.wait(30)


def test_calls_beside_the_queue_end_before_a_worker_does(mill: Mill, versions):
    """SIGTERM lets a call at work end, and refuses those that come after."""
    queue = mill.queue()
    hello = {"inputs": "hello", "parameters": PARAMETERS}
    with mill.worker("--sync", LORAMILL_QUEUE_URL=queue.url) as worker:
        worker.wait_ready()
        for name in versions:  # which the mirror is about to bring; a call does not wait for it
            wait_until(lambda name=name: call(worker, hello | {"adapters": name})[0] == 200, name)
        long = {"max_new_tokens": 120, "ignore_eos": True}
        job = queue.send(inputs=["row"] * 100, adapters="green", parameters=long)
        wait_until(lambda: worker.metric("loramill_rows_in_flight") == 100, "the job's rows")
        assert call(worker, hello | {"adapters": "red"})[0] == 200
        assert mill.manifest(job) is None, "the job is at work yet"
        said: list[tuple[int, Any]] = []
        body = {"inputs": ["hello"] * 8, "adapters": "blue", "parameters": long}
        caller = threading.Thread(target=lambda: said.append(call(worker, body)))
        before = worker.metric("loramill_tokens_total")
        caller.start()
        wait_until(lambda: worker.metric("loramill_tokens_total") > before, "another step")
        worker.popen.send_signal(signal.SIGTERM)
        caller.join(60)
        assert said
        assert said[0][0] in {200, 503}, "it was at work, or it came too late"
        assert worker.end() == 0
        assert "Traceback" not in worker.text
