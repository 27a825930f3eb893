"""A row's result as a line of a Bedrock batch's output file, and that batch's own manifest.

Beside Bedrock's fields a line has `served`, ours: what a tally needs and the shape has no place for.
"""

import msgspec

from worker.errors import LoramillError
from worker.jobs import Failure, Row, RowResult
from worker.wire.bedrock_rows import LLAMA, MESSAGES, MISTRAL
from worker.wire.openai_results import FINISH, openai_answer
from worker.wire.results import Counted, Tally, Usage, encode, failure_in

BAD_REQUEST, FAILED = 400, 500
"""`errorCode` of a row that can never succeed, and of one that another attempt may save."""


class Served(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who answered a record, at what cost; and why nobody did."""

    adapter: str
    """"" is the base model."""
    adapter_version: str | None
    usage: Usage
    code: str | None = None
    """The error's code, as in a native line."""


class RecordError(msgspec.Struct, frozen=True, rename="camel"):
    error_code: int
    error_message: str


class Record(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """One line. `model_input` is what was sent."""

    record_id: str
    model_input: msgspec.Raw
    model_output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: RecordError | None = None
    served: Served


class Summary(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`manifest.json.out`."""

    total_record_count: int
    processed_record_count: int
    success_record_count: int
    error_record_count: int
    input_token_count: int
    output_token_count: int


def bedrock_line(result: RowResult, *, job_id: str, created: int, base_model: str) -> Record:
    """One row's outcome. `created` is in seconds since the epoch."""
    row, failure = result.row, failure_in(result)
    served = Served(
        adapter=row.adapter or "",
        adapter_version=result.adapter_version,
        usage=Usage(result.prompt_tokens, result.completion_tokens),
        code=None if failure is None else failure.code,
    )
    error: RecordError | None = None
    output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    if failure is not None:
        # Half of a surrogate pair cannot be written, and a record as a whole cannot be mended.
        message = f"{failure.code}: {failure.message}".encode("utf-8", "replace").decode()
        error = RecordError(FAILED if failure.retryable else BAD_REQUEST, message)
    else:
        number = f"{job_id}-{row.index}"
        output = msgspec.Raw(encode(_output(result, number=number, created=created, base_model=base_model)))
    return Record(record_id=row.id, model_input=_input(row), model_output=output, error=error, served=served)


def count_bedrock(record: Record) -> Counted:
    """What a line says to a tally."""
    if (record.error is None) == (record.model_output is msgspec.UNSET):
        raise LoramillError("not a result file: a record has one of modelOutput and error")
    return Counted(
        adapter=record.served.adapter,
        adapter_version=record.served.adapter_version,
        usage=record.served.usage,
        error=None if record.error is None else Failure(record.served.code or "internal", ""),
    )


def encode_summary(tally: Tally) -> bytes:
    """The bytes of `manifest.json.out`, for a job that adds up to `tally`."""
    return encode(
        Summary(
            total_record_count=tally.rows,
            processed_record_count=tally.rows,
            success_record_count=tally.completed,
            error_record_count=tally.failed,
            input_token_count=tally.usage.prompt_tokens,
            output_token_count=tally.usage.completion_tokens,
        )
    )


class _Llama(msgspec.Struct, frozen=True):
    generation: str
    prompt_token_count: int
    generation_token_count: int
    stop_reason: str


class _MistralOutput(msgspec.Struct, frozen=True):
    text: str
    stop_reason: str


class _Mistral(msgspec.Struct, frozen=True):
    outputs: tuple[_MistralOutput, ...]


def _output(result: RowResult, *, number: str, created: int, base_model: str) -> msgspec.Struct:
    text, reason = result.text or "", FINISH[result.finish_reason]
    match _shape(result.row):
        case "llama":
            return _Llama(text, result.prompt_tokens, result.completion_tokens, reason)
        case "mistral":
            return _Mistral((_MistralOutput(text, reason),))
        case _:
            return openai_answer(result, number=number, created=created, base_model=base_model)


def _shape(row: Row) -> str:
    if row.origin is not None and row.origin.shape in {LLAMA, MISTRAL, MESSAGES}:
        return row.origin.shape
    return LLAMA if row.messages is None else MESSAGES


def _input(row: Row) -> msgspec.Raw:
    """What was sent; of a row in another format its prompt, in the shape that its answer has."""
    if row.origin is not None and row.origin.format == "bedrock":
        return msgspec.Raw(row.origin.body)
    if row.messages is not None:
        return msgspec.Raw(msgspec.json.encode({"messages": row.messages}))
    prompt = row.text if row.tokens is None else row.tokens
    return msgspec.Raw(msgspec.json.encode(None if prompt is None else {"prompt": prompt}))
