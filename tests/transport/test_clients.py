"""How the clients are set up, and what each of the SDK's errors becomes."""

import asyncio

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
)

from worker.errors import ObjectExists, QueueRefused, QueueUnavailable, SettingsError, StoreRefused
from worker.transport.clients import MAX_POLL_SECONDS, Clients, jittered, translated
from worker.transport.queue import SqsQueue
from worker.transport.store import S3Store


def with_clients(scenario) -> None:
    async def main() -> None:
        async with Clients() as clients:
            await scenario(clients)

    asyncio.run(main())


def refusal(code: str, status: int, message: str = "") -> ClientError:
    error = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(error, "Operation")


def translation(exc: Exception, known=None) -> Exception:
    with (
        pytest.raises(Exception) as caught,
        translated(unavailable=QueueUnavailable, refused=QueueRefused, known=known),
    ):
        raise exc
    assert caught.value.__cause__ is exc
    return caught.value


def test_polls_and_heartbeats_never_share_connections(aws):
    async def scenario(clients):
        assert clients.polls is not clients.acks
        assert clients.polls._endpoint.http_session is not clients.acks._endpoint.http_session

    with_clients(scenario)


def test_poll_is_never_cut_off_by_its_own_timeout(aws):
    async def scenario(clients):
        assert clients.polls.meta.config.read_timeout > MAX_POLL_SECONDS + 5

    with_clients(scenario)


def test_retries_are_standard_and_bounded(aws):
    async def scenario(clients):
        for client in (clients.polls, clients.acks, clients.objects):
            assert client.meta.config.retries["mode"] == "standard"
            assert client.meta.config.retries["total_max_attempts"] == 4
            assert client.meta.config.max_pool_connections == 32

    with_clients(scenario)


def test_endpoints_are_the_sdks_own_settings(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:1111")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2222")

    async def scenario(clients):
        assert clients.polls.meta.endpoint_url == "http://127.0.0.1:1111"
        assert clients.acks.meta.endpoint_url == "http://127.0.0.1:1111"
        assert clients.objects.meta.endpoint_url == "http://127.0.0.1:2222"

    with_clients(scenario)


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_DEFAULT_REGION", None), ("AWS_ENDPOINT_URL", "nonsense"), ("AWS_PROFILE", "none")],
)
def test_unusable_aws_settings_are_a_settings_error(aws, monkeypatch, tmp_path, name, value):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_REGION", raising=False)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)

    async def scenario(_):
        raise AssertionError("opened")

    with pytest.raises(SettingsError, match=r"^AWS: "):
        with_clients(scenario)


def test_unreachable_queue_is_unavailable(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    async def main():
        async with Clients(max_attempts=1) as clients:
            queue = SqsQueue(clients, "http://127.0.0.1:9/0/q")
            with pytest.raises(QueueUnavailable):
                await queue.receive(1, 0)
            with pytest.raises(QueueUnavailable):
                await queue.release("receipt", 0)
            outcome = await queue.extend(["one", "two"], 30)
            assert set(outcome.failed) == {"one", "two"}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("RequestThrottled", 400),
        ("AWS.SimpleQueueService.RequestThrottled", 400),
        ("ThrottlingException", 400),
        ("OverLimit", 403),
        ("ExpiredToken", 400),
        ("SlowDown", 503),
        ("InternalError", 500),
        ("SomethingNew", 502),
        ("SomethingNew", 429),
    ],
)
def test_what_time_may_mend_is_unavailable(code, status):
    assert type(translation(refusal(code, status))) is QueueUnavailable


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("AccessDenied", 403),
        ("AWS.SimpleQueueService.NonExistentQueue", 400),
        ("QueueDoesNotExist", 400),
        ("NoSuchBucket", 404),
        ("InvalidClientTokenId", 403),
        ("SomethingNew", 400),
        ("403", 403),
    ],
)
def test_what_time_does_not_mend_is_refused(code, status):
    assert type(translation(refusal(code, status))) is QueueRefused


def test_errors_are_told_apart_by_code_and_never_by_text():
    told = translation(refusal("AccessDenied", 403, "Throttling: SlowDown, PreconditionFailed"))
    assert type(told) is QueueRefused


def test_code_that_the_caller_knows_comes_first():
    known = ObjectExists("s3://b/k")
    assert translation(refusal("PreconditionFailed", 412), {"PreconditionFailed": known}) is known


@pytest.mark.parametrize(
    "exc",
    [
        EndpointConnectionError(endpoint_url="http://x"),
        ConnectTimeoutError(endpoint_url="http://x"),
        CredentialRetrievalError(provider="x", error_msg="x"),
        aiohttp.ClientPayloadError("cut short"),
        ConnectionResetError(),
        TimeoutError(),
    ],
)
def test_trouble_on_the_way_is_unavailable(exc):
    told = translation(exc)
    assert type(told) is QueueUnavailable
    assert str(told)


@pytest.mark.parametrize("exc", [NoCredentialsError(), ParamValidationError(report="empty key")])
def test_requests_that_were_never_sent_are_refused(exc):
    assert type(translation(exc)) is QueueRefused


def test_our_own_bugs_are_not_translated():
    with pytest.raises(KeyError), translated(unavailable=QueueUnavailable, refused=QueueRefused):
        raise KeyError("bug")


def test_jitter_never_lengthens_a_wait():
    assert all(1.0 <= jittered(2.0) <= 2.0 for _ in range(100))


def test_clients_that_were_never_opened_refuse_what_is_in_s3():
    with pytest.raises(StoreRefused, match="started without anything in S3"):
        asyncio.run(S3Store(Clients()).get("s3://bucket/key"))
