"""The model of a worker that is told of workflows and of no model: the one that they name."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import NamedTuple

from worker.errors import LoramillError, SettingsError
from worker.transport.clients import Clients
from worker.transport.store import S3Store
from worker.workflows.definition import Workflow
from worker.workflows.files import fetch_workflow
from worker.workflows.registry import canonical


class Named(NamedTuple):
    """What workflows need."""

    model: str
    """Its place."""
    adapters: bool
    """Whether there are any."""


async def named_by(urls: Sequence[str]) -> Named:
    """What the workflow.json files at `urls` name. Raises SettingsError."""
    clients = Clients()
    async with AsyncExitStack() as stack:
        if any(url.startswith("s3://") for url in urls):
            await stack.enter_async_context(clients)
        workflows = [await _fetched(url, clients) for url in urls]
    models = sorted({canonical(one.url) for workflow in workflows for one in workflow.models.values()})
    if len(models) > 1:
        said = f"they name the models {' and '.join(models)}, and a worker has one; give --model"
        raise SettingsError([f"workflows: {said}"])
    return Named(models[0], any(workflow.adapters for workflow in workflows))


async def _fetched(url: str, clients: Clients) -> Workflow:
    try:
        return await fetch_workflow(url, S3Store(clients))
    except LoramillError as error:
        raise SettingsError([f"workflows: {url}: {error}"]) from error
