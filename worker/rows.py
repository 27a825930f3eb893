"""The rows of a job, each through tokenizer, adapter and engine to its result."""

import asyncio
import functools
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import msgspec

from adapters_sync.layout import AdapterFolder
from worker.adapters import AdapterDirectory
from worker.bridge import Bridge
from worker.engine.scoring import read_pair
from worker.engine.tokenizer import Tokenizer
from worker.errors import Cancelled, EngineFailed, Expired, RowError
from worker.jobs import (
    AdapterKey,
    Completion,
    InferenceRequest,
    Job,
    Row,
    RowResult,
    SamplingParams,
    Task,
    TokenDetail,
)
from worker.wire.checks import failure_of


class Hold:
    """The rows of a job that is at work, and how many of them have no result yet."""

    __slots__ = ("began", "cancelled", "job", "left")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.left = len(job.rows)
        self.began = time.monotonic()
        self.cancelled = False
        """Whoever sets this has rows fail that are not started yet."""


class _Encoded(NamedTuple):
    """What a row gives the model."""

    text: str
    """The prompt; empty where nobody asks for it."""
    tokens: tuple[int, ...]
    """Of the prompt, and of a target."""
    num_targets: int = 0
    """How many of them, from the last backwards, are scored."""

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[len(self.tokens) - self.num_targets :]


