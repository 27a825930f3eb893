"""`loramill doctor` and `redrive`, against real servers where they have what is looked for."""

import asyncio
import itertools
import json
import os

import boto3
import pytest
from aiobotocore.client import AioBaseClient
from botocore.exceptions import ClientError
from typer.testing import CliRunner

from tests import tiny
from tests.sync import servers
from worker.cli import app
from worker.doctor import _outputs, least_policy, queue_arn
from worker.errors import StoreRefused
from worker.settings import read_settings
from worker.transport.memory import MemoryStore

_numbers = itertools.count()
URL = "https://sqs.eu-west-1.amazonaws.com/123456789012/jobs"
"""As AWS's own look."""


@pytest.fixture
def account(monkeypatch, tmp_path):
    """With a bucket, a queue and its dead-letter queue."""
    for name in [name for name in os.environ if name.startswith(("LORAMILL_", "OPTION_", "AWS_"))]:
        monkeypatch.delenv(name)
    with servers.moto() as address:
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": servers.KEY,
            "AWS_SECRET_ACCESS_KEY": servers.SECRET,
            "AWS_DEFAULT_REGION": servers.REGION,
            "LORAMILL_CACHE_DIR": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(name, value)
        yield Account(boto3.client("sqs"), boto3.client("s3"))


class Account:
    def __init__(self, sqs, s3):
        self.sqs, self.s3 = sqs, s3
        self.number = next(_numbers)  # servers in one process share what they hold
        self.dead = sqs.create_queue(QueueName=f"dead-{self.number}")["QueueUrl"]
        s3.create_bucket(Bucket="bucket")
        s3.put_object(Bucket="bucket", Key="model/config.json", Body=b"{}")
        s3.put_object(Bucket="bucket", Key="model/adapters/a/adapter_config.json", Body=b"{}")
        self.queue = self.make_queue("jobs", receives=5)
        self.set_retention(self.dead, 14)

    def set_retention(self, url, days):
        seconds = str(days * 86_400)
        self.sqs.set_queue_attributes(QueueUrl=url, Attributes={"MessageRetentionPeriod": seconds})

    def make_queue(self, name, receives=None):
        attributes = {}
        if receives is not None:
            wanted = self.sqs.get_queue_attributes(QueueUrl=self.dead, AttributeNames=["QueueArn"])
            arn = wanted["Attributes"]["QueueArn"]
            redrive = {"deadLetterTargetArn": arn, "maxReceiveCount": receives}
            attributes = {"RedrivePolicy": json.dumps(redrive)}
        return self.sqs.create_queue(QueueName=f"{name}-{self.number}", Attributes=attributes)["QueueUrl"]


def doctor(account, *arguments, queue=None, output="s3://bucket/out/", model="s3://bucket/model/"):
    given = ["--queue-url", queue or account.queue, "--output-prefixes", output, "--model", model]
    return CliRunner().invoke(app, ["doctor", *given, *arguments])


def findings(result):
    return [(one["verdict"], one["what"].split()[0], one["message"]) for one in json.loads(result.stdout)]


def test_all_is_well(account):
    result = doctor(account, "--json")
    assert result.exit_code == 0, result.output
    assert {verdict for verdict, _, _ in findings(result)} == {"ok"}
    assert [what for _, what, _ in findings(result)] == [
        "queue", "dead-letter", "output", "adapters", "model", "cache",
    ]  # fmt: skip
    again = doctor(account)
    assert again.exit_code == 0
    assert "ok       output s3://bucket/out/: conditional writes and reads work" in again.stdout
    left = account.s3.list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"]
    assert [one["Key"] for one in left] == ["out/.loramill-doctor"]


def test_looking_at_a_queue_touches_no_message(account):
    account.sqs.send_message(QueueUrl=account.queue, MessageBody="x")
    doctor(account)
    (message,) = account.sqs.receive_message(
        QueueUrl=account.queue, MessageSystemAttributeNames=["ApproximateReceiveCount"]
    )["Messages"]
    assert message["Attributes"]["ApproximateReceiveCount"] == "1"


@pytest.mark.parametrize(
    ("options", "what", "why"),
    [
        ({"queue": "http://127.0.0.1:1/123456789012/none"}, "queue", "NonExistentQueue"),
        ({"output": "s3://no-such-bucket/out/"}, "output", "NoSuchBucket"),
        ({"model": "s3://no-such-bucket/model/"}, "adapters", "NoSuchBucket"),
        ({"model": "s3://bucket/no-such-model/"}, "model", "config.json is not there"),
    ],
)
def test_what_a_worker_cannot_do_without_is_told_with_exit_code_1(account, options, what, why):
    result = doctor(account, "--json", **options)
    assert result.exit_code == 1, result.output
    failed = {found: message for verdict, found, message in findings(result) if verdict == "failed"}
    assert why in failed[what]
    assert "ListBucket is missing" not in result.stdout


