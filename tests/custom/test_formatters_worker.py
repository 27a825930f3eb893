"""Real workers whose own engine answers through formatters: over HTTP, from the queue, with adapters' own."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.custom.conftest import MODELS
from tests.custom.test_worker import README, call, curl, results, told
from tests.e2e.conftest import BUCKET, Process, wait_until

DJL = MODELS / "formatters"
SHORT = {"max_new_tokens": 4, "do_sample": False}  # an example sets a temperature where there is none
WRONG = """
import os
from djl_python.output_formatter import output_formatter
@output_formatter
def wrong(response):
    if os.path.exists({mark!r}):
        return {{"answer": response["generated_text"]}}
    open({mark!r}, "w").close()
    {deed}
"""
MARKER = """
from djl_python.input_parser import input_formatter
from djl_python.output_formatter import output_formatter
@input_formatter
def mark_input(payload, tokenizer=None, **kwargs):
    return {{**payload, "inputs": "{word} " + payload["inputs"]}}
@output_formatter
def mark_output(response):
    return {{"marked": "{word}"}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("formatted") / "base")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A model with the documented formatters."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    shutil.copy(DJL / "model" / "model.py", folder)
    return folder


def adapter(path: Path, base: Path, code: str | Path | None = None, seed: int = 1) -> Path:
    tiny.make_adapter(path, base, seed=seed, r=4, target_modules=tiny.ATTENTION)
    if isinstance(code, Path):
        shutil.copy(code / "model.py", path)
    elif code is not None:
        (path / "model.py").write_text(code)
    return path


def ask(worker: Process, body: dict[str, Any], path: str = "/invocations", **query: str) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"}
    answer, said = call(worker, "POST", path, json.dumps(body).encode(), headers, **query)
    return answer.status, json.loads(said)


def plain(worker: Process, prompt: str, model: str = "model") -> str:
    """What the engine says by itself: OpenAI's bodies are left alone."""
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    status, said = ask(worker, body, "/v1/completions")
    assert status == 200, said
    return said["choices"][0]["text"]


def test_calls_and_rows_go_through_the_documented_examples(serve, mill, base, folder) -> None:
    adapter(folder / "adapters" / "my_adapter", base, DJL / "adapter", seed=1)
    adapter(folder / "adapters" / "bare", base, seed=2)
    with serve(folder) as worker:
        own, bare, without = (
            plain(worker, "[ADAPTER_PREFIX] hello", "my_adapter"),
            plain(worker, "hello", "bare"),
            plain(worker, "hello"),
        )
        assert len({own, bare, without}) == 3
        for path in ("/invocations", "/predictions/model"):
            status, said = ask(worker, {"inputPrompt": "hello", "parameters": SHORT}, path)
            assert status == 200, said
            assert said["generated_text"] == f"[BASE] {without}"
            assert said["custom_formatter_applied"] is True
            assert said["original_length"] == len(without)
        status, said = ask(worker, {"inputPrompt": "hello", "parameters": SHORT}, adapter="bare")
        assert (status, said["generated_text"]) == (200, f"[BASE] {bare}")
        body = {"inputs": "hello", "parameters": SHORT | {"details": True}}
        for said in (
            ask(worker, body, adapter="my_adapter"),
            ask(worker, {**body, "adapters": "my_adapter"}),
        ):
            assert said[0] == 200, said
            assert said[1]["generated_text"] == f"[ADAPTER] {own}"
            assert said[1]["custom_metrics"]["text_length"] == len(own)
            assert said[1]["details"]["inputs"] == "[ADAPTER_PREFIX] hello"
        streamed = ask(worker, {**body, "adapters": "my_adapter", "stream": True})[1]
        assert {**streamed, "details": {}} == {**said[1], "details": {}}  # one line
        mixed = {"inputs": ["hello"] * 3, "adapters": ["my_adapter", "bare", ""], "parameters": SHORT}
        status, said = ask(worker, mixed)
        expected = [f"[ADAPTER] {own}", f"[BASE] {bare}", f"[BASE] {without}"]
        assert [one["generated_text"] for one in said] == expected
        assert ask(worker, {"inputPrompt": "hello"}, adapter="nobody")[0] == 424
        assert ask(worker, {"inputs": "hello", "other": 1})[0] == 400

        rows = [{"inputPrompt": "hello"}, "hello", {"input": "hello", "adapter": "my_adapter", "id": "own"}]
        lines = results(mill, worker, inputs=[*rows, {"id": "x"}], adapters="bare", parameters=SHORT)
        bases = [f"[BASE] {bare}"] * 2
        assert [line["generated_text"] for line in lines] == [*bases, f"[ADAPTER] {own}", None]
        assert [line["id"] for line in lines] == ["0", "1", "own", "x"]
        assert lines[3]["error"]["code"] == "invalid_line"
        assert lines[0]["response"]["custom_formatter_applied"] is True
        assert set(lines[2]["response"]) == {"adapter_name", "adapter_version", "custom_metrics"}
        detailed = {"parameters": SHORT | {"details": True}}
        (line,) = results(mill, worker, inputs="hello", adapters="my_adapter", **detailed)
        assert line["details"]["inputs"] == "[ADAPTER_PREFIX] hello"
        (line,) = results(mill, worker, inputs="hello", task="score", adapters="my_adapter")
        assert line["logprob"] < 0
        assert "response" not in line
        body = {"model": "bare", "prompt": "hello", "max_tokens": 4, "temperature": 0}
        sent = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
        (line,) = results(mill, worker, inputs=[sent])
        assert line["generated_text"] == bare


