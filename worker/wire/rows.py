"""The rows of a message: `inputs`, `adapters`, `parameters` and `ids`, aligned.

A mistake in the shape of the whole raises InvalidMessage; a mistake in one row becomes that row's failure.
`POST /invocations` takes the same bodies, so nothing here knows about queues.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from worker.errors import InvalidMessage
from worker.jobs import Given, Row, Task
from worker.wire.checks import kind, show
from worker.wire.draft import Draft
from worker.wire.lines import read_item

FIELDS = frozenset({"inputs", "adapters", "parameters", "ids"})


def read_rows(
    body: Mapping[str, Any],
    *,
    max_rows: int,
    adapter: str | None = None,
    task: Task = Task.GENERATE,
    base_models: Collection[str] | None = None,
    workflow: str | None = None,
    keeps_raw: bool = False,
) -> tuple[Row, ...]:
    """Read every row of a body, each in the format that it has.

    `adapter`, unless None, is for every row and wins over the body; "" is the base model. A row object's
    own `adapter` wins over `adapters`, and its own `parameters` over those of the same name in the body's.
    With a `workflow` no row may name an adapter. `keeps_raw` keeps native rows as they were sent, too.
    """
    inputs = _inputs(body.get("inputs"), max_rows)
    adapters = _aligned(body, "adapters", len(inputs), str, "text")
    parameters = _aligned(body, "parameters", len(inputs), dict, "an object")
    ids = _ids(body.get("ids"), len(inputs))
    rows = []
    own_ids: Counter[str] = Counter()
    for index, item in enumerate(inputs):
        given = Given(
            adapter=adapters[index],
            override=adapter,
            parameters=parameters[index],
            task=task,
            workflow=workflow,
            base_models=base_models,
            keeps_raw=keeps_raw,
        )
        draft = Draft(index, ids[index] if ids else str(index), given)
        rows.append(read_item(draft, item))
        if draft.id_is_sound:
            own_ids[draft.id] += 1
    _refuse_repeated(own_ids)
    return tuple(rows)


def _inputs(value: object, max_rows: int) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        given = "absent" if value is None else kind(value)
        raise InvalidMessage(f"inputs is {given}; it must be text, a list of texts or a list of row objects")
    if not 1 <= len(value) <= max_rows:
        raise InvalidMessage(f"inputs has {len(value)} rows; it must have from 1 to {max_rows}")
    return value


def _aligned(body: Mapping[str, Any], name: str, count: int, scalar: type, words: str) -> list[Any]:
    value = body.get(name)
    if value is None or isinstance(value, scalar):
        return [value] * count
    if not isinstance(value, list):
        raise InvalidMessage(f"{name} is {kind(value)}; it must be {words} or a list of them")
    if len(value) != count:
        raise InvalidMessage(f"Number of {name} is not equal to the number of inputs")
    return value


def _ids(value: object, count: int) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise InvalidMessage("ids must be a list of texts that are not empty")
    if len(value) != count:
        raise InvalidMessage("Number of ids is not equal to the number of inputs")
    return value


def _refuse_repeated(ids: Counter[str]) -> None:
    repeated, count = ids.most_common(1)[0] if ids else ("", 0)
    if count > 1:
        raise InvalidMessage(f"row id {show(repeated)} is used {count} times; ids must be unique")
