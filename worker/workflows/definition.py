"""workflow.json -> which adapter answers what, in which order. DJL Serving's format.

    {"name": "polite", "version": "0.1",
     "models": {"m": "s3://bucket/llama/"},
     "configs": {"adapters": {"a": {"model": "m", "src": "s3://bucket/polite/", "options": {"pin": true}}}},
     "workflow": {"draft": ["m", "in"], "out": ["adapter", "a", "draft"]}}

A value of `workflow` is a list of a function and its arguments: `adapter` takes the key of one in
`configs.adapters` and a value, a model by its key takes a value. A value is `in`, the name of another value,
or such a list itself. `out` is the answer. Of an adapter's options `preload` and `pin` mean what they do when
one is registered. In every text `{model_dir}` is the folder that the file is in.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from adapters_sync.layout import is_adapter_name
from worker.errors import InvalidWorkflow
from worker.wire.checks import BOOLEANS, show, unknown

IN, OUT, ADAPTER = "in", "out", "adapter"
MAX_BYTES = 1 << 20
MAX_CALLS = 32
"""The model is asked so often for one row at most."""
TEMPLATES: Mapping[str, tuple[str, ...]] = {"adapter": ("adapter", "url", "model")}
"""Names of the templates, and what each is filled with."""

_HERE = "{model_dir}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ModelSource(msgspec.Struct, frozen=True):
    """A model is its place and its version; what a workflow calls it is of no account."""

    url: str
    version: str = ""


class AdapterSource(msgspec.Struct, frozen=True):
    """An adapter of a workflow: `model` is a key of its models."""

    model: str
    src: str
    options: dict[str, str] = {}
    preload: bool = True
    pin: bool = False


class WorkflowCall(msgspec.Struct, frozen=True):
    """The model is asked for `value`, given the text of `argument`."""

    value: str
    argument: str
    adapter: str | None
    """Key of the workflow's adapters; None is the base model."""


class Workflow(msgspec.Struct, frozen=True):
    name: str
    version: str
    models: dict[str, ModelSource]
    adapters: dict[str, AdapterSource]
    calls: tuple[WorkflowCall, ...]
    """Those that `out` needs, each after what it needs; the last one's value is `out`."""
    bare: bool = False
    """Whether its adapters are known by their keys alone, as a custom handler is told of them."""

    def adapter_name(self, key: str) -> str:
        """What the adapter of this key is registered as: other workflows may have the same key."""
        return key if self.bare else f"{self.name}.{key}"


def read_workflow(content: bytes, folder: str | None = None) -> Workflow:
    """Read a workflow.json, which is in `folder`, unless nobody knows where.

    Raises InvalidWorkflow, which names the field, the value and what it must be.
    """
    if len(content) > MAX_BYTES:
        raise InvalidWorkflow(f"it has {len(content)} bytes; it may have {MAX_BYTES}")
    try:
        body = msgspec.json.decode(content)
        body = body if folder is None else _filled(body, folder)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidWorkflow(f"it is not JSON: {error}") from error
    body = _object(body, "the workflow", ("name", "version", "models", "configs", "workflow"))
    name, version = body.get("name"), body.get("version", "")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidWorkflow(f"name is {show(name)}; it must match [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}")
    if not isinstance(version, str):
        raise InvalidWorkflow(f"version is {show(version)}; it must be text")
    models = {key: _model(key, one) for key, one in _object(body.get("models"), "models").items()}
    if not models:
        raise InvalidWorkflow("models is empty; it must name one model at least")
    configs = _object(body.get("configs") or {}, "configs", ("adapters",))
    found = _object(configs.get("adapters") or {}, "configs.adapters")
    adapters = {key: _adapter(name, key, one, models) for key, one in found.items()}
    values = _object(body.get("workflow"), "workflow")
    try:
        calls = tuple(_Order(values, models, adapters).calls())
    except RecursionError as error:
        raise InvalidWorkflow("workflow is nested too deeply") from error
    return Workflow(name, version, models, adapters, calls)


def from_template(template: str, given: Mapping[str, str]) -> bytes:
    """The workflow.json that DJL's template of this name makes of `given`. Raises InvalidWorkflow."""
    names = TEMPLATES.get(template)
    if names is None:
        raise InvalidWorkflow(f"template is {show(template)}; it must be one of {', '.join(TEMPLATES)}")
    stranger = unknown(given, names)
    if stranger is not None:
        raise InvalidWorkflow(f"parameter {stranger}")
    missing = [name for name in names if not given.get(name)]
    if missing:
        raise InvalidWorkflow(f"parameter {missing[0]} is required by the template {template}")
    adapter = given["adapter"]
    workflow = {
        "name": adapter,
        "version": "0.1",
        "models": {"m": given["model"]},
        "configs": {"adapters": {adapter: {"model": "m", "src": given["url"]}}},
        "workflow": {OUT: [ADAPTER, adapter, IN]},
    }
    return json.dumps(workflow).encode()


