"""How a mirror behaves, and where it takes time and chance from."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import msgspec

from adapters_sync.inventory import Limits


class MirrorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Times are in seconds."""

    interval_seconds: float = 30.0
    """Between two passes, a tenth more or less."""
    settle_seconds: float = 60.0
    """For how long a plain upload must stay unchanged to count as complete."""
    grace_seconds: float = 3600.0
    """For how long a version stays on the disk after its link has moved on."""
    allow_empty: bool = False
    """Delete even when none of the adapters on disk is left in S3."""
    limits: Limits = Limits()
    adapters_at_once: int = 4
    files_at_once: int = 16


class Clock(msgspec.Struct, frozen=True):
    """Tests bring their own."""

    now: Callable[[], float] = time.time
    """Seconds since the Unix epoch."""
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    """From 0 to 1."""
