"""A row's result as a line of an OpenAI batch's output file, or of its error file.

Both kinds stand in one file here. A line has either a `response` or an `error`. `system_fingerprint`, which
names the configuration that answered, is the adapter's version.
"""

from typing import Any

import msgspec

from worker.jobs import Failure, FinishReason, Row, RowResult, TokenDetail
from worker.wire.results import Counted, Usage, failure_in

FINISH = {
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
}
CODES = {"expired": "batch_expired", "cancelled": "batch_cancelled"}
"""What OpenAI calls errors that we call otherwise."""
_OURS = {theirs: ours for ours, theirs in CODES.items()}
LEAST_LOG_PROB = -9999.0
"""In OpenAI's API the logarithm of a probability of 0, which JSON has no number for."""


class Tokens(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`chat.completion` or `text_completion`."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[dict[str, Any], ...]
    usage: Tokens
    system_fingerprint: str | None


class Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: Answer


class Error(msgspec.Struct, frozen=True):
    code: str
    message: str


class OpenAILine(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    custom_id: str
    response: Response | None
    error: Error | None


def openai_line(result: RowResult, *, job_id: str, created: int, base_model: str) -> OpenAILine:
    """One row's outcome. `created` is in seconds since the epoch."""
    row, number = result.row, f"{job_id}-{result.row.index}"
    failure = failure_in(result)
    line_id = f"batch_req_{number}"
    if failure is not None:
        error = Error(CODES.get(failure.code, failure.code), failure.message)
        return OpenAILine(id=line_id, custom_id=row.id, response=None, error=error)
    answer = openai_answer(result, number=number, created=created, base_model=base_model)
    return OpenAILine(id=line_id, custom_id=row.id, response=Response(200, line_id, answer), error=None)


def openai_answer(result: RowResult, *, number: str, created: int, base_model: str) -> Answer:
    """The body of a response, of the kind that was asked for. A native row with messages was a chat."""
    row, chat = result.row, result.row.messages is not None
    return Answer(
        id=answer_id(row, number),
        object="chat.completion" if chat else "text_completion",
        created=created,
        model=model_of(row, base_model),
        choices=(_chat_choice(result) if chat else _text_choice(result),),
        usage=tokens_of(result),
        system_fingerprint=result.adapter_version,
    )


def answer_id(row: Row, number: str) -> str:
    """What the body of its answer is called."""
    return f"{'cmpl' if row.messages is None else 'chatcmpl'}-{number}"


def model_of(row: Row, base_model: str) -> str:
    """The model that an answer names: the adapter, else what was asked for, else the base model."""
    return row.adapter or (None if row.origin is None else row.origin.model) or base_model


def tokens_of(result: RowResult) -> Tokens:
    """Its `usage`."""
    read, written = result.prompt_tokens, result.completion_tokens
    return Tokens(read, written, read + written)


def count_openai(line: OpenAILine) -> Counted:
    """What a line says to a tally; that of a failed row no longer knows its adapter and tokens."""
    if line.response is None:
        code = line.error.code if line.error is not None else "internal"
        failure = Failure(_OURS.get(code, code), "")
        return Counted(adapter="", adapter_version=None, usage=Usage(), error=failure)
    body = line.response.body
    return Counted(
        adapter=body.model,
        adapter_version=body.system_fingerprint,
        usage=Usage(body.usage.prompt_tokens, body.usage.completion_tokens),
        error=None,
    )


def _chat_choice(result: RowResult) -> dict[str, Any]:
    log_probs = None
    if result.row.params.details and result.tokens is not None:
        alternatives = result.top_tokens or ((),) * len(result.tokens)
        content = [
            _chat_token(token) | {"top_logprobs": [_chat_token(one) for one in likely]}
            for token, likely in zip(result.tokens, alternatives, strict=True)
        ]
        log_probs = {"content": content, "refusal": None}
    return {
        "index": 0,
        "message": {"role": "assistant", "content": result.text or "", "refusal": None},
        "logprobs": log_probs,
        "finish_reason": FINISH[result.finish_reason],
    }


def _chat_token(token: TokenDetail) -> dict[str, Any]:
    known = "\ufffd" not in token.text  # else a part of a character, whose bytes nobody knows here
    spelled = list(token.text.encode("utf-8", "replace")) if known else None
    return {"token": token.text, "logprob": _log_prob(token), "bytes": spelled}


def _text_choice(result: RowResult) -> dict[str, Any]:
    return {
        "text": result.text or "",
        "index": 0,
        "logprobs": _text_log_probs(result),
        "finish_reason": FINISH[result.finish_reason],
    }


def _text_log_probs(result: RowResult) -> dict[str, Any] | None:
    if not result.row.params.details or result.tokens is None:
        return None
    prefill = (result.prefill or ()) if result.row.params.return_full_text else ()
    tokens = (*prefill, *result.tokens)
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token.text)
    top = None
    if result.top_tokens is not None:
        # Best first: of tokens that are spelled alike the likeliest is to stay.
        likely = [{one.text: _log_prob(one) for one in reversed(place)} for place in result.top_tokens]
        top = [None] * len(prefill) + likely
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_log_prob(token) for token in tokens],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _log_prob(token: TokenDetail) -> float | None:
    return None if token.log_prob is None else max(LEAST_LOG_PROB, token.log_prob)
