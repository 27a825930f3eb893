"""When to merge an adapter into the base model: bookkeeping only, the products are in `projections`.

Merged, an adapter costs a step nothing; unmerged, it costs every step a little. Merging takes as long as a
few steps, and serves only steps whose rows all have that adapter.
"""

import enum
import logging

from worker.jobs import AdapterKey

logger = logging.getLogger(__name__)

_STRETCH = 10.0
"""Seconds of steps with one adapter after which a second of merging is worth it: on a CPU steps then
gain a few hundredths (`python -m tests.benchmarks.merged`): it is paid back if the stretch lasts some
times as long."""
_FIRST_GUESS_SECONDS = 1.0
"""What merging may take, until it was done once."""


class LoRAMode(enum.StrEnum):
    UNMERGED = "unmerged"
    """Never merge: a row is computed alike whatever its neighbours."""
    AUTO = "auto"
    """Merge where a stretch of steps with one adapter lasts."""
    MERGED = "merged"
    """As AUTO, but the first adapter at once: for a worker that serves one."""


class Merging:
    """Which adapter is merged, and which should be. Used from the engine's thread."""

    def __init__(self, mode: LoRAMode) -> None:
        self._mode = mode
        self.merged: AdapterKey | None = None
        """The adapter whose merged weights stand beside the base's."""
        self._only: AdapterKey | None = None
        self._stretch_seconds = 0.0
        self._cost_seconds = _FIRST_GUESS_SECONDS
        self._began = False

    @property
    def is_off(self) -> bool:
        """Whether nothing is merged, nor will be."""
        return self._mode is LoRAMode.UNMERGED

    def see(self, only: AdapterKey | None, seconds: float) -> None:
        """Count the last step, of so many seconds; `only` is the adapter of all rows of the next, or None.

        So a stretch begins with the step before it, and its own last step is not counted.
        """
        if only != self._only or only is None:
            self._only, self._stretch_seconds = only, 0.0
        self._stretch_seconds += seconds

    def wants(self, only: AdapterKey) -> bool:
        """Whether `only`, the adapter of all rows of the next step, should be merged before it."""
        if only == self.merged or self.is_off:
            return False
        if self._mode is LoRAMode.MERGED and not self._began:
            return True
        return only == self._only and self._stretch_seconds >= _STRETCH * self._cost_seconds

    def done(self, key: AdapterKey, seconds: float) -> None:
        """`key` is merged, and that took so long."""
        self.merged, self._began, self._cost_seconds = key, True, seconds
        logger.info("adapter merged", extra={"adapter": key.name, "seconds": round(seconds, 3)})

    def failed(self, key: AdapterKey, error: Exception) -> None:
        """There is no memory for it, say: go on unmerged, for good."""
        self.merged, self._mode = None, LoRAMode.UNMERGED
        logger.error("adapter %s could not be merged; from now on none is", key.name, exc_info=error)
