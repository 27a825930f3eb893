"""What DJL Serving's own tests expect of adapters, over HTTP against a real engine.

Each test names the one that it follows, in `serving/src/test/java/ai/djl/serving/ModelServerTest.java` or
in `tests/integration/llm/client.py` of deepjavalibrary/djl-serving. Their model echoes the adapter's name
and its prompt; here a tiny model with real adapters answers, and what it says must be what PEFT says. Where
our own rules differ, the test says how. Workflows and custom handlers have tests of their own.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.glue.calling import MODEL, Worker, make_core, serve

TEXT = {"Content-Type": "text/plain"}
TOKENS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("djl") / "base")


@pytest.fixture(scope="module")
def core(base):
    return make_core(base)


@pytest.fixture(scope="module")
def adaptable(base) -> Path:
    return tiny.make_adapter(base.parent / "src", base, seed=7, r=4, target_modules=tiny.ATTENTION)


@pytest.fixture(scope="module")
def builtin(base) -> Path:
    """A folder beside the model, with an adapter in it: adaptecho/adapters/myBuiltinAdapter of theirs."""
    folder = base.parent / "adapters"
    tiny.make_adapter(folder / "myBuiltinAdapter", base, seed=8, r=4, target_modules=tiny.MLP)
    return folder


@pytest.fixture(scope="module")
def says(base):
    """What PEFT makes of a prompt."""

    def generate(adapter: Path | None, prompt: str) -> str:
        tokens = list(prompt.encode())
        (generated,) = tiny.peft_generate(base, adapter, [[to_id[token] for token in tokens]], TOKENS)
        return generated

    alphabet = tiny.tokenizer()
    to_id = {byte: alphabet.encode(bytes([byte]).decode())[0] for byte in range(128)}
    return generate


@pytest.fixture
def run(core, builtin, tmp_path):
    def go(scenario):
        serve(core, builtin, tmp_path, scenario)

    return go


async def predict(worker: Worker, prompt: str, target: str) -> list[int]:
    """The tokens of an answer."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": TOKENS, "details": True}}
    answer = await worker.invoke(body, target)
    assert answer.status == 200, answer.body
    return [token["id"] for token in answer.body["details"]["tokens"]]


async def register(worker: Worker, src: Path, prefix: str = f"/models/{MODEL}", name: str = "adaptable"):
    return await worker("POST", f"{prefix}/adapters?name={name}&src={src}&echooption=opt")


@pytest.mark.parametrize("prefix", [f"/models/{MODEL}", ""])
def test_register_adapter(run, adaptable, prefix):
    """ModelServerTest.testRegisterAdapter, with and without the model's prefix (testAdapterSME)."""

    async def scenario(worker: Worker):
        missing = await worker("POST", f"/predictions/{MODEL}?adapter=adaptable", TEXT, b"testPredictAdapter")
        assert missing.status == 424, "testAdapterMissing"
        answer = await register(worker, adaptable, prefix)
        assert (answer.status, answer.body) == (200, {"status": "Adapter adaptable registered"})
        described = (await worker("GET", f"{prefix}/adapters/adaptable")).body
        assert (described["name"], described["src"]) == ("adaptable", str(adaptable))
        assert (described["preload"], described["pin"]) == (True, False)

    run(scenario)


def test_adapter_missing(run):
    """ModelServerTest.testAdapterMissing: 424. Ours names the adapter and no other."""

    async def scenario(worker: Worker):
        answer = await worker("POST", f"/predictions/{MODEL}?adapter=adaptable", TEXT, b"testPredictAdapter")
        assert (answer.status, answer.body["code"]) == (424, 424)
        assert answer.body["message"] == "Adapter adaptable is not registered"

    run(scenario)


def test_register_adapter_conflict(run, adaptable):
    """ModelServerTest.testRegisterAdapterConflict. Ours changes nothing by it."""

    async def scenario(worker: Worker):
        assert (await register(worker, adaptable)).status == 200
        before = (await worker("GET", "/adapters/adaptable")).body
        assert (await register(worker, adaptable)).status == 409
        assert (await worker("GET", "/adapters/adaptable")).body == before

    run(scenario)


def test_model_not_found(run):
    """ModelServerTest.test{Register,Update,List,Describe,Unregister}AdapterModelNotFound."""

    async def scenario(worker: Worker):
        for method, target in (
            ("POST", "/adapters?name=adaptable&echooption=opt"),
            ("POST", "/adapters/adaptable/update?src=src1"),
            ("GET", "/adapters"),
            ("GET", "/adapters/adaptable"),
            ("DELETE", "/adapters/adaptable"),
        ):
            assert (await worker(method, f"/models/invalid_model{target}")).status == 404, target
        assert (await worker.invoke({"inputs": "x"}, "/predictions/invalid_model")).status == 404

    run(scenario)


