"""Dead letters: the S3 object that keeps a message nothing could be made of."""

import json

from worker.jobs import Delivery, Failure


def encode_dead_letter(delivery: Delivery, error: Failure, *, now: float) -> bytes:
    """The whole message with the reason, as JSON in ASCII, so that any body survives unchanged.

    `now` is seconds since the epoch.
    """
    letter = {
        "message_id": delivery.message_id,
        "error": {"code": error.code, "message": error.message, "retryable": error.retryable},
        "sent_at": delivery.sent_at,
        "dead_at": now,
        "receive_count": delivery.receive_count,
        "attributes": delivery.attributes,
        "body": delivery.body,
    }
    return json.dumps(letter, indent=2).encode("ascii") + b"\n"
