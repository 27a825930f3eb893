"""A row through a workflow: the model's answer to one call is what the next is asked."""

from collections.abc import Awaitable, Callable

import msgspec

from worker.errors import InvalidLine, ModelNotFound
from worker.jobs import Failure, Raw, Row, RowResult, Task
from worker.wire.checks import failure_of
from worker.workflows.definition import IN, Workflow


def _asked(row: Row, text: str) -> Raw | None:
    """What a later call's formatter gets: the answer before it, with the parameters that were sent."""
    if row.raw is None:
        return None
    kept = {name: value for name, value in row.raw.item.items() if name in {"id", "adapter", "parameters"}}
    return msgspec.structs.replace(row.raw, item={"inputs": text} | kept)


def _told_of(result: RowResult, failure: Failure, workflow: Workflow, value: str) -> RowResult:
    """The failure with the call that it is of, where there are several."""
    if len(workflow.calls) == 1:
        return result
    message = f"{value} of workflow {workflow.name}: {failure.message}"
    return msgspec.structs.replace(result, failure=msgspec.structs.replace(failure, message=message))


def no_workflow(name: str) -> Workflow:
    """Where there are none. Raises ModelNotFound."""
    raise ModelNotFound(f"The model {name} was not found")


async def run_chain(workflow: Workflow, row: Row, run: Callable[[Row], Awaitable[RowResult]]) -> RowResult:
    """What the workflow's last call says. All calls have the row's parameters, and all tokens are counted.

    `run` takes a row that is put through one adapter, or the base model. The result is told of the last
    call's adapter; the first call that fails is the row's failure.
    """
    if row.task is Task.SCORE and len(workflow.calls) > 1:
        refused = InvalidLine(f"the workflow {workflow.name} has several calls; a score is of one")
        return RowResult(row=row, failure=failure_of(refused))
    said: dict[str, str] = {}
    prompt_tokens = completion_tokens = 0
    params = row.params
    for call in workflow.calls:
        adapter = None if call.adapter is None else workflow.adapter_name(call.adapter)
        step = msgspec.structs.replace(row, adapter=adapter, workflow=None)
        if call.argument != IN:
            text = said[call.argument]
            step = msgspec.structs.replace(step, text=text, tokens=None, messages=None, raw=_asked(row, text))
            if row.failure is not None:  # a formatter has made it one that can be read
                step = msgspec.structs.replace(step, failure=None, params=params)
        result = await run(step)
        params = result.row.params
        prompt_tokens += result.prompt_tokens
        completion_tokens += result.completion_tokens
        if result.failure is not None:
            result = _told_of(result, result.failure, workflow, call.value)
            break
        said[call.value] = result.text or ""
    # What is told of the row's input, and the shape of the answer, follow from what was sent.
    told = msgspec.structs.replace(result.row, text=row.text, tokens=row.tokens, messages=row.messages)
    return msgspec.structs.replace(
        result, row=told, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
    )
