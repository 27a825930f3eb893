"""workflow.json as DJL writes it, and what is wrong with others."""

import json
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import InvalidWorkflow
from worker.workflows.definition import (
    MAX_BYTES,
    MAX_CALLS,
    ModelSource,
    WorkflowCall,
    from_template,
    read_workflow,
)

DJL = {
    "name": "adapter1",
    "version": "0.1",
    "models": {"m": "src/test/resources/adaptecho"},
    "configs": {"adapters": {"a1": {"model": "m", "src": "url1", "options": {"echooption": "weo"}}}},
    "workflow": {"out": ["adapter", "a1", "in"]},
}


def read(**changes: Any) -> Any:
    return read_workflow(encoded(**changes))


def encoded(**changes: Any) -> bytes:
    said = {name: value for name, value in {**DJL, **changes}.items() if value is not ...}
    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        return json.dumps(said).encode()
    finally:
        sys.setrecursionlimit(depth)


def calls(workflow: object) -> list[tuple[str, str, str | None]]:
    return [(call.value, call.argument, call.adapter) for call in read(workflow=workflow).calls]


def test_djl_s_own_example():
    workflow = read()
    assert (workflow.name, workflow.version) == ("adapter1", "0.1")
    assert workflow.models == {"m": ModelSource("src/test/resources/adaptecho")}
    assert workflow.adapters["a1"].options == {"echooption": "weo"}
    assert workflow.calls == (WorkflowCall("out", "in", "a1"),)
    assert workflow.adapter_name("a1") == "adapter1.a1"


def test_a_model_may_have_a_version():
    assert read(models={"m": {"url": "s3://b/m/", "version": "2"}}).models["m"] == ModelSource(
        "s3://b/m/", "2"
    )


def test_calls_come_after_what_they_need_however_they_are_written():
    chained = [("draft", "in", None), ("better", "draft", "a1"), ("out", "better", None)]
    assert (
        calls({"out": ["m", "better"], "better": ["adapter", "a1", "draft"], "draft": ["m", "in"]}) == chained
    )


def test_calls_may_stand_in_each_other():
    assert calls({"out": ["m", ["adapter", "a1", ["m", "in"]]]}) == [
        ("out()()", "in", None),
        ("out()", "out()()", "a1"),
        ("out", "out()", None),
    ]


def test_a_model_is_where_djl_serving_says_it_is():
    said = {"id": "another", "modelUrl": "s3://b/m/", "version": "2"}
    assert read(models={"m": said}).models["m"] == ModelSource(url="s3://b/m/", version="2")


@pytest.mark.parametrize(
    ("options", "preload", "pin", "left"),
    [
        ({}, True, False, {}),
        ({"preload": False, "pin": "TRUE", "k": 1.5, "on": True}, False, True, {"k": "1.5", "on": "true"}),
        ({"preload": "no", "pin": 1}, False, True, {}),
    ],
)
def test_options_of_an_adapter_are_texts_and_say_whether_it_stays_in_memory(options, preload, pin, left):
    source = {"model": "m", "src": "x", "options": options}
    found = read(configs={"adapters": {"a1": source}}).adapters["a1"]
    assert (found.preload, found.pin, found.options) == (preload, pin, left)


def test_the_folder_of_the_file_has_a_name_in_it():
    source = {"model": "m", "src": "{model_dir}/{a}", "options": {"o": "{model_dir}"}}
    said = {
        "name": "w",
        "models": {"m": "{model_dir}/base"},
        "configs": {"adapters": {"a": source}},
        "workflow": {"out": ["adapter", "a", "in"]},
    }
    found = read_workflow(json.dumps(said).encode(), '/srv/"x"')
    assert found.models["m"].url == '/srv/"x"/base'
    assert (found.adapters["a"].src, found.adapters["a"].options) == ('/srv/"x"/{a}', {"o": '/srv/"x"'})
    with pytest.raises(InvalidWorkflow, match="it is not JSON"):
        read_workflow(b"[" * 100_000 + b"]" * 100_000, "/srv")