def test_adapter_not_found(run):
    """ModelServerTest.test{Update,Describe,Unregister}AdapterNotFound."""

    async def scenario(worker: Worker):
        for method, target in (("POST", "/update?src=src1"), ("GET", ""), ("DELETE", "")):
            answer = await worker(method, f"/models/{MODEL}/adapters/invalid_adapter{target}")
            assert answer.status == 404
            assert answer.body["message"] == "The adapter invalid_adapter was not found"

    run(scenario)


def test_register_adapter_handler_error(run, base, tmp_path):
    """ModelServerTest.testRegisterAdapterHandlerError: what does not load is not added.

    Theirs is 424, of a handler that raised; ours tells the caller what is wrong with the adapter, 400.
    """
    bad = tmp_path / "bad"
    tiny.make_adapter(bad, base, r=64, target_modules=tiny.MLP)

    async def scenario(worker: Worker):
        answer = await register(worker, bad, name="adaptable2")
        assert (answer.status, answer.body["type"]) == (400, "BadRequestException")
        assert "r is 64; the limit is 16" in answer.body["message"]
        listed = (await worker("GET", f"/models/{MODEL}/adapters")).body["adapters"]
        assert "adaptable2" not in {one["name"] for one in listed}

    run(scenario)


def test_register_adapter_oom(run, adaptable):
    """ModelServerTest.testRegisterAdapterOom: 507, and nothing is added.

    Theirs is a handler out of memory; ours is host memory full of pinned adapters.
    """

    async def scenario(worker: Worker):
        for name in ("one", "two"):
            assert (await worker("POST", f"/adapters?name={name}&src={adaptable}&pin=true")).status == 200
        answer = await worker("POST", f"/adapters?name=adaptable2&src={adaptable}&pin=true")
        assert (answer.status, answer.body["code"]) == (507, 507)
        listed = (await worker("GET", f"/models/{MODEL}/adapters")).body["adapters"]
        assert "adaptable2" not in {one["name"] for one in listed}
        for name in ("one", "two"):
            assert (await worker("DELETE", f"/adapters/{name}")).status == 200

    run(scenario)


def test_update_adapter(run, adaptable):
    """ModelServerTest.testUpdateAdapter."""

    async def scenario(worker: Worker):
        await register(worker, adaptable)
        answer = await worker("POST", f"/models/{MODEL}/adapters/adaptable/update?pin=true")
        assert (answer.status, answer.body) == (200, {"status": "Adapter adaptable updated"})
        described = (await worker("GET", "/adapters/adaptable")).body
        assert (described["src"], described["preload"], described["pin"]) == (str(adaptable), True, True)
        await worker("DELETE", "/adapters/adaptable")

    run(scenario)


def test_update_adapter_handler_error(run, adaptable, tmp_path):
    """ModelServerTest.testUpdateAdapterHandlerError: everything is as it was."""
    empty = tmp_path / "src1"
    empty.mkdir()

    async def scenario(worker: Worker):
        await register(worker, adaptable)
        before = (await worker("GET", "/adapters/adaptable")).body
        answer = await worker("POST", f"/models/{MODEL}/adapters/adaptable/update?src={empty}&load=false")
        assert 400 <= answer.status < 500
        assert (await worker("GET", "/adapters/adaptable")).body == before

    run(scenario)


def test_adapter_no_predict_register(run, adaptable):
    """ModelServerTest.testAdapterNoPredictRegister: headers of a prediction register nothing.

    Theirs refuses such a header with 400; ours has no headers that name a handler's function.
    """

    async def scenario(worker: Worker):
        headers = TEXT | {"handler": "register_adapter", "name": "malicious_name", "src": str(adaptable)}
        await register(worker, adaptable)
        await worker("POST", f"/predictions/{MODEL}?adapter=adaptable", headers, b"tt")
        assert (await worker("GET", "/adapters/malicious_name")).status == 404

    run(scenario)


def test_adapter_predict(run, adaptable, says):
    """ModelServerTest.testAdapterPredict, and testAdapterScale: again and again."""

    async def scenario(worker: Worker):
        await register(worker, adaptable)
        expected = says(adaptable, "testPredictAdapter")
        assert expected != says(None, "testPredictAdapter")
        for _ in range(3):
            target = f"/predictions/{MODEL}?adapter=adaptable"
            assert await predict(worker, "testPredictAdapter", target) == expected
        answer = await worker("POST", f"/predictions/{MODEL}?adapter=adaptable", TEXT, b"testPredictAdapter")
        assert (answer.status, list(answer.body)) == (200, ["generated_text"])

    run(scenario)


