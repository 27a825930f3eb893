"""The workflow management API of DJL Serving.

    GET    /workflows                       list
    POST   /workflows?url=                  register a workflow.json
    POST   /workflows?template=adapter&...  register what a template makes of the other parameters
    GET    /workflows/{name}[/{version}]    describe
    DELETE /workflows/{name}[/{version}]    unregister

A workflow is called as a model is: `POST /predictions/{name}`, or as the `model` of a job.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from worker.errors import LoramillError
from worker.http.answers import Refused, answer, refusal
from worker.http.bodies import read_body
from worker.http.codes import code_of
from worker.http.parameters import Parameters
from worker.http.paths import decoded, segments_of
from worker.workflows.definition import Workflow, from_template, read_workflow
from worker.workflows.registry import Workflows

logger = logging.getLogger(__name__)

PREFIX = "workflows"
MAX_PAGE = 100
_BODY_SECONDS = 10.0

Fetch = Callable[[str], Awaitable[Workflow]]
"""Reads the workflow.json at a path or URI. Raises RegistrationError."""


class WorkflowsApi:
    """Answers what is below PREFIX. `workflows` is set once the model is loaded."""

    def __init__(self, fetch: Fetch, not_ready: Callable[[], str | None]) -> None:
        self._fetch = fetch
        self._not_ready = not_ready
        self.workflows: Workflows | None = None
        self.refusal: str | None = None
        """Why there are none, and never will be."""

    def is_ours(self, request: web.Request) -> bool:
        return segments_of(request)[0] == PREFIX

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request; what is wrong with it is in the answer."""
        try:
            return answer(await self._run(request))
        except Refused as refused:
            return refusal(refused)
        except LoramillError as error:
            code = code_of(error)
            if code is not None:
                return refusal(Refused(code, str(error)))
            logger.exception("a request failed by a mistake of ours")
        except Exception:
            logger.exception("a request failed by a mistake of ours")
        return refusal(Refused(500, "The request failed by a mistake of the worker's; its log has more"))

    async def _run(self, request: web.Request) -> Any:
        names = [decoded(segment) for segment in segments_of(request)[1:]]
        allowed = ("GET", "POST") if not names else ("GET", "DELETE")
        if len(names) > 2:
            raise Refused(404, "Requested resource is not found", kind="ResourceNotFoundException")
        if request.method not in allowed:
            headers = {"Allow": ", ".join(allowed)}
            raise Refused(405, f"The method {request.method} is not allowed here", headers=headers)
        if self.refusal is not None:
            raise Refused(400, self.refusal)
        reason = self._not_ready()
        if reason is not None or self.workflows is None:
            raise Refused(503, f"The worker is not ready: {reason or 'loading the model'}")
        if await read_body(request, 0, _BODY_SECONDS):
            raise Refused(400, "The request has a body; parameters go into the query")
        parameters = Parameters(request.rel_url.raw_query_string)
        if not names:
            list_or_register = _list if request.method == "GET" else self._register
            return await list_or_register(self.workflows, parameters)
        parameters.end()
        if request.method == "DELETE" and names[0] in self.workflows.failed and len(names) == 1:
            await self.workflows.delete(names[0])
            return {"status": f'Model or workflow "{names[0]}" unregistered'}
        found = self.workflows.describe(names[0])
        if len(names) > 1 and names[1] != found.version:
            raise Refused(404, f"The workflow {names[0]} was not found in version {names[1]}")
        if request.method == "GET":
            return _told(found)
        await self.workflows.delete(found.name)
        return {"status": f'Model or workflow "{found.name}" unregistered'}

    async def _register(self, workflows: Workflows, parameters: Parameters) -> Any:
        template = parameters.take("template")
        if template is None:
            url = parameters.required("url")
            parameters.end()
            workflow = await self._fetch(url)
        else:
            workflow = read_workflow(from_template(template, parameters.rest()))
        await workflows.register(workflow)
        return {"status": f'Workflow "{workflow.name}" registered.'}


async def _list(workflows: Workflows, parameters: Parameters) -> Any:
    limit = parameters.number("limit", MAX_PAGE, least=1, most=MAX_PAGE)
    begin = parameters.number("next_page_token", 0, least=0)
    parameters.end()
    names = workflows.names
    page = [workflows.describe(name) for name in names[begin : begin + limit]]
    told: dict[str, Any] = {"workflows": [{"workflowName": one.name, "version": one.version} for one in page]}
    if workflows.failed and begin == 0:
        told["failed"] = workflows.failed
    return told | ({"nextPageToken": str(begin + limit)} if begin + limit < len(names) else {})


def _told(workflow: Workflow) -> Any:
    calls = [
        {"value": call.value, "argument": call.argument, "adapter": call.adapter} for call in workflow.calls
    ]
    return {
        "workflowName": workflow.name,
        "version": workflow.version,
        "models": msgspec.to_builtins(workflow.models),
        "adapters": {
            key: {"name": workflow.adapter_name(key), **msgspec.to_builtins(one)}
            for key, one in workflow.adapters.items()
        },
        "calls": calls,
    }
