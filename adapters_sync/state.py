"""`.state.json`: what the mirror thinks of every adapter, for people and for the worker to read."""

import enum
from collections.abc import Mapping
from pathlib import Path

import msgspec


class AdapterState(enum.StrEnum):
    """What became of an adapter's newest upload. The last good version is served in every state."""

    READY = "ready"
    PENDING = "pending"
    """Not complete yet, or could not be read: the next pass looks again."""
    INVALID = "invalid"
    """Refused until it changes."""


class AdapterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter. `version`, `bytes` and `rank` are those of the version that is served now."""

    name: str
    state: AdapterState
    version: str | None = None
    """None while nothing is served."""
    wanted: str | None = None
    """The version in S3 where it is another one."""
    reason: str | None = None
    """Why it is not ready, or what people should know about it."""
    bytes: int = 0
    rank: int | None = None
    skipped: tuple[str, ...] = ()
    """Files in S3 that the mirror does not carry, the first few."""


class MirrorState(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file. A pass that changes nothing does not write it."""

    source: str
    """The s3:// prefix that is mirrored."""
    folder: str
    """The name of the adapters folder beside this file."""
    adapters: tuple[AdapterStatus, ...] = ()
    """By name."""
    last_success: float | None = None
    """Unix time of the first complete pass that found things as told here. Later passes that changed
    nothing leave the file as it is; the metrics know the time of the latest."""
    error: str | None = None
    """Why the last pass failed, if it did."""

    def find(self, name: str) -> AdapterStatus | None:
        return next((adapter for adapter in self.adapters if adapter.name == name), None)

    def counts(self) -> Mapping[AdapterState, int]:
        """How many adapters are in each state."""
        return {state: sum(one.state is state for one in self.adapters) for state in AdapterState}


def read_state(state_file: Path) -> MirrorState | None:
    """The mirror's last word; None when there is no such file or it is not ours.

    The file is a report: nothing is decided by it, so an unreadable one is as good as none.
    """
    try:
        return msgspec.json.decode(state_file.read_bytes(), type=MirrorState)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
