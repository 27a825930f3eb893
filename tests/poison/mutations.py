"""Mistakes in JSON: a good value goes in, and the text of a wrong one comes out.

Whatever is left to chance comes from `rng`, so that a seed repeats it.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

DEPTHS = (2, 60, 300, 5_000, 100_000)
LONG = (257, 5_000, 60_000)
NAMES = ("", " id", "ID", "ïd", "\uff41dapter", "🜚", "__proto__", "$ref", "inputs\0", "x" * 300, "1", "uri")
TEXTS = (
    "", " ", "\0", "\x1b[31m", "a\r\nb", "\u2028", "\x7f", "\ufeff", "é", "🜚" * 9, "..", "../../x", "%00",
    "null", "NaN", "0", "-1", "s3://", "s3://mill/out/", "s3://elsewhere/x/", "${x}", "{{ x }}", "</s>",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, -0.0, 0.1, -1.5, 1e308,
    5e-324,
)  # fmt: skip


class Raw(NamedTuple):
    """What is written as it is, JSON or not."""

    text: str


READABLE = (
    *map(Raw, ("1e999", "-1e999", "9" * 400, "9" * 5_000, "1." + "0" * 3_000 + "1", "1e-999999", "-0")),
    *map(Raw, (r'"\ud83d\udf1a"', r'"\u0000"', r'"\uffff"', r'"\u202e\u0007"')),
)
"""What JSON has, and few readers take alike."""
UNREADABLE = (
    *map(Raw, ("NaN", "Infinity", "-Infinity", "01", "+1", ".5", "0x10", "True", "None", "undefined", "'x'")),
    *map(
        Raw, ("", "{}{}", "[1,]", r'"\ud800"', r'"a\udfffb"', r'"\udc00\ud800"', r'"\x41"', '"\t"', '"open')
    ),
)
"""What JSON has not."""


def written(value: object) -> str:
    """JSON, but for what is Raw in it."""
    match value:
        case Raw(text):
            return text
        case dict():
            fields = (f"{json.dumps(name)}:{written(one)}" for name, one in value.items())
            return "{" + ",".join(fields) + "}"
        case list() | tuple():
            return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def any_json(rng: random.Random, leaves: int = 6) -> Any:
    """A value of any kind, now and then one that JSON has not."""
    kind = rng.randrange(9 if leaves > 1 else 7)
    if kind == 7:
        return [any_json(rng, leaves // 2) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {
            rng.choice([*NAMES, "id", "input"]): any_json(rng, leaves // 2) for _ in range(rng.randrange(4))
        }
    raw = rng.choice(READABLE if rng.random() < 0.7 else UNREADABLE)
    return rng.choice((None, rng.random() < 0.5, rng.choice(NUMBERS), rng.choice(TEXTS), raw, [], {}))


def mutated(value: object, rng: random.Random, times: int = 1) -> str:
    """`value` with so many mistakes, almost always within it."""
    root = [copy.deepcopy(value)]
    for _ in range(times):
        whole, *within = _places(root)
        place = whole if not within or rng.random() < 0.03 else rng.choice(within)
        rng.choice(_MUTATIONS)(place, rng)
    return written(root[0])


def garbled(text: str, rng: random.Random) -> str:
    """`text` with one mistake of somebody who copies it."""
    return rng.choice(_GARBLINGS)(text, rng)


class _Place(NamedTuple):
    """An item of a list, or a field of an object."""

    parent: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.parent[self.key]

    @value.setter
    def value(self, value: object) -> None:
        self.parent[self.key] = value


def _places(parent: Any) -> Iterator[_Place]:
    match parent:
        case Raw():
            return
        case dict():
            keys: list[Any] = list(parent)
        case list():
            keys = list(range(len(parent)))
        case _:
            return
    for key in keys:
        yield _Place(parent, key)
        yield from _places(parent[key])


def _another(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = any_json(rng)


def _null(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = None


def _null_everywhere(place: _Place, rng: random.Random) -> None:
    for one in list(_places(place.value)) or [place]:
        if not isinstance(one.value, dict | list) or isinstance(one.value, Raw):
            one.parent[one.key] = None


def _number(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = rng.choice(NUMBERS)


def _text(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = rng.choice(TEXTS)


def _raw(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = rng.choice(READABLE if rng.random() < 0.7 else UNREADABLE)


def _long(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = rng.choice("xé🜚 \0") * rng.choice(LONG)


def _deep(place: _Place, rng: random.Random) -> None:
    depth = rng.choice(DEPTHS)
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    place.parent[place.key] = Raw(opening * depth + "1" + closing * depth * rng.randrange(2))


def _wrapped(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = rng.choice(([place.value], {"value": place.value}, [[place.value]]))


def _as_text(place: _Place, rng: random.Random) -> None:
    place.parent[place.key] = written(place.value)


def _renamed(place: _Place, rng: random.Random) -> None:
    if isinstance(place.parent, dict):
        place.parent[rng.choice([*NAMES, str(place.key).upper(), f"{place.key}s"])] = place.parent.pop(
            place.key
        )


def _removed(place: _Place, rng: random.Random) -> None:
    if isinstance(place.parent, dict):
        del place.parent[place.key]
    else:
        place.parent[place.key] = None


def _added(place: _Place, rng: random.Random) -> None:
    if isinstance(place.value, dict):
        place.value[rng.choice(NAMES)] = any_json(rng)
    else:
        _another(place, rng)


def _twice(place: _Place, rng: random.Random) -> None:
    """The same name twice in one object, which JSON leaves to the reader."""
    value = place.value
    if not isinstance(value, dict) or not value:
        return _another(place, rng)
    again = rng.choice(list(value))
    other = value[again] if rng.random() < 0.5 else any_json(rng)
    place.parent[place.key] = Raw(f"{written(value)[:-1]},{json.dumps(again)}:{written(other)}}}")
    return None


def _repeated(place: _Place, rng: random.Random) -> None:
    if isinstance(place.value, list):
        place.parent[place.key] = place.value * rng.choice((0, 2, 60))
    else:
        _another(place, rng)


_Mutation = Callable[[_Place, random.Random], None]
_MUTATIONS: tuple[_Mutation, ...] = (
    _another, _null, _null_everywhere, _number, _text, _raw, _long, _deep, _wrapped, _as_text, _renamed,
    _removed, _added, _twice, _repeated,
)  # fmt: skip


def _span(text: str, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(text) + 1)
    return start, min(len(text), start + rng.choice((1, 1, 2, 9, 80)))


def _cut_off(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text))] or "{"


def _cut_out(text: str, rng: random.Random) -> str:
    start, stop = _span(text, rng)
    return text[:start] + text[stop:] or " "


def _doubled(text: str, rng: random.Random) -> str:
    start, stop = _span(text, rng)
    return text[:stop] + text[start:]


def _inserted(text: str, rng: random.Random) -> str:
    start, _ = _span(text, rng)
    return (
        text[:start]
        + rng.choice(('"', "\\", ",", "}", "]", "\n", "é", "\ufeff", "0", "/* */", "\t"))
        + text[start:]
    )


def _quoted(text: str, rng: random.Random) -> str:
    return text.replace('"', "'")


def _around(text: str, rng: random.Random) -> str:
    before, after = rng.choice(
        (("\ufeff", ""), ("", ","), ("", text), ("```json\n", "\n```"), ("body=", ""), ("", "}"))
    )
    return before + text + after


_GARBLINGS: tuple[Callable[[str, random.Random], str], ...] = (
    _cut_off, _cut_off, _cut_out, _doubled, _inserted, _quoted, _around,
)  # fmt: skip
