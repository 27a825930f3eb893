"""What clients of the HTTP side are told: JSON with DJL Serving's fields, also when something is wrong."""

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

_TYPES = {
    401: "UnauthorizedException",
    403: "ForbiddenException",
    405: "MethodNotAllowedException",
    409: "IllegalArgumentException",
    424: "FailedDependencyException",
    503: "ServiceUnavailableException",
    504: "GatewayTimeoutException",
    507: "WlmOutOfMemoryException",
}


class Refused(Exception):
    """The request is answered with `code`; `kind` is the `type` of the answer, by default the code's own."""

    def __init__(
        self, code: int, message: str, *, kind: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.code = code
        self.message = message
        self.headers = headers
        self.outcome: str | None = None
        """The code of the row's error, where it is one row that failed."""
        self.kind = kind or _TYPES.get(
            code, "BadRequestException" if code < 500 else "InternalServerException"
        )
        super().__init__(message)


def answer(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON response, in ASCII: whatever a client sent can be told back."""
    return web.Response(
        body=json.dumps(body).encode() + b"\n",
        status=status,
        content_type="application/json",
        headers=headers,
    )


def refusal(refused: Refused) -> web.Response:
    """`{"code", "type", "message"}` with the code as the status."""
    body = {"code": refused.code, "type": refused.kind, "message": refused.message}
    return answer(body, status=refused.code, headers=refused.headers)
