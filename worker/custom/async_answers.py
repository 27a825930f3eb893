"""Answers of handlers written for DJL Serving's async mode: one Output, or an async generator of them.

The content of each is what `Output.binary_encode` makes of `data`, `last`, and of `code` and `error` where it
failed. Its data is the answer, or the next piece of it. Runs in the handler's own process.
"""

import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from worker.custom.package.djl_python import Output, PairList

_COUNT = struct.Struct(">h")
_LENGTH = struct.Struct(">i")


class _Said(NamedTuple):
    data: bytes
    is_last: bool = False
    code: int | None = None
    """Of a failure."""
    error: str = ""


def as_whole(answer: Output) -> Output:
    """The answer that is meant by one Output; any that is not of this mode is meant as it stands."""
    pairs = _decoded(answer)
    return answer if pairs is None else _whole(answer, _said(pairs))


async def as_stream(outputs: AsyncGenerator[object, Any]) -> Output:
    """The answer that is meant by a generator: its first Output's properties, and a stream.

    It is whole when the first is the last, or a failure. Raises TypeError for what is no Output.
    """
    first = await _next(outputs)
    if first is None:
        return Output(204, "No content")
    said = _read(first)
    if said.is_last or said.code is not None:
        await outputs.aclose()
        return _whole(first, said)
    return first.add_stream_content(_pieces(said, outputs), None)


async def _pieces(said: _Said, outputs: AsyncGenerator[object, Any]) -> AsyncGenerator[bytes, None]:
    async with aclosing(outputs):
        while True:
            if said.code is not None:
                raise RuntimeError(said.error or f"the handler's code is {said.code}")
            yield said.data
            following = None if said.is_last else await _next(outputs)
            if following is None:
                return
            said = _read(following)


async def _next(outputs: AsyncGenerator[object, Any]) -> Output | None:
    output = await anext(outputs, None)
    if output is not None and not isinstance(output, Output):
        raise TypeError(f"Invalid output type: {type(output)}")
    return output


def _whole(answer: Output, said: _Said) -> Output:
    answer.content = PairList()
    return answer.add(said.data) if said.code is None else answer.error(said.error, code=said.code)


def _read(output: Output) -> _Said:
    pairs = _decoded(output)
    if pairs is not None:
        return _said(pairs)
    data = b"".join(bytes(value) for value in output.content.values)
    return _Said(
        data, code=output.code if output.code >= 300 else None, error=data.decode("utf-8", "replace")
    )


def _said(pairs: dict[str, str]) -> _Said:
    code = pairs.get("code")
    return _Said(
        pairs.get("data", "").encode(),
        pairs["last"].lower() == "true",
        None if code is None else int(code),
        pairs.get("error", ""),
    )


def _decoded(output: Output) -> dict[str, str] | None:
    """What `Output.binary_encode` was given; None for any other content."""
    if output.content.size() != 1 or output.stream_content is not None:
        return None
    try:
        value = memoryview(output.content.value_at(0))
        (count,), at, texts = _COUNT.unpack_from(value), _COUNT.size, []
        for _ in range(2 * count):
            (length,) = _LENGTH.unpack_from(value, at)
            at += _LENGTH.size
            texts.append(str(value[at : at + max(0, length)], "utf-8"))
            at += max(0, length)
    except (struct.error, UnicodeDecodeError, TypeError):
        return None
    pairs = dict(zip(texts[::2], texts[1::2], strict=True))
    return pairs if at == len(value) and "last" in pairs else None
