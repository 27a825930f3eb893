"""The rows of a job, each through tokenizer, adapter and engine to its result."""

import asyncio
import functools
import hashlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from adapters_sync.layout import AdapterFolder
from worker.adapters.directory import AdapterDirectory
from worker.bridge import Bridge
from worker.custom.formatters import Formatter, Formatters
from worker.delivery.flow import FlowControl
from worker.delivery.row_runner import Hold, RowRunner, T, cause_of
from worker.engine.scoring import read_pair
from worker.engine.tokenizer import Tokenizer
from worker.errors import EngineFailed, RowError, RowFailed, TimedOut
from worker.jobs import (
    AdapterKey,
    Completion,
    Delta,
    InferenceRequest,
    Job,
    OnDelta,
    Output,
    Row,
    RowResult,
    SamplingParams,
    Task,
    TokenDetail,
)
from worker.wire.checks import failure_of
from worker.wire.formatting import check_kept, formatted, is_formatted, payload_of, read_formatted
from worker.wire.results import response_of
from worker.workflows.chain import no_workflow, run_chain
from worker.workflows.definition import Workflow


class _Encoded(NamedTuple):
    """What a row gives the model."""

    tokenizer: Tokenizer
    """The adapter's own, or the base model's."""
    text: str
    """The prompt; empty where nobody asks for it."""
    tokens: tuple[int, ...]
    """Of the prompt, and of a target."""
    num_targets: int = 0
    """How many of them, from the last backwards, are scored."""

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[len(self.tokens) - self.num_targets :]


