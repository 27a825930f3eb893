"""Rows of every format through runner and commit, to results of every format; and rows that are scored."""

import asyncio
import json
from typing import Any

import pytest

from tests.glue.support import PREFIX, Died, World, body_of, make_job, make_runner, nothing, run_rows
from tests.wire.test_lines import LINES
from worker import wire
from worker.adapters.directory import AdapterDirectory
from worker.jobs import Completion, FinishReason, InferenceRequest, SamplingParams, Score

FORMATS = ("native", "openai", "bedrock")
CHAT = {
    "custom_id": "chat",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
}
ROWS = [
    {"id": "native", "input": "hi"},
    CHAT,
    {
        **LINES["openai"],
        "custom_id": "completion",
        "body": {"model": "m", "prompt": [104, 105], "echo": True},
    },
    {"recordId": "record", "modelInput": {"prompt": "hi", "max_gen_len": 5}},
    {"recordId": "bad", "modelInput": {}},
]
NAMES = ["native", "chat", "completion", "record", "bad"]


class Letters:
    """One token a letter, and an EOS."""

    first_token = 0

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    encode_chat = encode

    def decode(self, tokens: tuple[int, ...]) -> str:
        return "".join(map(chr, tokens))

    decode_one = staticmethod(chr)

    def render_chat(self, messages: Any) -> str:
        return "".join(f"<{message.role}>{message.content}" for message in messages)


class Answering:
    """In the place of Bridge: says "ok" or finds every target less likely than the one before."""

    max_model_len = 100

    def __init__(self) -> None:
        self.requests: list[InferenceRequest] = []

    async def submit(self, request: InferenceRequest, adapter: object = None, *_: object) -> Completion:
        self.requests.append(request)
        scored = tuple(-1.0 - n for n in range(len(request.targets)))
        return Completion(
            request_id=request.id,
            text="" if scored else "ok",
            token_ids=() if scored else (111, 107),
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=len(request.prompt),
            score=Score(scored, is_greedy=False) if scored else None,
        )


def world_of(bridge: Any) -> World:
    world, tokenizer = World(), Letters()
    adapters = AdapterDirectory(None, 30.0, clock=world.clock, sleep=world.clock.sleep)
    world.rows = make_runner(bridge, tokenizer, adapters, max_rows=8)
    return world


def output(name: str) -> dict[str, str]:
    return {"uri": PREFIX, "format": name}


def lines_of(world: World, name: str) -> list[dict[str, Any]]:
    end = ".out" if name == "bedrock" else ""
    text = world.store.text(f"{PREFIX}j/results-00000-of-00001.jsonl{end}")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format_have_lines_in_the_one_that_was_asked_for(name):
    async def scenario() -> None:
        world = world_of(Answering())
        await world.send(body_of(inputs=ROWS, output=output(name)))
        await world.handle_all()
        lines = lines_of(world, name)
        said = {"native": "id", "openai": "custom_id", "bedrock": "recordId"}[name]
        assert [line[said] for line in lines] == NAMES
        assert [bool(line.get("error")) for line in lines] == [False] * 4 + [True]
        manifest = world.manifest("j")
        assert manifest.request_counts.completed == 4
        assert manifest.error_counts == {"invalid_line": 1}
        assert manifest.usage.completion_tokens == 8
        if name == "openai":
            bodies = [line["response"]["body"] for line in lines[:4]]
            assert [body["object"].partition(".")[0] for body in bodies] == [
                "text_completion", "chat", "text_completion", "text_completion",
            ]  # fmt: skip
            assert bodies[2]["choices"][0]["text"] == "hiok"
            assert {body["model"] for body in bodies} == {"m"}
        if name == "bedrock":
            assert lines[3]["modelOutput"]["generation"] == "ok"
            summary = json.loads(world.store.text(f"{PREFIX}j/manifest.json.out"))
            assert (summary["successRecordCount"], summary["errorRecordCount"]) == (4, 1)
        else:
            assert len(world.store.uris) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "moment",
    ["put results!", "overwrite manifest.json.out?", "overwrite manifest.json.out!", "put manifest.json!"],
)
def test_process_that_dies_around_bedrocks_manifest_leaves_both_to_the_next(moment):
    async def scenario() -> None:
        world = world_of(Answering())
        await world.send(body_of(inputs=ROWS, output=output("bedrock")))
        waiting = [moment]

        async def die(step: str) -> None:
            if step in waiting:
                waiting.remove(step)
                raise Died

        world.watch(die)
        with pytest.raises(Died):
            await world.handle_next()
        assert not waiting
        world.watch(nothing)
        await world.handle_all()
        assert await world.left() == 0
        assert len(lines_of(world, "bedrock")) == len(ROWS)
        assert world.manifest("j").request_counts.total == len(ROWS)
        assert f"{PREFIX}j/manifest.json.out" in world.store.uris

    asyncio.run(scenario())


def test_chat_without_a_limit_goes_on_to_the_end_of_the_model():
    bridge = Answering()
    body = CHAT["body"] | {"messages": [{"role": "user", "content": "x" * 200}]}
    long = {**CHAT, "custom_id": "long", "body": body}
    asyncio.run(run_rows(world_of(bridge).rows, make_job(inputs=[CHAT, long])))
    assert [request.params.max_new_tokens for request in bridge.requests] == [100 - len("<user>hi"), 1]


# Scores


def scored(*inputs: Any, **fields: Any) -> tuple[list[dict[str, Any]], list[InferenceRequest]]:
    bridge = Answering()
    job = make_job(inputs=inputs, task="score", **fields)
    results = asyncio.run(run_rows(world_of(bridge).rows, job))
    return [
        json.loads(line) for line in wire.encode_rows(job, results, base_model="m").splitlines()
    ], bridge.requests


def test_target_is_scored_after_its_input_and_its_last_token_is_not_computed():
    (line,), (request,) = scored({"input": "ab ", "target": "cd"}, parameters={"details": True})
    assert request.prompt == tuple(map(ord, "ab c"))
    assert request.targets == tuple(map(ord, " cd"))
    assert request.params == SamplingParams(max_new_tokens=0)
    assert (line["logprob"], line["token_logprobs"], line["is_greedy"]) == (-6.0, [-1.0, -2.0, -3.0], False)
    assert line["usage"] == {"prompt_tokens": 5, "completion_tokens": 0}
    assert line["finish_reason"] == "length"
    assert [token["text"] for token in line["details"]["tokens"]] == [" ", "c", "d"]


def test_text_without_a_target_is_scored_but_for_its_first_token():
    (line,), (request,) = scored("abc")
    assert (request.prompt, request.targets) == ((97, 98), (98, 99))
    assert line["token_logprobs"] == [-1.0, -2.0]
    assert "generated_text" not in line


def test_rows_that_cannot_be_scored_are_lines_in_their_place():
    lines, requests = scored("a", {"input": "ab", "parameters": {"temperature": 1}}, CHAT, "abc")
    assert [line["error"] and line["error"]["code"] for line in lines] == [
        "invalid_line", "invalid_parameters", "invalid_line", None,
    ]  # fmt: skip
    assert {tuple(line) for line in lines} == {tuple(lines[0])}, "every line has the same fields"
    assert len(requests) == 1
