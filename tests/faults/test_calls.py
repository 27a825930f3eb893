"""The names of what is asked."""

import pytest

from tests.faults.calls import Call, read_call


@pytest.mark.parametrize(
    ("method", "path", "operation", "target"),
    [
        ("GET", "/b/a%20key/%C3%BC", "GetObject", "b/a key/ü"),
        ("HEAD", "/b/k", "HeadObject", "b/k"),
        ("PUT", "/b/k", "PutObject", "b/k"),
        ("PUT", "/b/k?partNumber=1&uploadId=u", "UploadPart", "b/k"),
        ("POST", "/b/k?uploads", "CreateMultipartUpload", "b/k"),
        ("POST", "/b/k?uploadId=u", "CompleteMultipartUpload", "b/k"),
        ("DELETE", "/b/k?uploadId=u", "AbortMultipartUpload", "b/k"),
        ("DELETE", "/b/k", "DeleteObject", "b/k"),
        ("GET", "/b?list-type=2&prefix=p%2F", "ListObjectsV2", "b"),
        ("GET", "/b/?list-type=2", "ListObjectsV2", "b"),
        ("PUT", "/b", "CreateBucket", "b"),
        ("HEAD", "/b", "HeadBucket", "b"),
    ],
)
def test_calls_to_s3_are_told_apart_by_method_and_query(method, path, operation, target):
    assert read_call(method, path, {}, b"") == Call("s3", operation, target)


def test_calls_to_sqs_are_told_apart_by_their_header():
    headers = {"X-Amz-Target": "AmazonSQS.ReceiveMessage", "amz-sdk-invocation-id": "i"}
    call = read_call("POST", "/", headers, b'{"QueueUrl": "http://host:1/123/jobs"}', port=5)
    assert call == Call("sqs", "ReceiveMessage", "jobs", invocation="i", port=5)


def test_calls_to_sqs_by_the_older_protocol_are_told_apart_by_their_action():
    headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
    body = b"Action=DeleteMessageBatch&QueueUrl=http%3A%2F%2Fhost%2F123%2Fjobs"
    call = read_call("POST", "/123/jobs", headers, body)
    assert (call.operation, call.target, call.is_batch) == ("DeleteMessageBatch", "jobs", True)


def test_only_a_write_is_conditional():
    condition = {"If-None-Match": "*"}
    assert read_call("PUT", "/b/k", condition, b"").conditional
    assert not read_call("PUT", "/b/k", {}, b"").conditional
    assert not read_call("GET", "/b/k", condition, b"").conditional
