"""Every exception the mirror raises on purpose, and how far each one reaches.

SyncError
├── SettingsError        nothing starts; exit code 2
├── InvalidUri           an s3:// address that cannot be used; exit code 2
├── InvalidAdapter       one adapter is bad until it changes: reported; its last good version stays
├── ObjectChanged        one adapter changed between listing and reading: the next pass looks again
├── NoRoom               one adapter does not fit on the volume: the next pass looks again
├── RemoteUnavailable    S3 refused or cannot be reached: a failed listing fails the pass and deletes nothing,
│                        a failed read leaves one adapter pending
├── QueueUnavailable     the queue of S3 events, likewise: it is asked again later, passes go on by interval
├── UnreadableEvent      one message there is about no S3 event: counted and deleted
└── MirrorLocked         another syncer works on this volume: the pass is skipped
"""


class SyncError(Exception):
    """The root: catch this to catch all that the mirror raises on purpose."""


class SettingsError(SyncError):
    """One or more settings are wrong; the message lists every mistake, one a line."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        super().__init__("\n".join(mistakes))


class InvalidUri(SyncError):
    """The address is not an `s3://bucket/model_id/adapters/` that an adapter can live under."""


class InvalidAdapter(SyncError):
    """The adapter cannot be served. `reason` names the file or field, its value and the limit."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class ObjectChanged(SyncError):
    """The object at `key` is no longer the one that the listing named."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"{key} changed since it was listed")


class NoRoom(SyncError):
    """Publishing would pass the cap on disk use, or fill the volume."""


class RemoteUnavailable(SyncError):
    """S3 could not be reached, or refused, after the SDK's own retries."""


class QueueUnavailable(SyncError):
    """The queue of S3 events could not be reached, or refused, after the SDK's own retries."""


class UnreadableEvent(SyncError):
    """A message on the queue of S3 events is about no S3 event."""


class MirrorLocked(SyncError):
    """Another process or task holds the mirror's lock."""