def test_what_out_does_not_need_is_read_and_not_asked():
    assert calls({"out": ["m", "in"], "other": ["adapter", "a1", "in"]}) == [("out", "in", None)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ...}, "name is null"),
        ({"name": "../x"}, "name is '../x'; it must match"),
        ({"version": 1}, "version is 1; it must be text"),
        ({"model": {}}, "the workflow has the field 'model' is unknown; the nearest known name is models"),
        ({"functions": {"f": "com.x.F"}}, "the workflow has the field 'functions' is unknown"),
        ({"models": {}}, "models is empty"),
        ({"models": {"adapter": "x"}}, "models has the key adapter, which means something else"),
        ({"models": {"m": 5}}, "models.m is 5; it must be an object"),
        ({"models": {"m": {"version": "1"}}}, "models.m.url is null; it must be text"),
        ({"models": {"m": {"url": "x", "engine": "y"}}}, "models.m has the field 'engine' is unknown"),
        ({"configs": {"adapter": {}}}, "configs has the field 'adapter' is unknown"),
        ({"configs": {"adapters": {"a": {"model": "n", "src": "x"}}}}, "configs.adapters.a.model is 'n'"),
        ({"configs": {"adapters": {"a": {"model": "m"}}}}, "configs.adapters.a.src is null"),
        ({"configs": {"adapters": {"a/b": {"model": "m", "src": "x"}}}}, "configs.adapters.a/b: 'a/b' must"),
        (
            {"configs": {"adapters": {"a": {"model": "m", "src": "x", "options": {"k": [1]}}}}},
            "configs.adapters.a.options is an object; it must be an object of texts",
        ),
        (
            {"configs": {"adapters": {"a": {"model": "m", "src": "x", "options": {"pin": "maybe"}}}}},
            "configs.adapters.a.options.pin is 'maybe'; it must be true or false",
        ),
        ({"models": {"m": {"url": "x", "modelUrl": "x"}}}, "models.m has url and modelUrl; it must have one"),
        ({"models": {"m": {"modelUrl": 5}}}, "models.m.modelUrl is 5; it must be text"),
        ({"models": {"m": {"url": "x", "id": 5}}}, "models.m.id is 5; it must be text"),
        ({"workflow": ...}, "workflow is null"),
        ({"workflow": {}}, "workflow.out is missing"),
        ({"workflow": {"out": ["m", "in"], "in": ["m", "in"]}}, "workflow.in is defined"),
        ({"workflow": {"out": "in"}}, "workflow.out is 'in'; it must be a list of a function"),
        ({"workflow": {"out": ["adapter", "a1"]}}, "workflow.out gives adapter 1 arguments; it takes two"),
        ({"workflow": {"out": ["adapter", "a1", "in", "in"]}}, "gives adapter 3 arguments; it takes two"),
        ({"workflow": {"out": ["adapter", "a2", "in"]}}, "names the adapter 'a2'; configs.adapters has a1"),
        ({"workflow": {"out": ["m"]}}, "workflow.out gives m 0 arguments; it takes one value"),
        ({"workflow": {"out": ["n", "in"]}}, "workflow.out applies 'n', which is none of adapter, m"),
        ({"workflow": {"out": ["m", "x"]}}, "workflow.out needs 'x', which is not defined"),
        ({"workflow": {"out": ["m", 5]}}, "workflow.out is 5; it must be a list"),
        ({"workflow": {"out": ["m", "x"], "x": ["m", "out"]}}, "needs itself: out -> x -> out"),
        ({"workflow": {"out": ["m", "in"], "x": ["m", "x"]}}, "workflow.x needs itself: x -> x"),
        ({"workflow": {"out": ["m", ["m", "in"]], "out()": ["m", "in"]}}, "has a name that is taken"),
    ],
)
def test_mistakes_are_told_with_their_place(changes, message):
    with pytest.raises(InvalidWorkflow) as refused:
        read(**changes)
    assert message in str(refused.value)


def test_a_workflow_asks_the_model_so_often_and_no_more():
    def chain(length: int) -> dict[str, Any]:
        return {f"v{n}": ["m", f"v{n - 1}" if n else "in"] for n in range(length - 1)} | {
            "out": ["m", f"v{length - 2}"]
        }

    assert len(calls(chain(MAX_CALLS))) == MAX_CALLS
    with pytest.raises(InvalidWorkflow, match="asks the model 33 times; it may do so 32 times"):
        calls(chain(MAX_CALLS + 1))


@pytest.mark.parametrize("depth", [600, 5000])
def test_a_workflow_is_no_deeper_than_can_be_read(depth):
    value: Any = "in"
    for _ in range(depth):
        value = ["m", value]
    with pytest.raises(InvalidWorkflow):
        read_workflow(encoded(workflow={"out": value}))
    chained = {f"v{n}": ["m", f"v{n + 1}"] for n in range(depth)} | {f"v{depth}": ["m", "in"]}
    with pytest.raises(InvalidWorkflow):
        read_workflow(encoded(workflow={"out": ["m", "v0"], **chained}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (MAX_BYTES + 1)])
def test_what_is_no_workflow_at_all(content):
    with pytest.raises(InvalidWorkflow):
        read_workflow(content)


_names = st.sampled_from(["m", "in", "out", "a1", "adapter", "url", "src", "model", "x"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | _names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_names, inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*DJL, "other"]), _values))
def test_anything_is_read_or_refused(changes):
    with suppress(InvalidWorkflow):
        assert read(**changes).calls[-1].value == "out"


def test_the_template_is_djl_s_and_quotes_what_it_is_given():
    name, url, model = "n", 'u"},"x": "\\', 's3://b/"m"'
    workflow = read_workflow(from_template("adapter", {"adapter": name, "url": url, "model": model}))
    assert workflow.version == "0.1"
    assert workflow.models["m"].url == model
    assert workflow.adapters[name].src == url
    assert workflow.calls == (WorkflowCall("out", "in", name),)


@pytest.mark.parametrize(
    ("template", "given_", "message"),
    [
        ("adaptor", {}, "template is 'adaptor'; it must be one of adapter"),
        ("adapter", {"adapter": "a", "url": "u"}, "parameter model is required by the template adapter"),
        ("adapter", {"adapter": "a", "url": "", "model": "m"}, "parameter url is required"),
        ("adapter", {"adapter": "a", "url": "u", "modell": "m"}, "'modell' is unknown; the nearest"),
    ],
)
def test_mistakes_in_what_a_template_is_given(template, given_, message):
    with pytest.raises(InvalidWorkflow, match=message.replace("'", ".")):
        from_template(template, given_)