def test_adapter_dir_predict(run, builtin, says):
    """ModelServerTest.testAdapterDirPredict and testAdaptersInModelDir: those of the folder are there."""

    async def scenario(worker: Worker):
        target = f"/predictions/{MODEL}?adapter=myBuiltinAdapter"
        expected = says(builtin / "myBuiltinAdapter", "testPredictBuiltinAdapter")
        assert await predict(worker, "testPredictBuiltinAdapter", target) == expected

    run(scenario)


def test_adapter_invoke(run, adaptable, says):
    """ModelServerTest.testAdapterInvoke."""

    async def scenario(worker: Worker):
        await register(worker, adaptable)
        target = f"/invocations?model_name={MODEL}&adapter=adaptable"
        assert await predict(worker, "testInvokeAdapter", target) == says(adaptable, "testInvokeAdapter")

    run(scenario)


@pytest.mark.parametrize("prefix", [f"/models/{MODEL}", ""])
def test_list_describe_and_unregister_adapter(run, adaptable, prefix):
    """ModelServerTest.testListAdapter, testDescribeAdapter and testUnregisterAdapter."""

    async def scenario(worker: Worker):
        await register(worker, adaptable, prefix)
        listed = (await worker("GET", f"{prefix}/adapters")).body["adapters"]
        assert "adaptable" in {one["name"] for one in listed}
        described = (await worker("GET", f"{prefix}/adapters/adaptable")).body
        assert (described["name"], described["src"]) == ("adaptable", str(adaptable))
        answer = await worker("DELETE", f"{prefix}/adapters/adaptable")
        assert (answer.status, answer.body) == (200, {"status": "Adapter adaptable unregistered"})
        listed = (await worker("GET", f"{prefix}/adapters")).body["adapters"]
        assert "adaptable" not in {one["name"] for one in listed}

    run(scenario)


def test_unmerged_lora_request(run, adaptable, builtin, says):
    """client.py, `response_checker` for `adapters` aligned with `inputs`: one adapter for each prompt."""

    async def scenario(worker: Worker):
        await register(worker, adaptable)
        folders = {"adaptable": adaptable, "myBuiltinAdapter": builtin / "myBuiltinAdapter", "": None}
        names = ["adaptable", "myBuiltinAdapter", "adaptable", ""]
        inputs = ["Tell me", "Tell me", "about", "Tell me"]
        parameters = {"max_new_tokens": TOKENS, "details": True}
        answer = await worker.invoke({"inputs": inputs, "adapters": names, "parameters": parameters})
        assert answer.status == 200
        got = [[token["id"] for token in one["details"]["tokens"]] for one in answer.body]
        assert got == [says(folders[name], prompt) for name, prompt in zip(names, inputs, strict=True)]

    run(scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_lora_determinism_and_differentiation(run, adaptable, stream, chat):
    """client.py: test_handler_adapters and test_handler_adapters_chat, with their parameters."""

    async def scenario(worker: Worker):
        await register(worker, adaptable)
        texts = []
        for _ in range(2):
            said = {}
            for adapter in ("adaptable", "myBuiltinAdapter", None):
                body = {**(CHAT if chat else GENERATE), "stream": stream}
                answer = await worker.invoke(body if adapter is None else {**body, "adapters": adapter})
                assert answer.status == 200, answer.body
                extract = extract_chat_content if chat else extract_generated_text
                said[adapter] = extract(answer.body, stream=stream)
            texts.append(said)
        assert texts[0] == texts[1]
        assert len(set(texts[0].values())) == 3

    run(scenario)


GENERATE = {
    "inputs": "What is deep learning?",
    "parameters": {
        "do_sample": False, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "seed": 42,
        "max_new_tokens": 20, "details": True,
    },
}  # fmt: skip
CHAT = {
    "messages": [{"role": "user", "content": "What is deep learning?"}],
    "max_tokens": 20, "temperature": 0.0, "top_p": 1.0, "seed": 42,
}  # fmt: skip


def extract_generated_text(body, *, stream: bool) -> str:
    """As client.py has it: of lines, the last that has one."""
    lines = [json.loads(line) for line in body.splitlines()] if stream else [body]
    assert lines[-1]["details"]["finish_reason"] != "error"
    return lines[-1]["generated_text"]


def extract_chat_content(body, *, stream: bool) -> str:
    if not stream:
        return body["choices"][0]["message"]["content"]
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_adapters_that_come_into_the_folder_are_there(core, base, builtin, tmp_path):
    """ModelServerTest.testAdaptersInModelDir looks once, at start; ours goes on looking."""
    folder = tmp_path / "adapters"
    folder.mkdir()

    async def scenario(worker: Worker):
        body = json.dumps({"inputs": "x", "adapters": "late"}).encode()
        assert (await worker.invoke(body)).status == 424
        shutil.copytree(builtin / "myBuiltinAdapter", folder / "late")
        assert (await worker.invoke(body)).status == 200

    serve(core, folder, tmp_path, scenario)
