"""The faults, where each can strike, and what the client is told."""

import enum
from http import HTTPStatus
from typing import NamedTuple
from xml.sax.saxutils import escape

from tests.faults.calls import Call

_BATCHES = frozenset({"ChangeMessageVisibilityBatch", "DeleteMessageBatch", "SendMessageBatch"})


class Fault(enum.StrEnum):
    """What may happen to a call. `late_` ones strike after the call has had its effect."""

    THROTTLE = "throttle"
    ERROR = "error"
    """500, and nothing was done."""
    UNAVAILABLE = "unavailable"
    """503, and nothing was done."""
    DROP = "drop"
    """The connection breaks before anything was done."""
    LATE_ERROR = "late_error"
    LATE_DROP = "late_drop"
    DELAY = "delay"
    TRUNCATE = "truncate"
    """Fewer bytes come than were announced."""
    CONFLICT = "conflict"
    """409, to a conditional PUT: another one is under way."""
    ABORTED = "aborted"
    """409, as S3 has it for other operations that meet each other."""
    PARTIAL = "partial"
    """One entry of a batch is not done, and `Failed` says so."""
    LATE_PARTIAL = "late_partial"
    """One entry of a batch is said to have failed, and was done."""
    DUPLICATE = "duplicate"
    """What a receive brings is visible to others at once."""

    def fits(self, call: Call) -> bool:
        """Whether such a thing can happen to this call."""
        match self:
            case Fault.CONFLICT:
                return call.conditional
            case Fault.ABORTED:
                return call.service == "s3" and call.operation == "PutObject"
            case Fault.PARTIAL | Fault.LATE_PARTIAL:
                return call.operation in _BATCHES
            case Fault.DUPLICATE:
                return call.operation == "ReceiveMessage"
            case Fault.TRUNCATE:
                return call.operation == "GetObject"
        return True

    @property
    def is_late(self) -> bool:
        """Whether the call reaches the service, and has its effect."""
        return self in _LATE

    @property
    def is_rare(self) -> bool:
        """Whether it fits few calls."""
        return self in _RARE


_LATE = frozenset({
    Fault.LATE_ERROR, Fault.LATE_DROP, Fault.DELAY, Fault.TRUNCATE, Fault.PARTIAL, Fault.LATE_PARTIAL,
    Fault.DUPLICATE,
})  # fmt: skip

_RARE = frozenset({
    Fault.TRUNCATE, Fault.CONFLICT, Fault.ABORTED, Fault.PARTIAL, Fault.LATE_PARTIAL, Fault.DUPLICATE,
})  # fmt: skip


class Answer(NamedTuple):
    """An answer in the words of the service."""

    status: int
    headers: dict[str, str]
    body: bytes


# By service: what is said, and with which status.
_CODES = {
    Fault.THROTTLE: {"s3": ("SlowDown", 503), "sqs": ("RequestThrottled", 400)},
    Fault.ERROR: {"s3": ("InternalError", 500), "sqs": ("InternalFailure", 500)},
    Fault.UNAVAILABLE: {"s3": ("ServiceUnavailable", 503), "sqs": ("ServiceUnavailable", 503)},
    Fault.CONFLICT: {"s3": ("ConditionalRequestConflict", 409)},
    Fault.ABORTED: {"s3": ("OperationAborted", 409)},
}
_CODES[Fault.LATE_ERROR] = _CODES[Fault.ERROR]


def refusal(fault: Fault, call: Call) -> Answer:
    """What the service says instead of doing, or of telling what it did."""
    code, status = _CODES[fault][call.service]
    text = f"{HTTPStatus(status).phrase}, by a fault that a test has asked for"
    if call.service == "sqs":
        side = "Sender" if status < 500 else "Receiver"
        headers = {"Content-Type": "application/x-amz-json-1.0", "x-amzn-query-error": f"{code};{side}"}
        body = f'{{"__type": "com.amazonaws.sqs#{code}", "message": "{text}"}}'
    else:
        headers = {"Content-Type": "application/xml"}
        body = f"<Error><Code>{code}</Code><Message>{escape(text)}</Message></Error>"
    return Answer(status, headers, b"" if call.operation.startswith("Head") else body.encode())
