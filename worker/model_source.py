"""Where the base model's files are, and what `serving.properties` beside them says."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from worker.errors import LoramillError, ModelError, ObjectNotFound
from worker.settings import Settings
from worker.transport.store import Store

logger = logging.getLogger(__name__)

PROPERTIES = "serving.properties"
_MAX_PROPERTIES_BYTES = 1 << 20
_NOT_WEIGHTS = frozenset({"adapters", ".versions", ".staging"})
"""Folders beside the weights that the mirror takes care of."""


def local_properties(settings: Settings) -> str | None:
    """The text of serving.properties in a local model's folder; None when there is none. Blocking."""
    if settings.model_dir is None:
        return None
    try:
        return (settings.model_dir / PROPERTIES).read_text(encoding="latin-1")  # as the Java format has it
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise LoramillError(
            f"model: {settings.model_dir / PROPERTIES} cannot be read: {exc.strerror}"
        ) from exc


async def remote_properties(settings: Settings, store: Store) -> str | None:
    """The same for a model in S3."""
    if settings.model_uri is None:
        return None
    try:
        body, _ = await store.get(settings.model_uri + PROPERTIES, max_bytes=_MAX_PROPERTIES_BYTES)
    except ObjectNotFound:
        return None
    return body.decode("latin-1")


async def fetch_weights(settings: Settings, store: Store, on_bytes: Callable[[int], None]) -> str:
    """A folder on this machine with the base model, downloaded if it is in S3; else its hub id.

    Raises ModelError when nothing is there.
    """
    weights = settings.weights
    assert weights is not None, "the command requires a model"
    if not weights.startswith("s3://"):
        return await asyncio.to_thread(local_weights, settings)
    return str(await _fetch(weights, settings, store, on_bytes))


async def fetch_model_folder(
    settings: Settings, store: Store, on_bytes: Callable[[int], None]
) -> Path | None:
    """MODEL as a folder on this machine, downloaded if it is in S3; None for a hub id. Raises ModelError."""
    if settings.model_uri is not None:
        return await _fetch(settings.model_uri, settings, store, on_bytes)
    folder = settings.model_dir
    if folder is not None and not await asyncio.to_thread(folder.is_dir):
        raise ModelError(f"model: {settings.model} is not a folder")
    return folder


async def _fetch(weights: str, settings: Settings, store: Store, on_bytes: Callable[[int], None]) -> Path:
    uri = weights.rstrip("/") + "/"
    target = settings.cache_path / "models" / uri.removeprefix("s3://").rstrip("/")
    try:
        await store.download_tree(uri, target, on_bytes=on_bytes, without=_NOT_WEIGHTS)
    except ObjectNotFound as exc:
        raise ModelError(f"model: there is nothing under {uri}") from exc
    return target


def local_weights(settings: Settings) -> str:
    """The folder with a base model that is not in S3, or its hub id. Blocking. Raises ModelError."""
    weights = settings.weights
    assert weights is not None, "the command requires a model"
    folder = _folder(weights)
    if folder is None and settings.model_dir is not None and weights == settings.model:
        raise ModelError(f"model: {weights} is not a folder")
    return weights if folder is None else str(folder)


def _folder(weights: str) -> Path | None:
    path = Path(weights).expanduser()
    return path if path.is_dir() else None


def logging_bytes() -> Callable[[int], None]:
    """Progress of a download, a line every 256 MiB."""
    step = 256 << 20
    fetched = 0

    def on_bytes(count: int) -> None:
        nonlocal fetched
        before, fetched = fetched // step, fetched + count
        if fetched // step > before:
            logger.info("downloading the model", extra={"bytes": fetched})

    return on_bytes
