"""The rows of a message: `inputs`, `adapters`, `parameters` and `ids`, aligned.

A mistake in the shape of the whole raises InvalidMessage; a mistake in one row becomes that row's failure.
`POST /invocations` takes the same bodies, so nothing here knows about queues.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from adapters_sync.layout import is_adapter_name
from worker.errors import AdapterNotFound, InvalidLine, InvalidMessage, InvalidParameters, RowError
from worker.jobs import ChatMessage, Row
from worker.wire.checks import failure_of, kind, show, unknown
from worker.wire.parameters import read_parameters

ROW_FIELDS = frozenset({"id", "input", "inputs", "messages", "adapter", "parameters"})
FIELDS = frozenset({"inputs", "adapters", "parameters", "ids"})

_TEXT_FIELDS = ("input", "inputs", "messages")
_MAX_NAME_SHOWN = 128


def read_rows(body: Mapping[str, Any], *, max_rows: int, adapter: str | None = None) -> tuple[Row, ...]:
    """Read every row of a body.

    `adapter`, unless None, is for every row and wins over the body; "" is the base model. A row object's
    own `adapter` wins over `adapters`, and its own `parameters` over those of the same name in the body's.
    """
    inputs = _inputs(body.get("inputs"), max_rows)
    adapters = _aligned(body, "adapters", len(inputs), str, "text")
    parameters = _aligned(body, "parameters", len(inputs), dict, "an object")
    ids = _ids(body.get("ids"), len(inputs))
    rows = []
    own_ids: Counter[str] = Counter()
    for index, item in enumerate(inputs):
        reader = _RowReader(index, ids[index] if ids else str(index))
        rows.append(reader.read(item, adapters[index], parameters[index], adapter))
        if reader.id_is_sound:
            own_ids[reader.id] += 1
    _refuse_repeated(own_ids)
    return tuple(rows)


class _RowReader:
    """Reads one row; what is known before the first mistake stays with the failed row."""

    def __init__(self, index: int, default_id: str) -> None:
        self.index = index
        self.id = default_id
        self.id_is_sound = True
        self.adapter: str | None = None

    def read(self, item: object, adapter: object, parameters: object, override: str | None) -> Row:
        try:
            fields = self._fields(item)
            self._read_id(fields)
            said = fields.get("adapter", adapter) if override is None else override
            self.adapter = _adapter(said)
            if self.adapter is not None and not is_adapter_name(self.adapter):
                said, self.adapter = show(self.adapter), self.adapter[:_MAX_NAME_SHOWN]
                raise AdapterNotFound(f"Adapter {said} is not registered: no adapter can have that name")
            text, messages = _prompt(fields)
            params = read_parameters({**_parameters(parameters), **_parameters(fields.get("parameters"))})
        except RowError as error:
            return Row(index=self.index, id=self.id, adapter=self.adapter, failure=failure_of(error))
        return Row(
            index=self.index, id=self.id, text=text, messages=messages, adapter=self.adapter, params=params
        )

    @staticmethod
    def _fields(item: object) -> dict[str, Any]:
        if isinstance(item, str):
            return {"input": item}
        if not isinstance(item, dict):
            raise InvalidLine(f"the row is {kind(item)}; it must be text or an object")
        return item

    def _read_id(self, fields: Mapping[str, Any]) -> None:
        said = fields.get("id")
        if said is None:
            return
        if not isinstance(said, str) or not said:
            self.id_is_sound = False
            raise InvalidLine(f"the row's id is {show(said)}; it must be text that is not empty")
        self.id = said


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


def _adapter(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidLine(f"the row's adapter is {show(value)}; it must be text")
    return value or None


def _prompt(fields: Mapping[str, Any]) -> tuple[str | None, tuple[ChatMessage, ...] | None]:
    stranger = unknown(fields, ROW_FIELDS)
    if stranger is not None:
        raise InvalidLine(f"the row's field {stranger}")
    given = [name for name in _TEXT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        raise InvalidLine(
            f"the row has {' and '.join(given) or 'no input'}; it must have one of input, messages"
        )
    value = fields[given[0]]
    if given[0] == "messages":
        return None, _messages(value)
    if not isinstance(value, str):
        raise InvalidLine(f"the row's {given[0]} is {kind(value)}; it must be text")
    return value, None


def _messages(value: object) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidLine(f"the row's messages is {kind(value)}; it must be a list that is not empty")
    return tuple(_message(index, one) for index, one in enumerate(value))


def _message(index: int, value: object) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidLine(f"messages[{index}] is {kind(value)}; it must be an object")
    stranger = unknown(value, ("role", "content"))
    if stranger is not None:
        raise InvalidLine(f"messages[{index}]: {stranger}")
    for name in ("role", "content"):
        if not isinstance(value.get(name), str):
            raise InvalidLine(f"messages[{index}].{name} is {kind(value.get(name))}; it must be text")
    return ChatMessage(role=value["role"], content=value["content"])


def _parameters(value: object) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InvalidParameters(f"the row's parameters is {show(value)}; it must be an object")
    return value or {}
