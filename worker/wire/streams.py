"""The answer to a call that is streamed, piece by piece: DJL Serving's lines, and OpenAI's events."""

from typing import Any, Protocol

import msgspec

from worker.jobs import Delta, Row, RowResult, TokenDetail
from worker.wire.openai_results import FINISH, Error, answer_id, model_of, tokens_of
from worker.wire.results import encode, failure_in, response_of, result_line

_DETAILS = ("finish_reason", "generated_tokens", "inputs", "prefill", "top_tokens")
_DONE = b"data: [DONE]\n\n"


class Streamed(Protocol):
    """How the answer to one row is spelled while it is made."""

    content_type: str

    def token(self, delta: Delta) -> bytes:
        """What is sent for a token; perhaps nothing."""
        ...

    def end(self, result: RowResult) -> bytes:
        """What is sent for what no delta told, and for the end."""
        ...


class Lines:
    """A line of JSON for each token. The last one has all of the text besides, or the row's error.

    The row has to ask for `details`. Their texts make up what was generated, the prompt apart.
    """

    content_type = "application/jsonlines"

    def __init__(self) -> None:
        self._told = 0
        """Characters of the text."""

    def token(self, delta: Delta) -> bytes:
        """See Streamed."""
        self._told += len(delta.text)
        return self._line({"token": TokenDetail(delta.token, delta.text, delta.log_prob)})

    def end(self, result: RowResult) -> bytes:
        """See Streamed."""
        failure = failure_in(result)
        if failure is not None:
            return self._line({"error": failure})
        if result.response is not None or result.tokens is None:  # formatted: it is all one piece
            return self._line(response_of(result))
        line: Any = result_line(result)
        said = {"generated_text": line.generated_text}
        details = {name: getattr(line.details, name) for name in _DETAILS}
        said["details"] = {name: value for name, value in details.items() if value is not msgspec.UNSET}
        *_, last = line.details.tokens
        if not result.row.params.return_full_text:  # else nobody knows where the prompt ends
            last = TokenDetail(last.id, line.generated_text[self._told :], last.log_prob)
        return self._line({"token": last, **said})

    @staticmethod
    def _line(said: dict[str, Any]) -> bytes:
        return encode(said) + b"\n"


class Events:
    """Server-sent events with the chunks of a chat or of a completion; the last one is `[DONE]`."""

    content_type = "text/event-stream"

    def __init__(self, row: Row, *, number: str, created: int, base_model: str, with_usage: bool) -> None:
        """`with_usage` has one more chunk count the tokens."""
        self._is_chat = row.messages is not None
        self._head = {
            "id": answer_id(row, number),
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": created,
            "model": model_of(row, base_model),
        }
        self._with_usage = with_usage
        self._told = 0
        self._has_begun = False

    def token(self, delta: Delta) -> bytes:
        """See Streamed."""
        return self._text(delta.text)

    def end(self, result: RowResult) -> bytes:
        """See Streamed."""
        failure = failure_in(result)
        if failure is not None:
            return self._event({"error": Error(failure.code, failure.message)}) + _DONE
        said = self._text((result.text or "")[self._told :])
        said += self._choice({} if self._is_chat else "", FINISH[result.finish_reason])
        if self._with_usage:
            said += self._event({**self._head, "choices": [], "usage": tokens_of(result)})
        return said + _DONE

    def _text(self, text: str) -> bytes:
        self._told += len(text)
        if not self._is_chat:
            return self._choice(text) if text else b""
        begin = b"" if self._has_begun else self._choice({"role": "assistant", "content": ""})
        self._has_begun = True
        return begin + (self._choice({"content": text}) if text else b"")

    def _choice(self, said: Any, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta" if self._is_chat else "text": said, "logprobs": None}
        return self._event({**self._head, "choices": [{**choice, "finish_reason": finish_reason}]})

    @staticmethod
    def _event(said: dict[str, Any]) -> bytes:
        return b"data: " + encode(said) + b"\n\n"
