"""Messages that can never become a job, one of every kind, and what is owed to each."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

MAX_ROWS = 50


class Malformed(NamedTuple):
    body: str
    leaves: str
    """`letter`: a dead letter named by the message's id; `manifest`: a failed manifest under `job_id`."""
    job_id: str | None = None
    """None: the message's own id."""
    attributes: Mapping[str, str] = MappingProxyType({})
    says: str = ""
    """A word of the reason."""


def _job(**fields: Any) -> str:
    return json.dumps({"inputs": "x"} | fields)


MALFORMED = {
    "not-json": Malformed("no json at all", "letter", says="not JSON"),
    "blank": Malformed(" ", "letter", says="not JSON"),
    "truncated": Malformed('{"inputs": ["x"', "letter", says="not JSON"),
    "nan": Malformed('{"inputs": NaN}', "letter", says="not JSON"),
    "half-a-surrogate": Malformed('{"inputs": "\\ud800"}', "letter"),
    "list": Malformed('["x"]', "letter", says="not an object"),
    "null": Malformed("null", "letter", says="not an object"),
    "deep": Malformed("[" * 100_000, "letter"),
    "no-inputs": Malformed("{}", "manifest", says="inputs is absent"),
    "no-rows": Malformed('{"inputs": []}', "manifest", says="0 rows"),
    "inputs-number": Malformed('{"inputs": 5}', "manifest", says="a number"),
    "too-many-rows": Malformed(_job(inputs=["x"] * (MAX_ROWS + 1)), "manifest", says=f"1 to {MAX_ROWS}"),
    "unknown-field": Malformed(_job(id="m-unknown", adaptor="a"), "manifest", "m-unknown", says="adapters"),
    "version": Malformed(_job(id="m-version", version=2), "manifest", "m-version", says="version is 2"),
    "task": Malformed(_job(id="m-task", task="sing"), "manifest", "m-task", says="generate or score"),
    "score": Malformed(
        _job(id="m-score", task="score", output={"uri": "s3://out/jobs/", "format": "openai"}),
        "manifest",
        "m-score",
        says="no place for scores",
    ),
    "by-reference": Malformed(_job(id="m-ref", input={"uri": "s3://b/k"}), "manifest", "m-ref", says="input"),
    "id-with-slash": Malformed(_job(id="../x"), "manifest", says="id is"),
    "id-dots": Malformed(_job(id=".."), "manifest", says="id is"),
    "id-number": Malformed(_job(id=7), "manifest", says="id is 7"),
    "id-too-long": Malformed(_job(id="i" * 129), "manifest", says="128"),
    "output-text": Malformed(_job(output="s3://out/jobs/"), "letter", says="output"),
    "output-elsewhere": Malformed(_job(output={"uri": "s3://elsewhere/x/"}), "letter", says="not under"),
    "output-dots": Malformed(_job(output={"uri": "s3://out/jobs/../x/"}), "letter", says=".."),
    "format": Malformed(
        _job(output={"uri": "s3://out/jobs/", "format": "csv"}), "letter", says="must be native, openai"
    ),
    "adapters-length": Malformed(_job(id="m-adapters", adapters=["a", "b"]), "manifest", "m-adapters"),
    "parameters-kind": Malformed(
        _job(id="m-params", parameters=3), "manifest", "m-params", says="parameters"
    ),
    "ids-repeated": Malformed(
        _job(id="m-ids", inputs=["x", "y"], ids=["1", "1"]), "manifest", "m-ids", says="unique"
    ),
    "ttl": Malformed(_job(id="m-ttl", ttl_seconds=0), "manifest", "m-ttl", says="ttl_seconds is 0"),
    "metadata": Malformed(_job(id="m-meta", metadata={"a": 1}), "manifest", "m-meta", says="metadata"),
    "two-adapters": Malformed(
        _job(id="m-two"), "manifest", "m-two", {"adapter": "a", "Adapter": "b"}, says="twice"
    ),
}
