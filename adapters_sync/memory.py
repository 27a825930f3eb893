"""What one pass remembers for the next. It starts empty: all that must survive a restart is on the disk."""

from collections.abc import Collection, Mapping

import msgspec

from adapters_sync.complete import Quiet
from adapters_sync.inventory import RemoteAdapter


class _Sighting(msgspec.Struct):
    adapter: RemoteAdapter
    since: float
    polls: int = 0


class _Absence(msgspec.Struct, frozen=True):
    since: float
    listings: int = 1


class Memory:
    """Times are those of a monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._sightings: dict[str, _Sighting] = {}
        self._refusals: dict[str, tuple[RemoteAdapter, str]] = {}
        self._absences: dict[str, _Absence] = {}

    @property
    def absences(self) -> Mapping[str, int]:
        """For every linked adapter that the last listing lacked: how many in a row did."""
        return {name: absence.listings for name, absence in self._absences.items()}

    def note_listing(
        self,
        inventory: Mapping[str, RemoteAdapter],
        linked: Collection[str],
        now: float,
        *,
        least_absence_seconds: float = 0.0,
    ) -> None:
        """Take in a complete listing, and forget what it no longer holds.

        It counts as one more without an adapter only `least_absence_seconds` after the first of the row.
        """
        self._absences = {
            name: self._absent_again(name, now, least_absence_seconds)
            for name in linked
            if name not in inventory
        }
        self._refusals = {name: one for name, one in self._refusals.items() if inventory.get(name) == one[0]}
        self._sightings = {name: self._seen_again(adapter, now) for name, adapter in inventory.items()}

    def note_failed_listing(self) -> None:
        """Listings in a row means with no failed one between them."""
        self._absences = {}

    def quiet(self, name: str, now: float) -> Quiet:
        """For how long an adapter of the last listing has looked as it does."""
        sighting = self._sightings[name]
        return Quiet(now - sighting.since, sighting.polls)

    def refuse(self, adapter: RemoteAdapter, reason: str) -> None:
        """Remember not to fetch this upload again."""
        self._refusals[adapter.name] = (adapter, reason)

    def forget_refusals(self) -> None:
        """What was refused under other conditions is to be judged anew."""
        self._refusals = {}

    def refusal(self, adapter: RemoteAdapter) -> str | None:
        """Why exactly this upload was refused, if it was."""
        refused, reason = self._refusals.get(adapter.name, (None, None))
        return reason if refused == adapter else None

    def _absent_again(self, name: str, now: float, least_seconds: float) -> _Absence:
        absence = self._absences.get(name)
        if absence is None:
            return _Absence(since=now)
        if now - absence.since < least_seconds:
            return absence
        return _Absence(absence.since, absence.listings + 1)

    def _seen_again(self, adapter: RemoteAdapter, now: float) -> _Sighting:
        sighting = self._sightings.get(adapter.name)
        if sighting is None or sighting.adapter != adapter:
            sighting = _Sighting(adapter, since=now)
        sighting.polls += 1
        return sighting
