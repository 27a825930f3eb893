"""A row's result as a line of this project's own, and what the lines of a file add up to."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from worker.jobs import Failure, RowResult, Task, TokenDetail


class Usage(msgspec.Struct, frozen=True):
    """Tokens read and tokens written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """What `"details": true` adds to a line, by DJL's names. `inputs` is null for a chat row."""

    finish_reason: str
    generated_tokens: int
    inputs: str | None
    prefill: tuple[TokenDetail, ...] | msgspec.UnsetType = msgspec.UNSET
    """With `decoder_input_details`: the prompt's tokens, of which the first has no log-probability."""
    tokens: tuple[TokenDetail, ...]
    top_tokens: tuple[tuple[TokenDetail, ...], ...] | msgspec.UnsetType = msgspec.UNSET
    """With `top_n_tokens`: the likeliest tokens in the place of each of `tokens`, best first."""


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line, as it is written. `adapter` is "" for the base model."""

    id: str
    index: int
    adapter: str
    adapter_version: str | None
    generated_text: str | None
    finish_reason: str
    usage: Usage
    details: Details | dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    response: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """What an output formatter returned beside a text and details; then they are its own too, or absent."""
    error: Failure | None


class ScoreLine(msgspec.Struct, frozen=True, kw_only=True):
    """The line of a row that was scored. Logarithms are natural ones."""

    id: str
    index: int
    adapter: str
    adapter_version: str | None
    logprob: float | None
    """The sum of the next; null where the row failed, as are the next two."""
    token_logprobs: tuple[float, ...] | None
    is_greedy: bool | None
    finish_reason: str
    usage: Usage
    details: Details | msgspec.UnsetType = msgspec.UNSET
    error: Failure | None


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What one line says to a tally. By these names, it is also how a native line is read."""

    adapter: str
    adapter_version: str | None
    usage: Usage
    error: Failure | None
    """Only its code counts."""


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says about one result file, or by `total` about several."""

    rows: int = 0
    completed: int = 0
    errors: dict[str, int] = {}
    """Failed rows by error code."""
    usage: Usage = Usage()
    adapters: dict[str, tuple[str, ...]] = {}
    """The versions that served, by adapter name, sorted."""
    sha256: str = ""
    """Of the file's bytes, in hex; empty for a total."""

    @property
    def failed(self) -> int:
        return self.rows - self.completed


def result_line(result: RowResult) -> ResultLine | ScoreLine:
    """One row's outcome as a line. A failed row keeps no text."""
    failure = failure_in(result)
    if result.row.task is Task.SCORE:
        return _score_line(result, failure)
    if result.response is not None and failure is None:
        return _formatted_line(result, dict(result.response))
    return ResultLine(
        id=result.row.id,
        index=result.row.index,
        adapter=result.row.adapter or "",
        adapter_version=result.adapter_version,
        generated_text=None if failure else result.text,
        finish_reason="error" if failure else result.finish_reason.value,
        usage=Usage(result.prompt_tokens, result.completion_tokens),
        details=msgspec.UNSET if failure else _details(result),
        error=failure,
    )


def _formatted_line(result: RowResult, response: dict[str, Any]) -> ResultLine:
    """The fields of `response` that a line has, in their places, and all others together."""
    text = response.pop("generated_text") if isinstance(response.get("generated_text"), str) else None
    details = response.pop("details") if isinstance(response.get("details"), dict) else msgspec.UNSET
    line = result_line(msgspec.structs.replace(result, response=None))
    assert isinstance(line, ResultLine)
    return msgspec.structs.replace(
        line, generated_text=text, details=details, response=response or msgspec.UNSET
    )


def response_of(result: RowResult) -> dict[str, Any]:
    """What a row that did not fail is answered over HTTP: `{"generated_text", "details"?}`, or scores.

    Or what an output formatter made of it.
    """
    if result.response is not None:
        return result.response
    line = result_line(result)
    said: dict[str, Any]
    if isinstance(line, ScoreLine):
        said = {name: getattr(line, name) for name in ("logprob", "token_logprobs", "is_greedy")}
    else:
        said = {"generated_text": line.generated_text}
    return said if line.details is msgspec.UNSET else said | {"details": line.details}


