"""Fuzzed messages: what nobody should send, and good jobs in between.

Every message is one that SQS takes. A seed gives the same messages each time.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.e2e.conftest import PREFIX
from tests.poison import samples
from tests.poison.mutations import TEXTS, any_json, garbled, mutated, written

MAX_BYTES = 1_048_576
MAX_ROWS = 50
"""What the worker takes in one message."""
NOT_SENT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What SQS refuses in a body and in an attribute."""

Attributes = Mapping[str, Mapping[str, Any]]
NONE: Attributes = MappingProxyType({})


class Message(NamedTuple):
    body: str
    attributes: Attributes = NONE
    """As the SDK takes them."""
    ends: str = ""
    """How it must end: `completed`, `served`, `refused`, or in any way that leaves word of it."""
    kind: str = ""


def messages(count: int, seed: int) -> list[Message]:
    """`count` messages of all kinds, mixed."""
    rng = random.Random(seed)
    return [_message(rng, f"p-{number}") for number in range(count)]


def _message(rng: random.Random, job_id: str) -> Message:
    kind = rng.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    _, make = _KINDS[kind]
    message = make(rng, job_id)
    assert 0 < len(message.body.encode()) <= MAX_BYTES - 4096, f"{kind} is not a message that SQS takes"
    assert not NOT_SENT.search(message.body), f"{kind} is not a message that SQS takes"
    return message._replace(kind=kind)


def _good(rng: random.Random, job_id: str) -> Message:
    return Message(json.dumps(_job(rng, job_id)), ends="completed")


def _mutated(rng: random.Random, job_id: str) -> Message:
    return Message(_sendable(mutated(_job(rng, job_id), rng, rng.choice((1, 1, 2, 5)))))


def _garbled(rng: random.Random, job_id: str) -> Message:
    return Message(_sendable(garbled(json.dumps(_job(rng, job_id), ensure_ascii=False), rng)))


def _truncated(rng: random.Random, job_id: str) -> Message:
    text = json.dumps(_job(rng, job_id))
    return Message(text[: rng.randrange(1, len(text))], ends="refused")


def _noise(rng: random.Random, job_id: str) -> Message:
    """Random bytes, read as the characters that SQS takes."""
    size = rng.choice((1, 9, 200, 5_000))
    ranges = rng.choice((((0x20, 0x7E),), ((0x20, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x10FFFF))))
    return Message("~" + "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(size)), ends="refused")


def _almost_json(rng: random.Random, job_id: str) -> Message:
    pieces = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "0",
        "-",
        ".",
        "e",
        "true",
        "null",
        "\\u",
        " ",
        '"inputs"',
        '"x"',
    ]
    return Message("".join(rng.choices(pieces, k=rng.choice((1, 6, 30, 300)))))


def _any_json(rng: random.Random, job_id: str) -> Message:
    return Message(_sendable(written(any_json(rng, 12))) or "0")


def _unknown_field(rng: random.Random, job_id: str) -> Message:
    name = rng.choice(("adaptor", "input_s", "Inputs", "model", "prompt", "🜚", "__class__", "callback_url"))
    return Message(
        json.dumps(_job(rng, job_id) | {name: rng.choice((None, 1, "x", [], {}, ["x"], {"a": None}))}),
        ends="refused",
    )


def _forbidden(rng: random.Random, job_id: str) -> Message:
    """Results that are asked for where they may not be."""
    uri = rng.choice((
        "s3://elsewhere/x/", "s3://mill/", "s3://mill/tiny/", "s3://mill/outside/", "s3://mill//out/",
        "s3://MILL/out/", "S3://mill/out/", "file:///tmp/", "https://mill/out/", " " + PREFIX, f"{PREFIX}/",
        f"{PREFIX}./", f"{PREFIX}../tiny/", f"{PREFIX}a\0b/", PREFIX + "x" * 1000,
    ))  # fmt: skip
    fields = {"uri": uri, "format": rng.choice(("native", "bedrock"))}
    return Message(json.dumps(_job(rng, job_id) | {"output": fields}), ends="refused")


