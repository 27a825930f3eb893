"""How long the mirror waits between two passes."""

import math
from collections.abc import Callable

from adapters_sync.report import FailureKind, PassReport

LEAST_SECONDS = 1.0
"""From the end of a pass to the next, at least, whoever asks for it."""
_MOST_DOUBLINGS = 20


class Pace:
    """Says after each pass when the next one is due, if nobody asks for it before."""

    def __init__(self, interval_seconds: float, random: Callable[[], float]) -> None:
        """`random` gives numbers from 0 to 1."""
        self._interval_seconds = interval_seconds
        self._random = random
        self._owed = False
        """Whether a pass was asked for and none has dealt with everything since."""
        self._in_vain = 0
        """Passes in a row that nobody asked for, and that got nothing done."""

    def seconds_after(self, report: PassReport, *, asked_for: bool) -> float:
        """Until the next pass: the interval, a tenth more or less, or less where that brings something.

        It does where time alone changes what a pass would do, and after a pass that somebody `asked_for` and
        that failed, in all or for some adapter. What never ends, such as an upload that looks different at
        every listing, must not make the mirror list all the time: passes that got nothing done are followed
        by pauses of 1, 2, 4, ... seconds at least, up to the interval. One that was asked for begins this
        anew, as does one that published or deleted something.
        """
        interval = self._interval_seconds * (0.9 + 0.2 * self._random())
        self._owed = (self._owed or asked_for) and bool(report.failures.keys() - {FailureKind.INVALID})
        wanted = 0.0 if self._owed else report.look_again_seconds
        if wanted is None:
            self._in_vain = 0
            return interval
        if asked_for or report.published or report.deleted:
            self._in_vain = 0
        least = math.ldexp(LEAST_SECONDS, min(self._in_vain, _MOST_DOUBLINGS))
        self._in_vain += 1
        return min(interval, max(wanted, least))
