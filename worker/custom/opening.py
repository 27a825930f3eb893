"""Which handler a model comes with, and what it is started with."""

import logging
from collections.abc import Mapping
from pathlib import Path

from worker.custom.handler import CustomHandler
from worker.custom.messages import Begin
from worker.errors import ModelError
from worker.settings import Settings, handler_options

logger = logging.getLogger(__name__)

MODEL_PY = "model.py"
_INSTALLED_BY_DJL = "requirements.txt"


def find_entry_point(settings: Settings, folder: Path | None) -> str | None:
    """The handler in the model's folder; None when there is none, or custom code is off. Blocking.

    Raises ModelError when the one that was named is not there.
    """
    found = folder is not None and (folder / MODEL_PY).is_file()
    if not settings.custom_code:
        if found:
            logger.warning("the model comes with a handler, which is not run: custom_code is off",
                           extra={"path": str(folder)})  # fmt: skip
        return None
    named = settings.own_entry_point
    if named is None:
        if not found:
            logger.warning("custom_code is on, and the model has no model.py: the engine serves it")
        return MODEL_PY if found and settings.entry_point is None else None
    if folder is None:
        raise ModelError(f"entry_point: {named} is looked for in MODEL, and {settings.model} is no folder")
    if named.endswith(".py") and not (folder / named).is_file():
        raise ModelError(f"entry_point: there is no file {named} in {folder}")
    return named


def make_handler(
    settings: Settings,
    folder: Path,
    entry_point: str,
    *,
    model_id: str | None,
    device_id: str,
    environ: Mapping[str, str],
    properties: str | None,
) -> CustomHandler:
    """The handler, not started yet. `properties` is the text of serving.properties.

    `model_id` is where the weights are when they are not in the folder; `device_id` a GPU's number, or -1.
    """
    if (folder / _INSTALLED_BY_DJL).is_file():
        logger.warning("the model's requirements.txt is not installed; what the handler needs must be here")
    options = handler_options(environ, properties)
    if model_id is not None:
        options["model_id"] = model_id
    common = {"handler": options.get("handler", "handle"), "device_id": device_id}
    return CustomHandler(
        Begin(str(folder.absolute()), entry_point, common),
        options,
        environ=environ,
        batch_size=settings.batch_size,
        call_seconds=settings.predict_timeout_seconds,
        start_seconds=settings.model_loading_timeout_seconds,
    )
