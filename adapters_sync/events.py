"""Messages about S3 events: does one name a key under our prefix? Pure.

S3 writes to a queue itself, through an SNS topic, or through EventBridge, which may go by SNS as well:

    {"Records": [{"s3": {"bucket": {"name": ...}, "object": {"key": ...}}}, ...]}       keys are form-encoded
    {"source": "aws.s3", "detail": {"bucket": {"name": ...}, "object": {"key": ...}}}   keys are as they are
    {"Type": "Notification", "Message": "the text of one of the others"}
    {"Service": "Amazon S3", "Event": "s3:TestEvent", ...}         once, when a notification is configured

as the S3 user guide has them under "Event message structure" and "EventBridge event message structure". What
happened to the key is not asked: whether it came, went or changed, a listing tells.
"""

import enum
from collections.abc import Iterator
from urllib.parse import unquote_plus

import msgspec

from adapters_sync.errors import UnreadableEvent
from adapters_sync.uris import S3Prefix


class EventOutcome(enum.StrEnum):
    """What became of a message: the values of a metric's label."""

    HINT = "hint"
    """It names a key under the prefix."""
    OTHER = "other"
    """Other keys, or S3's test of the queue."""
    UNREADABLE = "unreadable"


class _Bucket(msgspec.Struct):
    name: str


class _Object(msgspec.Struct):
    key: str


class _Place(msgspec.Struct):
    bucket: _Bucket
    object: _Object


class _Record(msgspec.Struct):
    s3: _Place


class _Message(msgspec.Struct):
    """Any of the four."""

    records: list[_Record] | None = msgspec.field(name="Records", default=None)
    detail: _Place | None = None
    inner: str | None = msgspec.field(name="Message", default=None)
    event: str | None = msgspec.field(name="Event", default=None)


def concerns(body: str, source: S3Prefix) -> bool:
    """True when a message names a key under `source`. Raises UnreadableEvent when it is about no S3 event."""
    try:
        message = _decode(body)
        if message.inner is not None:
            message = _decode(message.inner)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise UnreadableEvent(str(error)) from error
    if message.records is None and message.detail is None and message.event is None:
        raise UnreadableEvent("it has neither Records nor detail nor Event")
    return any(bucket == source.bucket and key.startswith(source.prefix) for bucket, key in _places(message))


def _decode(body: str) -> _Message:
    return msgspec.json.decode(body, type=_Message)


def _places(message: _Message) -> Iterator[tuple[str, str]]:
    """Buckets and keys."""
    for record in message.records or ():
        yield record.s3.bucket.name, unquote_plus(record.s3.object.key)
    if message.detail is not None:
        yield message.detail.bucket.name, message.detail.object.key
