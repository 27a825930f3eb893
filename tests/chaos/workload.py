"""The jobs that are sent, and what is to come of each row."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

UNKNOWN = "nobody"
"""The name of an adapter that is nowhere."""
MAX_NEW_TOKENS = 4
PROMPTS = (
    "a", "bees", "What do they make?", "Something longer than the others, by far.", "ü", "0 1 2",
    "The first line", "A worker", "and its queue", "no", "yes", "the end of it",
)  # fmt: skip


class Ask(NamedTuple):
    """One row, but for its id."""

    adapter: str
    """Empty for the base model."""
    prompt: str
    max_new_tokens: int


class Job(NamedTuple):
    """A job by its id; row `i` has the id that `row_id` gives it."""

    id: str
    asks: tuple[Ask, ...]
    by_reference: bool = False
    """Whether its rows lie in an object, which the message names."""

    def row_id(self, index: int) -> str:
        return f"{self.id}/{index}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """As they stand in the message, or in the object."""
        return [
            {
                "id": self.row_id(index),
                "input": ask.prompt,
                "adapter": ask.adapter,
                "parameters": {"max_new_tokens": ask.max_new_tokens},
            }
            for index, ask in enumerate(self.asks)
        ]

    @property
    def lines(self) -> bytes:
        """The rows as a JSONL file."""
        return b"".join(json.dumps(row).encode() + b"\n" for row in self.rows)

    def message(self, input_uri: str | None = None) -> str:
        """The body of the message."""
        source = {"inputs": self.rows} if input_uri is None else {"input": {"uri": input_uri}}
        return json.dumps({"id": self.id, **source})


def make_jobs(
    rng: random.Random, count: int, adapters: Sequence[str], *, max_rows: int = 50, unknown: float = 0.05
) -> list[Job]:
    """`count` jobs of 1 to `max_rows` rows; in a share of `unknown` one is for an adapter that is nowhere."""
    return [
        Job(f"job-{number:05d}", _asks(rng, rng.randint(1, max_rows), adapters, rng.random() < unknown))
        for number in range(count)
    ]


def make_large_jobs(rng: random.Random, count: int, adapters: Sequence[str], rows: int) -> list[Job]:
    """`count` jobs by reference of `rows` rows each."""
    return [
        Job(
            f"large-{number:05d}", _asks(rng, rows, adapters, with_unknown=number % 2 == 1), by_reference=True
        )
        for number in range(count)
    ]


def _asks(rng: random.Random, rows: int, adapters: Sequence[str], with_unknown: bool) -> tuple[Ask, ...]:
    names = ["", *adapters]
    asks = [Ask(rng.choice(names), rng.choice(PROMPTS), rng.randint(1, MAX_NEW_TOKENS)) for _ in range(rows)]
    if with_unknown:
        at = rng.randrange(rows)
        asks[at] = asks[at]._replace(adapter=UNKNOWN)
    return tuple(asks)


class Answers(NamedTuple):
    """What each row must say, and by which version of which adapter."""

    texts: Mapping[Ask, str]
    versions: Mapping[str, str]

    def error(self, ask: Ask) -> str | None:
        """The error code of the row, if it must fail."""
        return "adapter_not_found" if ask.adapter not in {"", *self.versions} else None