def _too_much(rng: random.Random, job_id: str) -> Message:
    """As large as a message may be, in one way or another."""
    many: Any = rng.choice(
        ("x" * 900_000, ["x"] * (MAX_ROWS + 1), [{}] * 50_000, [[[]] * 9] * 9_000, {"a": 1})
    )
    field = rng.choice(("inputs", "adapters", "parameters", "ids", "metadata", "id", "task", "output"))
    return Message(json.dumps(samples.native(rng, job_id) | {field: many}))


def _attributes(rng: random.Random, job_id: str) -> Message:
    """A good job under attributes that contradict it, or themselves, or are not ours."""
    names = [
        "adapter",
        "Adapter",
        "X-Amzn-SageMaker-Adapter-Identifier",
        "ExtendedPayloadSize",
        "other",
        "input",
    ]
    kinds: list[Mapping[str, Any]] = [
        {"DataType": "Number", "StringValue": rng.choice(("0", "-1", "1e5"))},
        {"DataType": "Binary", "BinaryValue": rng.randbytes(9)},
        {"DataType": "String.json", "StringValue": '{"a": 1}'},
    ]
    texts = [text for text in (*TEXTS, *samples.ADAPTERS, "x" * 2000) if text and not NOT_SENT.search(text)]
    kinds += [{"DataType": "String", "StringValue": rng.choice(texts)} for _ in range(5)]
    given = {name: rng.choice(kinds) for name in rng.sample(names, rng.randint(1, 4))}
    return Message(json.dumps(_job(rng, job_id)), given)


def _by_reference(rng: random.Random, job_id: str) -> Message:
    body = samples.by_reference(rng, job_id)
    return Message(json.dumps(body) if rng.random() < 0.5 else _sendable(mutated(body, rng)))


def _event(rng: random.Random, job_id: str) -> Message:
    body = samples.event(rng, job_id)
    return Message(json.dumps(body) if rng.random() < 0.5 else _sendable(mutated(body, rng)))


def _pointer(rng: random.Random, job_id: str) -> Message:
    body = samples.pointer(rng)
    name = rng.choice(("ExtendedPayloadSize", "SQSLargePayloadSize"))
    size = {name: {"DataType": "Number", "StringValue": rng.choice(("300000", "0", "-5"))}}
    text = json.dumps(body) if rng.random() < 0.5 else _sendable(mutated(body, rng))
    return Message(text, size if rng.random() < 0.8 else NONE)


def _again(rng: random.Random, job_id: str) -> Message:
    """An id that others have too: the same job again, or another one."""
    inputs = rng.choice(("same", "same", "other"))
    return Message(json.dumps({"id": f"again-{rng.randrange(5)}", "inputs": inputs}))


def _expired(rng: random.Random, job_id: str) -> Message:
    return Message(
        json.dumps(_job(rng, job_id) | {"ttl_seconds": rng.choice((1e-6, 5e-324, 0.5))}), ends="served"
    )


_KINDS: dict[str, tuple[int, Callable[[random.Random, str], Message]]] = {
    "good": (12, _good),
    "mutated": (35, _mutated),
    "garbled": (8, _garbled),
    "truncated": (5, _truncated),
    "noise": (5, _noise),
    "almost-json": (4, _almost_json),
    "any-json": (4, _any_json),
    "unknown-field": (4, _unknown_field),
    "forbidden-output": (4, _forbidden),
    "too-much": (1, _too_much),
    "attributes": (4, _attributes),
    "by-reference": (4, _by_reference),
    "event": (4, _event),
    "pointer": (3, _pointer),
    "again": (2, _again),
    "expired": (1, _expired),
}
"""How often each kind comes, and what makes it."""
KINDS = tuple(_KINDS)


def _job(rng: random.Random, job_id: str) -> samples.Body:
    return rng.choice(samples.JOBS)(rng, job_id)


def _sendable(text: str) -> str:
    """The same without what SQS refuses, and not above its size."""
    kept = NOT_SENT.sub("", text).encode()[: MAX_BYTES - 4096]
    return kept.decode(errors="ignore") or " "