class EngineRows(RowRunner):
    """Runs rows in the engine. `workflow` finds what a row is to be put through, or raises RowError."""

    def __init__(
        self,
        bridge: Bridge,
        tokenizer: Tokenizer,
        adapters: AdapterDirectory,
        flow: FlowControl,
        *,
        workflow: Callable[[str], Workflow] = no_workflow,
        own_tokenizer: Callable[[AdapterKey, Path], Tokenizer | None] = lambda *_: None,
        formatters: Formatters | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`own_tokenizer` gives the one that an adapter brings in its folder; it may block."""
        super().__init__(flow, clock)
        self._bridge = bridge
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._workflow = workflow
        self._own_tokenizer = own_tokenizer
        self._formatters = formatters
        self.keeps_raw = formatters is not None
        self._numbers = itertools.count()
        self._encoders = ThreadPoolExecutor(4, "encoder")
        """For rows of messages: adapters' tokenizers may be slow, and S3 and files need threads as well."""
        self._urgent_encoders = ThreadPoolExecutor(2, "interactive")

    def close(self) -> None:
        """To be called when no row is at work any more: the threads end."""
        for threads in (self._encoders, self._urgent_encoders):
            threads.shutdown(wait=False)

    async def answer(
        self,
        call_id: str,
        rows: Sequence[Row],
        timeout_seconds: float = math.inf,
        on_delta: OnDelta | None = None,
    ) -> list[RowResult]:
        """All results of a call that somebody waits for, in order; its rows go before those of messages.

        What is not done after `timeout_seconds` has failed. An adapter that is not there is not waited for.
        Raises EngineFailed.
        """
        hold = Hold(0)
        hold.interactive, hold.on_delta = True, on_delta
        now = self._clock()
        hold.take(Job(id=call_id, rows=tuple(rows), output=Output(""), digest="", created_at=now))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._in_time(hold, row, timeout_seconds)) for row in rows]
        except BaseExceptionGroup as error:
            raise cause_of(error) from error
        return [task.result() for task in tasks]

    async def _in_time(self, hold: Hold, row: Row, seconds: float) -> RowResult:
        try:
            async with asyncio.timeout(None if math.isinf(seconds) else seconds):
                return await self._run(hold, row)
        except TimeoutError:
            return RowResult(
                row=row, failure=failure_of(TimedOut(f"The row did not end within {seconds:g} s"))
            )

    async def _run(self, hold: Hold, row: Row) -> RowResult:
        job = hold.job
        assert job is not None
        if row.failure is not None and (row.raw is None or self._formatters is None):
            return RowResult(row=row, failure=row.failure)
        if row.workflow is not None:
            return await self._chain(hold, row, row.workflow)
        version = None
        try:
            self._refuse_late(hold)
            async with self._using(hold, row.adapter) as adapter:
                self._refuse_late(hold)  # it may have waited long
                version = None if adapter is None else adapter.version
                row, own = await self._formatted(hold, row, adapter)
                if row.failure is not None:
                    return RowResult(row=row, failure=row.failure)
                encoded = await self._on_thread(hold, self._encode, row, adapter)
                key = None if adapter is None else AdapterKey(adapter.name, adapter.version)
                request = self._request(hold, row, encoded, key)
                completion = await self._submit(request, adapter, hold.on_delta or _unheard)
        except RowError as exc:
            return RowResult(row=row, adapter_version=version, failure=failure_of(exc))
        details = {}
        if row.params.details and completion.failure is None:  # of a row that failed there may be a part
            # Every token is decoded by itself, which takes a moment for a long prompt.
            details = await self._on_thread(hold, self._details, encoded, completion)
        result = RowResult(
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
        return result if own is None else await self._answered(hold, result, own)

    async def _formatted(
        self, hold: Hold, row: Row, adapter: AdapterFolder | None
    ) -> tuple[Row, Formatter | None]:
        """The row as its input formatter makes it, and its output formatter. Raises RowError."""
        if self._formatters is None or not is_formatted(row):
            return row, None
        own = await self._formatters.of(adapter, urgent=hold.interactive)
        if own.output is not None:
            hold.on_delta = None  # it is asked once, for all of the answer
        if own.input is None or row.raw is None:
            return row, own.output
        payload = payload_of(row)
        made = await self._formatters.run(own.input, payload, urgent=hold.interactive)
        check_kept(payload, made, own.input)
        return read_formatted(row, made), own.output

    async def _answered(self, hold: Hold, result: RowResult, own: Formatter) -> RowResult:
        """The result as its output formatter makes it."""
        assert self._formatters is not None
        if result.failure is not None:
            return result
        try:
            response = await self._formatters.run(own, response_of(result), urgent=hold.interactive)
        except RowError as exc:
            return msgspec.structs.replace(result, failure=failure_of(exc))
        return formatted(result, response)

    async def _chain(self, hold: Hold, row: Row, name: str) -> RowResult:
        try:
            workflow = self._workflow(name)
        except RowError as exc:
            return RowResult(row=row, failure=failure_of(exc))
        hold.on_delta = None  # what a step says is no answer yet
        return await run_chain(workflow, row, lambda step: self._run(hold, step))

    async def _on_thread(self, hold: Hold, work: Callable[..., T], *arguments: object) -> T:
        threads = self._urgent_encoders if hold.interactive else self._encoders
        try:
            at_work = asyncio.get_running_loop().run_in_executor(threads, work, *arguments)
        except RuntimeError as error:  # closed
            raise EngineFailed("the engine has stopped") from error
        return await at_work

    async def _submit(
        self, request: InferenceRequest, adapter: AdapterFolder | None, on_delta: OnDelta
    ) -> Completion:
        tokens = len(request.prompt) + request.params.max_new_tokens
        self._flow.take(tokens=tokens)
        try:
            return await self._bridge.submit(request, adapter, on_delta)
        finally:
            self._flow.give_back(tokens=tokens)

    @asynccontextmanager
    async def _using(self, hold: Hold, name: str | None) -> AsyncIterator[AdapterFolder | None]:
        """The rows of a job wait for missing adapters once, not each in its turn; those of a call never."""
        if name is None:
            yield None
            return
        waited = math.inf if hold.interactive else time.monotonic() - hold.began
        async with self._adapters.use(name, waited) as folder:
            yield folder

    def _encode(self, row: Row, adapter: AdapterFolder | None) -> "_Encoded":
        tokenizer = self._tokenizer_of(adapter)
        if row.task is Task.SCORE:
            return _Encoded(tokenizer, "", *read_pair(tokenizer, row))
        if row.messages is not None:
            text = tokenizer.render_chat(row.messages)
            return _Encoded(tokenizer, text, tokenizer.encode_chat(text))
        if row.tokens is not None:
            text = tokenizer.decode(row.tokens) if row.params.return_full_text else ""
            return _Encoded(tokenizer, text, row.tokens)
        assert row.text is not None
        return _Encoded(tokenizer, row.text, tokenizer.encode(row.text))

    def _tokenizer_of(self, adapter: AdapterFolder | None) -> Tokenizer:
        if adapter is None:
            return self._tokenizer
        try:
            own = self._own_tokenizer(AdapterKey(adapter.name, adapter.version), adapter.path)
        except OSError as exc:
            raise RowFailed(f"Adapter {adapter.name} could not be read: {exc}") from exc
        return own or self._tokenizer

    def _request(self, hold: Hold, row: Row, encoded: "_Encoded", key: AdapterKey | None) -> InferenceRequest:
        assert hold.job is not None
        # Two deliveries of one message may be at work here, so the job's id would not be unique.
        name, params = str(next(self._numbers)), row.params
        if encoded.targets:
            # Nothing comes after the last token, so the model need not see it.
            prompt, params = encoded.tokens[:-1], SamplingParams(max_new_tokens=0)
            return InferenceRequest(
                id=name,
                prompt=prompt,
                adapter=key,
                params=params,
                targets=encoded.targets,
                interactive=hold.interactive,
            )
        if row.fills:
            left = self._bridge.max_model_len - len(encoded.tokens)
            params = msgspec.structs.replace(params, max_new_tokens=max(1, left))
        if params.do_sample and params.seed is None:
            # Of the job and the row alone, so that a second attempt at the job says the same.
            seed = hashlib.sha256(f"{hold.job.id}/{row.index}".encode()).digest()[:8]
            params = msgspec.structs.replace(params, seed=int.from_bytes(seed, "big"))
        return InferenceRequest(
            id=name,
            prompt=encoded.tokens,
            adapter=key,
            params=params,
            fills=row.fills,
            interactive=hold.interactive,
            streams=hold.on_delta is not None,
        )

    def _details(self, encoded: "_Encoded", completion: Completion) -> dict[str, Any]:
        """The tokens that the row asked for, by field of RowResult."""
        spell = functools.cache(encoded.tokenizer.decode_one)

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


def _unheard(_: Delta) -> None:
    """For rows that do not stream."""
