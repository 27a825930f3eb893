"""What a pass did, for whoever turns it into metrics, log lines or text."""

import enum
from collections.abc import Mapping

import msgspec

from adapters_sync.disk import OnDisk
from adapters_sync.names import shown
from adapters_sync.plan import Action, Decision, Desired
from adapters_sync.state import AdapterState, AdapterStatus

_MAX_SKIPPED_SHOWN = 10
_MAX_NAME_SHOWN = 128
_STATES = {Decision.WAIT: AdapterState.PENDING, Decision.REFUSE: AdapterState.INVALID}


class FailureKind(enum.StrEnum):
    """What can go wrong: the values of a metric's label."""

    LIST = "list"
    """The listing failed, and with it the pass."""
    LOCKED = "locked"
    """Another syncer was at work, and the pass was skipped."""
    FETCH = "fetch"
    """S3 would not give an object."""
    CHANGED = "changed"
    """An object changed while it was read."""
    INVALID = "invalid"
    """An upload was fetched and refused."""
    DISK = "disk"
    """The volume is full, read-only or broken."""
    INTERNAL = "internal"
    """A mistake of ours."""


class Trouble(msgspec.Struct, frozen=True):
    """Why an adapter could not be published in this pass."""

    kind: FailureKind
    reason: str


class PassReport(msgspec.Struct, frozen=True, kw_only=True):
    """One pass. `ok` means that the listing was complete and every adapter was dealt with."""

    ok: bool
    finished_at: float
    """Seconds since the Unix epoch."""
    seconds: float = 0.0
    error: str | None = None
    """Why the pass failed."""
    adapters: tuple[AdapterStatus, ...] = ()
    published: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    collected: int = 0
    """Old versions removed."""
    fetched_bytes: int = 0
    failures: Mapping[FailureKind, int] = {}
    """Counts of this pass, by kind; a kind that did not occur is absent."""
    look_again_seconds: float | None = None
    """When a later pass would do more though nothing changed, as an upload settles or a deletion waits: in
    how long the first of these is due; else None."""


def status_of(
    action: Action, desired: Desired | None, on_disk: OnDisk | None, trouble: Trouble | None
) -> AdapterStatus:
    """The line of the state file for one adapter, after its action. `on_disk` is what is served now."""
    manifest = on_disk.manifest if on_disk is not None else None
    version = manifest.version if manifest is not None else None
    state, reason = _STATES.get(action.decision, AdapterState.READY), action.reason
    if trouble is not None:
        refused = trouble.kind is FailureKind.INVALID
        state, reason = (AdapterState.INVALID if refused else AdapterState.PENDING), trouble.reason
    wanted = desired.adapter.version if desired is not None and desired.adapter.files else None
    return AdapterStatus(
        name=action.name if len(action.name) <= _MAX_NAME_SHOWN else shown(action.name),
        state=state,
        version=version,
        wanted=wanted if wanted != version else None,
        reason=reason,
        bytes=manifest.bytes if manifest is not None else 0,
        rank=manifest.rank if manifest is not None else None,
        skipped=desired.adapter.skipped[:_MAX_SKIPPED_SHOWN] if desired is not None else (),
    )
