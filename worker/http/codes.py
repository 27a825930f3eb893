"""What errors of the management APIs are in HTTP."""

from worker.errors import (
    AdapterInvalid,
    AdapterStoreFull,
    AdapterTaken,
    EngineFailed,
    InvalidRegistration,
    LoramillError,
    RegistryUnavailable,
    RowFailed,
    StorageFull,
    UnknownAdapter,
    UnknownWorkflow,
)

CODES: tuple[tuple[type[LoramillError], int], ...] = (
    (UnknownAdapter, 404),
    (UnknownWorkflow, 404),
    (AdapterTaken, 409),
    (InvalidRegistration, 400),
    (AdapterInvalid, 400),
    (RegistryUnavailable, 503),
    (RowFailed, 503),
    (EngineFailed, 503),
    (StorageFull, 507),
    (AdapterStoreFull, 507),
)


def code_of(error: LoramillError) -> int | None:
    """The status of an answer that tells of `error`; None for one that nobody should be told."""
    return next((code for kind, code in CODES if isinstance(error, kind)), None)
