"""What a job's message may be wrapped in: a pointer to S3, an SNS notification, or an event of S3 itself.

Unwrapped in this order, as spec'd by their senders:

    the attribute ExtendedPayloadSize (or SQSLargePayloadSize), and a body
        ["software.amazon...PayloadS3Pointer", {"s3BucketName": ..., "s3Key": ...}]      the extended client
    {"Type": "Notification", "Message": "...", "MessageAttributes": {...}}                SNS
    {"Records": [{"eventSource": "aws:s3", "eventName": "ObjectCreated:Put", "s3": ...}]} S3; keys are encoded
    {"Service": "Amazon S3", "Event": "s3:TestEvent", ...}                                once, of S3
    {"source": "aws.s3", "detail-type": "Object Created", "detail": {...}}                EventBridge

An object that was created is a job whose rows are its lines.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_plus

import msgspec

from worker.errors import InvalidMessage
from worker.jobs import Delivery
from worker.wire.checks import show
from worker.wire.enqueue import encode_fields

POINTER_ATTRIBUTES = ("ExtendedPayloadSize", "SQSLargePayloadSize")
_CREATED = ("ObjectCreated:", "Object Created")


class Pointer(msgspec.Struct, frozen=True):
    """The body lies in S3."""

    uri: str


def find_pointer(delivery: Delivery) -> Pointer | None:
    """Where the body is, when an extended client sent it. Raises InvalidMessage when that is no place."""
    if delivery.attributes.keys().isdisjoint(POINTER_ATTRIBUTES):
        return None
    match _json(delivery.body):
        case [_, {"s3BucketName": str(bucket), "s3Key": str(key)}] if bucket and key and "/" not in bucket:
            return Pointer(f"s3://{bucket}/{key}")
    raise InvalidMessage(
        f"the message has the attribute {_pointing(delivery)}, and its body does not point to an S3 object"
    )


def with_body(delivery: Delivery, body: str) -> Delivery:
    """The message that a pointer stood for."""
    kept = {name: text for name, text in delivery.attributes.items() if name not in POINTER_ATTRIBUTES}
    return msgspec.structs.replace(delivery, body=body, attributes=kept)


def unwrap(delivery: Delivery, output_prefixes: Sequence[str] = ()) -> list[Delivery]:
    """The native messages in one; none, where it speaks of nothing that is a job.

    Objects under `output_prefixes` are no jobs: they may be our own results. What is in no envelope is
    returned as it is. Raises InvalidMessage for an envelope that is damaged.
    """
    try:
        body = msgspec.json.decode(delivery.body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return [delivery]  # whoever reads the message says what is wrong with it
    if isinstance(body, dict) and body.get("Type") == "Notification" and "Message" in body:
        delivery = _notified(delivery, body)
        body = _json(delivery.body)
    if not isinstance(body, dict):
        return [delivery]
    if "Records" in body or body.get("Event") == "s3:TestEvent" or "detail-type" in body:
        return [
            msgspec.structs.replace(delivery, body=job)
            for job in _jobs(body, [prefix for prefix in output_prefixes if prefix])
        ]
    return [delivery]


def _notified(delivery: Delivery, body: Mapping[str, Any]) -> Delivery:
    """What was published to the topic."""
    message, given = body["Message"], body.get("MessageAttributes") or {}
    if not isinstance(message, str) or not isinstance(given, dict):
        raise InvalidMessage("the SNS notification has no Message that is text")
    attributes = {
        name: value["Value"]
        for name, value in given.items()
        if isinstance(value, dict) and isinstance(value.get("Value"), str)
    }
    return msgspec.structs.replace(delivery, body=message, attributes=delivery.attributes | attributes)


def _jobs(event: Mapping[str, Any], output_prefixes: Sequence[str]) -> Iterator[str]:
    """A body for each object that an event says was created."""
    for bucket, key, version, etag in _created(event):
        uri = f"s3://{bucket}/{key}"
        if key.endswith("/") or uri.startswith(tuple(output_prefixes)):
            continue
        named = hashlib.sha256(f"{bucket}/{key} {version or etag}".encode()).hexdigest()
        yield encode_fields(id=f"s3-{named[:40]}", input={"uri": uri} | ({"etag": etag} if etag else {}))


def _created(event: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Bucket, key, version and ETag, the last two as far as they are known."""
    if "Records" in event:
        records = event["Records"]
        if not isinstance(records, list):
            raise InvalidMessage(f"the event's Records is {show(records)}; it must be a list")
        for record in records:
            match record:
                case {
                    "eventName": str(name),
                    "s3": {"bucket": {"name": str(bucket)}, "object": dict(object_)},
                }:
                    if name.removeprefix("s3:").startswith(_CREATED):
                        yield (
                            bucket,
                            unquote_plus(_text(object_, "key")),
                            *_version(object_, "versionId", "eTag"),
                        )
                case _:
                    raise InvalidMessage("a record of the event is not about an object in S3")
    elif "detail-type" in event:
        match event:
            case {"source": "aws.s3", "detail": {"bucket": {"name": str(bucket)}, "object": dict(object_)}}:
                if event["detail-type"] in _CREATED:
                    yield bucket, _text(object_, "key"), *_version(object_, "version-id", "etag")
            case _:
                raise InvalidMessage("the EventBridge event is not about an object in S3")


def _version(object_: Mapping[str, Any], version: str, etag: str) -> tuple[str, str]:
    said, tag = (one if isinstance(one, str) else "" for one in (object_.get(version), object_.get(etag)))
    return said, tag.strip('"')


def _text(object_: Mapping[str, Any], name: str) -> str:
    value = object_.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidMessage(f"the event's object has the {name} {show(value)}; it must be text")
    return value


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _pointing(delivery: Delivery) -> str:
    return next(name for name in POINTER_ATTRIBUTES if name in delivery.attributes)
