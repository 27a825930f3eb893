"""What an HTTP request asks of S3 or SQS."""

import json
from collections.abc import Mapping
from typing import Literal, NamedTuple
from urllib.parse import parse_qsl, unquote

_SQS_TARGET = "AmazonSQS."

# What an object or a bucket is asked, by method and the first of these names in the query.
_OF_OBJECTS = {
    "GET": {"": "GetObject"},
    "HEAD": {"": "HeadObject"},
    "PUT": {"uploadId": "UploadPart", "": "PutObject"},
    "POST": {"uploads": "CreateMultipartUpload", "uploadId": "CompleteMultipartUpload", "": "PostObject"},
    "DELETE": {"uploadId": "AbortMultipartUpload", "": "DeleteObject"},
}
_OF_BUCKETS = {
    "GET": {"list-type": "ListObjectsV2", "uploads": "ListMultipartUploads", "": "ListObjects"},
    "HEAD": {"": "HeadBucket"},
    "PUT": {"": "CreateBucket"},
    "POST": {"delete": "DeleteObjects", "": "PostBucket"},
    "DELETE": {"": "DeleteBucket"},
}


class Call(NamedTuple):
    """One attempt at one call, by the names that the SDK has for it."""

    service: Literal["s3", "sqs"]
    operation: str
    target: str = ""
    """`bucket/key`, or the name of the queue."""
    conditional: bool = False
    """Whether it is to write nothing where something is."""
    invocation: str = ""
    """The same for every attempt at one call; empty where the client does not say."""
    port: int = 0
    """The client's own."""

    @property
    def is_batch(self) -> bool:
        return self.service == "sqs" and self.operation.endswith("Batch")


def read_call(method: str, path: str, headers: Mapping[str, str], body: bytes, port: int = 0) -> Call:
    """Make out a request: `path` is as it came, with its query; `headers` are matched without case."""
    invocation = headers.get("amz-sdk-invocation-id", "")
    action = _sqs_action(headers, body)
    if action is not None:
        return Call("sqs", action, _queue(path, headers, body), invocation=invocation, port=port)
    place, _, query = path.partition("?")
    bucket, _, key = unquote(place).removeprefix("/").partition("/")
    asked = dict(parse_qsl(query, keep_blank_values=True))
    names = (_OF_OBJECTS if key else _OF_BUCKETS).get(method, {})
    operation = next((names[name] for name in names if name in asked), names.get("", method))
    return Call(
        "s3",
        operation,
        f"{bucket}/{key}" if key else bucket,
        conditional="If-None-Match" in headers and method in {"PUT", "POST"},
        invocation=invocation,
        port=port,
    )


def _sqs_action(headers: Mapping[str, str], body: bytes) -> str | None:
    target = headers.get("X-Amz-Target", "")
    if target.startswith(_SQS_TARGET):
        return target.removeprefix(_SQS_TARGET)
    return _form(body).get("Action") if _is_form(headers) else None


def _queue(path: str, headers: Mapping[str, str], body: bytes) -> str:
    fields = _form(body) if _is_form(headers) else json.loads(body or b"{}")
    return str(fields.get("QueueUrl") or fields.get("QueueName") or path).rpartition("/")[2]


def _is_form(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")


def _form(body: bytes) -> dict[str, str]:
    return dict(parse_qsl(body.decode(), keep_blank_values=True))
