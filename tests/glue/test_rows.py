"""What becomes of a row's completion: its result, with the details it asked for."""

import asyncio
import json
import threading
from typing import Any

from tests.glue.support import World, make_job, make_runner, run_rows
from worker import wire
from worker.adapters.directory import AdapterDirectory
from worker.jobs import Completion, Failure, FinishReason, InferenceRequest, Row, SamplingParams


class Letters:
    """One token a letter; remembers from which thread it was asked to spell one."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decode_one(self, token: int) -> str:
        self.threads.add(threading.get_ident())
        return chr(token)


class Answering:
    """In the place of Bridge: two letters, and the details that the request asks for."""

    def __init__(self, failure: Failure | None = None) -> None:
        self.failure = failure
        self.params: list[SamplingParams] = []

    async def submit(self, request: InferenceRequest, adapter: object = None, *_: object) -> Completion:
        params = request.params
        self.params.append(params)
        known = None if self.failure else -2.5  # a row that failed may have some of its details
        return Completion(
            request_id=request.id,
            text="ok",
            token_ids=(ord("o"), ord("k")),
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=len(request.prompt),
            log_probs=(-0.5, -1.5) if params.details else None,
            top_tokens=(((ord("o"), -0.5),), ((ord("a"), -0.1),)) if params.top_n_tokens else None,
            prompt_log_probs=(None, known)[: 1 if self.failure else 2] if params.prompt_log_probs else None,
            failure=self.failure,
        )


def line_of(tokenizer: Letters, bridge: Answering, **parameters: Any) -> dict[str, Any]:
    async def scenario() -> dict[str, Any]:
        world = World()
        adapters = AdapterDirectory(None, 30.0, clock=world.clock, sleep=world.clock.sleep)
        runner: Any = make_runner(bridge, tokenizer, adapters, max_rows=8)
        job = make_job(inputs=["in"], parameters=parameters)
        (line,) = wire.encode_rows(job, await run_rows(runner, job), base_model="m").splitlines()
        return json.loads(line)

    return asyncio.run(scenario())


def test_prompt_and_alternatives_are_spelled_out_away_from_the_event_loop():
    tokenizer = Letters()
    line = line_of(tokenizer, Answering(), decoder_input_details=True, top_n_tokens=1)
    assert line["details"] == {
        "finish_reason": "length",
        "generated_tokens": 2,
        "inputs": "in",
        "prefill": [
            {"id": ord("i"), "text": "i", "log_prob": None},
            {"id": ord("n"), "text": "n", "log_prob": -2.5},
        ],
        "tokens": [
            {"id": ord("o"), "text": "o", "log_prob": -0.5},
            {"id": ord("k"), "text": "k", "log_prob": -1.5},
        ],
        "top_tokens": [
            [{"id": ord("o"), "text": "o", "log_prob": -0.5}],
            [{"id": ord("a"), "text": "a", "log_prob": -0.1}],
        ],
    }
    assert threading.get_ident() not in tokenizer.threads


def test_decoder_input_details_bring_details_even_where_those_are_refused():
    bridge = Answering()
    line = line_of(Letters(), bridge, details=False, decoder_input_details=True)
    assert list(line["details"]) == ["finish_reason", "generated_tokens", "inputs", "prefill", "tokens"]
    assert [(own.details, own.prompt_log_probs) for own in bridge.params] == [(True, True)]


def test_details_alone_have_neither():
    line = line_of(Letters(), Answering(), details=True)
    assert list(line["details"]) == ["finish_reason", "generated_tokens", "inputs", "tokens"]


def test_nothing_is_spelled_out_for_nobody():
    tokenizer = Letters()
    assert "details" not in line_of(tokenizer, Answering())
    assert not tokenizer.threads


def test_a_row_that_failed_half_way_is_an_error_without_details():
    failed = Answering(Failure("oom", "no memory", retryable=True))
    line = line_of(Letters(), failed, decoder_input_details=True, top_n_tokens=1)
    assert line["error"]["code"] == "oom"
    assert "details" not in line


def test_rows_that_are_closed_leave_no_threads():
    async def scenario() -> None:
        world, before = World(), set(threading.enumerate())
        adapters = AdapterDirectory(None, 30.0, clock=world.clock, sleep=world.clock.sleep)
        runner: Any = make_runner(Answering(), Letters(), adapters)
        await run_rows(runner, make_job(inputs=["in"]))
        await runner.answer("call", [Row(index=0, id="0", text="in")])
        fresh = [one for one in threading.enumerate() if one not in before]
        assert {one.name.partition("_")[0] for one in fresh} == {"encoder", "interactive"}
        runner.close()
        for one in fresh:
            await asyncio.to_thread(one.join, 10)
        assert not any(one.is_alive() for one in fresh)

    asyncio.run(scenario())
