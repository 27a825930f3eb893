"""One pass of the mirror: list, look, judge, plan, act. The caller holds the mirror's lock."""

import asyncio
import math
from collections import Counter
from collections.abc import Mapping

import msgspec

from adapters_sync import disk
from adapters_sync.base_model import BaseModelFile
from adapters_sync.complete import Complete, Hopeless, Incomplete, judge
from adapters_sync.disk import OnDisk
from adapters_sync.errors import InvalidAdapter, ObjectChanged, RemoteUnavailable
from adapters_sync.inventory import RemoteAdapter, RemoteFile, take_inventory
from adapters_sync.layout import MirrorPaths
from adapters_sync.memory import Memory
from adapters_sync.options import Clock, MirrorOptions
from adapters_sync.plan import Action, Decision, Desired, Local, plan
from adapters_sync.publish import collect, settle
from adapters_sync.remote import Remote
from adapters_sync.report import FailureKind, PassReport, Trouble, status_of
from adapters_sync.tasks import all_done, in_thread
from adapters_sync.workshop import Outcome, Workshop

_NOT_ASKED = Incomplete("not looked at")
_UNKNOWN = Incomplete("to be looked at")
_CHANGES = frozenset({Decision.PUBLISH, Decision.DELETE})
_NOTHING = Outcome()


_Listed = tuple[list[RemoteFile], dict[str, RemoteAdapter]]
"""A listing, and what it comes to."""


class _Calm(msgspec.Struct, frozen=True):
    """A pass that had nothing to do, and would not have had more at another time."""

    listed: _Listed
    on_disk: dict[str, OnDisk]
    report: PassReport

    def holds(self, listed: _Listed, on_disk: dict[str, OnDisk]) -> bool:
        """Whether another pass would only come to the same again."""
        return self.listed is listed and self.on_disk == on_disk


