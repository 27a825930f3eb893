"""A call with the body of OpenAI's API, and its answer. The rows are those of a batch file."""

from collections.abc import Collection, Mapping
from typing import Any

from worker.errors import InvalidLine, InvalidMessage
from worker.jobs import Given, Row, RowResult
from worker.wire.calls import read_stream
from worker.wire.checks import show
from worker.wire.draft import Draft
from worker.wire.lines import read_item
from worker.wire.openai_results import openai_answer
from worker.wire.openai_rows import CHAT, COMPLETION, URLS
from worker.wire.results import encode

_URL_OF = {shape: url for url, shape in URLS.items()}


def shape_of(body: Mapping[str, Any]) -> str | None:
    """Whether a body is a chat's or a completion's; None if it is neither."""
    if "inputs" in body:
        return None
    return CHAT if "messages" in body else COMPLETION if "prompt" in body else None


def read_openai_call(
    body: Mapping[str, Any],
    shape: str,
    *,
    call_id: str,
    adapter: str | None = None,
    base_models: Collection[str],
    workflow: str | None = None,
) -> Row:
    """The one row of it; a mistake is its `failure`.

    The adapter is what `model` names, or as in DJL Serving's chats `adapters`, one name; `adapter`, unless
    None, wins over both. `base_models` are the names of the base model, the first of which is meant where
    there is no `model`. With a `workflow`, `model` names that or the base model.
    """
    known = base_models if workflow is None else [workflow, *base_models]
    said = dict(body)
    adapters = said.pop("adapters", None)
    if said.get("model") is None:
        said["model"] = next(iter(known))
    draft = Draft(0, call_id, Given(adapter=adapters, override=adapter, base_models=known, workflow=workflow))
    if adapters is not None and said["model"] not in [*known, adapters]:
        return draft.failed(
            InvalidLine(
                f"model is {show(said['model'])} and adapters {show(adapters)}; they name two adapters"
            )
        )
    item = {"custom_id": call_id, "method": "POST", "url": _URL_OF[shape], "body": said}
    return read_item(draft, item, "openai")


def read_streaming(body: Mapping[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """The body without what it says of streaming, whether it wants that, and whether with the usage.

    Raises InvalidMessage.
    """
    rest = {name: value for name, value in body.items() if name not in {"stream", "stream_options"}}
    streams, options = read_stream(body), body.get("stream_options")
    if options is None:
        return rest, streams, False
    if not streams or not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise InvalidMessage("stream_options must be an object with include_usage, where stream is true")
    with_usage = options.get("include_usage")
    if with_usage is not None and not isinstance(with_usage, bool):
        raise InvalidMessage(f"include_usage is {show(with_usage)}; it must be true or false")
    return rest, streams, bool(with_usage)


def refuse_to_stream(row: Row) -> None:
    """Raise InvalidMessage for a row that asks for what is not streamed."""
    asked = {"logprobs": row.params.details, "echo": row.params.return_full_text}
    for name, is_there in asked.items():
        if is_there:
            raise InvalidMessage(f"{name} is there, and stream is true; one of them can be served")


def write_openai_answer(result: RowResult, *, call_id: str, created: int, base_model: str) -> bytes:
    """The body of the answer to a row that did not fail."""
    return encode(openai_answer(result, number=call_id, created=created, base_model=base_model)) + b"\n"


def write_models(base_model: str, adapters: Collection[str]) -> dict[str, Any]:
    """What `GET /v1/models` answers: the base model, and each adapter as a model whose parent that is."""
    base = {"id": base_model, "object": "model", "created": 0, "owned_by": "loramill"}
    return {
        "object": "list",
        "data": [base, *(base | {"id": name, "parent": base_model} for name in adapters)],
    }
