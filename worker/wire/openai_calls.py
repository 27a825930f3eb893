"""A call with the body of OpenAI's API, and its answer. The rows are those of a batch file."""

from collections.abc import Collection, Mapping
from typing import Any

from worker.jobs import Given, Row, RowResult
from worker.wire.draft import Draft
from worker.wire.lines import read_item
from worker.wire.openai_results import openai_answer
from worker.wire.openai_rows import CHAT, COMPLETION, URLS
from worker.wire.results import encode

_URL_OF = {shape: url for url, shape in URLS.items()}


def shape_of(body: Mapping[str, Any]) -> str | None:
    """Whether a body is a chat's or a completion's; None if it is neither."""
    if "model" not in body or "inputs" in body:
        return None
    return CHAT if "messages" in body else COMPLETION if "prompt" in body else None


def read_openai_call(
    body: Mapping[str, Any],
    shape: str,
    *,
    call_id: str,
    adapter: str | None = None,
    base_models: Collection[str] | None = None,
    workflow: str | None = None,
) -> Row:
    """The one row of it; a mistake is its `failure`. `adapter`, unless None, wins over `model`.

    With a `workflow`, `model` names that or the base model.
    """
    if workflow is not None and base_models is not None:
        base_models = {*base_models, workflow}
    item = {"custom_id": call_id, "method": "POST", "url": _URL_OF[shape], "body": body}
    given = Given(override=adapter, base_models=base_models, workflow=workflow)
    return read_item(Draft(0, call_id, given), item, "openai")


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
