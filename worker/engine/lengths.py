"""How much a sequence still needs: what is certain, and what is to be expected. No torch here."""

import math

from worker.engine.sequence import Sequence

_PROMPT_TOKEN = 0.25
"""Work of a prompt token, in steps of one decoding row; about what a CPU takes for it. A power of two, so
that sums of work are exact."""
_MEMORY = 16
"""Rows that ended over which the expected share of `max_new_tokens` is averaged."""


def work(sequence: Sequence) -> float:
    """The most that `sequence` still needs, in steps of one decoding row."""
    prompt = max(0, len(sequence.request.prompt) - sequence.computed)
    return sequence.request.params.max_new_tokens - sequence.num_generated + prompt * _PROMPT_TOKEN


class Lengths:
    """Learns what share of `max_new_tokens` rows really generate. It begins with all of it."""

    def __init__(self) -> None:
        self.ratio = 1.0

    def learn(self, sequence: Sequence) -> None:
        """`sequence` has ended by itself."""
        share = sequence.num_generated / max(1, sequence.request.params.max_new_tokens)
        self.ratio += (share - self.ratio) / _MEMORY

    def learn_shortage(self) -> None:
        """Rows turned out longer than they were expected to be: one had to be preempted."""
        self.ratio += (1.0 - self.ratio) / 4

    def remaining(self, sequence: Sequence) -> int:
        """Tokens that `sequence` is expected to generate yet; at least one."""
        left = sequence.request.params.max_new_tokens - sequence.num_generated
        return max(1, math.ceil(left * self.ratio))
