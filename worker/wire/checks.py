"""Words for mistakes in messages: what a JSON value is, and what the sender probably meant."""

import functools
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import msgspec

from worker.errors import InvalidMessage, JobError, RowError
from worker.jobs import Failure, Task

_SHOWN = 60

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""What a text may be that says yes or no, in lower case."""


def parse_object(text: bytes | str) -> dict[str, Any]:
    """The JSON object that a body is. Raises InvalidMessage."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidMessage(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidMessage("the body is nested too deeply") from error
    if not isinstance(found, dict):
        raise InvalidMessage("the body is JSON and not an object")
    return found


def read_task(value: object) -> Task:
    """What is to be done with rows; null counts as absent. Raises InvalidMessage."""
    if value is not None and (not isinstance(value, str) or value not in list(Task)):
        raise InvalidMessage(f"task is {show(value)}; it must be generate or score")
    return Task.GENERATE if value is None else Task(value)


def show(value: object) -> str:
    """A JSON value in at most about 60 characters, so that no message grows with its cause."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def kind(value: object) -> str:
    """What a JSON value is, without what it says: for fields that may hold prompts."""
    if isinstance(value, str):
        return "text"
    return "a number" if isinstance(value, int | float) and not isinstance(value, bool) else show(value)


def unknown(given: Mapping[str, object], known: Collection[str]) -> str | None:
    """Which name in `given` is not known, and what it was probably meant to be; None when all are."""
    name = next((name for name in given if name not in known), None)
    return (
        None if name is None else f"{show(name)} is unknown; the nearest known name is {nearest(name, known)}"
    )


def nearest(name: str, known: Collection[str]) -> str:
    """The known name that shares the most pairs of neighbouring letters with this one.

    A message may hold ten thousand wrong names, so this must cost microseconds; difflib takes 0.5 ms.
    """
    pairs = _pairs(name[:_SHOWN])

    def alike(one: str) -> float:
        other = _known_pairs(one)
        return len(pairs & other) / (len(pairs) + len(other))

    return max(sorted(known), key=alike)


def _pairs(name: str) -> frozenset[tuple[str, str]]:
    letters = "^" + "".join(filter(str.isalnum, name.lower())) + "$"
    return frozenset(pairwise(letters))


_known_pairs = functools.cache(_pairs)

MAX_MESSAGE_CHARACTERS = 1000


def failure_of(error: JobError | RowError) -> Failure:
    """The `error` object that this exception becomes in a result line or a manifest."""
    text = str(error)
    if len(text) > MAX_MESSAGE_CHARACTERS:  # it may quote what somebody sent
        text = text[: MAX_MESSAGE_CHARACTERS - 1] + "…"
    return Failure(error.code, text, isinstance(error, RowError) and error.retryable)