class _Order:
    """What is to be asked, in an order in which everything is there when it is needed."""

    def __init__(
        self, values: dict[str, Any], models: Mapping[str, ModelSource], adapters: Mapping[str, AdapterSource]
    ) -> None:
        self._values = values
        self._models = models
        self._adapters = adapters
        self._calls: dict[str, WorkflowCall] = {}
        self._under_way: list[str] = []

    def calls(self) -> Iterator[WorkflowCall]:
        if OUT not in self._values:
            raise InvalidWorkflow(f"workflow.{OUT} is missing; it is the answer")
        if IN in self._values:
            raise InvalidWorkflow(f"workflow.{IN} is defined; it is what the workflow is given")
        for name in self._values:  # also those that nobody needs: a mistake is told
            self._define(name)
        needed, left = set[str](), [OUT]
        while left:
            name = left.pop()
            if name != IN and name not in needed:
                needed.add(name)
                left.append(self._calls[name].argument)
        if len(needed) > MAX_CALLS:
            raise InvalidWorkflow(
                f"workflow asks the model {len(needed)} times; it may do so {MAX_CALLS} times"
            )
        return (call for name, call in self._calls.items() if name in needed)

    def _define(self, name: str) -> None:
        if name == IN or name in self._calls:
            return
        if name in self._under_way:
            circle = " -> ".join([*self._under_way[self._under_way.index(name) :], name])
            raise InvalidWorkflow(f"workflow.{name} needs itself: {circle}")
        if name not in self._values:
            raise InvalidWorkflow(f"workflow.{self._under_way[-1]} needs {show(name)}, which is not defined")
        self._under_way.append(name)
        self._apply(name, self._values[name])
        self._under_way.pop()

    def _apply(self, name: str, said: object) -> None:
        """Have `name` defined by the function that `said` applies, after its argument."""
        where = f"workflow.{self._under_way[-1]}"
        if not isinstance(said, list) or not said or not isinstance(said[0], str):
            raise InvalidWorkflow(f"{where} is {show(said)}; it must be a list of a function and arguments")
        function, *arguments = said
        if function == ADAPTER:
            if len(arguments) != 2:
                raise InvalidWorkflow(
                    f"{where} gives {ADAPTER} {len(arguments)} arguments; it takes two: adapter and value"
                )
            adapter = arguments[0]
            if not isinstance(adapter, str) or adapter not in self._adapters:
                known = ", ".join(self._adapters) or "none"
                raise InvalidWorkflow(
                    f"{where} names the adapter {show(adapter)}; configs.adapters has {known}"
                )
        elif function in self._models:
            adapter = None
            if len(arguments) != 1:
                raise InvalidWorkflow(
                    f"{where} gives {function} {len(arguments)} arguments; it takes one value"
                )
        else:
            known = ", ".join([ADAPTER, *self._models])
            raise InvalidWorkflow(f"{where} applies {show(function)}, which is none of {known}")
        self._calls[name] = WorkflowCall(name, self._argument(name, arguments[-1]), adapter)
        self._calls[name] = self._calls.pop(name)  # behind what it needs

    def _argument(self, name: str, said: object) -> str:
        if isinstance(said, str):
            self._define(said)
            return said
        inner = f"{name}()"
        if inner in self._values:
            raise InvalidWorkflow(f"workflow.{inner} has a name that is taken")
        self._apply(inner, said)
        return inner


def _filled(value: Any, folder: str) -> Any:
    """JSON with the folder's name wherever a text asks for it."""
    if isinstance(value, str):
        return value.replace(_HERE, folder)
    if isinstance(value, list):
        return [_filled(one, folder) for one in value]
    if isinstance(value, dict):
        return {key: _filled(one, folder) for key, one in value.items()}
    return value


def _object(value: object, what: str, fields: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidWorkflow(f"{what} is {show(value)}; it must be an object")
    stranger = None if fields is None else unknown(value, fields)
    if stranger is not None:
        raise InvalidWorkflow(f"{what} has the field {stranger}")
    return value


def _model(key: str, said: object) -> ModelSource:
    if key in {ADAPTER, IN, OUT}:
        raise InvalidWorkflow(f"models has the key {key}, which means something else in a workflow")
    if isinstance(said, str):
        said = {"url": said}
    # DJL Serving says modelUrl; it takes an id, and goes by the key.
    found = _object(said, f"models.{key}", ("url", "modelUrl", "version", "id"))
    if "url" in found and "modelUrl" in found:
        raise InvalidWorkflow(f"models.{key} has url and modelUrl; it must have one of them")
    place = "modelUrl" if "modelUrl" in found else "url"
    for name in (place, "version", "id"):
        if not isinstance(found.get(name, ""), str) or (name == place and not found.get(name)):
            raise InvalidWorkflow(f"models.{key}.{name} is {show(found.get(name))}; it must be text")
    return ModelSource(found[place], found.get("version", ""))


def _adapter(workflow: str, key: str, said: object, models: Mapping[str, ModelSource]) -> AdapterSource:
    where = f"configs.adapters.{key}"
    if not is_adapter_name(f"{workflow}.{key}"):
        raise InvalidWorkflow(f"{where}: {show(key)} must consist of A-Z a-z 0-9 . _ - and be short")
    found = _object(said, where, ("model", "src", "options"))
    model, src, options = found.get("model"), found.get("src"), found.get("options") or {}
    if not isinstance(model, str) or model not in models:
        raise InvalidWorkflow(f"{where}.model is {show(model)}; it must be one of {', '.join(models)}")
    if not isinstance(src, str) or not src:
        raise InvalidWorkflow(f"{where}.src is {show(src)}; it must be a folder or s3://bucket/prefix/")
    if not isinstance(options, dict) or any(isinstance(one, list | dict | None) for one in options.values()):
        raise InvalidWorkflow(f"{where}.options is {show(options)}; it must be an object of texts")
    texts = {name: one if isinstance(one, str) else json.dumps(one) for name, one in options.items()}
    flags = {}
    for name in {"preload", "pin"} & texts.keys():
        text = texts.pop(name)
        if text.lower() not in BOOLEANS:
            raise InvalidWorkflow(f"{where}.options.{name} is {show(text)}; it must be true or false")
        flags[name] = BOOLEANS[text.lower()]
    return AdapterSource(model, src, texts, **flags)
