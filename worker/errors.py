"""Every exception loramill raises on purpose, and what each means for the message.

LoramillError
├── SettingsError        the process does not start; exit code 2
├── ModelError           the base model cannot be served; the process ends with exit code 1
├── JobError             the job can never succeed: a `failed` manifest (or a dead letter), then ack
│   ├── InvalidMessage       not JSON, wrong schema, a limit exceeded
│   ├── InvalidInput         the file it refers to is gone, another one, or damaged
│   ├── ForbiddenInput       `input.uri` lies outside the worker's INPUT_PREFIXES
│   ├── ForbiddenOutput      `output.uri` lies outside the worker's OUTPUT_PREFIXES
│   └── JobIdReused          another job was committed under the same id
├── RowError             one row fails: an error line in the results; its neighbours go on
│   ├── InvalidLine          the row is not a row
│   ├── InvalidParameters    unknown, ill-typed or contradictory generation parameters
│   ├── PromptTooLong        prompt and max_new_tokens exceed max_model_len
│   ├── ModelNotFound        neither the base model nor a workflow has that name
│   ├── AdapterNotFound      no adapter of that name, or LoRA is off
│   ├── AdapterInvalid       the adapter exists and cannot be applied whole
│   ├── Expired              not started within the job's ttl_seconds
│   ├── Cancelled            not started before its sender took the job back
│   ├── TimedOut             somebody waits for the row, and it took too long
│   ├── OutOfMemory          the row alone does not fit
│   ├── AdapterStoreFull     host memory is full of adapters in use or pinned
│   ├── HandlerRefusedRow    the custom handler failed at this row, or said no
│   └── RowFailed            anything else that is this row's own
├── TransientError       worth another try: the message is released with a back-off
│   ├── QueueUnavailable     SQS refused, throttled or timed out after the SDK's own retries
│   └── StoreUnavailable     S3, likewise
├── LeaseLost            somebody else may hold the message: stop working, ack nothing
├── ObjectExists         a conditional PUT found the key taken (412)
├── ObjectNotFound       no such object
├── RegistrationError    the adapter management API was asked for what cannot be: its answer, nobody else's
│   ├── UnknownAdapter       404
│   ├── AdapterTaken         409: the name is somebody else's
│   ├── UnknownWorkflow      404
│   ├── InvalidRegistration  400: the name, the source or the adapter itself
│   │   └── InvalidWorkflow      a workflow.json that says nothing that could be done
│   ├── RegistryUnavailable  503: S3 cannot be reached, or another worker is in charge
│   ├── StorageFull          507: the disk
│   └── HandlerRefused       the custom handler failed at it, or said no: the code is its own
├── HandlerDied          the custom handler's process is gone: it is started again, the call fails
├── HandlerBusy          too many calls wait for the custom handler
└── EngineFailed         the engine is broken: release every lease, end non-zero
"""

from typing import ClassVar


class LoramillError(Exception):
    """The root: catch this to catch all that loramill raises on purpose."""


class SettingsError(LoramillError):
    """One or more settings are wrong; the message lists every mistake, one a line."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        super().__init__("\n".join(mistakes))


class ModelError(LoramillError):
    """The base model cannot be loaded or cannot be served right by this engine."""


class JobError(LoramillError):
    """The job can never succeed, however often it is tried."""

    code: ClassVar[str] = "invalid_job"


class InvalidMessage(JobError):
    """The message body does not describe a job."""

    code = "invalid_message"


class InvalidInput(JobError):
    """The file that the job refers to cannot be read as what it is said to be."""

    code = "invalid_input"


class ForbiddenInput(JobError):
    """The job asks for a file that this worker may not read."""

    code = "forbidden_input"


class ForbiddenOutput(JobError):
    """The job asks for results at a place this worker may not write to."""

    code = "forbidden_output"


class JobIdReused(JobError):
    """A different job was committed under this id; its results are left as they are."""

    code = "job_id_reused"


class RowError(LoramillError):
    """One row fails and its neighbours do not. `code` is the result line's `error.code`."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class InvalidLine(RowError):
    code = "invalid_line"


