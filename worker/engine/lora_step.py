"""How one step applies LoRA: the same for every projection, built once, dropped after it."""

from collections.abc import Mapping, Sequence

import torch

from worker.engine.lora_ops import Chosen, choose_rows
from worker.engine.lora_plan import Run


class Pattern:
    """Which rows of an adapter the sums of one token read: [sums, rows of each] int32, from 0."""

    def __init__(self, chosen: torch.Tensor, rows_each: int) -> None:
        """An adapter has `rows_each` rows in all."""
        self.chosen = chosen
        self.rows_each = rows_each


class TokenEntries:
    """Tokens that follow each other, with the entry of a table that each one's adapter has."""

    def __init__(self, runs: Sequence[Run], entries: Mapping[int, int]) -> None:
        """`runs` follow each other without a gap; `entries` by slot."""
        self.tokens = slice(runs[0][1], runs[-1][2])
        own = [entries[slot] for slot, start, stop in runs for _ in range(start, stop)]
        self._entries = torch.tensor(own, dtype=torch.int32)
        self._chosen: dict[Pattern, Chosen] = {}

    def chosen(self, pattern: Pattern) -> Chosen:
        """Rows of the whole table, for each token's sums."""
        chosen = self._chosen.get(pattern)
        if chosen is None:
            first = (self._entries * pattern.rows_each)[:, None, None]
            chosen = self._chosen[pattern] = choose_rows((first + pattern.chosen).flatten(0, 1))
        return chosen


class LoRAStep:
    """Which tokens go which way: `segments`, then `rows` by the rank of their table."""

    def __init__(self, segments: Sequence[Run], rows: Mapping[int, TokenEntries] | None = None) -> None:
        self.segments = segments
        self.rows = rows or {}
