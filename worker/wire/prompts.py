"""What a row is to be answered: chat messages, token ids."""

from worker.errors import InvalidLine
from worker.jobs import ChatMessage
from worker.wire.checks import kind, show, unknown
from worker.wire.parameters import MAX_TOKEN_ID

_NOT_HERE = ("name", "refusal", "audio", "tool_calls", "tool_call_id", "function_call")
"""Fields of OpenAI's messages that may be null, which says nothing."""


def read_messages(value: object, *, parts: bool = False) -> tuple[ChatMessage, ...]:
    """A list of `{"role", "content"}`, not empty. InvalidLine names what is wrong, without its text.

    With `parts`, as in OpenAI's API, a content may be a list of `{"type": "text", "text"}`, which are put
    together as lines, and OpenAI's other fields may be there as null.
    """
    if not isinstance(value, list) or not value:
        raise InvalidLine(f"the row's messages is {kind(value)}; it must be a list that is not empty")
    return tuple(_message(f"messages[{index}]", one, parts=parts) for index, one in enumerate(value))


def read_token_ids(value: object, field: str) -> tuple[int, ...] | None:
    """A list of token ids; None when it is something else. Raises InvalidLine for an id beyond the limit."""
    if not isinstance(value, list) or not all(_is_whole(token) for token in value):
        return None
    for index, token in enumerate(value):
        if not 0 <= token <= MAX_TOKEN_ID:
            limit = f"a token id from 0 to {MAX_TOKEN_ID}"
            raise InvalidLine(f"the row's {field}[{index}] is {show(token)}; it must be {limit}")
    return tuple(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _message(name: str, value: object, *, parts: bool) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidLine(f"{name} is {kind(value)}; it must be an object")
    if parts:
        value = {one: said for one, said in value.items() if one not in _NOT_HERE or said is not None}
    stranger = unknown(value, ("role", "content"))
    if stranger is not None:
        raise InvalidLine(f"{name}: {stranger}")
    content = value.get("content")
    if parts and isinstance(content, list):
        content = "\n".join(_part(f"{name}.content[{index}]", one) for index, one in enumerate(content))
    for field, said in (("role", value.get("role")), ("content", content)):
        if not isinstance(said, str):
            raise InvalidLine(f"{name}.{field} is {kind(said)}; it must be text")
    return ChatMessage(role=value["role"], content=str(content))


def _part(name: str, value: object) -> str:
    if not isinstance(value, dict):
        raise InvalidLine(f"{name} is {kind(value)}; it must be an object")
    if value.get("type") != "text":
        raise InvalidLine(f"{name}.type is {show(value.get('type'))}; it must be 'text'")
    stranger = unknown(value, ("type", "text"))
    if stranger is not None:
        raise InvalidLine(f"{name}: {stranger}")
    if not isinstance(value.get("text"), str):
        raise InvalidLine(f"{name}.text is {kind(value.get('text'))}; it must be text")
    return str(value["text"])