class InvalidParameters(RowError):
    code = "invalid_parameters"


class PromptTooLong(RowError):
    code = "prompt_too_long"


class ModelNotFound(RowError):
    code = "model_not_found"
    retryable = True


class AdapterNotFound(RowError):
    code = "adapter_not_found"
    retryable = True


class AdapterInvalid(RowError):
    """`kind` is one of KINDS: what about the adapter is wrong."""

    code = "adapter_invalid"
    KINDS: ClassVar[tuple[str, ...]] = (
        "config",
        "file",
        "modules",
        "rank",
        "tensors",
        "values",
        "size",
        "mirror",
    )

    def __init__(self, message: str, kind: str = "config") -> None:
        assert kind in self.KINDS
        self.kind = kind
        super().__init__(message)


class Expired(RowError):
    code = "expired"


class Cancelled(RowError):
    """The job was cancelled before the row was started."""

    code = "cancelled"


class TimedOut(RowError):
    """A row of a call did not end in time."""

    code = "timeout"
    retryable = True


class OutOfMemory(RowError):
    code = "oom"
    retryable = True


class AdapterStoreFull(RowError):
    code = "oom"
    retryable = True


class HandlerRefusedRow(RowError):
    """The custom handler's answer is that it failed, or it gave none that a result line has a place for."""

    code = "handler_failed"


class RowFailed(RowError):
    code = "internal"
    retryable = True


class TransientError(LoramillError):
    """Trouble that time may mend."""


class QueueUnavailable(TransientError):
    """SQS could not be reached, or refused, after the SDK's own retries."""


class StoreUnavailable(TransientError):
    """S3 could not be reached, or refused, after the SDK's own retries."""


class LeaseLost(LoramillError):
    """The message's visibility ended before the work did."""


class ObjectExists(LoramillError):
    """A conditional PUT found an object at the key. `uri` names it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        super().__init__(f"{uri} exists already")


class ObjectNotFound(LoramillError):
    """No object at `uri`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        super().__init__(f"{uri} does not exist")


class QueueRefused(LoramillError):
    """SQS said no and will say so again: access denied, no such queue, no credentials."""


class StoreRefused(LoramillError):
    """S3 said no and will say so again: access denied, no such bucket, no credentials, a bad URI or key."""


class ObjectTooLarge(StoreRefused):
    """The object at `uri` has `size` bytes, more than the caller would take."""

    def __init__(self, uri: str, size: int, max_bytes: int) -> None:
        self.uri = uri
        self.size = size
        self.max_bytes = max_bytes
        super().__init__(f"{uri} has {size} bytes; at most {max_bytes} are taken")


class RegistrationError(LoramillError):
    """An adapter or workflow cannot be registered, changed or removed as asked; everything is as it was."""


class UnknownAdapter(RegistrationError):
    """No adapter has this name."""


class UnknownWorkflow(RegistrationError):
    """No workflow has this name."""


class AdapterTaken(RegistrationError):
    """The name belongs to another registration, or to an adapter of the adapters folder."""


class InvalidRegistration(RegistrationError):
    """The name, the source, or what lies there cannot be served."""


class InvalidWorkflow(InvalidRegistration):
    """A workflow.json cannot be read, or asks for what is not there."""


class RegistryUnavailable(RegistrationError):
    """The source or the place for it cannot be reached now; later it may."""


class StorageFull(RegistrationError):
    """The disk took no more."""


class HandlerRefused(RegistrationError):
    """The custom handler did not take what it was told about an adapter. `status` is its code."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


class HandlerDied(LoramillError):
    """The custom handler's process ended, or had to be ended."""


class HandlerBusy(LoramillError):
    """So many calls wait for the custom handler that one more is not taken."""


class EngineFailed(LoramillError):
    """The engine thread ended by an error that no single row explains."""
