"""Which handler a model comes with, and what it is started with."""

import ast
import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from adapters_sync.layout import MODEL_PY
from worker.custom import formatter_host
from worker.custom.formatters import Formatters
from worker.custom.handler import CustomHandler
from worker.custom.messages import Begin
from worker.custom.package import djl_python
from worker.errors import ModelError
from worker.settings import Settings, handler_options

logger = logging.getLogger(__name__)

_INSTALLED_BY_DJL = "requirements.txt"
_MOST_NAMED = 10
_MARKS = {"input_formatter", "output_formatter"}


def find_entry_point(settings: Settings, folder: Path | None, function: str = "handle") -> str | None:
    """The handler in the model's folder; None when there is none, or custom code is off. Blocking.

    A model.py with formatters and without the `function` of a handler is none: see `open_formatters`.

    Raises ModelError when the one that was named is not there.
    """
    found = folder is not None and (folder / MODEL_PY).is_file()
    if not settings.custom_code:
        if folder is not None and found:
            what = "formatters, which are" if _only_formats(folder, function) else "a handler, which is"
            logger.warning("the model comes with %s not run: custom_code is off", what,
                           extra={"path": str(folder)})  # fmt: skip
        return None
    named = settings.own_entry_point
    if folder is not None and found and named in {None, MODEL_PY} and _only_formats(folder, function):
        return None
    if named is None:
        if not found:
            logger.warning("custom_code is on, and the model has no model.py: the engine serves it")
        return MODEL_PY if found and settings.entry_point is None else None
    if folder is None:
        raise ModelError(f"entry_point: {named} is looked for in MODEL, and {settings.model} is no folder")
    if named.endswith(".py") and not (folder / named).is_file():
        raise ModelError(f"entry_point: there is no file {named} in {folder}")
    return named


@asynccontextmanager
async def open_formatters(
    settings: Settings, folder: Path | None, *, weights: str, environ: Mapping[str, str]
) -> AsyncIterator[Formatters | None]:
    """What the engine's rows go through; None where custom code is off, or could be nobody's.

    `folder` is the model's, `weights` where its tokenizer is. Raises ModelError.
    """
    found = await asyncio.to_thread(_find_formatters, folder) if settings.custom_code else None
    if not settings.custom_code or (found is None and not settings.lora_enabled):
        yield None
        return
    told = {
        "formatters": str(found is not None).lower(),
        "tokenizer": weights,
        "trust_remote_code": str(settings.trust_remote_code).lower(),
    }
    place = found or Path(djl_python.__file__).parents[1]  # where there is no model's folder to be in
    handler = CustomHandler(
        Begin(str(place), formatter_host.__name__, {"handler": "handle", "device_id": "-1"}),
        told,
        environ=environ,
        call_seconds=settings.predict_timeout_seconds,
        start_seconds=settings.model_loading_timeout_seconds,
    )
    async with Formatters(handler, found) as formatters:
        yield formatters


def _find_formatters(folder: Path | None) -> Path | None:
    """The folder, if there are formatters in its model.py. Blocking."""
    if folder is None or not (folder / MODEL_PY).is_file():
        return None
    _, marks = _defined(folder / MODEL_PY)
    return folder.absolute() if marks else None


def warn_of_code(adapters: Path) -> None:
    """Say which adapters of a folder bring code that nobody runs. Blocking."""
    names = sorted(path.parent.name for path in adapters.glob(f"*/{MODEL_PY}"))
    if names:
        extra = {"adapters": ", ".join(names[:_MOST_NAMED]), "count": len(names)}
        logger.warning("adapters come with code, which is not run: custom_code is off", extra=extra)


def _only_formats(folder: Path, function: str) -> bool:
    names, marks = _defined(folder / MODEL_PY)
    return bool(marks) and names.isdisjoint({function, "*"})


def _defined(path: Path) -> tuple[set[str], set[str]]:
    """Names that a module has, and marks of formatters on its functions, as its text tells. Blocking."""
    names, marks = set[str](), set[str]()
    try:
        pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError):
        return names, marks  # whoever runs it will be told what is wrong
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            marks |= {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list} & _MARKS
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {one.asname or one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending += ast.iter_child_nodes(node)
    return names, marks


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
