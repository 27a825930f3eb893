"""Bodies of calls through the input formatter of the adapter that they are for."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from worker.adapters.directory import AdapterDirectory
from worker.custom.formatters import Formatters
from worker.errors import HandlerRefusedRow, RowError
from worker.http.answers import Refused
from worker.jobs import Task
from worker.wire.formatting import KEPT, check_kept
from worker.wire.openai_calls import shape_of


class Formatted(NamedTuple):
    """What a call's body is, and whether its rows have yet to be formatted one by one."""

    body: dict[str, Any]
    by_row: bool = False
    trouble: RowError | None = None
    """Why the adapter that all of it is for cannot be used, and so its formatter was not asked."""


class BodyFormatting:
    """What all rows of a body share goes through the formatter whole, as it would in DJL Serving.

    Where rows have adapters of their own, or are put through a workflow, each is formatted by itself.
    """

    def __init__(self, formatters: Formatters, adapters: AdapterDirectory) -> None:
        self._formatters = formatters
        self._adapters = adapters

    async def format(self, body: dict[str, Any], *, adapter: str | None, workflow: str | None) -> Formatted:
        """A body of ours; OpenAI's, and those to be scored, stay what they are.

        `adapter` and `workflow` are what is said beside the body. Raises Refused.
        """
        if shape_of(body) is not None or body.get("task") == Task.SCORE:
            return Formatted(body)
        if workflow is not None or (adapter is None and _is_mixed(body)):
            return Formatted(body, by_row=True)
        async with AsyncExitStack() as stack:
            folder, name = None, body.get("adapters") if adapter is None else adapter
            name = name[0] if isinstance(name, list) and name else name
            try:
                if isinstance(name, str) and name:
                    folder = await stack.enter_async_context(self._adapters.use(name, float("inf")))
                formatter = (await self._formatters.of(folder)).input
            except RowError as error:
                return Formatted(body, trouble=error)
            if formatter is None:
                return Formatted(body)
            try:
                made = await self._formatters.run(formatter, body, urgent=True)
                check_kept(body, made, formatter)
                _expect_one_adapter(made, formatter, adapter)
            except HandlerRefusedRow as error:
                refused = Refused(424, str(error))
                refused.outcome = error.code
                raise refused from error
        return Formatted({name: body[name] for name in KEPT if name in body} | made)


def _expect_one_adapter(made: Mapping[str, Any], who: object, adapter: str | None) -> None:
    """Raise HandlerRefusedRow when a formatter gave rows adapters, and nobody beside the body says which."""
    if adapter is None and _is_mixed(made):
        raise HandlerRefusedRow(f"The {who} gave rows adapters of their own")


def _is_mixed(body: Mapping[str, Any]) -> bool:
    """Whether rows of a body name adapters of their own."""
    adapters, inputs = body.get("adapters"), body.get("inputs")
    if isinstance(adapters, list) and any(one != adapters[0] for one in adapters):
        return True
    return isinstance(inputs, list) and any(isinstance(one, dict) and "adapter" in one for one in inputs)
