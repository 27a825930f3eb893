"""Settings as flags of a typer command, without writing any of them down twice."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from adapters_sync.settings import SettingInfo

_PANELS = (
    (
        "Queue and results",
        (
            "queue_url",
            "output_prefixes",
            "input_prefixes",
            "rows_per_part",
            "visibility",
            "drain",
            "exit",
            "dead_letter",
            "max_rows",
            "max_in_flight",
        ),
    ),
    (
        "Adapters",
        ("adapter", "sync", "settle", "lora", "max_lora", "max_cpu", "enable_lora", "fully", "long_lora"),
    ),
    ("Model and engine", ("model", "device", "dtype", "max_", "trust", "tensor", "cache", "kernel")),
)


def with_settings(infos: list[SettingInfo]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each setting; it gets those that were given as `flags`, by field name.

    A flag takes text: the reader checks all settings together, and reports every mistake at once.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**arguments: Any) -> None:
            flags = {info.name: arguments.pop(info.name) for info in infos}
            command(flags=flags, **arguments)

        own = [p for p in inspect.signature(command).parameters.values() if p.name != "flags"]
        added = [
            inspect.Parameter(
                info.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(info)
            )
            for info in infos
        ]
        called.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        return called

    return decorate


def _annotation(info: SettingInfo) -> Any:
    panel = next((title for title, starts in _PANELS if info.name.startswith(starts)), "Service")
    if info.kind is bool:
        flags = f"{info.flag}/--no-{info.flag.removeprefix('--')}"
        return Annotated[
            bool | None, typer.Option(flags, help=info.help, rich_help_panel=panel, show_default=False)
        ]
    metavar = "|".join(info.allowed) or info.type.upper()
    shown = f"{info.help} Default: {info.default}." if info.default not in {None, ()} else info.help
    return Annotated[
        str | None,
        typer.Option(info.flag, help=shown, metavar=metavar, rich_help_panel=panel, show_default=False),
    ]
