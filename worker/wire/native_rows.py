"""A row in this project's own format: text, or `{"id", "input" or "messages", "adapter", "parameters"}`."""

from collections.abc import Mapping
from typing import Any

from worker.errors import InvalidLine, InvalidParameters
from worker.jobs import ChatMessage, Raw, Row, Task
from worker.wire.checks import kind, show, unknown
from worker.wire.draft import Draft
from worker.wire.parameters import read_parameters, read_score_parameters
from worker.wire.prompts import read_messages, read_token_ids

FIELDS = frozenset({"id", "input", "inputs", "messages", "target", "adapter", "parameters"})

_INPUTS = ("input", "inputs", "messages")

Content = str | tuple[int, ...] | tuple[ChatMessage, ...]


def read_native(draft: Draft, item: object) -> Row:
    """Read one row; raises RowError. Its own `parameters` win, name by name, over those of the job."""
    fields = _fields(item)
    draft.read_id(fields.get("id"), "id")
    draft.read_adapter(fields.get("adapter", draft.given.adapter))
    if draft.given.keeps_raw and draft.given.task is Task.GENERATE:
        draft.raw = Raw(fields, draft.given.parameters)
    prompt = _prompt(fields)
    scored = draft.given.task is Task.SCORE
    if scored:
        prompt["target"] = _target(fields.get("target"), prompt)
    elif fields.get("target") is not None:
        raise InvalidLine("the row has a target, which is for jobs of task score")
    read = read_score_parameters if scored else read_parameters
    said = {**_parameters(draft.given.parameters), **_parameters(fields.get("parameters"))}
    return draft.done(**prompt, params=read(said), said=said)


def _fields(item: object) -> dict[str, Any]:
    if isinstance(item, str):
        return {"input": item}
    if not isinstance(item, dict):
        raise InvalidLine(f"the row is {kind(item)}; it must be text or an object")
    return item


def _prompt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The one of text, tokens and messages that is there, by its name in Row."""
    stranger = unknown(fields, FIELDS)
    if stranger is not None:
        raise InvalidLine(f"the row's field {stranger}")
    given = [name for name in _INPUTS if fields.get(name) is not None]
    if len(given) != 1:
        raise InvalidLine(
            f"the row has {' and '.join(given) or 'no input'}; it must have one of input, messages"
        )
    value = fields[given[0]]
    if given[0] == "messages":
        return {"messages": read_messages(value)}
    if isinstance(value, str):
        return {"text": value}
    tokens = read_token_ids(value, given[0])
    if tokens is None:
        raise InvalidLine(f"the row's {given[0]} is {kind(value)}; it must be text or a list of token ids")
    return {"tokens": tokens}


def _target(value: object, prompt: Mapping[str, Any]) -> str | tuple[int, ...] | None:
    """What is scored after the prompt; of the prompt's kind, so that it is clear where it begins."""
    if value is None:
        if "messages" in prompt:
            raise InvalidLine("the row has messages and no target; what is scored after messages is a target")
        return None
    if "tokens" in prompt:
        tokens = read_token_ids(value, "target")
        if tokens is None:
            raise InvalidLine(f"the row's target is {kind(value)}; it must be token ids, as its input is")
        return tokens
    if not isinstance(value, str):
        raise InvalidLine(f"the row's target is {kind(value)}; it must be text, as its input is")
    return value


def _parameters(value: object) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InvalidParameters(f"the row's parameters is {show(value)}; it must be an object")
    return value or {}
