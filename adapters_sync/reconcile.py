"""The mirror: keeps an adapters folder like its prefix in S3, pass after pass.

It may run in a process of its own or as a task of the worker. The lock on the volume is held for one pass at
a time, so a second syncer on it only skips passes, and takes over when the first one ends.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from adapters_sync import disk
from adapters_sync.errors import MirrorLocked, RemoteUnavailable, SettingsError
from adapters_sync.event_queue import EventQueue, connect_queue
from adapters_sync.events import EventOutcome
from adapters_sync.inventory import Limits
from adapters_sync.layout import MirrorPaths
from adapters_sync.listener import listening
from adapters_sync.options import Clock, MirrorOptions
from adapters_sync.pace import LEAST_SECONDS, Pace
from adapters_sync.passes import Passes
from adapters_sync.remote import Remote, connect
from adapters_sync.report import FailureKind, PassReport
from adapters_sync.state import MirrorState, read_state
from adapters_sync.tasks import in_thread, unless
from adapters_sync.uris import parse_prefix

__all__ = ["Clock", "Limits", "Mirror", "MirrorOptions", "PassReport", "open_mirror"]

_logger = logging.getLogger(__name__)
_DEFAULTS = MirrorOptions()
_REAL_CLOCK = Clock()
_MAX_SETTLING_PASSES = 4


def _ignore(_: object) -> None:
    pass


class Mirror:
    """One adapters folder and the prefix it mirrors. Use it from one event loop, one pass at a time."""

    def __init__(
        self,
        remote: Remote,
        adapters_dir: Path,
        options: MirrorOptions = _DEFAULTS,
        clock: Clock = _REAL_CLOCK,
        events: EventQueue | None = None,
    ) -> None:
        """Writes nothing yet. Raises SettingsError when another mirrored folder has the same parent.

        `run` listens to `events`, if any.
        """
        # Real, since a link's `..` is that of the folder it lies in, not of the path that led there.
        self._paths = MirrorPaths(adapters_dir.resolve())
        self._options = options
        self._clock = clock
        self._events = events
        self._source = remote.source
        self._passes = Passes(remote, self._paths, options, clock)
        self._state = _restore(self._paths, str(remote.source))
        self._pace = Pace(options.interval_seconds, clock.random)
        self._woken = asyncio.Event()
        self._ready = False

    @property
    def ready(self) -> bool:
        """True once a full pass is done."""
        return self._ready

    @property
    def state(self) -> MirrorState:
        """What the state file says."""
        return self._state

    def wake(self) -> None:
        """Begin the next pass now, or a second after the last: for whoever hears that S3 changed.

        Call it on the event loop.
        """
        self._woken.set()

    async def run(
        self,
        stop: asyncio.Event,
        on_pass: Callable[[PassReport], None] = _ignore,
        on_event: Callable[[EventOutcome], None] = _ignore,
    ) -> None:
        """Pass after pass until `stop` is set; a pass under way is cancelled, which the disk can bear."""
        asked_for = False
        async with listening(self._events, self._source, self.wake, on_event, self._clock):
            while not stop.is_set():
                try:
                    report = await unless(stop, self.run_once(asked_for=asked_for))
                except Exception as error:
                    _logger.exception("a pass failed by a mistake of ours")
                    report = self._failed(FailureKind.INTERNAL, repr(error))
                if report is None:
                    return
                on_pass(report)
                seconds = self._pace.seconds_after(report, asked_for=asked_for)
                asked_for = bool(await unless(stop, self._pause(seconds)))

    async def settle(
        self, stop: asyncio.Event, on_pass: Callable[[PassReport], None] = _ignore
    ) -> PassReport | None:
        """Pass until nothing waits for time alone, at most a few times; None when `stop` came first.

        What `--once` does: a single pass could neither publish a plain upload nor delete, since both take
        two listings. The report is the last pass's.
        """
        for remaining in reversed(range(_MAX_SETTLING_PASSES)):
            report = await unless(stop, self.run_once())
            if report is None:
                return None
            on_pass(report)
            if not report.ok or report.look_again_seconds is None or not remaining:
                return report
            await unless(stop, self._sleep(self._options.settle_seconds))
        return None

    async def run_once(self, *, asked_for: bool = False) -> PassReport:
        """One pass. Trouble is in the report; what is raised is a mistake of ours.

        One that is `asked_for` may come soon after another, and counts for a deletion accordingly.
        """
        started = self._clock.monotonic()
        try:
            with disk.exclusive(self._paths.lock_file):
                report = await self._pass(asked_for)
                await self._record(report)
        except MirrorLocked as error:
            report = self._failed(FailureKind.LOCKED, str(error))
        except OSError as error:
            report = self._failed(FailureKind.DISK, str(error))
        self._ready = self._ready or report.ok
        return msgspec.structs.replace(report, seconds=self._clock.monotonic() - started)

    async def _pass(self, asked_for: bool) -> PassReport:
        try:
            return await self._passes.run(asked_for=asked_for)
        except RemoteUnavailable as error:
            return self._failed(FailureKind.LIST, str(error))

    async def _record(self, report: PassReport) -> None:
        """Write the state file, if the pass changed what it says."""
        adapters = report.adapters if report.ok else self._state.adapters
        state = msgspec.structs.replace(self._state, adapters=adapters, error=report.error)
        if state == self._state and (state.last_success is not None or not report.ok):
            return
        if report.ok:
            state = msgspec.structs.replace(state, last_success=report.finished_at)
        await in_thread(disk.write_state, self._paths.state_file, state)
        self._state = state

    def _failed(self, kind: FailureKind, error: str) -> PassReport:
        _logger.warning("a pass failed", extra={"kind": kind, "reason": error})
        return PassReport(ok=False, finished_at=self._clock.now(), error=error, failures={kind: 1})

    async def _pause(self, seconds: float) -> bool:
        """Wait so long, or until somebody calls `wake`, but a second at least; True when somebody did."""
        least = min(LEAST_SECONDS, seconds)
        await self._sleep(least)
        if not self._woken.is_set():
            await unless(self._woken, self._sleep(seconds - least))
        woken = self._woken.is_set()
        self._woken.clear()
        return woken

    async def _sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)


@asynccontextmanager
async def open_mirror(
    uri: str,
    adapters_dir: Path,
    options: MirrorOptions = _DEFAULTS,
    events_queue_url: str | None = None,
) -> AsyncIterator[Mirror]:
    """A mirror of `s3://bucket/model_id/adapters/` and its connections, which are closed at the end.

    Raises InvalidUri, SettingsError, and RemoteUnavailable when not even a client can be made.
    """
    async with connect(parse_prefix(uri)) as remote, connect_queue(events_queue_url) as events:
        yield Mirror(remote, adapters_dir, options, events=events)


def _restore(paths: MirrorPaths, source: str) -> MirrorState:
    """The state to go on from. It decides nothing; what is served is read from the links."""
    blank = MirrorState(source=source, folder=paths.adapters_dir.name)
    last = read_state(paths.state_file)
    if last is None:
        return blank
    if last.folder != blank.folder and paths.adapters_dir.with_name(last.folder).exists():
        mistake = (
            f"adapters_dir: {paths.adapters_dir} has the same parent as {last.folder}, which is mirrored"
        )
        raise SettingsError([f"{mistake} too; versions are kept in the parent, so each needs its own"])
    # Written by another source or folder, it is out of date: the next complete pass must write it.
    return last if (last.source, last.folder) == (blank.source, blank.folder) else blank