def test_what_goes_wrong_in_a_formatter_costs_its_own_rows_and_no_others(serve, mill, base, tmp_path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    deeds = {"loops": "while True: pass", "exits": "os._exit(1)"}
    for name, deed in deeds.items():
        mark = str(tmp_path / f"{name}.mark")
        adapter(folder / "adapters" / name, base, WRONG.format(deed=deed, mark=mark))
    for name in ("failing_input", "failing_output"):
        adapter(folder / "adapters" / name, base, DJL / name)
    adapter(folder / "adapters" / "broken", base, "def f(:\n")
    adapter(folder / "adapters" / "good", base, MARKER.format(word="good"))
    names = ["good", "loops", "", "exits", "failing_input", "good", "failing_output", "broken", "good"]
    with serve(folder, LORAMILL_PREDICT_TIMEOUT_SECONDS="2") as worker:
        lines = results(mill, worker, inputs=["hello"] * len(names), adapters=names, parameters=SHORT)
        assert [line["adapter"] for line in lines] == names
        codes = [line["error"] and line["error"]["code"] for line in lines]
        failed = "handler_failed"
        assert codes == [None, failed, None, failed, failed, None, failed, "adapter_invalid", None]
        said = {line["adapter"]: line["error"]["message"] for line in lines if line["error"]}
        what = "The output formatter wrong of adapter {} failed: the handler"
        assert said["loops"] == what.format("loops") + " did not answer within 2 s"
        assert said["exits"] == what.format("exits") + "'s process ended with exit code 1"
        assert "Input formatter intentionally failed" in said["failing_input"]
        assert "of adapter failing_output failed: RuntimeError" in said["failing_output"]
        assert "SyntaxError" in said["broken"]
        assert [lines[number]["response"] for number in (0, 5, 8)] == [{"marked": "good"}] * 3
        assert lines[0]["generated_text"] is None
        for name in deeds:  # the second time they do well: their process was replaced
            (line,) = results(mill, worker, inputs="hello", adapters=name, parameters=SHORT)
            assert list(line["response"]) == ["answer"]
        restarts = "loramill_handler_restarts_total"
        wait_until(lambda: worker.metric(restarts) == 2, "two new processes")
        for name in ("failing_input", "failing_output", "broken"):
            status, refused = ask(worker, {"inputs": "hello", "parameters": SHORT}, adapter=name)
            assert (status, refused["code"]) == (424, 424)
        status, said = ask(worker, {"inputs": "hello", "parameters": SHORT}, adapter="good")
        assert (status, said) == (200, {"marked": "good"})


def test_registered_code_is_loaded_updated_in_place_and_unloaded(serve, mill, base, folder, tmp_path) -> None:
    source = adapter(tmp_path / "one", base, MARKER.format(word="one"))
    broken = adapter(tmp_path / "broken", base, "raise OSError('no table')\n")
    body = {"inputs": "hello", "parameters": SHORT}
    with serve(folder, LORAMILL_ENABLE_LORA="true", LORAMILL_CACHE_DIR=str(tmp_path / "c")) as worker:
        status, said = told(worker, "POST", "/adapters", name="a", src=str(broken))
        assert (status, said["code"]) == (424, 424)
        assert "OSError: no table" in said["message"]
        assert told(worker, "GET", "/adapters/a")[0] == 404
        assert told(worker, "POST", "/adapters", name="a", src=str(source))[0] == 200
        assert ask(worker, body, adapter="a") == (200, {"marked": "one"})
        (source / "model.py").write_text(MARKER.format(word="two"))
        assert ask(worker, body, adapter="a") == (200, {"marked": "one"})
        before = told(worker, "GET", "/adapters/a")[1]["version"]
        assert told(worker, "POST", "/adapters/a/update", src=str(broken))[0] == 424
        assert ask(worker, body, adapter="a") == (200, {"marked": "one"})
        assert told(worker, "POST", "/adapters/a/update", src=str(source))[0] == 200
        assert ask(worker, body, adapter="a") == (200, {"marked": "two"})
        assert told(worker, "GET", "/adapters/a")[1]["version"] != before
        (source / "model.py").unlink()
        assert told(worker, "POST", "/adapters/a/update", src=str(source))[0] == 200
        assert ask(worker, body, adapter="a")[1]["custom_formatter_applied"] is True  # the model's own
        assert told(worker, "DELETE", "/adapters/a")[0] == 200
        assert ask(worker, body, adapter="a")[0] == 424
        (source / "model.py").write_text(MARKER.format(word="three"))
        assert told(worker, "POST", "/adapters", name="a", src=str(source))[0] == 200
        worker.popen.terminate()
        assert worker.end() == 0
    with serve(folder, LORAMILL_ENABLE_LORA="true", LORAMILL_CACHE_DIR=str(tmp_path / "c")) as worker:
        assert ask(worker, body, adapter="a") == (200, {"marked": "three"})


def test_a_mirror_carries_code_to_a_worker_that_runs_it_and_to_no_other(serve, mill, base, tmp_path) -> None:
    source = adapter(
        tmp_path / "a", base, f"open({str(tmp_path / 'ran')!r}, 'w')\n" + MARKER.format(word="one")
    )
    uri = f"s3://{BUCKET}/formatted/{mill.new_name()}/adapters/"
    assert mill.run("push", str(source), uri).returncode == 0
    body = {"inputs": "hello", "parameters": SHORT}
    said = {"LORAMILL_ADAPTERS_URI": uri, "LORAMILL_SYNC": "true", "LORAMILL_ENABLE_LORA": "true"}

    def ready(folder: str) -> dict[str, str]:
        return said | {"LORAMILL_ADAPTERS_DIR": str(tmp_path / folder / "adapters")}

    with serve(base, LORAMILL_CUSTOM_CODE="false", **ready("off")) as worker:
        (line,) = results(mill, worker, inputs="hello", adapters="a", parameters=SHORT)
        assert line["error"] is None
        assert line["generated_text"] == plain(worker, "hello", "a")
        described = told(worker, "GET", "/adapters/a")[1]
        assert described["note"] == "its model.py is not run: custom_code is off"
    assert not (tmp_path / "ran").exists()
    with serve(base, **ready("on")) as worker:
        (line,) = results(mill, worker, inputs="hello", adapters="a", parameters=SHORT)
        assert line["response"] == {"marked": "one"}
        assert ask(worker, body, adapter="a") == (200, {"marked": "one"})
        assert line["adapter_version"] != described["version"]
    assert (tmp_path / "ran").exists()
    # A mirror of its own that was not told leaves it out: then rows are refused, and not answered without.
    apart = str(tmp_path / "apart" / "adapters")
    mirror = ["sync", "--once", "--adapters-uri", uri, "--adapters-dir", apart]
    done = mill.run(*mirror)
    assert done.returncode == 0, done.stderr
    with serve(base, LORAMILL_ADAPTERS_DIR=apart) as worker:
        status, refused = ask(worker, body, adapter="a")
        assert (status, "model.py was not carried" in refused["message"]) == (424, True)
    done = mill.run(*mirror, "--custom-code")
    assert done.returncode == 0, done.stderr
    with serve(base, LORAMILL_ADAPTERS_DIR=apart) as worker:
        assert ask(worker, body, adapter="a") == (200, {"marked": "one"})


def test_formatters_run_only_where_custom_code_is_on(serve, base, folder) -> None:
    adapter(folder / "adapters" / "a", base, "raise SystemExit\n")
    with serve(folder, LORAMILL_CUSTOM_CODE="false") as worker:
        assert "the model comes with formatters, which are not run: custom_code is off" in worker.said()
        assert "adapters come with code, which is not run: custom_code is off" in worker.said()
        assert ask(worker, {"inputPrompt": "hello"})[0] == 400
        status, said = ask(worker, {"inputs": "hello", "parameters": SHORT}, adapter="a")
        assert (status, said) == (200, {"generated_text": plain(worker, "hello", "a")})
        assert told(worker, "GET", "/adapters/a")[1]["note"] == "its model.py is not run: custom_code is off"


def test_the_calls_of_a_workflow_are_formatted_each_for_its_adapter(serve, mill, base, tmp_path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    sources = {
        "first": MARKER.format(word="first").replace('{"marked": "first"}', '{"generated_text": "hello"}'),
        "last": MARKER.format(word="last").replace('{"marked": "last"}', "{**response, 'last': 1}"),
    }
    for seed, (name, code) in enumerate(sources.items()):
        adapter(tmp_path / name, base, code, seed=seed)
    adapters = {name: {"model": "m", "src": str(tmp_path / name)} for name in sources}
    steps = {"one": ["adapter", "first", "in"], "out": ["adapter", "last", "one"]}
    said = {"name": "pair", "models": {"m": str(folder)}, "configs": {"adapters": adapters}}
    (tmp_path / "workflow.json").write_text(json.dumps({**said, "workflow": steps}))
    environ = {"LORAMILL_ENABLE_LORA": "true", "LORAMILL_WORKFLOWS": str(tmp_path / "workflow.json")}
    with serve(folder, LORAMILL_CACHE_DIR=str(tmp_path / "c"), **environ) as worker:
        wanted = plain(worker, "last hello", "pair.last")
        status, answer = ask(worker, {"inputs": "any", "parameters": SHORT}, "/predictions/pair")
        assert (status, answer) == (200, {"generated_text": wanted, "last": 1})
        (line,) = results(mill, worker, inputs="any", model="pair", parameters=SHORT)
        assert (line["generated_text"], line["response"]) == (wanted, {"last": 1})


def test_files_of_rows_are_formatted_by_a_worker_and_by_run_batch(
    serve, mill, base, folder, tmp_path
) -> None:
    adapter(folder / "adapters" / "a", base, MARKER.format(word="one"))
    rows = [{"inputPrompt": "hello"}] * 6 + [{"input": "hello", "adapter": "a"}]
    text = "".join(json.dumps({**row, "parameters": SHORT}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    key = f"results/{mill.new_name()}.jsonl"
    mill.s3.put_object(Bucket=BUCKET, Key=key, Body=text.encode())
    with serve(folder) as worker:
        lines = results(mill, worker, input={"uri": f"s3://{BUCKET}/{key}"})
        said = plain(worker, "hello")
    assert [line["generated_text"] for line in lines] == [f"[BASE] {said}"] * 6 + [None]
    assert [line["index"] for line in lines] == list(range(7))
    assert lines[6]["response"] == {"marked": "one"}
    command = ["run-batch", "-i", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    told = {"LORAMILL_MODEL": str(folder), "LORAMILL_CUSTOM_CODE": "true", "LORAMILL_ENABLE_LORA": "true"}
    done = mill.run(*command, **told)
    assert done.returncode == 0, done.stderr
    local = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line in [*lines, *local]:
        line.get("response", {}).pop("formatter_timestamp", None)
    assert local == lines


def test_the_formatters_of_the_readme_do_as_it_says(serve, mill, base, tmp_path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    text = README.read_text()
    (code,) = [
        one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@input_formatter" in one
    ]
    (folder / "model.py").write_text(code)
    lines = [line for line in text.splitlines() if line.startswith("curl") and '"question"' in line]
    (words,) = map(shlex.split, lines)
    adapter(folder / "adapters" / "blue", base)
    with serve(folder) as worker:
        said = json.loads(curl(worker, words))
        assert said["length"] == len(said["generated_text"])
        question = {"question": "What do bees make?"}
        rows = [question, {**question, "id": "own", "adapter": "blue"}]
        line, own = results(mill, worker, inputs=rows)
        assert line["generated_text"] == said["generated_text"]
        assert line["response"] == {"length": said["length"]}
        assert (own["id"], own["adapter"], own["error"]) == ("own", "blue", None)
        assert own["generated_text"] != line["generated_text"]
        for body, query in (({"adapters": "blue"}, {}), ({}, {"adapter": "blue"})):
            status, said = ask(worker, {**question, **body}, **query)
            assert (status, said["generated_text"]) == (200, own["generated_text"])
        status, said = ask(worker, {"question": "x", "adapters": "nobody"})
        assert (status, said["message"]) == (424, "Adapter nobody is not registered")
