"""A row through a workflow: what each call is asked, and what is told of all of them."""

import asyncio
import json

import pytest
from msgspec.structs import replace

from tests.glue.support import echo
from worker.errors import InvalidMessage, ModelNotFound, RowFailed
from worker.jobs import ChatMessage, Delivery, Part, Raw, Row, RowResult, SamplingParams, Source, Task
from worker.wire import decode
from worker.wire.checks import failure_of
from worker.wire.source import encode_part
from worker.workflows.chain import no_workflow, run_chain
from worker.workflows.definition import Workflow, read_workflow


def workflow(steps: dict[str, object]) -> Workflow:
    adapters = {key: {"model": "m", "src": f"/{key}"} for key in ("a", "b")}
    said = {"name": "w", "models": {"m": "x"}, "configs": {"adapters": adapters}, "workflow": steps}
    return read_workflow(json.dumps(said).encode())


class Model:
    """Says what it is asked, between the names of its adapter."""

    def __init__(self, bad: str = "") -> None:
        self.asked: list[Row] = []
        self._bad = bad

    async def __call__(self, row: Row) -> RowResult:
        self.asked.append(row)
        if row.adapter == self._bad:
            return RowResult(row=row, prompt_tokens=5, failure=failure_of(RowFailed("no")))
        text = f"{row.adapter}({row.text or 'chat'})"
        return RowResult(row=row, text=text, prompt_tokens=3, completion_tokens=2, adapter_version="v")


def run(steps: dict[str, object], row: Row, bad: str = "") -> tuple[RowResult, Model]:
    model = Model(bad)
    return asyncio.run(run_chain(workflow(steps), row, model)), model


CHAIN = {"first": ["adapter", "a", "in"], "out": ["adapter", "b", ["m", "first"]]}


def test_formatters_are_asked_by_each_call_and_a_row_may_need_the_first_one_to_be_read():
    unread = failure_of(RowFailed("no input"))
    raw = Raw({"question": "hi", "parameters": {"seed": 1}, "id": "x"}, {"details": True})
    row = Row(index=0, id="x", workflow="w", raw=raw, failure=unread)
    params = SamplingParams(max_new_tokens=5)
    asked = []

    async def model(step):
        asked.append(step)
        return RowResult(row=replace(step, failure=None, params=params), text=f"to {step.adapter}")

    result = asyncio.run(run_chain(workflow(CHAIN), row, model))
    first, second, third = asked
    assert (first.raw, first.failure) == (raw, unread)
    assert second.raw == Raw({"inputs": "to w.a", "parameters": {"seed": 1}, "id": "x"}, {"details": True})
    assert (second.text, second.failure, second.params) == ("to w.a", None, params)
    assert third.raw.item["inputs"] == "to None"
    assert result.text == "to w.b"


def test_each_call_is_asked_what_the_one_before_said():
    params = SamplingParams(max_new_tokens=7, details=True)
    result, model = run(CHAIN, Row(index=4, id="x", text="hi", workflow="w", params=params))
    assert result.text == "w.b(None(w.a(hi)))"
    assert (result.prompt_tokens, result.completion_tokens) == (9, 6)
    assert (result.row.index, result.row.id, result.row.adapter, result.adapter_version) == (
        4,
        "x",
        "w.b",
        "v",
    )
    assert {(row.workflow, row.params, row.index) for row in model.asked} == {(None, params, 4)}


def test_the_first_call_is_given_whatever_the_row_has():
    messages = (ChatMessage("user", "hi"),)
    for given in ({"messages": messages}, {"tokens": (1, 2)}):
        _, model = run(CHAIN, Row(index=0, id="0", workflow="w", **given))
        assert [(row.messages, row.tokens) for row in model.asked[1:]] == [(None, None)] * 2
        first = model.asked[0]
        assert given in ({"messages": first.messages}, {"tokens": first.tokens})


def test_a_value_may_be_used_twice_and_is_computed_once():
    steps = {"x": ["m", "in"], "y": ["adapter", "a", "x"], "out": ["adapter", "b", "y"], "z": ["m", "x"]}
    result, model = run(steps, Row(index=0, id="0", text="q", workflow="w"))
    assert result.text == "w.b(w.a(None(q)))"
    assert len(model.asked) == 3


def test_the_first_call_that_fails_ends_it():
    result, model = run(CHAIN, Row(index=0, id="0", text="q", workflow="w"))
    assert result.failure is None
    result, model = run(CHAIN, Row(index=0, id="0", text="q", workflow="w"), bad="w.a")
    assert result.failure is not None
    assert result.failure.message.startswith("first of workflow w: ")
    assert (len(model.asked), result.row.adapter, result.prompt_tokens) == (1, "w.a", 5)


def test_a_score_is_of_one_call():
    row = Row(index=0, id="0", text="q", task=Task.SCORE, workflow="w")
    result, model = run(CHAIN, row)
    assert result.failure is not None
    assert result.failure.code == "invalid_line"
    assert not model.asked
    _, model = run({"out": ["adapter", "a", "in"]}, row)
    assert model.asked[0].task is Task.SCORE


def test_without_workflows_no_model_has_another_name():
    with pytest.raises(ModelNotFound, match="The model w was not found"):
        no_workflow("w")
    assert echo(Row(index=0, id="0", text="a")).failure is None


# On the wire


def decoded(body: dict[str, object], attributes: dict[str, str] | None = None):
    delivery = Delivery(message_id="m", body=json.dumps(body), receipt="r", attributes=attributes or {})
    return decode(
        delivery, output_prefixes=["s3://b/o/"], max_rows=10, now=0.0, base_models={"llama", "s3://m/llama"}
    )


@pytest.mark.parametrize("name", ["llama", "s3://m/llama", None])
def test_the_base_model_by_its_own_name_is_no_workflow(name):
    job = decoded({"inputs": ["a"], "model": name, "adapters": "x"})
    assert (job.rows[0].workflow, job.rows[0].adapter) == (None, "x")


def test_a_job_s_model_is_every_row_s_workflow():
    rows = decoded({"inputs": ["a", {"input": "b"}], "model": "polite"}).rows
    assert [(row.workflow, row.adapter, row.failure) for row in rows] == [("polite", None, None)] * 2


@pytest.mark.parametrize(
    ("body", "attributes"),
    [
        ({"inputs": ["a"], "adapters": "x"}, {}),
        ({"inputs": [{"input": "a", "adapter": "x"}]}, {}),
        ({"inputs": ["a"]}, {"adapter": "x"}),
    ],
)
def test_a_row_of_a_workflow_names_no_adapter(body, attributes):
    (row,) = decoded({**body, "model": "polite"}, attributes).rows
    assert row.failure is not None
    assert row.failure.message == "the row's adapter is 'x'; the workflow polite has adapters of its own"


@pytest.mark.parametrize("value", ["", 5, ["w"]])
def test_a_model_is_a_name(value):
    with pytest.raises(InvalidMessage, match=r"model is .*; it must be the base model's name"):
        decoded({"inputs": ["a"], "model": value})


def test_a_part_of_a_large_job_has_its_workflow():
    job = decoded({"input": {"uri": "s3://b/rows.jsonl"}, "model": "polite"})
    assert job.given.workflow == "polite"
    digests = {
        decoded({"inputs": ["a"], **more}).digest for more in ({}, {"model": "polite"}, {"model": "other"})
    }
    assert len(digests) == 3
    part = replace(job, source=Source(uri="s3://b/rows.jsonl", etag="e", start=0, stop=9), part=Part(rows=1))
    assert json.loads(encode_part(part))["model"] == "polite"
