"""Adapters that are managed over HTTP while a worker runs, and across its restart."""

import json
import urllib.error
import urllib.parse
import urllib.request

from tests import tiny
from tests.e2e.conftest import BUCKET, Process
from tests.e2e.test_jobs import TOKENS, assert_says, enqueue, expected

ASKED = ["hello", "-a", "mine", "-p", f"max_new_tokens={TOKENS}", "-p", "details=true"]
SRC = f"s3://{BUCKET}/elsewhere/one/"


def ask(worker: Process, method: str, path: str, **query: str) -> tuple[int, dict]:
    url = f"http://127.0.0.1:{worker.port}{path}"
    if query:
        url += "?" + urllib.parse.urlencode(query)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_an_adapter_is_registered_updated_kept_over_a_restart_and_deleted(mill, base, tmp_path):
    queue = mill.queue()
    told = {"LORAMILL_QUEUE_URL": queue.url, "LORAMILL_CACHE_DIR": str(tmp_path / "cache")}
    paths = [
        tiny.make_adapter(tmp_path / f"mine{seed}", base, seed=seed, r=4, target_modules=tiny.MLP)
        for seed in (21, 22)
    ]
    versions = []
    with mill.worker(**told) as worker:
        worker.wait_ready()
        mill.upload(paths[0], "elsewhere/one/")
        assert ask(worker, "POST", "/models/tiny/adapters", name="mine", src=SRC, pin="true") == (
            200,
            {"status": "Adapter mine registered"},
        )
        for path in paths:
            if versions:
                mill.upload(path, "elsewhere/one/")
                said = {"status": "Adapter mine updated"}
                assert ask(worker, "POST", "/adapters/mine/update", src=SRC) == (200, said)
            described = ask(worker, "GET", "/adapters/mine")[1]
            (line,) = enqueue(mill, queue, *ASKED)
            ((tokens, text),) = expected(base, path, ["hello"])
            assert_says(line, tokens, text)
            assert line["adapter_version"] == described["version"]
            assert (described["rank"], described["pin"], described["src"]) == (4, True, SRC)
            versions.append(line["adapter_version"])
        assert len(set(versions)) == 2
        served = ask(worker, "GET", "/adapters/mine")[1]
        assert (served["requests"], served["tier"]) == (1, "gpu")
        assert worker.metric("loramill_adapters_pinned ") == 1
        listed = mill.run("adapters", "--url", f"http://127.0.0.1:{worker.port}")
        assert listed.returncode == 0, listed.stderr
        mine = next(line.split("\t") for line in listed.stdout.splitlines() if line.startswith("mine\t"))
        assert mine[1:3] == [versions[-1][:12], "4"]
        assert "gpu" in mine

        status, refused = ask(worker, "POST", "/adapters", name="base", src="s3://mill/tiny/")
        assert (status, refused["type"]) == (400, "BadRequestException")
        worker.popen.terminate()
        assert worker.end() == 0

    for key in mill.keys("elsewhere/"):
        mill.s3.delete_object(Bucket=BUCKET, Key=key)
    with mill.worker(**told) as worker:
        worker.wait_ready()
        assert worker.metric("loramill_adapters_pinned ") == 1
        (line,) = enqueue(mill, queue, *ASKED)
        assert line["adapter_version"] == versions[-1]
        assert ask(worker, "DELETE", "/adapters/mine") == (200, {"status": "Adapter mine unregistered"})
        (line,) = enqueue(mill, queue, *ASKED)
        assert line["error"]["code"] == "adapter_not_found"
        assert ask(worker, "GET", "/adapters") == (200, {"adapters": []})
        assert "Traceback" not in worker.text
