"""What to do with every adapter: S3 x disk -> decision. Pure.

    on disk   in S3                                decision   state of the adapter
    -------   ----------------------------------   --------   --------------------
    any       refused: name, key, cap              REFUSE     invalid
    any       its twin in other case is there      REFUSE     invalid
    foreign   anything                             REFUSE     invalid
    linked    the same version                     KEEP       ready
    any       refused before, unchanged since      REFUSE     invalid
    any       said to be complete, no adapter      REFUSE     invalid
    any       not complete yet                     WAIT       pending
    any       complete, another version            PUBLISH    ready, when all goes well
    broken    complete, the same version           PUBLISH    ready, when all goes well
    linked    absent, for the first time           MISS       ready
    linked    absent twice, others are in S3       DELETE     gone
    linked    absent twice, and so are all linked  HOLD       ready, unless allow_empty: DELETE
    foreign   absent                               none       not ours
    none      absent                               none       gone

The first line that fits decides. `linked` is a link of ours to a whole version, `broken` a link of ours to
one that is not whole (deleted like a linked one), `foreign` anything else that has the name. Nothing but
DELETE takes away what is served: in every other case the last good version stays. Twins are two names that
a case-insensitive file system cannot tell apart: the one that is on disk wins, else the first in sort order.
"""

import enum
from collections.abc import Mapping

import msgspec

from adapters_sync.complete import Complete, Hopeless, Incomplete, Verdict
from adapters_sync.inventory import RemoteAdapter
from adapters_sync.names import folded, shown

LISTINGS_BEFORE_DELETE = 2


class Decision(enum.StrEnum):
    KEEP = "keep"
    WAIT = "wait"
    PUBLISH = "publish"
    REFUSE = "refuse"
    MISS = "miss"
    HOLD = "hold"
    DELETE = "delete"


class Local(msgspec.Struct, frozen=True):
    """What has an adapter's name on disk."""

    version: str | None = None
    """The version our link points to; None for a folder, a file or a link that is not ours."""
    whole: bool = True
    """False when the version's files are not all there, in size."""


class Desired(msgspec.Struct, frozen=True):
    """An adapter in S3 and what is known about it so far."""

    adapter: RemoteAdapter
    verdict: Verdict
    refused: str | None = None
    """Why exactly this upload was refused at an earlier pass."""


class Action(msgspec.Struct, frozen=True):
    """One row of the plan."""

    name: str
    decision: Decision
    reason: str | None = None


def plan(
    desired: Mapping[str, Desired],
    local: Mapping[str, Local],
    absences: Mapping[str, int],
    *,
    allow_empty: bool = False,
) -> list[Action]:
    """Decide for every adapter that is in S3 or linked on disk, in the order of their names.

    `absences` counts the complete listings in a row, this one included, that lacked an adapter.
    """
    linked = {name for name, one in local.items() if one.version is not None}
    doomed = {name for name in linked - desired.keys() if absences.get(name, 0) >= LISTINGS_BEFORE_DELETE}
    hold = linked.isdisjoint(desired) and not allow_empty
    winners = _winners(desired, local)
    actions = []
    for name in sorted(desired.keys() | linked):
        if name in desired:
            actions.append(_decide(desired[name], local.get(name), winners[folded(name)]))
        elif name not in doomed:
            actions.append(Action(name, Decision.MISS, "absent from the last listing"))
        elif hold:
            actions.append(Action(name, Decision.HOLD, "gone from S3; kept, since nothing would be left"))
        else:
            actions.append(Action(name, Decision.DELETE, "gone from S3"))
    return actions


def _decide(desired: Desired, local: Local | None, winner: str) -> Action:
    name = desired.adapter.name
    obstacle = _obstacle(desired.adapter, local, winner)
    is_served = local is not None and local.whole and local.version == desired.adapter.version
    if is_served and obstacle is None:
        return Action(name, Decision.KEEP)
    refused = obstacle or desired.refused
    match Hopeless(refused) if refused is not None else desired.verdict:
        case Hopeless(reason):
            return Action(name, Decision.REFUSE, reason)
        case Incomplete(reason):
            return Action(name, Decision.WAIT, reason)
        case Complete():
            return Action(name, Decision.PUBLISH)


def _obstacle(adapter: RemoteAdapter, local: Local | None, winner: str) -> str | None:
    """Why nothing of this name may be published, whatever its content."""
    if adapter.fault is not None:
        return adapter.fault
    if winner != adapter.name:
        return f"differs from {shown(winner)} only in case"
    if local is not None and local.version is None:
        return "something that is not the mirror's has this name on disk"
    return None


def _winners(desired: Mapping[str, Desired], local: Mapping[str, Local]) -> dict[str, str]:
    """For every folded name the one that may have it: on disk before not, then by sort order."""
    winners: dict[str, str] = {}
    contenders = local.keys() | {name for name, one in desired.items() if one.adapter.fault is None}
    for name in sorted(contenders, key=lambda name: (name not in local, name), reverse=True):
        winners[folded(name)] = name
    return {folded(name): name for name in desired} | winners
