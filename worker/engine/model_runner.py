"""A batch -> tensors -> logits -> tokens."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from worker.engine.adapters.adapter import LoRAWeights, Target
from worker.engine.attention import PackedAttention
from worker.engine.base_model import BaseModel
from worker.engine.cache_size import CacheShape, choose_cache_shape
from worker.engine.changes.slots import ModuleChanges
from worker.engine.discovery import Discovery, discover
from worker.engine.executor import Executor, HostExecutor, LocalExecutor, PackedRow
from worker.engine.kernels.tilings import Tuner
from worker.engine.kv_cache import BlockCopy, Leftover
from worker.engine.limits import EngineLimits
from worker.engine.lora_layers import LoRALayers
from worker.engine.lora_plan import Costs
from worker.engine.merging import LoRAMode, Merging
from worker.engine.pages import give_back_freed
from worker.engine.parallel.share import Share
from worker.engine.projections import Projection, tied_weights
from worker.engine.proof import Expected, Probe, check_packed, expect, sound
from worker.engine.sampler import Group, Sample, Sampled, choose_in_groups, collect, fetch, prepare
from worker.engine.scheduler import Batch, ScheduledRow
from worker.engine.scores import Scores
from worker.engine.sequence import Scored, Sequence
from worker.engine.transfer import to_device
from worker.errors import EngineFailed, ModelError
from worker.jobs import AdapterKey

logger = logging.getLogger(__name__)

_WINDOWS = ("sliding_window", "keep_window_size", "attention_window_size", "window_size")
"""Names under which configurations keep the length of a local attention."""


class Timings(NamedTuple):
    prepare_seconds: float
    forward_seconds: float
    sample_seconds: float


class Launched(NamedTuple):
    """A step that the device works on."""

    batch: Batch
    places: dict[int, int]
    """By the id of a sequence that samples, where its token is in `sampled`."""
    sampled: Sampled | None
    """On the device; None if no row samples."""
    fetched: Sampled | None
    """The same, on its way to the host."""
    scores: Scores
    """Of the tokens that are scored in this step, on their way to the host."""


class Outcome(NamedTuple):
    """What came of a step."""

    samples: list[Sample]
    """For each row that reached its end, in the batch's order."""
    scores: list[list[Scored]]
    """For each row, of its `targets` in this step."""


