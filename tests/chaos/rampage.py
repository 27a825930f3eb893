"""When workers are struck, and how: as the work goes on, so that there is some between any two blows."""

import asyncio
import random
from collections.abc import Sequence

from tests.chaos.fleet import Blow, Fleet
from tests.faults.calls import Call

_WEIGHTS = {Blow.KILL: 50, Blow.AMBUSH: 20, Blow.TERM: 15, Blow.FREEZE: 15}
_AT_WORK = 0.8
"""The share of blows that must hit somebody at work; the others may hit one that is starting."""
_COMMITS = frozenset({"PutObject", "DeleteMessageBatch"})
"""Calls that commit something: results, a manifest, an ack."""
_MOST_PASS = 5
"""How many of them pass an ambush, at most, before it strikes."""
_LAST_DUE = 0.6
"""Later ones may find nobody at work any more: the last messages end nearly together."""


class Rampage:
    """`kills` blows, each due when a random share of the work is done.

    `gate` must be the proxy's: there the ambushes are laid. A frozen worker stays so for `freeze_seconds`,
    from the least to the most.
    """

    def __init__(self, rng: random.Random, kills: int, freeze_seconds: tuple[float, float]) -> None:
        self._random = rng
        self._due = sorted(rng.uniform(0.01, _LAST_DUE) for _ in range(kills))
        self._blows = _mixed(rng, kills)
        self._freeze_seconds = freeze_seconds
        self._ambushes: list[int] = []
        """For each, how many calls pass before it strikes."""
        self.fleet: Fleet | None = None

    def go_on(self, done: float) -> None:
        """Strike whoever is to be struck by now, of the work this share being `done`; one at a time."""
        assert self.fleet is not None
        if not self._due or done < self._due[0]:
            return
        if self._blows[0] is Blow.AMBUSH:
            self._ambushes.append(self._random.randint(0, _MOST_PASS))
        else:
            at_work = self._random.random() < _AT_WORK
            victims = self.fleet.at_work() if at_work else self.fleet.running()
            if not victims:
                return
            victim = self._random.choice(victims)
            if not self.fleet.strike(victim, self._blows[0], self._random.uniform(*self._freeze_seconds)):
                return
        del self._due[0], self._blows[0]

    async def gate(self, call: Call) -> None:
        """On the proxy's event loop: kill who makes the call that an ambush is laid for; the call goes on."""
        if call.operation not in _COMMITS or not self._ambushes:
            return
        left = self._ambushes.pop(0)  # no other call walks into it meanwhile
        if left == 0:
            assert self.fleet is not None
            caller = await asyncio.to_thread(self.fleet.caller, call.port)
            if caller is not None and self.fleet.strike(caller, Blow.AMBUSH):
                return
        self._ambushes.append(max(0, left - 1))


def _mixed(rng: random.Random, count: int) -> Sequence[Blow]:
    """So many blows in random order: each kind's share, and one at least where there is room."""
    total = sum(_WEIGHTS.values())
    special = [blow for blow in _WEIGHTS if blow is not Blow.KILL]
    blows = [blow for blow in special for _ in range(max(1, count * _WEIGHTS[blow] // total))]
    blows = (blows + [Blow.KILL] * count)[:count]
    rng.shuffle(blows)
    return blows
