"""The workflow management API of DJL Serving.

    GET    /workflows                       list
    POST   /workflows?url=                  register a workflow.json
    POST   /workflows?template=adapter&...  register what a template makes of the other parameters
    GET    /workflows/{name}[/{version}]    describe
    DELETE /workflows/{name}[/{version}]    unregister

A workflow is called as a model is: `POST /predictions/{name}`, or as the `model` of a job.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from worker.http.answers import Refused, answer
from worker.http.parameters import Parameters
from worker.http.paths import decoded, segments_of
from worker.http.requests import expect_method, expect_no_body, expect_ready, no_route
from worker.workflows.definition import Workflow, from_template, read_workflow
from worker.workflows.registry import Workflows

PREFIX = "workflows"
MAX_PAGE = 100

Fetch = Callable[[str], Awaitable[Workflow]]
"""Reads the workflow.json at a path or URI. Raises RegistrationError."""


class WorkflowsApi:
    """Answers what is below PREFIX. `workflows` is set once the model is loaded."""

    def __init__(self, fetch: Fetch, not_ready: Callable[[], str | None]) -> None:
        self._fetch = fetch
        self._not_ready = not_ready
        self.workflows: Workflows | None = None

    def is_ours(self, request: web.Request) -> bool:
        return segments_of(request)[0] == PREFIX

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request. Raises Refused and LoramillError."""
        names = [decoded(segment) for segment in segments_of(request)[1:]]
        if len(names) > 2:
            raise no_route()
        expect_method(request, "GET", "DELETE" if names else "POST")
        workflows = expect_ready(self._not_ready(), self.workflows)
        await expect_no_body(request)
        parameters = Parameters(request.rel_url.raw_query_string)
        if not names:
            list_or_register = _list if request.method == "GET" else self._register
            return answer(await list_or_register(workflows, parameters))
        parameters.end()
        name, *version = names
        if version or request.method == "GET":
            found = workflows.describe(name)
            if version and version[0] != found.version:
                raise Refused(404, f"The workflow {name} was not found in version {version[0]}")
        if request.method == "GET":
            return answer(_told(found))
        await workflows.delete(name)
        return answer({"status": f'Model or workflow "{name}" unregistered'})

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