class ModelRunner:
    """Owns the base model's forward pass: its attention, its cache, its LoRA banks. One thread only.

    Construction finds the cache's shape, proves on a small example that the packed way computes what
    the model computes by itself, and raises ModelError if it does not.
    """

    def __init__(
        self,
        base: BaseModel,
        limits: EngineLimits,
        *,
        cache_shape: CacheShape | None = None,
        memory_share: float | None = None,
        costs: Costs | None = None,
        tuner: Tuner | None = None,
        kernels: bool | None = None,
        share: Share | None = None,
        expected: Expected | None = None,
    ) -> None:
        """`memory_share` is the part of the memory left by the weights that the KV cache may take.

        None stands for 0.4 on a CPU and 0.85 on a GPU. `cache_shape` overrides what would be chosen, `costs`
        what LoRA goes by on a CPU. `kernels` is whether the project's own kernels run, which on a GPU they
        do, and `tuner` fits those of LoRA to the device. With a `share` the model is cut down to it already;
        all ranks construct theirs at the same time, and alike, but that only rank 0 has what was
        `expected`, which may be left out without a share.
        """
        self._base = base
        self._model = base.model
        self.limits = limits
        self._share = share
        assert share is None or limits.lora_mode is LoRAMode.UNMERGED, "settings are checked"
        self._kernels = base.device.type == "cuda" if kernels is None else kernels
        self._attention = PackedAttention()
        self._merging = Merging(limits.lora_mode)
        self.timings = Timings(0.0, 0.0, 0.0)
        self._probe = Probe(base)
        self.vocab_size = self._probe.vocab_size
        """Token ids from this on are unknown to the model."""
        if share is None and expected is None:
            expected = expect(base)
        if expected is not None:
            self.num_logits = expected.num_logits
            """Token ids from this on are never generated."""
            self.base_rows = expected.base_rows
        with sound(base.model):
            self._build(expected, cache_shape, memory_share, costs, tuner)

    @torch.inference_mode()
    def _build(
        self,
        expected: Expected | None,
        cache_shape: CacheShape | None,
        memory_share: float | None,
        costs: Costs | None,
        tuner: Tuner | None,
    ) -> None:
        base, model, limits, attention = self._base, self._model, self.limits, self._attention
        model.set_attn_implementation(attention.name)
        found = self._discover(self._probe)
        self.targets: dict[str, Target] = self._checked(found, expected)
        """Modules that adapters may name."""
        projections, head = self._project(found)
        self._projections = projections
        changes = ModuleChanges(model, projections, head, self.targets, found.axes)
        give_back_freed()
        group = None if self._share is None else self._share.group
        self.cache_shape = cache_shape or choose_cache_shape(
            base, limits.max_num_seqs, attention.bytes_per_token, memory_share, group
        )
        blocks, size = self.cache_shape
        attention.allocate(blocks + self._kernels, size, base.device)
        executor = self._local = self._make_executor(projections, changes, costs, tuner)
        self._executor: Executor = executor
        for factor in (1.0, *base.rope.factors):
            if base.rope.factors:  # before the first step: what graphs are given depends on it
                executor.rope_factors = {None: factor}
            own = None if expected is None else expected.logits[factor]
            check_packed(base, executor, attention, size, own)
        if base.rope.factors:
            executor.rope_factors = {}

    @property
    def cache_bytes(self) -> int:
        blocks, size = self.cache_shape
        return blocks * size * self._attention.bytes_per_token

    @property
    def executor(self) -> Executor:
        return self._executor

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have parts of the model: adapters may only add to linear modules then."""
        return self._share is not None

    def lead(self, lead: Callable[[Executor], Executor]) -> None:
        """From now on everything goes by what `lead` makes of the executor: it has others do the same."""
        self._executor = lead(self._executor)

    def close(self) -> None:
        """End what runs beside this process."""
        self._executor.close()

    @torch.inference_mode()
    def put_adapter(self, slot: int, weights: LoRAWeights) -> None:
        """Replace whatever `slot` holds by `weights`."""
        self._executor.put(slot, weights)
        if weights.key == self._merging.merged:
            self._local.merged_slot = slot

    @torch.inference_mode()
    def merge_for(self, rows: Iterable[ScheduledRow], weights: Callable[[AdapterKey], LoRAWeights]) -> bool:
        """Merge the adapter that all of `rows` have, if they do and it pays; they must hold their slots.

        Returns whether they run merged now. Without memory for it they go on unmerged, and so do adapters
        that do more than add.
        """
        if self._merging.is_off:
            return False
        found = {(row.sequence.slot, row.sequence.request.adapter) for row in rows}
        if not found:
            return False
        (slot, only), *others = found
        self._merging.see(None if others else only, sum(self.timings))
        if others or only is None:
            return False
        if self._merging.wants(only) and not weights(only).changes:
            self._merge(slot, weights(only))
        return slot == self._local.merged_slot

    def _merge(self, slot: int | None, weights: LoRAWeights) -> None:
        executor, started = self._local, time.perf_counter()
        executor.merged_slot = None
        executor.merges += 1
        try:
            for names, projection in self._projections.items():
                projection.merge([weights.pairs.get(name) for name in names])
        except (RuntimeError, MemoryError) as exc:
            for projection in self._projections.values():
                projection.merge([])
            self._merging.failed(weights.key, exc)
            return
        executor.merged_slot = slot
        self._merging.done(weights.key, time.perf_counter() - started)

    @torch.inference_mode()
    def is_sound(self) -> bool:
        """Whether a batch that is known to be good can still be computed. Leaves the cache alone."""
        try:
            return bool(torch.isfinite(self._executor.run_uncached(self._probe.prompts)).all())
        except EngineFailed:
            raise
        except Exception:  # what it cannot do is what was asked
            logger.exception("a batch that is known to be good failed")
            return False

    @torch.inference_mode()
    def scrub(self, leftovers: Iterable[Leftover]) -> None:
        """Zero what earlier rows have left in blocks. The kernels never read it: with them it may stay."""
        if not self._kernels and (places := [*leftovers]):
            self._executor.scrub(places)

    @torch.inference_mode()
    def copy_prefixes(self, copies: Iterable[BlockCopy]) -> None:
        """Make blocks begin with what others begin with, one after the other."""
        if own := [*copies]:
            self._executor.copy(own)

    def run(self, batch: Batch) -> "Outcome":
        """Put `batch` through the model and wait for what comes of it; see `launch`."""
        return self.collect(self.launch(batch))

    @torch.inference_mode()
    def launch(self, batch: Batch, last: "Launched | None" = None) -> "Launched":
        """Have `batch` put through the model, without waiting for the device.

        The sequences must hold their blocks and slots; the newest token of one that is `pending` is among
        those of `last`, the step before. The cache then holds the batch's tokens; nothing else is changed,
        and a batch whose launch raised may be launched again.
        """
        started = time.perf_counter()
        places = {} if last is None else last.places
        packed = [_packed(row, places) for row in batch.rows]
        order = self._executor.order(packed)
        rows = [batch.rows[number] for number in order]
        sampling = [row.sequence for row in rows if row.samples]
        pending = [int(sequence.pending) for sequence in sampling]
        groups = self._plan_sampling(sampling, pending)
        tokens = None if last is None or last.sampled is None else last.sampled.tokens
        prepared = time.perf_counter()
        logits = self._executor.run([packed[number] for number in order], tokens)
        forwarded = time.perf_counter()
        scores, logits = self._score(rows, logits)
        sampled = fetched = None
        if sampling:
            latest = None
            if any(pending):
                assert tokens is not None
                sources = [places.get(id(sequence), 0) for sequence in sampling]
                latest = tokens.index_select(0, to_device(torch.tensor(sources), tokens.device))
            sampled = choose_in_groups(logits, groups, latest)
            fetched = fetch(sampled)
        done = time.perf_counter()
        self.timings = Timings(prepared - started, forwarded - prepared, done - forwarded)
        new_places = {id(sequence): place for place, sequence in enumerate(sampling)}
        return Launched(batch, new_places, sampled, fetched, scores)

    def collect(self, launched: "Launched") -> "Outcome":
        """Wait for a launched step."""
        started = time.perf_counter()
        samples = [] if launched.fetched is None else collect(launched.fetched)
        scores = launched.scores.collect()
        self._executor.check()
        self.timings = self.timings._replace(
            sample_seconds=self.timings.sample_seconds + time.perf_counter() - started
        )
        sampling = [row for row in launched.batch.rows if row.samples]
        return Outcome(
            [samples[launched.places[id(row.sequence)]] for row in sampling],
            [scores.get(id(row.sequence), []) for row in launched.batch.rows],
        )

    def _plan_sampling(self, sampling: list[Sequence], pending: list[int]) -> list[Group]:
        """The rows apart by how many tokens they can write: none sees the columns of a neighbour's."""
        widths = [self._width(sequence) for sequence in sampling]
        groups = []
        for width in sorted(set(widths)):
            rows = [row for row, own in enumerate(widths) if own == width]
            plan = prepare(
                [sampling[row] for row in rows],
                width,
                self._base.device,
                eos_token_ids=self._base.eos_token_ids,
                pending=[pending[row] for row in rows],
            )
            groups.append(Group(width, rows, plan))
        return groups

    def _width(self, sequence: Sequence) -> int:
        """How many logits a row has."""
        own = self._executor.width(sequence.slot)
        return self.num_logits if own is None else own

    def _score(self, rows: list[ScheduledRow], logits: torch.Tensor) -> tuple[Scores, torch.Tensor]:
        """What rows want to know of tokens that they have, and the logits to sample from."""
        scores = Scores()
        if not any(row.sequence.targets for row in rows):
            return scores, logits
        ends = []
        start = 0
        for row in rows:
            if row.scored:
                own = logits[start : start + len(row.scored), : self._width(row.sequence)]
                scores.add(id(row.sequence), own.contiguous(), row.targets)
            start += row.keep
            if row.samples:
                ends.append(start - 1)
        scores.fetch()
        if len(ends) == start:
            return scores, logits
        kept = to_device(torch.tensor(ends, dtype=torch.long), logits.device)
        return scores, logits.index_select(0, kept)

    def _discover(self, probe: Probe) -> Discovery:
        """Run the example once without a cache: which layers attend how, which modules see its tokens."""
        lora, changes = LoRALayers({}, max_loras=0), ModuleChanges(self._model, {}, None, {}, {})
        attention, device = self._attention, self._base.device
        executor = HostExecutor(self._model, attention, [], lora, device, changes=changes, block_size=1)
        with nullcontext() if self._share is None else self._share.disguised(self._model):
            found = discover(self._model, lambda: executor.run_uncached(probe.prompts), 2 * probe.length)
        layers = self._base.model.config.get_text_config().num_hidden_layers
        if sorted(self._attention.shapes) != list(range(layers)):
            raise ModelError(
                f"{type(self._model).__name__} has {layers} layers, of which {len(self._attention.shapes)} "
                "attend through transformers' attention interface"
            )
        self._check_windows()
        return found

    def _checked(self, found: Discovery, expected: Expected | None) -> dict[str, Target]:
        """The targets as the whole model has them, without a head whose output is not yet the logits."""
        share, head = self._share, found.head
        targets = dict(found.targets if share is None else share.whole(found.targets))
        num_logits = None if expected is None else expected.num_logits
        if head is not None and num_logits not in {None, targets[head].out_features}:
            cut = f"it writes {targets[head].out_features} logits, the model {num_logits}"
            targets[head] = targets[head]._replace(refused=cut, fixed=cut)
        return targets

    def _project(
        self, found: Discovery
    ) -> tuple[dict[tuple[str, ...], Projection], tuple[str, Projection] | None]:
        """Take over the model's linear modules; the head by itself."""
        modules, keep = dict(self._model.named_modules()), tied_weights(self._model)
        projections = {}
        share = self._share
        for group in found.groups:
            for names in [group] if share is None else share.divide(group):
                exchange = None if share is None else share.exchange(names)
                projections[names] = Projection([modules[name] for name in names], keep, exchange)
        if found.head is None:
            return projections, None
        exchange = None if share is None else share.exchange([found.head])
        return projections, (found.head, Projection([modules[found.head]], keep, exchange))

    def _make_executor(
        self,
        projections: dict[tuple[str, ...], Projection],
        changes: ModuleChanges,
        costs: Costs | None,
        tuner: Tuner | None,
    ) -> LocalExecutor:
        parts = self._model, self._attention, list(projections.values())
        blocks, size = self.cache_shape
        device = self._base.device
        if not self._kernels:
            lora = LoRALayers(projections, self.limits.max_loras, costs or Costs())
            return HostExecutor(*parts, lora, device, changes=changes, block_size=size)
        # Not before they are wanted: a machine without a GPU need not have Triton.
        from worker.engine.graphs import CudaCapture  # noqa: PLC0415
        from worker.engine.kernel_executor import KernelExecutor  # noqa: PLC0415
        from worker.engine.lora_kernels import KernelLoRALayers  # noqa: PLC0415

        return KernelExecutor(
            *parts,
            KernelLoRALayers(projections, device, self.limits, self._base.dtype, tuner),
            device,
            changes=changes,
            num_blocks=blocks,
            block_size=size,
            max_blocks=-(-self._base.max_model_len // size),
            max_num_seqs=self.limits.max_num_seqs,
            # Collectives in a captured graph have not been tried.
            capture=CudaCapture(device) if device.type == "cuda" and self._share is None else None,
        )

    def _check_windows(self) -> None:
        """Refuse a model whose windows it keeps to itself: a short example cannot show them."""
        config = self._base.model.config.get_text_config()
        told = all(shape.window is not None for shape in self._attention.shapes.values())
        for name in _WINDOWS:
            window = getattr(config, name, None)
            by_layer = getattr(config, "layer_types", None) is not None
            if isinstance(window, int) and window < self._base.max_model_len and not told and not by_layer:
                raise ModelError(
                    f"{type(self._model).__name__} has {name} {window} and does not tell its attention: "
                    f"lower max_model_len, {self._base.max_model_len}, to that"
                )
        for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
            if (kind == "sliding_attention") and self._attention.shapes[layer].window is None:
                raise ModelError(f"layer {layer} has sliding attention, and does not tell its window")


def _packed(row: ScheduledRow, places: dict[int, int]) -> PackedRow:
    sequence = row.sequence
    tokens = sequence.tokens[row.start : row.start + row.num_tokens]
    source = None
    if len(tokens) < row.num_tokens:  # the newest is not known here yet
        assert row.num_tokens == 1
        tokens, source = [0], places[id(sequence)]
    return PackedRow(sequence.blocks, row.start, tokens, row.keep, sequence.slot, source)
