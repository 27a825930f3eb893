"""What answers rows, an engine or a handler, as the rest of the worker sees it; and what it stands on."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from worker.delivery.rows import RowRunner
from worker.http.adapters_api import Registry
from worker.http.inference_api import InferenceApi
from worker.http.models_api import ModelsApi
from worker.http.workflows_api import WorkflowsApi
from worker.settings import Settings
from worker.stats import Exporter
from worker.transport.store import S3Store


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