class Passes:
    """Runs passes over one volume, one at a time, and remembers between them what `plan` needs.

    What takes time for each adapter is done in a thread: with thousands of them, the event loop may have
    others to serve.
    """

    def __init__(self, remote: Remote, paths: MirrorPaths, options: MirrorOptions, clock: Clock) -> None:
        self._remote = remote
        self._paths = paths
        self._options = options
        self._clock = clock
        self._base = BaseModelFile(paths)
        self._workshop = Workshop(
            remote, paths, options.limits, clock.now, options.files_at_once, base=self._base
        )
        self._gate = asyncio.Semaphore(options.adapters_at_once)
        self._memory = Memory()
        self._listed: _Listed = ([], {})
        self._on_disk: dict[str, OnDisk] = {}
        self._calm: _Calm | None = None
        self._collect_from = -math.inf
        """When there may be something to collect, as far as the last look could tell."""

    async def run(self, *, asked_for: bool = False) -> PassReport:
        """One pass over every adapter. Raises RemoteUnavailable when the listing failed, and OSError when the
        volume cannot be used; nothing was deleted then.

        Passes that are `asked_for` may come in the pause between the removal of an upload and its
        replacement: for what is absent they count only once it has been for `settle_seconds`.
        """
        await in_thread(disk.tidy, self._paths)
        inventory = await self._list()
        before, self._on_disk = self._on_disk, await in_thread(disk.look, self._paths, self._on_disk)
        linked = {name for name, one in self._on_disk.items() if one.version is not None}
        least = self._options.settle_seconds if asked_for else 0.0
        self._memory.note_listing(inventory, linked, self._clock.monotonic(), least_absence_seconds=least)
        self._workshop.forget_all_but(inventory)
        if await in_thread(self._base.look):
            self._memory.forget_refusals()
            self._calm = None
        if self._calm is not None and self._calm.holds(self._listed, self._on_disk):
            collected = await self._collect(changed=before != self._on_disk)
            return msgspec.structs.replace(
                self._calm.report, finished_at=self._clock.now(), collected=collected
            )

        desired = await in_thread(self._remember, inventory)
        judged = await all_done(
            self._judge(one.adapter) for one in desired.values() if one.verdict is _UNKNOWN
        )
        desired |= {one.adapter.name: one for one, _ in judged}
        troubles = {one.adapter.name: trouble for one, trouble in judged}
        local = {name: Local(one.version, one.manifest is not None) for name, one in self._on_disk.items()}
        actions = await in_thread(
            plan, desired, local, self._memory.absences, allow_empty=self._options.allow_empty
        )
        outcomes = {name: Outcome(trouble=trouble) for name, trouble in troubles.items()}
        outcomes |= await self._act([one for one in actions if one.decision in _CHANGES], desired)
        collected = await self._collect(changed=before != self._on_disk)
        report = await in_thread(self._report, actions, desired, outcomes, collected)
        is_calm = _CHANGES.isdisjoint(action.decision for action in actions) and not report.failures
        if is_calm and report.look_again_seconds is None:
            self._calm = _Calm(self._listed, self._on_disk, report)
        return report

    async def _list(self) -> dict[str, RemoteAdapter]:
        try:
            objects = await self._remote.list()
        except RemoteUnavailable:
            self._memory.note_failed_listing()
            raise
        before, inventory = self._listed
        if objects != before:
            inventory = await in_thread(take_inventory, objects, self._options.limits, inventory)
            self._listed = (objects, inventory)
        return inventory

    def _remember(self, inventory: Mapping[str, RemoteAdapter]) -> dict[str, Desired]:
        """What is known about uploads without asking; the verdict is _UNKNOWN where one is needed."""
        return {name: self._remembered(adapter) for name, adapter in inventory.items()}

    def _remembered(self, adapter: RemoteAdapter) -> Desired:
        refused = self._memory.refusal(adapter)
        served = self._on_disk.get(adapter.name)
        is_served = served is not None and served.manifest is not None and served.version == adapter.version
        is_clear = is_served or adapter.fault is not None or refused is not None
        return Desired(adapter, _NOT_ASKED if is_clear else _UNKNOWN, refused)

    async def _judge(self, adapter: RemoteAdapter) -> tuple[Desired, Trouble | None]:
        """Whether an upload is complete, asking S3 for its manifest."""
        try:
            manifest = await self._workshop.upload_manifest(adapter)
        except InvalidAdapter as error:
            return Desired(adapter, Hopeless(error.reason)), None
        except ObjectChanged as error:
            return Desired(adapter, Incomplete(str(error))), Trouble(FailureKind.CHANGED, str(error))
        except RemoteUnavailable as error:
            return Desired(adapter, Incomplete(str(error))), Trouble(FailureKind.FETCH, str(error))
        quiet = self._memory.quiet(adapter.name, self._clock.monotonic())
        return Desired(adapter, judge(adapter, manifest, quiet, self._options.settle_seconds)), None

    async def _act(self, actions: list[Action], desired: Mapping[str, Desired]) -> dict[str, Outcome]:
        """Carry out what changes the volume, all of it together; the outcomes by name."""
        if not actions:
            return {}
        await self._workshop.measure_room()
        done = await all_done(
            self._delete(one.name) if one.decision is Decision.DELETE else self._publish(desired[one.name])
            for one in actions
        )
        await in_thread(settle, self._paths)
        self._collect_from = -math.inf
        return {action.name: outcome for action, outcome in zip(actions, done, strict=True)}

    async def _collect(self, *, changed: bool) -> int:
        """Remove old versions, if by now there may be any: it takes a look at every adapter."""
        now = self._clock.now()
        if changed:
            self._collect_from = -math.inf
        if now < self._collect_from:
            return 0
        collected, self._collect_from = await in_thread(
            collect, self._paths, now, self._options.grace_seconds
        )
        return collected

    async def _delete(self, name: str) -> Outcome:
        outcome = await self._workshop.delete(name)
        if outcome.trouble is None:
            del self._on_disk[name]
        return outcome

    async def _publish(self, desired: Desired) -> Outcome:
        assert isinstance(desired.verdict, Complete)
        adapter = desired.adapter
        async with self._gate:
            outcome = await self._workshop.publish(
                adapter, desired.verdict.sha256, self._on_disk.get(adapter.name)
            )
        if outcome.on_disk is not None:
            self._on_disk[adapter.name] = outcome.on_disk
        if outcome.trouble is not None and outcome.trouble.kind is FailureKind.INVALID:
            self._memory.refuse(adapter, outcome.trouble.reason)
        return outcome

    def _report(
        self,
        actions: list[Action],
        desired: Mapping[str, Desired],
        outcomes: Mapping[str, Outcome],
        collected: int,
    ) -> PassReport:
        statuses, published, deleted = [], [], []
        for action in actions:
            outcome = outcomes.get(action.name, _NOTHING)
            on_disk = self._on_disk.get(action.name)
            if outcome.on_disk is not None:
                published.append(f"{action.name}@{outcome.on_disk.version}")
            if action.decision is Decision.DELETE and on_disk is None:
                deleted.append(action.name)
            else:
                statuses.append(status_of(action, desired.get(action.name), on_disk, outcome.trouble))
        return PassReport(
            ok=True,
            finished_at=self._clock.now(),
            adapters=tuple(statuses),
            published=tuple(published),
            deleted=tuple(deleted),
            collected=collected,
            fetched_bytes=sum(outcome.fetched_bytes for outcome in outcomes.values()),
            failures=Counter(one.trouble.kind for one in outcomes.values() if one.trouble is not None),
            look_again_seconds=min(
                (due for action in actions if (due := self._due(action, desired)) is not None), default=None
            ),
        )

    def _due(self, action: Action, desired: Mapping[str, Desired]) -> float | None:
        """In how many seconds a pass would do more for this adapter though nothing changed."""
        if action.decision is Decision.MISS:
            return self._options.settle_seconds
        verdict = desired[action.name].verdict if action.decision is Decision.WAIT else None
        return verdict.seconds_left if isinstance(verdict, Incomplete) else None
