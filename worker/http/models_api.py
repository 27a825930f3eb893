"""The model management API of DJL Serving, for a worker that has one model.

    GET    /models                       list
    GET    /models/{model}[/{version}]   describe

Workflows are listed too, each with the model under its own name for it. Other models are not registered here,
and this one is not unregistered: a worker is started with its model, and ends with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import web

from worker.http.answers import Refused, answer
from worker.http.parameters import Parameters
from worker.http.paths import decoded, segments_of
from worker.http.requests import expect_no_body, no_route
from worker.workflows.registry import Workflows

PREFIX = "models"
MAX_PAGE = 100
_ALONE = {
    "POST": "A worker serves one model, by its setting MODEL; start another for another",
    "DELETE": "A worker serves one model as long as it runs; stop the worker",
    "PUT": "A worker is one process with one model, and has no number of workers to be changed",
}
"""Why something cannot be done, by method."""


class Served(NamedTuple):
    """The worker's model."""

    name: str
    url: str
    """MODEL."""
    batch_size: int
    """Rows in a batch."""
    queue_size: int
    """Calls that may be read or at work."""


class ModelsApi:
    """Answers what is below PREFIX, but adapters and calls. `workflows` is set once the model is loaded."""

    def __init__(
        self, served: Served, not_ready: Callable[[], str | None], num_calls: Callable[[], int]
    ) -> None:
        self._served = served
        self._not_ready = not_ready
        self._num_calls = num_calls
        self.workflows: Workflows | None = None

    def is_ours(self, request: web.Request) -> bool:
        first, *rest = segments_of(request)
        return first == PREFIX and rest[1:2] not in (["adapters"], ["invoke"])

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request. Raises Refused and LoramillError."""
        names = [decoded(segment) for segment in segments_of(request)[1:]]
        if len(names) > 2:
            raise no_route()
        if request.method not in {"GET", "HEAD"}:
            said = _ALONE.get(request.method, f"The method {request.method} is not allowed here")
            raise Refused(405, said, headers={"Allow": "GET, HEAD"})
        await expect_no_body(request)
        parameters = Parameters(request.rel_url.raw_query_string)
        if not names:
            return answer(self._list(parameters))
        parameters.end()
        return answer([self._described(*names)])

    def _list(self, parameters: Parameters) -> Any:
        limit = parameters.number("limit", MAX_PAGE, least=1, most=MAX_PAGE)
        begin = parameters.number("next_page_token", 0, least=0)
        parameters.end()
        status = "READY" if self._not_ready() is None else "PENDING"
        listed: list[dict[str, Any]] = [{"modelName": self._served.name, "modelUrl": self._served.url}]
        for name in [] if self.workflows is None else self.workflows.names:
            assert self.workflows is not None
            found = self.workflows.describe(name)
            listed += [
                {"modelName": f"{name}:{key}", "version": found.version, "modelUrl": one.url}
                for key, one in found.models.items()
            ]
        page = {"models": [one | {"status": status} for one in listed[begin : begin + limit]]}
        return page | ({"nextPageToken": str(begin + limit)} if begin + limit < len(listed) else {})

    def _described(self, name: str, version: str | None = None) -> Any:
        if name == self._served.name:
            own, models = None, {name: self._served.url}
        elif self.workflows is not None and self.workflows.knows(name):
            found = self.workflows.describe(name)
            own, models = found.version, {key: one.url for key, one in found.models.items()}
        else:
            raise Refused(404, f"The model {name} was not found")
        if version not in {None, own}:
            raise Refused(404, f"The model {name} was not found in version {version}")
        said = {"workflowName": name} | ({} if own is None else {"version": own})
        return said | {"models": [self._model(key, url) for key, url in models.items()]}

    def _model(self, name: str, url: str) -> dict[str, Any]:
        return {
            "modelName": name,
            "modelUrl": url,
            "batchSize": self._served.batch_size,
            "queueSize": self._served.queue_size,
            "requestInQueue": self._num_calls(),
            "status": "Healthy" if self._not_ready() is None else "PENDING",
            "loadedAtStartup": True,
        }
