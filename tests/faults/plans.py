"""Which calls meet which fault: by rules, and by chance."""

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tests.faults.calls import Call
from tests.faults.kinds import Fault

_RARE = 4
"""How much likelier a fault is that fits few calls."""


@dataclass
class Rule:
    """The next `times` calls of this `operation`, whose target has `target` in it, meet `fault`.

    The first `skip` of them do not. Every attempt of the SDK at one call counts.
    """

    fault: Fault
    operation: str
    target: str = ""
    times: int = 1
    skip: int = 0

    def strikes(self, call: Call) -> bool:
        """Whether this call is one of them; it is counted."""
        if call.operation != self.operation or self.target not in call.target or not self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Chance:
    """A `share` of all calls meets a fault of those `kinds` that fit it, likelier one that fits few calls.

    `stubborn` is the part of the faults that strike every attempt at the call, so that the SDK gives up.
    The same calls in the same order meet the same faults with the same `seed`.
    """

    def __init__(
        self,
        share: float,
        *,
        seed: int = 0,
        stubborn: float = 0.2,
        kinds: Collection[Fault] = tuple(Fault),
    ) -> None:
        self._share = share
        self._stubborn = stubborn
        self._kinds = tuple(kinds)
        self._random = random.Random(seed)
        self._decided: dict[str, Fault | None] = {}
        """What later attempts at a call meet, by its invocation."""

    def choose(self, call: Call) -> Fault | None:
        if call.invocation in self._decided:
            return self._decided[call.invocation]
        fault = self._draw(call)
        if fault is not None and call.invocation:
            again = self._random.random() < self._stubborn
            self._decided[call.invocation] = fault if again else None
        return fault

    def _draw(self, call: Call) -> Fault | None:
        if self._random.random() >= self._share:
            return None
        fitting = [kind for kind in self._kinds if kind.fits(call)]
        weights = [_RARE if kind.is_rare else 1 for kind in fitting]
        return self._random.choices(fitting, weights)[0] if fitting else None


class Plan:
    """Rules come before chance, and the first one that strikes before the others."""

    def __init__(self, rules: Iterable[Rule] = (), chance: Chance | None = None) -> None:
        self.rules = list(rules)
        self.chance = chance

    def choose(self, call: Call) -> Fault | None:
        """The fault that this call meets, if any."""
        for rule in self.rules:
            if rule.strikes(call):
                return rule.fault
        return None if self.chance is None else self.chance.choose(call)