@pytest.mark.parametrize(
    ("calls", "what"),
    [
        (("sqs", "ChangeMessageVisibilityBatch"), "queue"),
        (("sqs", "DeleteMessageBatch"), "queue"),
        (("s3", "GetObject"), "output"),
        (("s3", "GetObject", "/.loramill-doctor"), "output"),
        (("s3", "GetObject", "a/adapter_config.json"), "adapters"),
        (("s3", "ListObjectsV2"), "model"),
    ],
)
def test_missing_right_is_found_by_trying(account, calls, what, monkeypatch):
    """One operation of the real clients is refused; all others are done."""
    service, operation, *keys = calls
    ask = AioBaseClient._make_api_call

    async def refusing(client, name, request):
        here = request.get("Key", "").endswith(tuple(keys) or "")
        if (client.meta.service_model.service_name, name) == (service, operation) and here:
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, name)
        return await ask(client, name, request)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", refusing)
    result = doctor(account, "--json")
    assert result.exit_code == 1, result.output
    assert what in {found for verdict, found, _ in findings(result) if verdict == "failed"}


def test_nobody_at_the_endpoint_is_told_everywhere(account, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    result = doctor(account, "--json", "--adapters-events-queue-url", account.queue + "-events")
    assert result.exit_code == 1
    assert {what for verdict, what, _ in findings(result) if verdict == "ok"} == {"cache"}


def test_setting_that_a_worker_needs_is_asked_for(account):
    def told(*arguments):
        result = CliRunner().invoke(app, ["doctor", *arguments])
        assert result.exit_code == 1
        failed = [line for line in result.stdout.splitlines() if line.startswith("failed")]
        return [line.split(":")[0].split()[-1] for line in failed if " setting " in line]

    assert told() == ["MODEL"], "a worker without a queue answers calls"
    assert told("--queue-url", URL) == ["OUTPUT_PREFIXES", "MODEL"]
    assert told("--output-prefixes", "s3://out/a/") == ["QUEUE_URL", "MODEL"]
    assert CliRunner().invoke(app, ["doctor", "--policy"]).exit_code == 2


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_cache_that_cannot_be_a_folder_is_found_out(account, place, tmp_path):
    (tmp_path / "file").touch()
    result = doctor(account, "--cache-dir", str(tmp_path / place))
    assert result.exit_code == 1
    assert "is no folder that can be written" in result.stdout or "Not a directory" in result.stdout


def test_devices_and_model_are_looked_at_when_several_are_to_share_it(account, tmp_path):
    base, stored = str(tiny.make_base(tmp_path / "base")), "s3://bucket/model/"
    for degree, model, code, said in (
        (
            "2",
            base,
            0,
            "ok       tensor parallelism of 2: the devices are there, and the model can be divided",
        ),
        ("2", stored, 0, "ok       tensor parallelism of 2: the devices are there\n"),
        ("3", base, 1, "failed   tensor parallelism of 3: tensor_parallel_degree 3 does not divide"),
    ):
        looked = doctor(account, "--tensor-parallel-degree", degree, "--device", "cpu", model=model)
        assert looked.exit_code == code, looked.output
        assert said in looked.output
    assert "parallelism" not in doctor(account, model=base).output


def test_what_will_hurt_some_day_is_a_warning(account):
    account.set_retention(account.dead, 2)
    account.sqs.send_message(QueueUrl=account.dead, MessageBody="x")
    hasty = account.make_queue("hasty", receives=1)
    account.sqs.set_queue_attributes(QueueUrl=hasty, Attributes={"MessageRetentionPeriod": "3600"})
    result = doctor(account, "--json", queue=hasty, model="somebody/model")
    assert result.exit_code == 0
    warnings = [message for verdict, _, message in findings(result) if verdict == "warning"]
    assert [text.split(":")[0] for text in warnings] == [
        "maxReceiveCount is 1", "MessageRetentionPeriod is 3600 seconds", "messages are in it",
    ]  # fmt: skip
    account.set_retention(hasty, 4)
    result = doctor(account, queue=hasty)
    assert "is not longer than the queue's" in result.stdout
    result = doctor(account, queue=account.make_queue("no-redrive"))
    assert "it has no redrive policy" in result.stdout


def test_adapters_that_are_not_there_yet_are_no_failure(account):
    account.s3.delete_object(Bucket="bucket", Key="model/adapters/a/adapter_config.json")
    result = doctor(account)
    assert result.exit_code == 0
    assert "nothing is there yet" in result.stdout


def test_store_that_ignores_conditions_is_found_out():
    class Careless(MemoryStore):
        async def put_if_absent(self, uri, body, content_type="", metadata=None):
            return await self.put(uri, body)

    (finding,) = asyncio.run(_outputs(Careless(), "s3://b/out/"))
    assert (finding.verdict, "ignores If-None-Match" in finding.message) == ("failed", True)


def test_missing_right_to_list_is_found_out():
    class Forbidding(MemoryStore):
        async def get(self, uri, *, max_bytes=None):
            raise StoreRefused(
                f"{uri}: An error occurred (AccessDenied) when calling the GetObject operation"
            )

    (finding,) = asyncio.run(_outputs(Forbidding(), "s3://b/out/"))
    assert (finding.verdict, "s3:ListBucket is missing" in finding.message) == ("failed", True)


def test_real_store_is_well(account, monkeypatch):
    if servers.weed() is None:
        pytest.skip(servers.WHY_NOT)
    with servers.seaweedfs() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        servers.client(address).create_bucket(Bucket="real")
        result = doctor(account, output="s3://real/out/", model="somebody/model")
        assert result.exit_code == 0, result.output
        assert "conditional writes and reads work" in result.stdout


def test_queue_of_events_is_looked_at_too(account):
    result = doctor(account, "--adapters-events-queue-url", account.make_queue("events"))
    assert result.exit_code == 0
    assert ": messages may be deleted" in result.stdout
    result = doctor(account, "--adapters-events-queue-url", account.queue + "-none")
    assert result.exit_code == 1


def test_policy_names_what_is_used_and_nothing_else():
    given = {"LORAMILL_QUEUE_URL": URL, "LORAMILL_OUTPUT_PREFIXES": "s3://out/a/,s3://other/b/"}
    given |= {"LORAMILL_MODEL": "s3://models/llama", "LORAMILL_ADAPTERS_EVENTS_QUEUE_URL": f"{URL}-events"}
    given |= {
        "LORAMILL_INPUT_PREFIXES": "s3://files/in/",
        "LORAMILL_WORKFLOWS": "s3://flows/a/one.json,/srv/b",
    }
    given |= {"OPTION_MODEL_ID": "s3://weights/base"}
    policy = least_policy(read_settings(environ=given, flags={}))
    by_action = {}
    for statement in policy["Statement"]:
        for action in statement["Action"]:
            assert "*" not in action
            by_action.setdefault(action, set()).update(statement["Resource"])
    jobs = "arn:aws:sqs:eu-west-1:123456789012:jobs"
    assert by_action == {
        "sqs:ReceiveMessage": {jobs, f"{jobs}-events"},
        "sqs:DeleteMessage": {jobs, f"{jobs}-events"},
        "sqs:GetQueueAttributes": {jobs},
        "sqs:ChangeMessageVisibility": {jobs},
        "sqs:SendMessage": {jobs},
        "s3:GetObject": {f"arn:aws:s3:::{name}/*" for name in ("out/a", "other/b", "models/llama/adapters")}
        | {"arn:aws:s3:::models/llama/*", "arn:aws:s3:::files/in/*"}
        | {"arn:aws:s3:::weights/base/*", "arn:aws:s3:::flows/a/*"},
        "s3:PutObject": {"arn:aws:s3:::out/a/*", "arn:aws:s3:::other/b/*"},
        "s3:AbortMultipartUpload": {"arn:aws:s3:::out/a/*", "arn:aws:s3:::other/b/*"},
        "s3:ListBucket": {
            f"arn:aws:s3:::{name}" for name in ("out", "other", "models", "files", "weights", "flows")
        },
    }


def test_policy_is_printed_without_a_look_at_anything(account):
    result = doctor(account, "--policy", queue=URL)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["Version"] == "2012-10-17"


@pytest.mark.parametrize(
    ("url", "arn"),
    [
        ("http://127.0.0.1:4566/000000000000/q", "arn:aws:sqs:*:000000000000:q"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/1/q", "arn:aws-cn:sqs:cn-north-1:1:q"),
        ("https://sqs.us-gov-west-1.amazonaws.com/1/q", "arn:aws-us-gov:sqs:us-gov-west-1:1:q"),
    ],
)
def test_arn_follows_from_the_url(url, arn):
    assert queue_arn(url) == arn


def test_redrive_moves_dead_letters_and_says_how_many(account):
    for number in range(12):
        account.sqs.send_message(QueueUrl=account.dead, MessageBody=f"letter {number}")
    result = CliRunner().invoke(app, ["redrive", "--queue-url", account.queue])
    assert result.exit_code == 0, result.output
    arn = f"arn:aws:sqs:us-east-1:123456789012:dead-{account.number}"
    assert result.stdout == f"12 messages moved from {arn}\n"
    counts = account.sqs.get_queue_attributes(
        QueueUrl=account.queue, AttributeNames=["ApproximateNumberOfMessages"]
    )
    assert counts["Attributes"]["ApproximateNumberOfMessages"] == "12"
    result = CliRunner().invoke(app, ["redrive", "--queue-url", account.make_queue("alone")])
    assert result.exit_code == 2
    assert "has no redrive policy" in result.stderr
