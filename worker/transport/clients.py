"""The AWS clients of one worker, and the one place where the SDK's errors become ours.

Everything that would change with another SDK is in this file: how clients are opened, how they time out
and retry, and what each error code means. Endpoints, region and credentials are the SDK's own settings
(`AWS_ENDPOINT_URL_SQS`, `AWS_ENDPOINT_URL_S3`, `AWS_DEFAULT_REGION`, ...); none of ours repeats them.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
)

from worker.errors import SettingsError, StoreRefused

MAX_POLL_SECONDS = 20
"""The longest long poll that SQS allows."""

_ERROR_PREFIX = "AWS.SimpleQueueService."

_TRANSIENT_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        # The SDK fetches fresh credentials for the next call.
        "ExpiredToken",
        "ExpiredTokenException",
        "TokenRefreshRequired",
        "KMS.ThrottlingException",
        "KmsThrottled",
        "LimitExceededException",
        "OperationAborted",
        # Too many messages in flight: acks by this worker or another make room.
        "OverLimit",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "TooManyRequestsException",
    }
)


class Clients:
    """The three AWS clients of a worker: `async with Clients() as clients`.

    `polls` receives messages and does nothing else: a long poll holds a connection for up to
    `MAX_POLL_SECONDS`, and a heartbeat must never wait behind one. `acks` does every other call to SQS.
    `objects` is the S3 client.

    `connections` bounds the pool of each client; `max_attempts` counts the first try. Raises SettingsError
    on entry when the SDK finds no region, or a profile or endpoint that it cannot use. A Clients object is
    used once, from one event loop.
    """

    polls: Any
    acks: Any

    def __init__(self, *, connections: int = 32, max_attempts: int = 4) -> None:
        self._connections = connections
        self._max_attempts = max_attempts
        self._stack = AsyncExitStack()
        self._objects: Any = None

    @property
    def objects(self) -> Any:
        """Raises StoreRefused when they were never opened: a worker may have nothing to do with AWS."""
        if self._objects is None:
            raise StoreRefused("this worker was started without anything in S3")
        return self._objects

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            try:
                await self._open(stack)
            except NoRegionError as exc:
                raise SettingsError(["AWS: no region is set; set AWS_DEFAULT_REGION"]) from exc
            except (BotoCoreError, ValueError) as exc:  # the SDK reports a bad endpoint by ValueError
                raise SettingsError([f"AWS: {exc}"]) from exc
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> None:
        session = aioboto3.Session()
        # The SDK sends a poll again when the answer is late: its messages would be lost until their
        # visibility ends. So the read timeout lies well above the longest poll.
        polls = session.client("sqs", config=self._config(read_timeout=MAX_POLL_SECONDS + 15))
        self.polls = await stack.enter_async_context(polls)
        # Short, so that a heartbeat on a dead connection is tried again before the visibility ends.
        acks = session.client("sqs", config=self._config(read_timeout=6))
        self.acks = await stack.enter_async_context(acks)
        objects = session.client("s3", config=self._config(read_timeout=60))
        self._objects = await stack.enter_async_context(objects)

    def _config(self, *, read_timeout: float) -> AioConfig:
        return AioConfig(
            connect_timeout=4,
            read_timeout=read_timeout,
            max_pool_connections=self._connections,
            retries={"mode": "standard", "total_max_attempts": self._max_attempts},
            # aiobotocore 2.25 sets no socket options yet; the timeouts above find dead connections meanwhile.
            tcp_keepalive=True,
            user_agent_extra="loramill",
        )


@contextmanager
def translated(
    *,
    unavailable: Callable[[str], Exception],
    refused: Callable[[str], Exception],
    known: Mapping[str, Exception] | None = None,
) -> Iterator[None]:
    """Turn what the SDK raises inside the block into errors of ours.

    `known` maps error codes that mean something to the caller (`NoSuchKey`, `PreconditionFailed`) to what
    is raised for them. Of the rest, trouble that time may mend (throttling, 5xx, the network, a checksum
    that did not match) becomes `unavailable`, and a service that answered no becomes `refused`: access
    denied, no such queue, no such bucket, no credentials, a request it finds malformed.
    """
    try:
        yield
    except ClientError as exc:
        code = error_code(exc)
        if known and code in known:
            raise known[code] from exc
        raise (unavailable if _is_transient(exc, code) else refused)(str(exc)) from exc
    except (NoCredentialsError, PartialCredentialsError, ParamValidationError) as exc:
        raise refused(str(exc)) from exc
    except (BotoCoreError, aiohttp.ClientError, ConnectionError, TimeoutError) as exc:
        # A body cut short reaches us as aiohttp's own error: aiobotocore maps only the first few.
        raise unavailable(str(exc) or type(exc).__name__) from exc


def error_code(exc: ClientError) -> str:
    """The service's error code; the HTTP status as text where the answer had no body (HEAD)."""
    return plain_code(str(exc.response.get("Error", {}).get("Code", "")))


def plain_code(code: str) -> str:
    """`code` without the prefix that SQS adds for clients of its older protocol."""
    return code.removeprefix(_ERROR_PREFIX)


def jittered(seconds: float) -> float:
    """Between half of `seconds` and all of it, so that many workers do not act at the same moment."""
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311 (spreads load, guards no secret)


def _is_transient(exc: ClientError, code: str) -> bool:
    status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return code in _TRANSIENT_CODES or status >= 500 or status == 429
