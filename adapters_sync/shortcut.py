"""Many GETs under one prefix, at a fraction of what as many calls of the SDK take.

A call of the SDK takes three milliseconds of a processor, most of them to work out anew the endpoint and the
shape of the request, which are the same for all keys. So the first GET goes the SDK's way, and the request
that it signed is kept; the next ones are copies of it with another key and another If-Match. The SDK's own
signer signs each, with the credentials of that moment, and its own connections carry them, with its time
limits, proxies and certificates.

An answer other than 200 is left to the SDK, which is asked again from the start: it knows what can be
retried, where a bucket has moved to, and what an error means. What it signs then is the new pattern.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import msgspec

_OK = 200
_COPIED = "adapters_sync.copied"
"""Stands in the context of a request that is a copy, so that nobody learns from it."""


class _Pattern(msgspec.Struct, frozen=True):
    """A GET of the SDK's, as it was just before it was signed. All but the key is told in it."""

    request: Any
    headers: dict[str, str]
    signer: Any

    def copy(self, prefix: str, path: str, etag: str) -> Any:
        """The same for another path below the prefix; both as they stand in a URL."""
        pattern = self.request
        copy = type(pattern)(
            method=pattern.method,
            url=_moved(pattern.url, prefix, path),
            headers=self.headers | {"If-Match": etag},
            auth_path=pattern.auth_path and _moved(pattern.auth_path, prefix, path),
            stream_output=pattern.stream_output,
        )
        copy.context = pattern.context | {_COPIED: True}
        return copy


class Shortcut:
    """The short way to the objects of one client below one prefix.

    `send` is that of the client's HTTP session, `errors` is what it and the client's signer may raise.
    """

    def __init__(
        self, client: Any, prefix: str, send: Callable[[Any], Any], errors: tuple[type[Exception], ...]
    ) -> None:
        self._prefix = _quoted(prefix)
        self._send = send
        self._errors = errors
        self._pattern: _Pattern | None = None
        client.meta.events.register("before-sign.s3.GetObject", self._see)

    async def get(self, path: str, etag: str) -> tuple[Any, dict[str, Any]] | None:
        """The SDK's response with the object, if it is the listed one, and the context of its request.

        None when the SDK has to be asked. Close the response's `raw`.
        """
        pattern = self._pattern
        if pattern is None:
            return None
        request = pattern.copy(self._prefix, _quoted(path), etag)
        try:
            await pattern.signer.sign("GetObject", request)
            response = await self._send(request.prepare())
        except self._errors:
            return None
        if response.status_code != _OK:
            response.raw.close()
            return None
        return response, request.context

    def _see(self, request: Any, request_signer: Any, **_: Any) -> None:
        # Where the prefix stands twice, as in a bucket of its name, one cannot tell which is which.
        if _COPIED not in request.context and request.url.count(f"/{self._prefix}") == 1:
            self._pattern = _Pattern(request, dict(request.headers.items()), request_signer)


def _quoted(text: str) -> str:
    """As the SDK writes keys into URLs."""
    return quote(text, safe="/~")


def _moved(url: str, prefix: str, path: str) -> str:
    # The first place: a path may have the prefix in it once more.
    return f"{url.partition(f'/{prefix}')[0]}/{prefix}{path}"
