"""Real workers with handlers: over HTTP, by the adapter management API, and from the queue."""

import contextlib
import http.client
import io
import json
import re
import shlex
import signal
import urllib.parse
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.custom.conftest import MODELS
from tests.e2e.conftest import BUCKET, PREFIX, Process, wait_until


def call(
    worker: Process, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **query
) -> tuple[http.client.HTTPResponse, bytes]:
    line = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=60)
    with contextlib.closing(line):
        line.request(
            method, f"{path}?{urllib.parse.urlencode(query)}" if query else path, body, headers or {}
        )
        with line.getresponse() as answer:
            return answer, answer.read()


def asked(worker: Process, body: bytes = b"", path: str = "/invocations", **query) -> tuple[int, bytes]:
    answer, said = call(worker, "POST", path, body, **query)
    return answer.status, said


def told(worker: Process, method: str, path: str, **query) -> tuple[int, dict]:
    answer, said = call(worker, method, path, **query)
    return answer.status, json.loads(said)


README = Path(__file__).parents[2] / "README.md"


def results(mill, worker: Process, **fields) -> list[dict]:
    job_id = uuid.uuid4().hex
    worker.queue.send(id=job_id, output={"uri": PREFIX}, **fields)
    wait_until(lambda: mill.manifest(job_id), f"{job_id}: {worker.text}")
    return mill.results(job_id)


def test_adapter_workflows_run_as_they_do_in_djl_serving(serve, mill, tmp_path) -> None:
    """Its testAdapterWorkflows, and a chain, a job and a restart of ours."""
    flows = []
    for number, options in ((1, {"echooption": "weo"}), (2, {})):
        key = f"a{number}"
        said = {
            "name": f"adapter{number}",
            "version": "0.1",
            "models": {"m": str(MODELS / "adaptecho")},
            "configs": {"adapters": {key: {"model": "m", "src": f"url{number}", "options": options}}},
            "workflow": {"out": ["adapter", key, "in"]},
        }
        flows.append(tmp_path / f"w{number}" / "workflow.json")
        flows[-1].parent.mkdir()
        flows[-1].write_text(json.dumps(said))
    chain = json.loads(flows[1].read_text()) | {"name": "chain"}
    chain["configs"]["adapters"] = {"b": chain["configs"]["adapters"]["a2"]}
    chain["workflow"] = {"first": ["adapter", "b", "in"], "out": ["m", ["adapter", "b", "first"]]}
    (tmp_path / "workflow.json").write_text(json.dumps(chain))
    cache = {"LORAMILL_CACHE_DIR": str(tmp_path / "cache"), "LORAMILL_ENABLE_LORA": "true"}
    with serve(MODELS / "adaptecho", LORAMILL_WORKFLOWS=",".join(map(str, flows)), **cache) as worker:
        assert asked(worker, b"testAWP", "/predictions/adapter1") == (200, b"a1weotestAWP")
        assert asked(worker, b"testAWP", "/predictions/adapter2") == (200, b"a2testAWP")
        template = {"template": "adapter", "adapter": "a", "url": "dummy", "model": str(MODELS / "adaptecho")}
        assert told(worker, "POST", "/workflows", **template)[0] == 200
        assert asked(worker, b"testRAWT", "/predictions/a") == (200, b"atestRAWT")
        assert asked(worker, b"x", "/predictions/nobody")[0] == 404
        assert asked(worker, b"x", "/invocations", model_name="adapter1") == (200, b"a1weox")
        assert asked(worker, b"x", "/invocations", model_name="nobody")[0] == 404
        version = {"model_name": "adapter1", "model_version": "0.2"}
        assert asked(worker, b"x", "/invocations", **version)[0] == 404
        assert asked(worker, b"x", "/predictions/adapter1", adapter="a2")[0] == 400
        assert told(worker, "POST", "/workflows", url=str(tmp_path))[0] == 200
        assert asked(worker, b"x", "/predictions/chain/0.1")[1].startswith(b"bbx")
        (line,) = results(mill, worker, model="adapter2", inputs=["hi"])
        assert (line["adapter"], line["generated_text"][:2], line["error"]) == ("a2", "a2", None)
        names = {one["name"] for one in told(worker, "GET", "/adapters")[1]["adapters"]}
        assert {"a", "a1", "a2", "b"} <= names
        assert told(worker, "DELETE", "/workflows/a")[0] == 200
        assert told(worker, "GET", "/adapters/a")[0] == 404
    with serve(MODELS / "adaptecho", **cache) as worker:
        assert asked(worker, b"x", "/predictions/adapter1") == (200, b"a1weox")
        assert asked(worker, b"x", "/predictions/a")[0] == 404


