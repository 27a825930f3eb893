"""A native row as the payload that an input formatter gets, and what becomes of what formatters return."""

from collections.abc import Mapping
from typing import Any

import msgspec

from worker.errors import HandlerRefusedRow
from worker.jobs import Given, Row, RowResult, Task
from worker.wire.checks import show
from worker.wire.draft import Draft
from worker.wire.native_rows import read_native
from worker.wire.results import encode

KEPT = ("id", "adapter", "adapters")
"""What a formatter may not change: it is chosen by them."""


def is_formatted(row: Row) -> bool:
    """Whether formatters are for a row: native ones that ask for text."""
    return row.origin is None and row.task is Task.GENERATE


def payload_of(row: Row) -> dict[str, Any]:
    """The row's own object, its text under `inputs` and its parameters with those of the job."""
    assert row.raw is not None
    payload = dict(row.raw.item)
    if payload.get("input") is not None and "inputs" not in payload:
        payload = {"inputs": payload.pop("input"), **payload}
    given, own = row.raw.parameters, payload.get("parameters")
    if isinstance(given, dict) and (own is None or isinstance(own, dict)):
        payload["parameters"] = {**given, **(own or {})}
    return payload


def check_kept(before: Mapping[str, Any], after: Mapping[str, Any], who: object) -> None:
    """Raise HandlerRefusedRow when a formatter changed whose row it is; it need not repeat that."""
    for name in KEPT:
        if name in after and after[name] != before.get(name):
            said = show(after[name])
            raise HandlerRefusedRow(f"The {who} changed {name} to {said}; it must stay what it was")


def read_formatted(row: Row, payload: Mapping[str, Any]) -> Row:
    """The row with what a formatted payload asks for. Raises RowError as for any row."""
    item = {name: value for name, value in payload.items() if name not in KEPT}
    read = read_native(Draft(row.index, row.id, Given()), item)
    return msgspec.structs.replace(
        row,
        text=read.text,
        tokens=read.tokens,
        messages=read.messages,
        params=read.params,
        failure=None,
        raw=None,
    )


def formatted(result: RowResult, response: dict[str, Any]) -> RowResult:
    """The result as an output formatter wants it. Without `generated_text`, its text is all of it as JSON."""
    text = response.get("generated_text")
    return msgspec.structs.replace(
        result, text=text if isinstance(text, str) else encode(response).decode(), response=response
    )
