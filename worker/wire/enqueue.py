"""The sender's side: a job -> the body of its SQS message."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worker.errors import InvalidMessage
from worker.jobs import Output
from worker.wire.native import MAX_BODY_BYTES


def encode_job(
    inputs: str | Sequence[str | Mapping[str, Any]],
    *,
    id: str | None = None,  # noqa: A002 - the field's name
    adapters: str | Sequence[str | None] | None = None,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    task: str | None = None,
    ids: Sequence[str] | None = None,
    output: Output | None = None,
    ttl_seconds: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write the body that `native.decode` reads; what is None is left out.

    Raises InvalidMessage when it cannot be sent: above SQS's limit, or not writable as UTF-8 JSON. What the
    fields mean is checked by `decode` alone.
    """
    fields = {
        "version": 1,
        "id": id,
        "inputs": inputs,
        "adapters": adapters,
        "parameters": parameters,
        "task": task,
        "ids": ids,
        "output": None if output is None else {"uri": output.uri, "format": output.format},
        "ttl_seconds": ttl_seconds,
        "metadata": metadata,
    }
    try:
        said = {name: value for name, value in fields.items() if value is not None}
        body = json.dumps(said, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessage(f"the job cannot be written as JSON: {error}") from error
    if len(body) > MAX_BODY_BYTES:
        raise InvalidMessage(f"the message would have {len(body)} bytes; it may have {MAX_BODY_BYTES}")
    return body.decode()