def test_adaptecho_runs_as_it_does_in_djl_serving(serve, mill) -> None:
    with serve(MODELS / "adaptecho") as worker:
        assert asked(worker, b"text") == (200, b"text")
        assert asked(worker, b"text", "/predictions/adaptecho") == (200, b"text")
        assert asked(worker, b"text", adapter="unknown") == (200, b"dynunknowntext")
        assert asked(worker, b"text", adapter="myBuiltinAdapter") == (200, b"myBuiltinAdaptertext")

        path = "/models/adaptecho/adapters"
        registered = told(worker, "POST", path, name="adaptable", src="src", echooption="opt")
        assert registered == (200, {"status": "Adapter adaptable registered"})
        assert asked(worker, b"text", adapter="adaptable") == (200, b"adaptableopttext")
        status, described = told(worker, "GET", f"{path}/adaptable")
        assert (status, described["name"], described["src"]) == (200, "adaptable", "src")
        assert described["options"] == {"echooption": "opt"}
        assert told(worker, "POST", path, name="adaptable", src="src")[0] == 409
        status, failed = told(worker, "POST", path, name="other", src="src", error="true")
        assert (status, failed["code"]) == (424, 424)
        assert "Failed to register adapter: other" in failed["message"]
        assert told(worker, "POST", path, name="other", src="src", oom="true")[0] == 507
        assert told(worker, "GET", f"{path}/other")[0] == 404

        updated = told(worker, "POST", f"{path}/adaptable/update", echooption="new")
        assert updated == (200, {"status": "Adapter adaptable updated"})
        assert asked(worker, b"text", adapter="adaptable") == (200, b"adaptablenewtext")
        assert told(worker, "POST", f"{path}/adaptable/update", error="1")[0] == 424
        assert asked(worker, b"text", adapter="adaptable") == (200, b"adaptablenewtext")
        listed = told(worker, "GET", "/adapters")[1]["adapters"]
        assert [one["name"] for one in listed] == ["adaptable", "myBuiltinAdapter"]

        (plain, adapted, dynamic) = results(
            mill, worker, inputs=["one", "two", "three"], adapters=["", "adaptable", "some"]
        )
        assert json.loads(plain["generated_text"]) == {"inputs": "one"}
        assert adapted["generated_text"].startswith('adaptablenew{"inputs":"two"')
        assert adapted["adapter_version"] is None  # its src is no folder
        assert dynamic["generated_text"].startswith("dynsome")

        gone = told(worker, "DELETE", "/adapters/adaptable")
        assert gone == (200, {"status": "Adapter adaptable unregistered"})
        assert asked(worker, b"text", adapter="adaptable") == (200, b"dynadaptabletext")
        assert told(worker, "DELETE", "/adapters/adaptable")[0] == 404
        assert told(worker, "DELETE", "/adapters/myBuiltinAdapter")[0] == 409


def test_a_registered_adapter_outlives_the_worker_and_one_in_s3_comes_as_a_folder(
    serve, mill, tmp_path
) -> None:
    mill.upload(MODELS / "adaptecho", "models/adaptecho/")
    cache = {"LORAMILL_CACHE_DIR": str(tmp_path)}
    mill.s3.put_object(Bucket=BUCKET, Key="handlers/a/adapter.txt", Body=b"x")
    with serve(f"s3://{BUCKET}/models/adaptecho/", **cache) as worker:
        src = f"s3://{BUCKET}/handlers/a/"
        assert told(worker, "POST", "/adapters", name="a", src=src, echooption="-")[0] == 200
        version = told(worker, "GET", "/adapters/a")[1]["version"]
        assert len(version) == 64
        worker.popen.terminate()
        assert worker.end() == 0
    with serve(f"s3://{BUCKET}/models/adaptecho/", **cache) as worker:
        assert asked(worker, b"text", adapter="a") == (200, b"a-text")
        (line,) = results(mill, worker, inputs="row", adapters="a")
        assert line["adapter_version"] == version
        assert told(worker, "POST", "/adapters", name="b", src="s3://mill/nothing/here/")[0] == 400
        assert told(worker, "POST", "/adapters", name="b", src="ftp://a/b")[0] == 400


