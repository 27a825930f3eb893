"""Workflows over HTTP and from jobs, over a real engine."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.glue.calling import MODEL, MODEL_URL, Worker, make_core, serve
from tests.glue.test_calls import curl
from tests.test_docs import README, blocks
from worker.http import workflows_api

PARAMETERS = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def core(base):
    return make_core(base, max_loras=3, max_cpu_loras=8)


@pytest.fixture
def play(core, adapter_paths, tmp_path):
    (tmp_path / "adapters").mkdir()
    for name, path in zip(("pirate", "robot"), adapter_paths, strict=False):
        shutil.copytree(path, tmp_path / name)

    def runner(scenario):
        serve(core, tmp_path / "adapters", tmp_path, scenario)

    return runner


def written(folder: Path, name: str = "polite", **changes: object) -> str:
    adapters = {key: {"model": "m", "src": f"./{key}"} for key in ("pirate", "robot")}
    body = {
        "name": name,
        "version": "0.1",
        "models": {"m": MODEL_URL},
        "configs": {"adapters": adapters},
        "workflow": {"draft": ["adapter", "pirate", "in"], "out": ["adapter", "robot", ["m", "draft"]]},
    }
    path = folder / "workflow.json"
    path.write_text(json.dumps(body | changes))
    return str(path)


async def text_of(worker: Worker, target: str, prompt: str, **body: object) -> str:
    said = await worker.invoke({"inputs": prompt, "parameters": PARAMETERS, **body}, target)
    assert said.status == 200, said.body
    return said.body["generated_text"]


def test_a_workflow_answers_what_its_calls_answer_one_after_the_other(play, tmp_path):
    async def scenario(worker: Worker):
        said = await worker("POST", "/workflows", url=written(tmp_path))
        assert (said.status, said.body) == (200, {"status": 'Workflow "polite" registered.'})
        whole = await text_of(worker, "/predictions/polite", "hello there")
        text = "hello there"
        for adapter in ("polite.pirate", "", "polite.robot"):
            text = await text_of(worker, "/invocations", text, adapters=adapter)
        assert whole == text
        asked = {"model": "polite", "prompt": "hello there", "max_tokens": 6, "temperature": 0}
        for target in ("/v1/completions", "/predictions/polite"):
            completed = await worker.invoke(asked, target)
            assert (completed.status, completed.body["choices"][0]["text"]) == (200, whole)
        alone = await text_of(worker, "/invocations", "hello there", adapters="polite.robot")
        assert whole != alone
        await worker.settled()

    play(scenario)


def test_a_job_names_a_workflow_as_its_model(play, tmp_path):
    async def scenario(worker: Worker):
        await worker("POST", "/workflows", url=written(tmp_path))
        fields = {"model": "polite", "parameters": PARAMETERS}
        first, second = await worker.job(["hello there", "and you"], **fields)
        assert first.text == await text_of(worker, "/predictions/polite", "hello there")
        assert second.text == await text_of(worker, "/predictions/polite", "and you")
        assert first.row.adapter == "polite.robot"
        assert first.adapter_version is not None
        (lost,) = await worker.job(["hello"], model="nobody")
        assert (lost.failure.code, lost.failure.message) == (
            "model_not_found",
            "The model nobody was not found",
        )

    play(scenario)


def test_the_life_of_a_workflow(play, tmp_path):
    async def scenario(worker: Worker):
        await worker("POST", "/workflows", url=str(tmp_path / "nothing"))
        url = written(tmp_path)
        assert (await worker("POST", "/workflows", url=url)).status == 200
        taken = await worker("POST", "/workflows", url=url)
        assert (taken.status, taken.body["type"]) == (409, "IllegalArgumentException")
        listed = await worker("GET", "/workflows")
        assert listed.body == {"workflows": [{"workflowName": "polite", "version": "0.1"}]}
        told = (await worker("GET", "/workflows/polite/0.1")).body
        assert told["adapters"]["robot"]["src"] == str(tmp_path / "robot")
        assert [call["adapter"] for call in told["calls"]] == ["pirate", None, "robot"]
        assert (await worker("GET", "/workflows/polite/9")).status == 404
        gone = await worker("DELETE", "/workflows/polite")
        assert (gone.status, gone.body) == (200, {"status": 'Model or workflow "polite" unregistered'})
        assert (await worker("GET", "/workflows/polite")).status == 404
        assert (await worker.invoke({"inputs": "a"}, "/predictions/polite")).status == 404
        assert (await worker("GET", "/adapters")).body == {"adapters": []}

    play(scenario)


@pytest.mark.parametrize(
    ("target", "method", "status", "message"),
    [
        ("/workflows", "POST", 400, "The parameter url is required"),
        ("/workflows?url=/nowhere/workflow.json", "POST", 400, "which cannot be read: No such file"),
        ("/workflows?url=s3://bucket/none", "POST", 400, "there is no s3://bucket/none/workflow.json"),
        ("/workflows?template=adaptor", "POST", 400, "template is 'adaptor'; it must be one of adapter"),
        ("/workflows?template=adapter&adapter=a&url=x", "POST", 400, "parameter model is required"),
        ("/workflows?limit=0", "GET", 400, "The parameter limit is '0'"),
        ("/workflows", "PUT", 405, "The method PUT is not allowed here"),
        ("/workflows/a/b/c", "GET", 404, "Requested resource is not found"),
        ("/workflows/a", "GET", 404, "The workflow a was not found"),
        ("/workflows/a", "DELETE", 404, "The workflow a was not found"),
    ],
)
def test_what_is_wrong_is_told(play, target, method, status, message):
    async def scenario(worker: Worker):
        said = await worker(method, target)
        assert (said.status, said.body["code"]) == (status, status)
        assert message in said.body["message"]

    play(scenario)


def test_a_workflow_of_another_model_or_with_a_bad_adapter_is_refused_whole(play, tmp_path):
    async def scenario(worker: Worker):
        other = await worker("POST", "/workflows", url=written(tmp_path, models={"m": "s3://bucket/other/"}))
        assert (other.status, "serves s3://bucket/llama and no other" in other.body["message"]) == (400, True)
        (tmp_path / "robot" / "adapter_model.safetensors").write_bytes(b"no weights")
        bad = await worker("POST", "/workflows", url=written(tmp_path))
        assert bad.status == 400
        assert (await worker("GET", "/workflows")).body == {"workflows": []}
        assert (await worker("GET", "/adapters")).body == {"adapters": []}

    play(scenario)


def test_a_row_of_a_workflow_that_names_an_adapter_is_refused(play, tmp_path):
    async def scenario(worker: Worker):
        await worker("POST", "/workflows", url=written(tmp_path))
        said = await worker.invoke({"inputs": "a", "adapters": "polite.robot"}, "/predictions/polite")
        assert said.status == 400
        assert "the workflow polite has adapters of its own" in said.body["message"]

    play(scenario)


def test_a_chat_is_answered_as_a_chat_however_many_calls_it_takes(play, tmp_path):
    async def scenario(worker: Worker):
        await worker("POST", "/workflows", url=written(tmp_path))
        messages = [{"role": "user", "content": "hello there"}]
        asked = {"model": "polite", "messages": messages, "max_tokens": 6, "temperature": 0}
        said = (await worker.invoke(asked, "/v1/chat/completions")).body
        assert said["object"] == "chat.completion"
        assert said["choices"][0]["message"]["role"] == "assistant"

    play(scenario)


def test_every_call_of_one_that_cannot_be_served_says_why(play, tmp_path):
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "broken.json").write_text("{")
    why = "The workflow broken cannot be served: "

    async def scenario(worker: Worker):
        chat = {"model": "broken", "messages": [{"role": "user", "content": "x"}]}
        for target, body in (("/predictions/broken", {"inputs": "x"}), ("/v1/chat/completions", chat)):
            said = await worker.invoke(body, target)
            assert (said.status, said.body["message"][: len(why)]) == (404, why)
        assert (await worker("GET", "/workflows")).body["failed"].keys() == {"broken"}
        assert (await worker("GET", "/workflows/broken")).body["message"].startswith(why)
        assert (await worker("DELETE", "/workflows/broken")).status == 200
        assert (await worker("DELETE", "/workflows/broken")).status == 404

    play(scenario)


def test_calls_that_name_no_model_are_for_the_only_workflow_if_that_is_all_there_is(play, tmp_path):
    async def scenario(worker: Worker):
        await worker("POST", "/workflows", url=written(tmp_path))
        base = await text_of(worker, "/invocations", "hello there")
        polite = await text_of(worker, "/predictions/polite", "hello there")
        assert base != polite
        worker.calls.plain = "polite"
        assert await text_of(worker, "/invocations", "hello there") == polite
        assert await text_of(worker, f"/predictions/{MODEL}", "hello there") == base
        assert await text_of(worker, f"/invocations?model_name={MODEL}", "hello there") == base
        asked = {"prompt": "hello there", "max_tokens": 6, "temperature": 0}
        for named, expected in (({}, polite), ({"model": MODEL}, base), ({"model": "polite"}, polite)):
            said = await worker.invoke(asked | named, "/v1/completions")
            assert (said.status, said.body["choices"][0]["text"]) == (200, expected)
        said = await worker.invoke({"inputs": "x", "adapters": "polite.robot"})
        assert (said.status, "has adapters of its own" in said.body["message"]) == (400, True)
        await worker("DELETE", "/workflows/polite")
        said = await worker.invoke({"inputs": "x"})
        assert (said.status, said.body["message"]) == (404, "The model polite was not found")

    play(scenario)


def test_a_body_is_not_taken_for_parameters(play):
    async def scenario(worker: Worker):
        said = await worker("POST", "/workflows?url=/srv", {}, b"x")
        assert (said.status, "go into the query" in said.body["message"]) == (400, True)

    play(scenario)


def test_a_pipe_is_no_workflow_and_keeps_nobody_waiting(play, tmp_path):
    os.mkfifo(tmp_path / "pipe")

    async def scenario(worker: Worker):
        said = await worker("POST", "/workflows", url=str(tmp_path / "pipe"))
        assert (said.status, "it is no file" in said.body["message"]) == (400, True)

    play(scenario)


def test_the_examples_of_the_readme_do_what_they_say(play, tmp_path):
    said = next(block for block in blocks("json") if '"workflow"' in block)
    (tmp_path / "workflow.json").write_text(said)
    block = next(block for block in blocks("sh") if "/workflows?" in block)
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("curl")]
    folder = str(tmp_path)

    async def scenario(worker: Worker):
        answers = []
        for command in commands:
            words = [word.replace("/srv/polite", folder).replace("/srv/", f"{folder}/") for word in command]
            if words[0] == "-X":
                answers.append(await worker(words[1], words[2].removeprefix("$here")))
            else:
                answers.append(await curl(worker, *words))
        assert [answer.status for answer in answers] == [200] * len(commands)
        assert [one["workflowName"] for one in (await worker("GET", "/workflows")).body["workflows"]] == [
            "polite",
            "robot",
        ]
        assert answers[-1].body["generated_text"]

    play(scenario)


def test_the_readme_names_every_route():
    text = README.read_text().partition("\n### Workflows\n")[2].partition("\n## ")[0]
    routes = re.findall(r"^\| `([A-Z]+ \S+)` \|", text, re.MULTILINE)
    documented = re.findall(r"^ *([A-Z]+) +(/[^?\[ ]+)", str(workflows_api.__doc__), re.MULTILINE)
    assert routes == [*dict.fromkeys(" ".join(one) for one in documented)]
