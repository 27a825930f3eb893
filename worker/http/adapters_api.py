"""The adapter management API of DJL Serving.

    GET    [/models/{model}]/adapters                     list
    POST   [/models/{model}]/adapters                     register
    GET    [/models/{model}]/adapters/{adapter}           describe
    DELETE [/models/{model}]/adapters/{adapter}           delete
    POST   [/models/{model}]/adapters/{adapter}/update    update

Everything below `/models` and `/adapters` is answered here, and in JSON. A path is split before its segments
are decoded, so a name with an encoded slash is one name.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
from aiohttp import web

from worker.adapters.info import AdapterInfo
from worker.errors import LoramillError
from worker.http.answers import Refused, answer
from worker.http.codes import refused_for
from worker.http.parameters import Parameters
from worker.http.paths import decoded, segments_of
from worker.http.requests import expect_method, expect_no_body, expect_ready, no_route

PREFIXES = ("models", "adapters")
ALIAS_HEADER = "X-Amzn-SageMaker-Adapter-Alias"
MAX_PAGE = 100


class Registry(Protocol):
    """What knows the adapters: see AdapterRegistry. A text that a change returns takes the place of ours."""

    def close(self) -> None: ...
    async def page(self, begin: int, limit: int) -> tuple[list[AdapterInfo], int | None]: ...
    async def describe(self, name: str) -> AdapterInfo: ...
    async def register(
        self,
        name: str,
        src: str,
        *,
        preload: bool,
        pin: bool,
        options: Mapping[str, str] | None,
        alias: str | None,
    ) -> str | None: ...
    async def update(
        self,
        name: str,
        *,
        src: str | None,
        preload: bool | None,
        pin: bool | None,
        options: Mapping[str, str] | None,
        alias: str | None,
    ) -> str | None: ...
    async def delete(self, name: str, *, alias: str | None) -> str | None: ...


class _Done(NamedTuple):
    """What became of an adapter, and what is said of that when it is not what is always said."""

    verb: str
    said: str | None


_Action = Callable[[Registry, Parameters, str, str | None], Awaitable[Any]]
"""Of an adapter's name, and what its client calls it."""


class AdaptersApi:
    """Answers what is below PREFIXES. `registry` is set once the model is loaded.

    `not_ready` gives the reason while nothing can be served.
    """

    def __init__(self, model: str, lora_enabled: bool, not_ready: Callable[[], str | None]) -> None:
        self._model = model
        self._lora_enabled = lora_enabled
        self._not_ready = not_ready
        self.registry: Registry | None = None

    def close(self) -> None:
        """To be called when nothing is answered any more."""
        if self.registry is not None:
            self.registry.close()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer one request. Raises Refused and LoramillError."""
        model, adapter, actions = _route(segments_of(request))
        expect_method(request, *sorted(actions))
        action = actions[request.method]
        if model not in {None, self._model}:
            raise Refused(404, f"The model {model} was not found")
        if not self._lora_enabled:
            raise Refused(400, "LoRA is not enabled.")
        registry = expect_ready(self._not_ready(), self.registry)
        await expect_no_body(request)
        parameters = Parameters(request.rel_url.raw_query_string)
        name = adapter or ""
        if action is _register:
            name = parameters.required("name")
        alias = request.headers.get(ALIAS_HEADER) or None
        if alias is not None and not alias.isprintable():
            raise Refused(400, f"The header {ALIAS_HEADER} has something else than text")
        work = action(registry, parameters, name, alias)
        return answer(await _under_alias(name, alias or name, work))


def is_ours(request: web.Request) -> bool:
    """Whether a request is for this API."""
    return segments_of(request)[0] in PREFIXES


def _route(segments: list[str]) -> tuple[str | None, str | None, dict[str, _Action]]:
    """Model, adapter and what can be done there, by method. Raises Refused for a path that leads nowhere."""
    model, rest = None, segments
    if segments[0] == "models" and len(segments) > 1:
        model, rest = decoded(segments[1]), segments[2:]
    match rest:
        case ["adapters"]:
            return model, None, {"GET": _list, "POST": _register}
        case ["adapters", adapter]:
            return model, decoded(adapter), {"GET": _describe, "DELETE": _delete}
        case ["adapters", adapter, "update"]:
            return model, decoded(adapter), {"POST": _update}
        case _:
            raise no_route()


async def _under_alias(name: str, shown: str, work: Awaitable[Any]) -> Any:
    """Do it, and let no message call the adapter otherwise than the client does."""
    try:
        found = await work
    except LoramillError as error:
        refused = refused_for(error)
        if refused is None:
            raise
        raise Refused(refused.code, _renamed(refused.message, name, shown)) from error
    if not isinstance(found, _Done):
        return found
    status = f"Adapter {shown} {found.verb}" if found.said is None else _renamed(found.said, name, shown)
    return {"status": status}


def _renamed(message: str, name: str, shown: str) -> str:
    if not name:
        return message
    return re.sub(rf"(\b[Aa]dapter ){re.escape(name)}(?![\w.-])", lambda found: found[1] + shown, message)


# What can be done.


async def _list(registry: Registry, parameters: Parameters, _: str, __: str | None) -> Any:
    limit = parameters.number("limit", MAX_PAGE, least=1, most=MAX_PAGE)
    begin = parameters.number("next_page_token", 0, least=0)
    parameters.end()
    adapters, following = await registry.page(begin, limit)
    page = {"adapters": msgspec.to_builtins(adapters)}
    return page if following is None else {"nextPageToken": str(following), **page}


async def _describe(registry: Registry, parameters: Parameters, name: str, _: str | None) -> Any:
    parameters.end()
    return msgspec.to_builtins(await registry.describe(name))


async def _register(registry: Registry, parameters: Parameters, name: str, alias: str | None) -> _Done:
    src = parameters.required("src")
    preload, pin = parameters.boolean("preload"), parameters.boolean("pin")
    said = await registry.register(
        name, src, preload=preload is not False, pin=bool(pin), options=parameters.rest(), alias=alias
    )
    return _Done("registered", said)


async def _update(registry: Registry, parameters: Parameters, name: str, alias: str | None) -> _Done:
    src = parameters.take("src")
    if src == "":
        raise Refused(400, "The parameter src is empty")
    preload, pin = parameters.boolean("preload"), parameters.boolean("pin")
    said = await registry.update(
        name, src=src, preload=preload, pin=pin, options=parameters.rest(), alias=alias
    )
    return _Done("updated", said)


async def _delete(registry: Registry, parameters: Parameters, name: str, alias: str | None) -> _Done:
    parameters.end()
    return _Done("unregistered", await registry.delete(name, alias=alias))
