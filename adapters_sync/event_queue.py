"""The SQS queue of S3 events, as far as the mirror needs it: nothing else here talks to SQS."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

import aioboto3
import aiohttp
import msgspec
from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError, ClientError

from adapters_sync.errors import QueueUnavailable, SettingsError

MAX_POLL_SECONDS = 20
"""The longest long poll that SQS allows."""

_MAX_BATCH = 10
_LIBRARY_ERRORS = (BotoCoreError, ClientError, aiohttp.ClientError, OSError)


class EventMessage(msgspec.Struct, frozen=True):
    body: str
    receipt: str


class EventQueue(Protocol):
    """Where messages about S3 events come from. Every call may raise QueueUnavailable."""

    @property
    def url(self) -> str: ...

    async def receive(self, wait_seconds: int) -> list[EventMessage]:
        """Up to ten messages, waiting so long (at most MAX_POLL_SECONDS) for the first.

        A receive may be cancelled: what it would have brought comes again when its visibility ends.
        """

    async def delete(self, messages: Sequence[EventMessage]) -> None:
        """Delete for good what one `receive` has brought."""


@asynccontextmanager
async def connect_queue(url: str | None) -> AsyncIterator[EventQueue | None]:
    """The queue at `url`, with one client that is closed at the end; None without a url.

    Credentials, region and endpoint are the SDK's own (`AWS_*`). Raises SettingsError when it finds no
    region, or an endpoint that it cannot use.
    """
    if url is None:
        yield None
        return
    config = AioConfig(
        connect_timeout=10,
        # A poll whose answer is late is sent again: what the first one brought stays invisible for a while.
        read_timeout=MAX_POLL_SECONDS + 15,
        retries={"mode": "standard", "total_max_attempts": 2},
        tcp_keepalive=True,
    )
    try:
        context = aioboto3.Session().client("sqs", config=config)
        client = await context.__aenter__()
    except (BotoCoreError, ValueError) as error:  # the SDK reports a bad endpoint by ValueError
        raise SettingsError([f"adapters_events_queue_url: no client for {url}: {error}"]) from error
    try:
        yield SqsEventQueue(client, url)
    finally:
        await context.__aexit__(None, None, None)


class SqsEventQueue(EventQueue):
    """The queue at `url`."""

    def __init__(self, client: Any, url: str) -> None:
        self._client = client
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    async def receive(self, wait_seconds: int) -> list[EventMessage]:
        with _mapped_errors():
            answer = await self._client.receive_message(
                QueueUrl=self._url, MaxNumberOfMessages=_MAX_BATCH, WaitTimeSeconds=wait_seconds
            )
        return [EventMessage(one["Body"], one["ReceiptHandle"]) for one in answer.get("Messages", ())]

    async def delete(self, messages: Sequence[EventMessage]) -> None:
        entries = [{"Id": str(at), "ReceiptHandle": one.receipt} for at, one in enumerate(messages)]
        with _mapped_errors():
            answer = await self._client.delete_message_batch(QueueUrl=self._url, Entries=entries)
        for failed in answer.get("Failed", ()):
            raise QueueUnavailable(f"a message was not deleted: {failed['Code']}")


@contextmanager
def _mapped_errors() -> Iterator[None]:
    """Turn the libraries' errors into ours."""
    try:
        yield
    except ClientError as error:
        details = error.response.get("Error", {})
        raise QueueUnavailable(f"{details.get('Code', 'unknown')}: {details.get('Message', '')}") from error
    except _LIBRARY_ERRORS as error:
        raise QueueUnavailable(str(error) or type(error).__name__) from error