def test_echo_and_its_stream_and_what_goes_wrong(serve) -> None:
    with serve(MODELS / "echo") as worker:
        answer, said = call(worker, "POST", "/invocations", b"hi", {"Content-Type": "text/x-odd"})
        assert (answer.status, answer.headers["Content-Type"], said) == (200, "text/x-odd", b"hi")
        answer, said = call(worker, "POST", "/invocations", b"", stream="true")
        assert (answer.headers["Transfer-Encoding"], said) == ("chunked", b"t-0\nt-1\nt-2\nt-3\nt-4\n")
        status, failed = asked(worker, b"", exception="a reason")
        assert status == 424
        expected = {"code": 424, "message": "invoke handler failure", "error": "a reason"}
        assert json.loads(failed) == expected
        status, exited = asked(worker, b"", exit="1")
        assert (status, json.loads(exited)["error"]) == (424, "the handler's process ended with exit code 0")
        assert asked(worker, b"", OOM="1")[0] == 507
        assert asked(worker, b"still here") == (200, b"still here")
        assert asked(worker, b"x", "/predictions/other")[0] == 404
        assert call(worker, "POST", "/invocations", b"x", {"handler": "os.system"})[0].status == 400
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert call(worker, "POST", "/invocations", b"data=of+a+form", form)[1] == b"of a form"
        parts = b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\npart\r\n--B--\r\n'
        form = {"Content-Type": "multipart/form-data; boundary=B"}
        assert call(worker, "POST", "/invocations", parts, form)[1] == b"part"
        assert call(worker, "GET", "/ping")[0].status == 200
        assert "a reason" in worker.text  # the traceback is in the log


def test_arrays_go_in_and_out(serve) -> None:
    file = io.BytesIO()
    np.savez(file, np.ones((2, 2), "float32"))
    with serve(MODELS / "arrays") as worker:
        status, said = asked(worker, file.getvalue(), npz="1")
        assert status == 200
        with np.load(io.BytesIO(said)) as found:
            np.testing.assert_array_equal(found["arr_0"], np.ones((2, 2), "float32"))


@pytest.fixture(scope="module")
def unruly(serve):
    with serve(MODELS / "unruly", LORAMILL_PREDICT_TIMEOUT_SECONDS="3") as worker:
        yield worker


def test_rows_get_what_the_handler_answers_and_only_the_bad_ones_fail(unruly, mill) -> None:
    rows = ["plain", "generated", "binary", "crash", "nothing", "teapot", "starve", "broken_stream", "ready"]
    lines = dict(zip(rows, results(mill, unruly, inputs=rows), strict=True))
    texts = {row: line["generated_text"] for row, line in lines.items() if line["error"] is None}
    assert (texts["plain"], texts["generated"], texts["nothing"]) == ("PLAIN", "well said", "")
    assert json.loads(texts["ready"])["beside"] == "from beside"
    assert json.loads(texts["ready"])["secrets"] == []
    codes = {row: line["error"]["code"] for row, line in lines.items() if line["error"] is not None}
    assert codes == {
        "binary": "handler_failed",
        "crash": "handler_failed",
        "teapot": "handler_failed",
        "starve": "oom",
        "broken_stream": "handler_failed",
    }
    assert "SIGSEGV" in lines["crash"]["error"]["message"]