class RowRunner:
    """Runs rows of many jobs at once. At most `max_at_once` rows of one job are with the engine."""

    def __init__(
        self,
        bridge: Bridge,
        tokenizer: Tokenizer,
        adapters: AdapterDirectory,
        *,
        max_at_once: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bridge = bridge
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._max_at_once = max_at_once
        self._clock = clock
        self._numbers = itertools.count()
        self._holds: set[Hold] = set()

    @property
    def in_flight(self) -> int:
        """Rows of the jobs at work that have no result yet."""
        return sum(hold.left for hold in self._holds)

    @contextmanager
    def hold(self, job: Job) -> Iterator[Hold]:
        """Count the rows of `job` as at work from now to the end of the block."""
        hold = Hold(job)
        self._holds.add(hold)
        try:
            yield hold
        finally:
            self._holds.discard(hold)

    async def run(self, hold: Hold) -> list[RowResult]:
        """A result for every row, in order. Raises EngineFailed; a row's own failure is in its result."""
        job, results = hold.job, list[RowResult]()
        rows = iter(job.rows)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(min(len(job.rows), self._max_at_once)):
                    group.create_task(self._take(hold, rows, results), name=f"rows-{number}-{job.id}")
        except BaseExceptionGroup as error:
            raise _cause(error) from error
        if len(results) < len(job.rows):  # a group does not mind if its tasks are cancelled
            raise EngineFailed(f"{len(job.rows) - len(results)} rows of job {job.id} were dropped")
        return sorted(results, key=lambda result: result.row.index)

    async def _take(self, hold: Hold, rows: Iterator[Row], results: list[RowResult]) -> None:
        for row in rows:
            results.append(await self._run(hold, row))
            hold.left -= 1

    async def _run(self, hold: Hold, row: Row) -> RowResult:
        job = hold.job
        if row.failure is not None:
            return RowResult(row=row, failure=row.failure)
        version = None
        try:
            self._refuse_late(hold)
            async with self._using(hold, row.adapter) as adapter:
                self._refuse_late(hold)  # it may have waited long
                version = None if adapter is None else adapter.version
                encoded = await asyncio.to_thread(self._encode, row)
                key = None if adapter is None else AdapterKey(adapter.name, adapter.version)
                completion = await self._bridge.submit(self._request(job, row, encoded, key), adapter)
        except RowError as exc:
            return RowResult(row=row, adapter_version=version, failure=failure_of(exc))
        details = {}
        if row.params.details and completion.failure is None:  # of a row that failed there may be a part
            # Every token is decoded by itself, which takes a moment for a long prompt.
            details = await asyncio.to_thread(self._details, encoded, completion)
        return RowResult(
            row=row,
            adapter_version=version,
            text=encoded.text + completion.text if row.params.return_full_text else completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(encoded.tokens),
            completion_tokens=len(completion.token_ids),
            score=completion.score,
            failure=completion.failure,
            **details,
        )

    def _refuse_late(self, hold: Hold) -> None:
        """Raise Cancelled or Expired when no row of the job may start any more."""
        job = hold.job
        if hold.cancelled:
            raise Cancelled(f"Job {job.id} was cancelled before this row was started")
        if job.expires_at is not None and self._clock() > job.expires_at:
            raise Expired(f"The row was not started before {job.expires_at:.0f}, by ttl_seconds of its job")

    @asynccontextmanager
    async def _using(self, hold: Hold, name: str | None) -> AsyncIterator[AdapterFolder | None]:
        """The rows of a job wait for missing adapters once, not each in its turn."""
        if name is None:
            yield None
            return
        async with self._adapters.use(name, time.monotonic() - hold.began) as folder:
            yield folder

    def _encode(self, row: Row) -> "_Encoded":
        if row.task is Task.SCORE:
            return _Encoded("", *read_pair(self._tokenizer, row))
        if row.messages is not None:
            text = self._tokenizer.render_chat(row.messages)
            return _Encoded(text, self._tokenizer.encode_chat(text))
        if row.tokens is not None:
            text = self._tokenizer.decode(row.tokens) if row.params.return_full_text else ""
            return _Encoded(text, row.tokens)
        assert row.text is not None
        return _Encoded(row.text, self._tokenizer.encode(row.text))

    def _request(self, job: Job, row: Row, encoded: "_Encoded", key: AdapterKey | None) -> InferenceRequest:
        # Two deliveries of one message may be at work here, so the job's id would not be unique.
        name, params = str(next(self._numbers)), row.params
        if encoded.targets:
            # Nothing comes after the last token, so the model need not see it.
            prompt, params = encoded.tokens[:-1], SamplingParams(max_new_tokens=0)
            return InferenceRequest(
                id=name, prompt=prompt, adapter=key, params=params, targets=encoded.targets
            )
        if row.fills:
            left = self._bridge.max_model_len - len(encoded.tokens)
            params = msgspec.structs.replace(params, max_new_tokens=max(1, left))
        if params.do_sample and params.seed is None:
            # Of the job and the row alone, so that a second attempt at the job says the same.
            seed = hashlib.sha256(f"{job.id}/{row.index}".encode()).digest()[:8]
            params = msgspec.structs.replace(params, seed=int.from_bytes(seed, "big"))
        return InferenceRequest(id=name, prompt=encoded.tokens, adapter=key, params=params)

    def _details(self, encoded: "_Encoded", completion: Completion) -> dict[str, Any]:
        """The tokens that the row asked for, by field of RowResult."""
        spell = functools.cache(self._tokenizer.decode_one)

        def spelled(found: Iterable[tuple[int, float | None]]) -> tuple[TokenDetail, ...]:
            return tuple(TokenDetail(token, spell(token), log_prob) for token, log_prob in found)

        details: dict[str, Any] = {}
        if completion.score is not None:
            details["tokens"] = spelled(zip(encoded.targets, completion.score.log_probs, strict=True))
        if completion.log_probs is not None:
            details["tokens"] = spelled(zip(completion.token_ids, completion.log_probs, strict=True))
        if completion.top_tokens is not None:
            details["top_tokens"] = tuple(spelled(likely) for likely in completion.top_tokens)
        if completion.prompt_log_probs is not None:
            details["prefill"] = spelled(zip(encoded.tokens, completion.prompt_log_probs, strict=True))
        return details


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended a task group: the engine's failure before anything else."""
    leaves = [_cause(exc) if isinstance(exc, BaseExceptionGroup) else exc for exc in group.exceptions]
    return next((exc for exc in leaves if isinstance(exc, EngineFailed)), leaves[0])
