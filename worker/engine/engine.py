"""The engine: `add`, `abort`, `step`. One thread calls all of it; nothing here waits for anybody."""

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from worker.engine.adapter import LoRAWeights, Vocabulary
from worker.engine.kv_cache import KVCache, OwnBlocks, SharedBlocks
from worker.engine.lora_slots import LoRASlots
from worker.engine.model_runner import Launched, ModelRunner, Outcome
from worker.engine.rope import RopeScaling
from worker.engine.sampler import check
from worker.engine.scheduler import Batch, ScheduledRow, Scheduler
from worker.engine.sequence import Sequence, Status
from worker.engine.tokenizer import TextStream, Tokenizer
from worker.errors import EngineFailed, InvalidParameters, PromptTooLong
from worker.jobs import AdapterKey, Completion, Delta, Failure, FinishReason, InferenceRequest, Score

logger = logging.getLogger(__name__)

_GIVE_UP_AFTER = 3
"""Rows in a row that fail alone before the engine has to prove that it is not broken itself."""


class StepStats(NamedTuple):
    """What one step did, for metrics. Seconds are of wall time."""

    rows: int
    adapters: int
    """Distinct adapters in the batch."""
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens of the rows that started in this step which were in the cache already."""
    generated_tokens: int
    """Tokens that rows got in this step, perhaps by one that was launched before."""
    running: int
    waiting: int
    preempted: int
    """Since the engine began."""
    free_blocks: int
    merged: bool
    """Whether its rows have one adapter, and that is merged into the base model."""
    resident_adapters: int
    """In slots."""
    slot_hits: int
    """Rows that found their adapter in a slot, since the engine began; the next two likewise."""
    slot_misses: int
    slot_evictions: int
    slot_loads: tuple[float, ...]
    """Seconds that each adapter took which came into a slot in this step; part of `schedule_seconds`."""
    schedule_seconds: float
    prepare_seconds: float
    forward_seconds: float
    sample_seconds: float
    update_seconds: float


class Engine:
    """Continuous batching over one base model and the adapters of `weights`.

    A request's adapter must be loaded, and stay so, from `add` to its completion: `weights` is asked
    for it when the adapter gets a slot, perhaps more than once. With `prefix_reuse`, rows of one adapter
    version that begin with the same tokens compute them once. `max_passed_over` is the most rows that
    start before one that came earlier. `look_ahead` is for devices that work while the host prepares.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        weights: Callable[[AdapterKey], LoRAWeights],
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_loras: int,
        prefix_reuse: bool = True,
        max_passed_over: int = 256,
        look_ahead: bool = False,
        rope: RopeScaling = RopeScaling(),  # noqa: B008 (it never changes)
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._weights = weights
        self._eos = eos_token_ids
        self.max_model_len = max_model_len
        self._rope = rope
        self._scheduler = Scheduler(
            _kv_cache(runner.cache_shape, max_model_len, reuse=prefix_reuse),
            LoRASlots(max_loras),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_passed_over=max_passed_over,
        )
        self._sequences: dict[str, Sequence] = {}
        self._streams: dict[str, TextStream] = {}
        """The text so far of rows that stream, or that a text may end."""
        self._deltas: list[Delta] = []
        self._failed_alone = 0
        self._look_ahead = look_ahead
        self._flight: Launched | None = None
        """The step that the device works on; None without `look_ahead`."""
        self.resident_adapters: frozenset[AdapterKey] = frozenset()
        """Those in slots. Replaced, never changed: it may be read from any thread."""

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._flight is not None

    def max_len(self, adapter: AdapterKey | None) -> int:
        """Most tokens of a row, prompt and answer together. The adapter must be loaded. From any thread."""
        if not self._rope.factors:
            return self.max_model_len
        factor = 1.0 if adapter is None else self._weights(adapter).rope_factor
        return min(self.max_model_len, self._rope.max_len(factor))

    def check(self, request: InferenceRequest) -> None:
        """Raise the RowError that `add` would, without adding. May be called from any thread.

        An adapter need not be loaded, so what only its own tokens and positions tell is left to `add`.
        """
        extra = 0 if request.adapter is None else self._runner.lora_extra_vocab_size
        known = Vocabulary(self._runner.vocab_size + extra, self._runner.num_logits + extra)
        certain = request.adapter is None or not self._rope.factors
        limit = self.max_len(request.adapter) if certain else self.max_model_len
        if request.fills:
            request = _filled(request, limit)
        self._check(request, known, self._eos, limit)

    def _check(self, request: InferenceRequest, known: Vocabulary, eos: frozenset[int], limit: int) -> None:
        """Raise the RowError for a row of an adapter (or the base model) that knows these tokens."""
        if not request.prompt:
            raise InvalidParameters("The prompt has no tokens")
        whose = "the base model" if request.adapter is None else f"adapter {request.adapter.name}"
        if max(request.prompt) >= known.reads:
            message = f"The prompt has token {max(request.prompt)}, {whose} knows {known.reads} tokens"
            raise InvalidParameters(message)
        check(request.params, known.writes, eos, whose)
        if request.targets:
            self._check_targets(request, known.writes, whose, limit)
            return
        whole = len(request.prompt) + request.params.max_new_tokens
        if whole > limit:
            raise PromptTooLong(
                f"The prompt has {len(request.prompt)} tokens and max_new_tokens is "
                f"{request.params.max_new_tokens}: together {whole}, the limit (max_model_len) is "
                f"{limit}"
            )

    def _check_targets(self, request: InferenceRequest, num_logits: int, whose: str, limit: int) -> None:
        assert request.params.max_new_tokens == 0, "what is scored is not gone on with"
        assert not request.params.prompt_log_probs
        assert len(request.targets) <= len(request.prompt)
        if max(request.targets) >= num_logits:
            known = f"{whose} writes {num_logits} tokens"
            raise InvalidParameters(f"The row has token {max(request.targets)} to be scored, {known}")
        if len(request.prompt) > limit:
            raise PromptTooLong(
                f"The row has {len(request.prompt) + 1} tokens; to be scored it may have one more than "
                f"max_model_len, {limit}"
            )

    def add(self, request: InferenceRequest) -> None:
        """Take a request in. Raises RowError if it can never run, ValueError if its id is in flight."""
        endings, limit = frozenset[int](), self.max_len(request.adapter)
        if request.fills:
            request = _filled(request, limit)
        if request.adapter is None:
            self.check(request)
        else:
            weights = self._weights(request.adapter)
            endings = weights.eos_token_ids
            known = weights.vocabulary or Vocabulary(self._runner.vocab_size, self._runner.num_logits)
            self._check(request, known, self._eos | endings, limit)
        if request.id in self._sequences:
            raise ValueError(f"request {request.id} is in flight already")
        sequence = self._sequences[request.id] = Sequence(request, endings)
        if request.streams or request.params.stop_sequences:
            self._streams[request.id] = TextStream(self._tokenizer_of(request), request.prompt)
        self._scheduler.add(sequence)

    def _tokenizer_of(self, request: InferenceRequest) -> Tokenizer:
        own = None if request.adapter is None else self._weights(request.adapter).tokenizer
        return own or self._tokenizer

    def abort(self, request_id: str) -> None:
        """Drop a request without a completion; unknown ids are ignored, as it may just have ended."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._streams.pop(request_id, None)
            self._scheduler.finish(sequence, FinishReason.ERROR)

    def step(self) -> tuple[list[Completion], StepStats]:
        """Put one batch through the model; returns the rows that ended.

        A row whose own computation fails ends with a failure, the others go on. Raises EngineFailed
        when it is not the rows' fault. With `look_ahead` the batch is only launched: it is settled by the
        next step, after that has launched its own, so that the device never waits for the host.
        """
        started = time.perf_counter()
        scheduler = self._scheduler
        generated_before = scheduler.num_generated
        before: list[Completion] = []
        if self._flight is not None and not scheduler.can_look_ahead:
            before = self._settle_flight()
        batch = scheduler.schedule()
        self._runner.copy_prefixes(batch.copies)
        self._runner.scrub(batch.leftovers)
        reused_tokens = batch.reused_tokens
        batch, refused, put = self._put_adapters(batch)
        merged = self._runner.merge_for(batch.rows, self._weights)
        scheduled = time.perf_counter()
        prompt_tokens = sum(row.num_prompt_tokens for row in batch.rows)
        completions, computed = self._compute(batch)
        done = time.perf_counter()
        timings = self._runner.timings
        work = timings.prepare_seconds + timings.forward_seconds + timings.sample_seconds
        return before + refused + completions, StepStats(
            rows=len(computed),
            adapters=len({row.sequence.request.adapter for row in computed} - {None}),
            prompt_tokens=prompt_tokens,
            reused_tokens=reused_tokens,
            generated_tokens=scheduler.num_generated - generated_before,
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            preempted=scheduler.num_preempted,
            free_blocks=scheduler.kv_cache.num_free,
            merged=merged,
            resident_adapters=len(self.resident_adapters),
            slot_hits=scheduler.slots.hits,
            slot_misses=scheduler.slots.misses,
            slot_evictions=scheduler.slots.evictions,
            slot_loads=put,
            schedule_seconds=scheduled - started,
            prepare_seconds=timings.prepare_seconds,
            forward_seconds=timings.forward_seconds,
            sample_seconds=timings.sample_seconds,
            update_seconds=max(0.0, done - scheduled - work),
        )

    def take_deltas(self) -> list[Delta]:
        """What rows that stream have said in the steps since this was last called, in order."""
        taken, self._deltas = self._deltas, []
        return taken

    def check_integrity(self) -> None:
        """Raise AssertionError unless the books agree; for tests, and cheap enough for idle moments."""
        self._scheduler.check_integrity()
        alive = {*self._scheduler.running, *self._scheduler.waiting, *self._scheduler.urgent}
        assert alive == set(self._sequences.values())
        assert self._streams.keys() <= self._sequences.keys()

    def _put_adapters(self, batch: Batch) -> tuple[Batch, list[Completion], tuple[float, ...]]:
        """Fill the slots that the batch needs; rows whose adapter cannot be put there leave it, failed.

        Also returns what each took.
        """
        failed: list[Completion] = []
        took: list[float] = []
        for slot, key in batch.loads:
            started = time.perf_counter()
            try:
                self._runner.put_adapter(slot, self._weights(key))
                took.append(time.perf_counter() - started)
            except EngineFailed:
                raise
            except Exception as exc:
                logger.exception("adapter %s could not be put into slot %d", key.name, slot)
                code = "oom" if isinstance(exc, torch.OutOfMemoryError) else "internal"
                failure = Failure(code, f"Adapter {key.name} could not be put on the device: {exc}", True)
                own = [row for row in batch.rows if row.sequence.request.adapter == key]
                failed += [self._fail(row.sequence, failure) for row in own]
                # The slot must not pass for this adapter's: it may hold half of it.
                self._scheduler.slots.forget(key)
                batch = Batch(tuple(row for row in batch.rows if row not in own))
        if took or failed:
            self.resident_adapters = frozenset(self._scheduler.slots.resident)
        return batch, failed, tuple(took)

    def _compute(self, batch: Batch) -> tuple[list[Completion], list[ScheduledRow]]:
        if not self._look_ahead:
            return self._run(batch)
        if not batch.rows:
            return self._settle_flight(), []
        try:
            launched = self._runner.launch(batch, self._flight)
        except EngineFailed:
            raise
        except Exception:
            logger.warning("a step could not be launched ahead", exc_info=True)
            completions = self._settle_flight()
            left = Batch(tuple(row for row in batch.rows if row.sequence.status is Status.RUNNING))
            again, computed = self._run(left)
            return completions + again, computed
        self._scheduler.advance(batch)
        completions = self._settle_flight()
        self._flight = launched
        return completions, list(batch.rows)

    def _settle_flight(self) -> list[Completion]:
        """Wait for the step under way, if there is one, and record it."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        try:
            outcome = self._runner.collect(flight)
        except EngineFailed:
            raise
        except Exception as exc:  # a device that fails so late leaves nothing to go on with
            raise EngineFailed(f"the device failed in a step that was under way: {exc}") from exc
        self._failed_alone = 0
        return self._record(flight.batch, outcome)

    def _run(self, batch: Batch) -> tuple[list[Completion], list[ScheduledRow]]:
        """Run and record a batch; halve it on trouble until the trouble is one row's."""
        if not batch.rows:
            return [], []
        try:
            outcome = self._runner.run(batch)
        except EngineFailed:
            raise
        except torch.OutOfMemoryError as exc:
            torch.cuda.empty_cache()
            return self._split(batch, exc, "oom")
        except Exception as exc:  # noqa: BLE001 (whatever a model raises is one row's until shown otherwise)
            return self._split(batch, exc, "internal")
        self._failed_alone = 0
        self._scheduler.advance(batch)
        return self._record(batch, outcome), list(batch.rows)

    def _split(self, batch: Batch, exc: Exception, code: str) -> tuple[list[Completion], list[ScheduledRow]]:
        if len(batch.rows) == 1:
            return [self._fail_alone(batch.rows[0].sequence, exc, code)], []
        logger.warning("a batch of %d rows failed, trying halves: %s", len(batch.rows), exc)
        middle = len(batch.rows) // 2
        first, computed = self._run(Batch(batch.rows[:middle]))
        second, also = self._run(Batch(batch.rows[middle:]))
        return first + second, computed + also

    def _fail_alone(self, sequence: Sequence, exc: Exception, code: str) -> Completion:
        self._failed_alone += 1
        if self._failed_alone >= _GIVE_UP_AFTER:
            if not self._runner.is_sound():
                raise EngineFailed(f"{self._failed_alone} rows failed one after another: {exc}") from exc
            self._failed_alone = 0
        logger.error("row %s failed by itself", sequence.request.id, exc_info=exc)
        return self._fail(sequence, Failure(code, f"The model failed on this row: {exc}", retryable=True))

    def _fail(self, sequence: Sequence, failure: Failure) -> Completion:
        self._scheduler.finish(sequence, FinishReason.ERROR)
        return self._complete(sequence, failure)

    def _record(self, batch: Batch, outcome: Outcome) -> list[Completion]:
        """Settle a batch that was advanced; rows that have ended since it was launched are passed by."""
        completions = []
        sampled = iter(outcome.samples)
        for row, scores in zip(batch.rows, outcome.scores, strict=True):
            row.sequence.scores += scores
        kept_rows, kept_samples = [], []
        for row in batch.rows:
            own = next(sampled) if row.samples else None
            if row.sequence.status is not Status.RUNNING:
                continue
            if not (_is_finite(row) if own is None else own.finite):
                failure = Failure("internal", "The model's output for this row is not finite")
                completions.append(self._fail(row.sequence, failure))
                continue
            kept_rows.append(row)
            if own is not None:
                kept_samples.append((own.token, own.log_prob, own.top_tokens))
        ended = self._scheduler.settle(Batch(tuple(kept_rows)), kept_samples, self._finish_reason)
        telling = [row.sequence for row in kept_rows if row.samples and row.sequence.request.streams]
        self._deltas += [self._delta(sequence) for sequence in telling if sequence.status is Status.RUNNING]
        return completions + [self._complete(sequence) for sequence in ended]

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Why the sequence ends with its last token, if it does."""
        params = sequence.request.params
        ends = sequence.tokens[-1] in self._eos or sequence.tokens[-1] in sequence.endings
        if ends and not params.ignore_eos:
            return FinishReason.EOS_TOKEN
        if sequence.tokens[-1] in params.stop_token_ids:
            return FinishReason.STOP_SEQUENCE
        stream = self._streams.get(sequence.request.id)
        if stream is not None and self._meets_stop(sequence, stream):
            return FinishReason.STOP_SEQUENCE
        if sequence.num_generated >= params.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _meets_stop(self, sequence: Sequence, stream: TextStream) -> bool:
        new, stops = stream.push(sequence.tokens[-1]), sequence.request.params.stop_sequences
        if not new or not stops or sequence.num_generated <= sequence.request.params.min_new_tokens:
            return False
        # A stop sequence may have begun in earlier tokens, but it ends in the new text.
        begin = max(0, len(stream.text) - len(new) - max(map(len, stops)) + 1)
        found = [at for at in (stream.text.find(stop, begin) for stop in stops) if at >= 0]
        sequence.text_end = min(found, default=None)
        return bool(found)

    def _delta(self, sequence: Sequence) -> Delta:
        request = sequence.request
        log_prob = sequence.log_probs[-1] if request.params.details else None
        text = self._streams[request.id].tell(request.params.stop_sequences)
        return Delta(request.id, sequence.tokens[-1], log_prob, text)

    def _complete(self, sequence: Sequence, failure: Failure | None = None) -> Completion:
        request = sequence.request
        del self._sequences[request.id]
        stream = self._streams.pop(request.id, None)
        if sequence.text_end is not None:
            assert stream is not None
            text = stream.text[: sequence.text_end]
        else:
            said = sequence.generated
            if said and said[-1] in request.params.stop_token_ids:
                said = said[:-1]
            text = self._tokenizer_of(request).continuation(request.prompt, said) if said else ""
        assert sequence.finish_reason is not None
        log_probs = tuple(score.log_prob for score in sequence.scores)
        is_greedy = all(score.likeliest for score in sequence.scores)
        return Completion(
            request_id=request.id,
            text=text,
            token_ids=tuple(sequence.generated),
            finish_reason=sequence.finish_reason,
            prompt_tokens=len(request.prompt),
            log_probs=tuple(sequence.log_probs) if request.params.details else None,
            top_tokens=tuple(sequence.top_tokens) if request.params.top_n_tokens else None,
            prompt_log_probs=(None, *log_probs) if request.params.prompt_log_probs else None,
            score=Score(log_probs, is_greedy) if request.targets and failure is None else None,
            failure=failure,
        )


def _filled(request: InferenceRequest, limit: int) -> InferenceRequest:
    """The request with no more tokens to generate than there is room for, but one at least."""
    room = max(1, limit - len(request.prompt))
    if request.params.max_new_tokens <= room:
        return request
    params = msgspec.structs.replace(request.params, max_new_tokens=room)
    return msgspec.structs.replace(request, params=params)


def _is_finite(row: ScheduledRow) -> bool:
    """Whether the logits by which a row was scored were finite, once it is; NaN in any of them shows."""
    if not row.ends:
        return True
    return all(math.isfinite(score.log_prob) for score in row.sequence.scores)


def _kv_cache(shape: tuple[int, int], max_model_len: int, *, reuse: bool) -> KVCache:
    """Blocks that hold any sequence whole are its own; smaller ones are shared."""
    num_blocks, block_size = shape
    mode = OwnBlocks if block_size >= max_model_len else SharedBlocks
    return mode(num_blocks, block_size, reuse=reuse)