def _score_line(result: RowResult, failure: Failure | None) -> ScoreLine:
    score = None if failure else result.score
    return ScoreLine(
        id=result.row.id,
        index=result.row.index,
        adapter=result.row.adapter or "",
        adapter_version=result.adapter_version,
        logprob=None if score is None else math.fsum(score.log_probs),
        token_logprobs=None if score is None else score.log_probs,
        is_greedy=None if score is None else score.is_greedy,
        finish_reason="error" if failure else result.finish_reason.value,
        usage=Usage(result.prompt_tokens, result.completion_tokens),
        details=msgspec.UNSET if failure else _details(result),
        error=failure,
    )


def failure_in(result: RowResult) -> Failure | None:
    """Why the row failed, if it did: in the engine or while it was read."""
    return result.failure or result.row.failure


def encode(line: object) -> bytes:
    """UTF-8, on one line. Half of a surrogate pair, from a tokenizer or an error's text, becomes "?"."""
    try:
        return _ENCODER.encode(line)
    except UnicodeEncodeError:
        return _ENCODER.encode(_writable(msgspec.to_builtins(line)))


class Adder:
    """Adds up the lines of one file, as they come."""

    def __init__(self) -> None:
        self._rows = 0
        self._errors: Counter[str] = Counter()
        self._prompt_tokens = self._completion_tokens = 0
        self._adapters: set[tuple[str, str]] = set()
        self._sha256 = hashlib.sha256()

    def add(self, line: Counted, encoded: bytes) -> None:
        """One more line, and its bytes with the newline."""
        self._rows += 1
        if line.error is not None:
            self._errors[line.error.code] += 1
        self._prompt_tokens += line.usage.prompt_tokens
        self._completion_tokens += line.usage.completion_tokens
        if line.adapter_version is not None:
            self._adapters.add((line.adapter, line.adapter_version))
        self._sha256.update(encoded)

    @property
    def tally(self) -> Tally:
        """Of the lines so far."""
        return Tally(
            rows=self._rows,
            completed=self._rows - self._errors.total(),
            errors=dict(self._errors),
            usage=Usage(self._prompt_tokens, self._completion_tokens),
            adapters=_versions(self._adapters),
            sha256=self._sha256.hexdigest(),
        )


def total(tallies: Sequence[Tally]) -> Tally:
    """The tallies of all parts as one."""
    return Tally(
        rows=sum(one.rows for one in tallies),
        completed=sum(one.completed for one in tallies),
        errors=dict(sum((Counter(one.errors) for one in tallies), Counter())),
        usage=_sum(one.usage for one in tallies),
        adapters=_versions(
            (name, version) for one in tallies for name, found in one.adapters.items() for version in found
        ),
    )


_ENCODER = msgspec.json.Encoder()


def _writable(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: _writable(one) for name, one in value.items()}
    return [_writable(one) for one in value] if isinstance(value, list | tuple) else value


def _details(result: RowResult) -> Details | msgspec.UnsetType:
    if not result.row.params.details or result.tokens is None:
        return msgspec.UNSET
    return Details(
        finish_reason=result.finish_reason.value,
        generated_tokens=result.completion_tokens,
        inputs=result.row.text,
        prefill=msgspec.UNSET if result.prefill is None else result.prefill,
        tokens=result.tokens,
        top_tokens=msgspec.UNSET if result.top_tokens is None else result.top_tokens,
    )


def _sum(usages: Iterable[Usage]) -> Usage:
    prompt = completion = 0
    for usage in usages:
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
    return Usage(prompt, completion)


def _versions(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for name, version in pairs:
        found.setdefault(name, set()).add(version)
    return {name: tuple(sorted(versions)) for name, versions in sorted(found.items())}
