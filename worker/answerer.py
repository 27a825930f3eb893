"""What answers rows, an engine or a handler, as the rest of the worker sees it; and what it stands on."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from worker.delivery.row_runner import RowRunner
from worker.errors import LoramillError
from worker.http.adapters_api import Registry
from worker.http.inference_api import InferenceApi
from worker.http.models_api import ModelsApi
from worker.http.workflows_api import WorkflowsApi
from worker.settings import Settings
from worker.stats import Exporter
from worker.transport.store import S3Store
from worker.workflows.files import fetch_workflow
from worker.workflows.registry import Adapters, Workflows


class Answerer(NamedTuple):
    """What answers rows."""

    rows: RowRunner
    registry: Registry | None
    """None when no adapters are served."""
    wait: Callable[[], Awaitable[None]]
    """Raises when it can serve no more."""
    export: Callable[[], None]


class Foundation(NamedTuple):
    """What is there before an answerer, and outlives it."""

    settings: Settings
    objects: S3Store
    registry: CollectorRegistry
    exporter: Exporter
    owned: set[asyncio.Task[None]]
    """Tasks that must live as long as the worker."""
    calls: InferenceApi
    workflows_api: WorkflowsApi
    models: ModelsApi
    only_workflows: bool
    """Whether nobody named the model itself."""

    async def open_workflows(self, adapters: Adapters | None, *, bare: bool = False) -> Workflows:
        """Those that were registered before, and those of the settings, for all who are to know them.

        Raises LoramillError for one of the settings that cannot be served.
        """
        settings, place = self.settings, self.settings.registered_path
        urls = {url for url in (settings.model, settings.model_id) if url is not None}
        folder = None if place is None else place.parent / "workflows"
        workflows = Workflows(adapters, urls, settings.model_names, folder, bare=bare)
        await workflows.start()
        for url in settings.workflows:
            try:
                await workflows.serve(await fetch_workflow(url, self.objects))
            except LoramillError as error:
                raise LoramillError(f"workflows: {url}: {error}") from error
        if self.only_workflows and len(workflows.of_settings) == 1:
            (self.calls.plain,) = workflows.of_settings
        self.workflows_api.workflows = self.calls.workflows = self.models.workflows = workflows
        return workflows