def test_rows_that_a_handler_cannot_have_are_refused(unruly, mill) -> None:
    (scored,) = results(mill, unruly, inputs="text", task="score")
    assert scored["error"]["code"] == "invalid_line"
    (adapted,) = results(mill, unruly, inputs="text", adapters="mine", parameters={"max_new_tokens": 3})
    assert adapted["error"]["code"] == "adapter_not_found"  # LoRA is off


def test_a_handler_that_never_answers_is_replaced(unruly) -> None:
    status, said = asked(unruly, b"", how="loop")
    assert status == 424
    assert "did not answer within 3 s" in json.loads(said)["error"]
    answer, said = call(unruly, "POST", "/invocations", b"", how="bad_header")
    assert (answer.status, said, answer.headers["X-Split"]) == (200, b"fine", None)
    assert asked(unruly, b"", how="nonsense")[0] == 424
    assert asked(unruly, b"", how="nothing") == (204, b"")
    answer, said = call(unruly, "POST", "/invocations", b"", how="teapot")
    assert (answer.status, answer.reason, answer.headers["X-Kind"]) == (418, "short and stout", "odd")
    with pytest.raises(http.client.IncompleteRead):
        asked(unruly, b"", how="broken_stream")
    assert asked(unruly, b"", how="after") == (200, b"AFTER")
    wait_until(lambda: unruly.metric("loramill_handler_restarts_total") >= 2, "the metric")


def test_sigterm_lets_the_call_under_way_end(serve, mill) -> None:
    with serve(MODELS / "unruly") as worker:
        worker.queue.send(id="drained", output={"uri": PREFIX}, inputs=["slow"] * 8)
        wait_until(lambda: worker.metric("loramill_rows_in_flight") > 0, "rows at work")
        worker.popen.send_signal(signal.SIGTERM)
        assert worker.end() == 0
        assert [line["generated_text"] for line in mill.results("drained")] == ['{"slept": true}'] * 8


def test_a_worker_whose_handler_does_not_start_ends_aloud(serve, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "model.py").write_text("def handle(inputs):\n    raise ValueError('no weights here')\n")
    with serve(folder, ready=False) as worker:
        assert worker.end() == 1
        assert "no weights here" in worker.text


def test_code_runs_only_when_it_is_enabled(serve, tmp_path: Path) -> None:
    folder = tiny.make_base(tmp_path / "quiet")
    (folder / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with serve(folder, LORAMILL_CUSTOM_CODE="false") as worker:
        assert "the model comes with a handler, which is not run: custom_code is off" in worker.said()
        assert (
            call(worker, "POST", "/invocations", b"{}")[0].status == 400
        )  # the engine answers, and asks for inputs
    assert not (tmp_path / "ran").exists()
    with serve(MODELS / "adaptecho", ready=False, LORAMILL_CUSTOM_CODE="false") as worker:
        assert worker.end() == 2
        assert "entry_point" in worker.text


def test_the_handler_of_the_readme_answers_as_it_says(serve, mill, tmp_path: Path) -> None:
    text = README.read_text()
    folder = tmp_path / "shout"
    folder.mkdir()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def handle" in block
    ]
    (folder / "model.py").write_text(code)
    shell = next(
        block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "/predictions/shout" in block
    )
    expected = [
        {"status": "Adapter loud registered, and marked"},
        {"generated_text": "HELLO!"},
        {"generated_text": "HELLO."},
        {"status": "Adapter loud unregistered"},
    ]
    with serve(folder, LORAMILL_ENABLE_LORA="true") as worker:
        commands = [shlex.split(line) for line in shell.splitlines() if line.startswith("curl")]
        found = [json.loads(curl(worker, words)) for words in commands]
        assert found == expected
        (line,) = results(mill, worker, inputs="hello")
        assert line["generated_text"] == "HELLO."


def curl(worker: Process, words: list[str]) -> bytes:
    """What the command would print."""
    options = {flag: words[words.index(flag) + 1] for flag in ("-X", "-H", "-d") if flag in words}
    (url,) = [word for word in words if word.startswith("$api")]
    name, _, value = options.get("-H", "").partition(": ")
    headers = {name: value} if name else {}
    return call(worker, options["-X"], url.removeprefix("$api"), options.get("-d", "").encode(), headers)[1]
