"""Input and output formatters: the handler that runs them, in a process as any handler has (see `host`).

Whose they are is said by a key: "" is the model's own, any other a version of an adapter. A call has the
folder of the `model.py` with it, so what was not loaded in this process, or not kept, is loaded then.
"""

import importlib
import importlib.util
import itertools
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from worker.custom.package.djl_python import Input, Output

logger = logging.getLogger("djl_python")

MOST_LOADED = 256
"""Adapters whose modules are kept, those that were used last."""


class _Formatters(NamedTuple):
    module: str
    input: Callable[..., Any] | None
    output: Callable[..., Any] | None


_model: _Formatters | None = None
_adapters: OrderedDict[str, _Formatters] = OrderedDict()
_numbers = itertools.count()


class _Tokenizer:
    """The base model's tokenizer as transformers reads it, once a formatter uses it."""

    def __init__(self, path: str, trust_remote_code: bool) -> None:
        self._path = path
        self._trust_remote_code = trust_remote_code
        self._real: Any = None

    def _load(self) -> Any:
        if self._real is None:
            transformers = importlib.import_module("transformers")  # takes seconds, and few formatters ask
            read = transformers.AutoTokenizer.from_pretrained
            self._real = read(self._path, trust_remote_code=self._trust_remote_code)
        return self._real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._load()(*arguments, **named)

    def __len__(self) -> int:
        return len(self._load())


_tokenizer = _Tokenizer("", trust_remote_code=False)


def handle(inputs: Input) -> None:
    """The first call of a process: load the model's own."""
    global _model, _tokenizer  # noqa: PLW0603 (a handler is a module)
    told = inputs.get_property
    _tokenizer = _Tokenizer(told("tokenizer") or "", trust_remote_code=told("trust_remote_code") == "true")
    if told("formatters") == "true":
        _model = _read(Path(told("model_dir") or ""))


def look(inputs: Input) -> Output:
    """Load those of a key anew, but the model's; tells the functions' names."""
    _forget(inputs.get_as_string("key"))
    try:
        found = _of(inputs)
    except Exception as error:  # noqa: BLE001 (it is somebody else's code)
        return _failed(error, "cannot be loaded")
    return Output().add_as_json({kind: _name(getattr(found, kind)) for kind in ("input", "output")})


def unregister_adapter(inputs: Input) -> None:
    """Unload every version of an adapter."""
    for key in [key for key in _adapters if key.rpartition("/")[0] == inputs.get_as_string("name")]:
        _forget(key)


def format_input(inputs: Input) -> Output:
    """A payload, formatted."""
    return _made(inputs, "input", tokenizer=_tokenizer)


def format_output(inputs: Input) -> Output:
    """A response, formatted."""
    return _made(inputs, "output")


def _made(inputs: Input, kind: str, **named: Any) -> Output:
    try:
        made = getattr(_of(inputs), kind)(inputs.get_as_json("data"), **named)
        return Output().add(_encode(made), "data")
    except Exception as error:  # noqa: BLE001 (it is somebody else's code)
        return _failed(error, "failed")


def _encode(made: object) -> str:
    if not isinstance(made, dict):
        raise TypeError(f"it returned {type(made).__name__}, and must return a dict")
    return json.dumps(made, allow_nan=False)


def _failed(error: Exception, what: str) -> Output:
    logger.error("a model.py with formatters %s", what, exc_info=error)
    return Output().error(f"{type(error).__name__}: {error}", message=what)


def _name(function: Callable[..., Any] | None) -> str | None:
    return None if function is None else function.__name__


def _of(inputs: Input) -> _Formatters:
    key = inputs.get_as_string("key")
    found = _adapters.get(key) if key else _model
    if found is None:
        found = _adapters[key] = _read(Path(inputs.get_as_string("folder")))
        if len(_adapters) > MOST_LOADED:
            _forget(next(iter(_adapters)))
    if key:
        _adapters.move_to_end(key)
    return found


def _forget(key: str) -> None:
    found = _adapters.pop(key, None)
    if found is not None:
        sys.modules.pop(found.module, None)


def _read(folder: Path) -> _Formatters:
    """The functions that a folder's model.py marks. Every one has a module of its own name."""
    name = f"loramill_formatters_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return _Formatters(name, *_all_marked(vars(module)))
    except BaseException:
        del sys.modules[name]
        raise


def _all_marked(module: dict[str, Any]) -> list[Callable[..., Any] | None]:
    marked = [_marked(module, kind) for kind in ("input", "output")]
    if not any(marked):
        raise ValueError("it has no function that is marked @input_formatter or @output_formatter")
    return marked


def _marked(module: dict[str, Any], kind: str) -> Callable[..., Any] | None:
    found = {id(one): one for one in module.values() if getattr(one, f"is_{kind}_formatter", None) is True}
    if len(found) > 1:
        names = ", ".join(sorted(one.__name__ for one in found.values()))
        raise ValueError(f"it has {len(found)} functions that are marked @{kind}_formatter: {names}")
    return next(iter(found.values()), None)
