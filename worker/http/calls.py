"""What a call of a model is, and who answers it: the base model with its adapters, or another name."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class Call(NamedTuple):
    """One request that is for a model."""

    id: str
    """Unique."""
    body: bytes
    content_type: str | None
    """Without its parameters, in lower case; None where there is none."""
    adapter: str | None
    """That query or header name for all of it; None if they name none, "" is the base model."""
    headers: Mapping[str, str]
    """Names in lower case."""
    workflow: str | None = None
    """What the rows are put through, where the model was called by a workflow's name."""
    shape: str | None = None
    """`chat` or `completion`, where the route says which of OpenAI's bodies it takes."""


class Reply(NamedTuple):
    """What is sent back."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    outcomes: tuple[str, ...] = ()
    """Of its rows: `completed`, or an error's code."""


class Model(Protocol):
    """What a name stands for that can be called."""

    async def answer(self, call: Call) -> Reply:
        """Raises Refused for what the caller has to be told, and EngineFailed."""
        ...
