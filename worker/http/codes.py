"""What errors are in HTTP."""

from worker.errors import (
    AdapterInvalid,
    AdapterStoreFull,
    AdapterTaken,
    EngineFailed,
    HandlerRefused,
    InvalidRegistration,
    LoramillError,
    OutOfMemory,
    RegistryUnavailable,
    RowFailed,
    StorageFull,
    UnknownAdapter,
    UnknownWorkflow,
)
from worker.http.answers import Refused

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
    (OutOfMemory, 507),
)


def code_of(error: LoramillError) -> int | None:
    """The status of an answer that tells of `error`; None for one that nobody should be told."""
    if isinstance(error, HandlerRefused):
        return error.status
    return next((code for kind, code in CODES if isinstance(error, kind)), None)


def refused_for(error: Exception) -> Refused | None:
    """What a request that ended with `error` is told; None where that is nobody's business."""
    code = code_of(error) if isinstance(error, LoramillError) else None
    if isinstance(error, EngineFailed):
        return Refused(503, "The worker is not ready: the engine has stopped")
    return None if code is None else Refused(code, str(error))
