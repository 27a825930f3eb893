"""Messages about S3 events, as AWS writes them."""

import json
from urllib.parse import quote_plus


def from_s3(bucket: str, key: str, *, removed: bool = False) -> str:
    """As S3 sends it itself, with the key form-encoded but for its slashes."""
    place = {
        "s3SchemaVersion": "1.0",
        "configurationId": "adapters",
        "bucket": {"name": bucket, "ownerIdentity": {"principalId": "A"}, "arn": f"arn:aws:s3:::{bucket}"},
        "object": {"key": quote_plus(key, safe="/"), "sequencer": "0055AED6DCD90281E5"},
    }
    record = {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": "eu-central-1",
        "eventTime": "1970-01-01T00:00:00.000Z",
        "eventName": "ObjectRemoved:Delete" if removed else "ObjectCreated:CompleteMultipartUpload",
        "requestParameters": {"sourceIPAddress": "127.0.0.1"},
        "s3": place,
    }
    return json.dumps({"Records": [record]})


def by_eventbridge(bucket: str, key: str, *, removed: bool = False) -> str:
    return json.dumps({
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": "Object Deleted" if removed else "Object Created",
        "source": "aws.s3",
        "account": "111122223333",
        "time": "2021-11-12T00:00:00Z",
        "region": "eu-central-1",
        "resources": [f"arn:aws:s3:::{bucket}"],
        "detail": {
            "version": "0",
            "bucket": {"name": bucket},
            "object": {"key": key, "size": 5, "etag": "b1946ac92492d2347c6235b4d2611184"},
            "requester": "111122223333",
            "reason": "DeleteObject" if removed else "PutObject",
        },
    })  # fmt: skip


def by_sns(body: str) -> str:
    """The same in an SNS notification."""
    return json.dumps({
        "Type": "Notification",
        "MessageId": "860338d1-77d7-482b-8e9e-da898b3a3193",
        "TopicArn": "arn:aws:sns:eu-central-1:111122223333:adapters",
        "Subject": "Amazon S3 Notification",
        "Message": body,
        "Timestamp": "2026-11-22T22:24:22.878Z",
    })  # fmt: skip
