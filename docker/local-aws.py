# ruff: noqa: INP001
"""What the containers of docker/local-aws.Dockerfile run: `queue`, `store`, `create`, or `check URL`.

Endpoints and credentials come from the SDK's own variables (AWS_*).
"""

import json
import os
import sys
import urllib.error
import urllib.request

STORE = (
    "weed", "mini", "-dir=/data", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", "-s3.port=8333", "-admin.ui=false",
    "-webdav=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
)  # fmt: skip
DEAD_LETTERS_AFTER = 5
"""Receives of a message before it moves to the dead-letter queue."""
RETENTION_SECONDS = 14 * 24 * 3600


def main(command: str, *arguments: str) -> None:
    if command == "queue":
        os.execvp("ministack", ["ministack"])  # noqa: S606, S607
    elif command == "store":
        os.execvp(STORE[0], STORE)  # noqa: S606
    elif command == "check":
        check(*arguments)
    elif command == "create":
        create(os.environ["BUCKET"], os.environ["QUEUE"])
    else:
        sys.exit(f"unknown command {command!r}: queue, store, check or create")


def check(url: str) -> None:
    """End with 0 if anything at all answers at `url`: a refusal by a server is a server."""
    try:
        urllib.request.urlopen(url, timeout=4)  # noqa: S310
    except urllib.error.HTTPError:
        return
    except OSError as error:
        sys.exit(f"{url}: {error}")


def create(bucket: str, queue: str) -> None:
    """Create the bucket, the queue and its dead-letter queue; what is there already stays as it is."""
    import botocore.session  # noqa: PLC0415

    session = botocore.session.get_session()
    s3, sqs = session.create_client("s3"), session.create_client("sqs")
    if bucket not in {found["Name"] for found in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=bucket)
    retention = {"MessageRetentionPeriod": str(RETENTION_SECONDS)}
    dead_letters = sqs.create_queue(QueueName=f"{queue}-dead-letters", Attributes=retention)["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead_letters, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": DEAD_LETTERS_AFTER})
    url = sqs.create_queue(QueueName=queue, Attributes=retention | {"RedrivePolicy": redrive})["QueueUrl"]
    sys.stdout.write(f"bucket {bucket}, queue {url}, dead letters {dead_letters}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
