"""A queue on a moto server, and S3 events that get there in each of the ways that AWS has."""

import json
from contextlib import ExitStack
from typing import Any

from tests.sync import servers
from tests.sync.builders import Bucket

WAYS = ("s3", "sns", "eventbridge")
_EVENTS = ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]


class EventSender:
    """One queue; its clients are closed with `stack`."""

    def __init__(self, address: str, name: str, stack: ExitStack) -> None:
        self._address = address
        self._name = name
        self._stack = stack
        self._sqs = self._client("sqs")
        self.url = self._sqs.create_queue(QueueName=name)["QueueUrl"]

    def send(self, *bodies: str) -> None:
        for body in bodies:
            self._sqs.send_message(QueueUrl=self.url, MessageBody=body)

    def delete(self) -> None:
        self._sqs.delete_queue(QueueUrl=self.url)

    def left(self) -> int:
        """Messages that are on the queue, received or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)

    def hear_of(self, bucket: Bucket, way: str = "s3") -> None:
        """From now on the bucket's events come here: directly, through a topic, or through EventBridge."""
        arn = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])
        arn = arn["Attributes"]["QueueArn"]
        if way == "s3":
            told = {"QueueConfigurations": [{"QueueArn": arn, "Events": _EVENTS}]}
        elif way == "sns":
            told = {"TopicConfigurations": [{"TopicArn": self._topic(arn), "Events": _EVENTS}]}
        else:
            self._rule(arn, bucket)
            told = {"EventBridgeConfiguration": {}}
        bucket.client.put_bucket_notification_configuration(
            Bucket=bucket.name, NotificationConfiguration=told
        )

    def _topic(self, queue_arn: str) -> str:
        sns = self._client("sns")
        topic = sns.create_topic(Name=self._name)["TopicArn"]
        sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue_arn)
        return topic

    def _rule(self, queue_arn: str, bucket: Bucket) -> None:
        events = self._client("events")
        pattern = {"source": ["aws.s3"], "detail": {"bucket": {"name": [bucket.name]}}}
        events.put_rule(Name=self._name, EventPattern=json.dumps(pattern))
        events.put_targets(Rule=self._name, Targets=[{"Id": "queue", "Arn": queue_arn}])

    def _client(self, service: str) -> Any:
        client = servers.client(self._address, service=service)
        self._stack.callback(client.close)
        return client
