"""The routes of DJL Serving that are about models, over a real engine: one model and its workflows."""

import json
import shutil

import pytest

from tests.glue.calling import MODEL, MODEL_URL, Worker, make_core, serve
from tests.glue.registering import refused

METHOD = "MethodNotAllowedException"


@pytest.fixture(scope="module")
def core(base):
    return make_core(base)


@pytest.fixture
def play(core, adapter_paths, tmp_path):
    shutil.copytree(adapter_paths[0], tmp_path / "adapters" / "a0")
    body = {"name": "w", "version": "7", "models": {"m": MODEL_URL}, "workflow": {"out": ["m", "in"]}}
    (tmp_path / "workflow.json").write_text(json.dumps(body))

    def runner(scenario):
        async def registered(worker: Worker) -> None:
            assert (await worker("POST", "/workflows", url=str(tmp_path))).status == 200
            await scenario(worker)

        serve(core, tmp_path / "adapters", tmp_path, registered)

    return runner


def test_the_model_is_listed_with_its_workflows_a_page_at_a_time(play):
    async def scenario(worker: Worker):
        model = {"modelName": MODEL, "modelUrl": MODEL_URL, "status": "READY"}
        workflow = {"modelName": "w:m", "version": "7", "modelUrl": MODEL_URL, "status": "READY"}
        answer = await worker("GET", "/models")
        assert (answer.status, answer.body) == (200, {"models": [model, workflow]})
        page = (await worker("GET", "/models?limit=1")).body
        assert page == {"models": [model], "nextPageToken": "1"}
        assert (await worker("GET", "/models?limit=1&next_page_token=1")).body == {"models": [workflow]}
        assert (await worker("GET", "/models?limit=x")).status == 400
        worker.reason = "loading the model"
        assert (await worker("GET", "/models")).body["models"][0]["status"] == "PENDING"
        worker.reason = None

    play(scenario)


def test_it_is_described_as_a_workflow_of_one_model(play):
    async def scenario(worker: Worker):
        (told,) = (await worker("GET", f"/models/{MODEL}")).body
        (model,) = told.pop("models")
        assert told == {"workflowName": MODEL}
        expected = {"modelName": MODEL, "modelUrl": MODEL_URL, "status": "Healthy", "requestInQueue": 0}
        assert {name: model[name] for name in expected} == expected
        for path in ("/models/w", "/models/w/7"):
            (told,) = (await worker("GET", path)).body
            assert (told["workflowName"], told["version"]) == ("w", "7")
            assert told["models"] == [model | {"modelName": "m"}]
        for path, says in (
            ("/models/nobody", "The model nobody was not found"),
            ("/models/w/8", "The model w was not found in version 8"),
            (f"/models/{MODEL}/1", f"The model {MODEL} was not found in version 1"),
        ):
            assert refused(await worker("GET", path), 404, says)

    play(scenario)


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("POST", "/models?url=s3://bucket/other/", "A worker serves one model, by its setting MODEL; start"),
        ("DELETE", f"/models/{MODEL}", "A worker serves one model as long as it runs; stop the worker"),
        ("PUT", f"/models/{MODEL}?min_worker=2", "A worker is one process with one model, and has no number"),
        ("PATCH", "/models", "The method PATCH is not allowed here"),
    ],
)
def test_models_are_neither_registered_nor_removed_nor_scaled(play, method, path, says):
    async def scenario(worker: Worker):
        answer = await worker(method, path)
        assert (answer.status, answer.body["type"]) == (405, METHOD)
        assert answer.body["message"].startswith(says)
        assert answer.headers["Allow"] == "GET, HEAD"

    play(scenario)


def test_a_model_is_invoked_by_all_its_paths_and_in_no_other_version(play):
    async def scenario(worker: Worker):
        asked = {"inputs": "one", "adapters": "a0", "parameters": {"max_new_tokens": 5}}
        expected = (await worker.invoke(asked)).body
        answer = await worker.invoke(asked, f"/models/{MODEL}/invoke")
        assert (answer.status, answer.body) == (200, expected)
        says = "The method GET is not allowed here"
        assert refused(await worker("GET", f"/models/{MODEL}/invoke"), 405, says, METHOD)
        assert refused(await worker.invoke(asked, "/models/no/invoke"), 404, "The model no was not found")
        del asked["adapters"]
        expected = (await worker.invoke(asked)).body
        for path in (
            "predictions/w",
            "predictions/w/7",
            "models/w/invoke",
            "models/w/invoke?model_version=7",
        ):
            answer = await worker.invoke(asked, f"/{path}")
            assert (answer.status, answer.body) == (200, expected), path
        for path, name in (("predictions/w/8", "w"), ("invocations?model_name=w&model_version=8", "w")):
            says = f"The model {name} was not found in version 8"
            assert refused(await worker.invoke(asked, f"/{path}"), 404, says)
        for path in (
            f"predictions/{MODEL}/1",
            "invocations?model_version=1",
            f"models/{MODEL}/invoke?model_version=1",
        ):
            says = f"The model {MODEL} was not found in version 1"
            assert refused(await worker.invoke(asked, f"/{path}"), 404, says)
        counted = 'loramill_http_requests_total{route="models",status="200"}'
        assert worker.metric(counted) == 3

    play(scenario)
