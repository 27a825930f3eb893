"""Worker processes that are killed, frozen and told to stop, and started again whatever ended them."""

import contextlib
import enum
import math
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Self

import psutil

from tests.e2e.conftest import Process

_OUTCOME = 'loramill_messages_total{outcome="'
_HTTP_SECONDS = 2.0
_HURRY_SECONDS = 2.0


class Blow(enum.StrEnum):
    """What may be done to a worker."""

    KILL = "SIGKILL"
    AMBUSH = "SIGKILL in a call"
    """As soon as it makes the next call that commits something; the call is done, and nobody hears of it."""
    TERM = "SIGTERM"
    FREEZE = "SIGSTOP"
    """And SIGCONT, when its messages have become visible."""


class Slot:
    """The place of one worker: a cache of its own, which outlives the processes."""

    def __init__(
        self, number: int, folder: Path, environ: Mapping[str, str], arguments: Sequence[str]
    ) -> None:
        self.number = number
        self.starts = 0
        self.thaws_at: float | None = None
        """When it goes on, while it is frozen."""
        self.dies_by: float | None = None
        """When a process that was told to stop must have ended."""
        self._folder = folder
        self._environ = {**environ, "LORAMILL_CACHE_DIR": str(folder / f"cache-{number}")}
        self._arguments = list(arguments)
        self.start()

    def start(self) -> None:
        self.thaws_at = self.dies_by = None
        self.buried = False
        """Whether its end was counted."""
        log = self._folder / f"worker-{self.number}-{self.starts}.log"
        self.process = Process(self._arguments, self._environ, log)
        self.starts += 1

    @property
    def runs(self) -> bool:
        """Whether there is a process, and nobody has told it anything yet."""
        return self.thaws_at is None and self.dies_by is None and self.process.popen.poll() is None

    def outcomes(self) -> Counter[str]:
        """How many deliveries of this process ended how; nothing where it does not say."""
        counts: Counter[str] = Counter()
        url = f"http://127.0.0.1:{self.process.port}/metrics"
        with contextlib.suppress(OSError, HTTPException):
            with urllib.request.urlopen(url, timeout=_HTTP_SECONDS) as answer:
                text = answer.read().decode()
            for line in text.splitlines():
                if line.startswith(_OUTCOME):
                    outcome, _, count = line.removeprefix(_OUTCOME).partition('"} ')
                    counts[outcome] = int(float(count))
        return counts

    def last_words(self) -> str:
        return self.process.text.strip().rpartition("\n")[2][-300:]


class Fleet:
    """`with Fleet(...) as fleet`: `count` workers. Call `tend` often; other threads may call `strike` alone.

    A worker that was told to stop and does not end within `stop_seconds` is counted as stuck and killed.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        environ: Mapping[str, str],
        arguments: Sequence[str],
        *,
        stop_seconds: float,
    ) -> None:
        self._make = lambda number: Slot(number, folder, environ, arguments)
        self._count = count
        self._stop_seconds = stop_seconds
        self.slots: list[Slot] = []
        self.blows: Counter[Blow] = Counter()
        self.exits: Counter[int] = Counter()
        """Exit codes, of all processes that ended."""
        self.stuck = 0
        self.unasked: list[str] = []
        """The last words of those that ended by themselves."""
        self._lock = threading.Lock()
        self._ended_outcomes: Counter[str] = Counter()
        self._latest: dict[int, Counter[str]] = {}

    def __enter__(self) -> Self:
        try:
            for number in range(self._count):
                self.slots.append(self._make(number))
        except BaseException:
            self.kill_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    @property
    def restarts(self) -> int:
        return sum(slot.starts - 1 for slot in self.slots)

    @property
    def outcomes(self) -> Counter[str]:
        """How deliveries ended, as far as the workers lived to say."""
        return sum(self._latest.values(), self._ended_outcomes)

    def running(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.runs]

    def at_work(self) -> list[Slot]:
        """Of those that run, whoever has ended a delivery as far as is known."""
        return [slot for slot in self.running() if self._latest.get(slot.number)]

    def strike(self, slot: Slot, blow: Blow, freeze_seconds: float = 0.0) -> bool:
        """Do it to a worker; False if it does not run any more."""
        with self._lock:
            if not slot.runs:
                return False
            self.blows[blow] += 1
            now, popen = time.monotonic(), slot.process.popen
            if blow is Blow.FREEZE:
                slot.thaws_at = now + freeze_seconds
                popen.send_signal(signal.SIGSTOP)
            else:
                slot.dies_by = now + self._stop_seconds
                popen.send_signal(signal.SIGTERM if blow is Blow.TERM else signal.SIGKILL)
            return True

    def caller(self, port: int) -> Slot | None:
        """Whose end of a connection has this port, if it runs and nobody has told it anything."""
        for slot in self.running():
            with contextlib.suppress(psutil.Error):
                connections = psutil.Process(slot.process.popen.pid).net_connections("tcp")
                if any(one.laddr.port == port for one in connections):
                    return slot
        return None

    def tend(self) -> None:
        """Thaw whom it is time for, bury the dead, and start others in their places."""
        for slot in self.slots:
            if self._see_to(slot):
                slot.start()

    def look(self) -> None:
        """Ask the workers how they are."""
        for slot in self.running():
            self._look(slot)

    def stop(self) -> None:
        """Tell all to stop, and wait until they have."""
        self.look()
        for slot in self.slots:
            if slot.thaws_at is not None:
                slot.thaws_at = 0.0
            if slot.dies_by is None:
                slot.process.popen.terminate()
                slot.dies_by = time.monotonic() + self._stop_seconds
        hurry_at = time.monotonic() + _HURRY_SECONDS
        left = self.slots
        while left := [slot for slot in left if not self._see_to(slot)]:
            if time.monotonic() >= hurry_at:
                for slot in left:
                    slot.process.popen.terminate()  # twice is at once
                hurry_at = math.inf
            time.sleep(0.05)

    def kill_all(self) -> None:
        for slot in self.slots:
            slot.process.popen.kill()
            slot.process.popen.wait(30)

    def _see_to(self, slot: Slot) -> bool:
        """Whether this process has ended; if it must, by our own hand."""
        with self._lock:
            popen, now = slot.process.popen, time.monotonic()
            if slot.thaws_at is not None and now >= slot.thaws_at:
                popen.send_signal(signal.SIGCONT)
                slot.thaws_at = None
            if popen.poll() is None and slot.dies_by is not None and now >= slot.dies_by:
                self.stuck += 1
                popen.kill()
                popen.wait(30)
            if popen.poll() is not None and not slot.buried:
                self._bury(slot)
            return slot.buried

    def _bury(self, slot: Slot) -> None:
        slot.buried = True
        code = slot.process.popen.returncode
        self.exits[code] += 1
        if slot.dies_by is None:
            self.unasked.append(f"exit {code}: {slot.last_words()}")
        self._ended_outcomes += self._latest.pop(slot.number, Counter())

    def _look(self, slot: Slot) -> None:
        outcomes = slot.outcomes()
        if outcomes:
            self._latest[slot.number] = outcomes
