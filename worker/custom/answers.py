"""What a handler answered, and how several calls become one with an answer for each."""

import json
import re
from collections.abc import AsyncIterator, Sequence

import msgspec

from worker.custom.messages import Call, Content, Head

FAILED = 424
MAX_BATCH = 999
_NUMBERED = re.compile(r"batch_(\d{1,9})\.(.*)", re.DOTALL)


class Answer:
    """A status with properties, and a body: whole in `content`, or still coming, in `pieces`."""

    def __init__(self, head: Head, pieces: AsyncIterator[bytes] | None = None) -> None:
        self.status = head.code
        self.message = head.message
        self.properties = head.properties
        self.content = head.content
        self.pieces = pieces

    @property
    def is_failure(self) -> bool:
        return self.status >= 300

    @property
    def kind(self) -> str:
        """Its content type; empty when it does not say."""
        return next((value for name, value in self.properties.items() if name.lower() == "content-type"), "")

    @property
    def body(self) -> bytes:
        """What is under `data`, else what comes first; of a stream nothing."""
        named = [value for key, value in self.content if key == "data"]
        return next(iter([*named, *(value for _, value in self.content)]), b"")

    async def read(self) -> bytes:
        """All of the body. Raises HandlerDied when a stream breaks off."""
        if self.pieces is None:
            return self.body
        return b"".join([piece async for piece in self.pieces])

    @property
    def reason(self) -> str:
        """Why it is a failure, in a sentence: its message, and the `error` in its body."""
        try:
            said = json.loads(self.body)["error"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return self.message
        return f"{self.message}: {said}"


def failure(error: str, status: int = FAILED, message: str = "invoke handler failure") -> Head:
    """The answer that says that there is no answer."""
    body = {"code": status, "message": message, "error": error}
    content: Content = (("data", msgspec.json.encode(body)),)
    return Head(status, message, {"content-type": "application/json"}, content)


def merged(calls: Sequence[Call]) -> Call:
    """One call with the requests of several: every name begins with the number of its request."""
    assert 1 < len(calls) <= MAX_BATCH
    properties = {"batch_size": str(len(calls))}
    content: list[tuple[str | None, bytes]] = []
    for number, call in enumerate(calls):
        prefix = f"batch_{number:03}."
        properties.update({prefix + name: value for name, value in call.properties.items()})
        content += [(prefix + (key or "data"), value) for key, value in call.content]
    return Call(calls[0].function, properties, tuple(content))


def parted(head: Head, count: int) -> list[Head]:
    """The answers to so many calls in the one to all of them; all fail if it is not one for each."""
    if count == 1:
        return [head]
    found = [_NUMBERED.fullmatch(key or "") for key, _ in head.content]
    numbers = [-1 if match is None else int(match[1]) for match in found]
    if len(numbers) != count:
        return [failure(f"Batch output size mismatch, expected: {count}, actual: {len(numbers)}")] * count
    if any(not 0 <= number < count for number in numbers):
        keys = ", ".join(repr(key) for key, _ in head.content[:5])
        return [failure(f"Unexpected batch output key: the keys begin with {keys}")] * count
    parts: list[list[tuple[str | None, bytes]]] = [[] for _ in range(count)]
    for match, number, (_, value) in zip(found, numbers, head.content, strict=True):
        assert match is not None
        parts[number].append((match[2] or "data", value))
    return [msgspec.structs.replace(head, content=tuple(part)) for part in parts]
