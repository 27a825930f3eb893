"""A batch -> tensors -> logits -> tokens."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from worker.engine.adapter import LoRAWeights, Target
from worker.engine.attention import PackedAttention
from worker.engine.base_model import BaseModel, free_memory
from worker.engine.discovery import Discovery, discover, foresee
from worker.engine.executor import Executor, HostExecutor, PackedRow
from worker.engine.fingerprints import fingerprints
from worker.engine.kernels.tilings import Tuner
from worker.engine.kv_cache import BlockCopy, Leftover
from worker.engine.limits import EngineLimits
from worker.engine.lora_layers import LoRALayers
from worker.engine.lora_plan import Costs
from worker.engine.merging import LoRAMode, Merging
from worker.engine.module_changes import ModuleChanges
from worker.engine.pages import give_back_freed
from worker.engine.parallel.share import Share
from worker.engine.projections import Projection, tied_weights
from worker.engine.rope import RopeScaling, check_scalable, scaled
from worker.engine.sampler import Group, Sample, Sampled, choose_in_groups, collect, fetch, prepare
from worker.engine.scheduler import Batch, ScheduledRow
from worker.engine.scores import Scores
from worker.engine.sequence import Scored, Sequence
from worker.engine.transfer import to_device
from worker.errors import EngineFailed, ModelError
from worker.jobs import AdapterKey

logger = logging.getLogger(__name__)

_PAGED_BLOCK_SIZE = 32
_MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.85}
"""Of the free memory: a GPU is ours alone, a host is not, and holds adapters as well."""
_WINDOWS = ("sliding_window", "keep_window_size", "attention_window_size", "window_size")
"""Names under which configurations keep the length of a local attention."""
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Relative difference of logits, packed against plain, that rounding explains."""


class CacheShape(NamedTuple):
    num_blocks: int
    block_size: int


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
    ) -> None:
        """`memory_share` is the part of the memory left by the weights that the KV cache may take.

        None stands for 0.4 on a CPU and 0.85 on a GPU. `cache_shape` overrides what would be chosen, `costs`
        what LoRA goes by on a CPU. `kernels` is whether the project's own kernels run, which on a GPU they
        do, and `tuner` fits those of LoRA to the device. With a `share` the model, which is on the host, is
        cut down to it; all ranks construct theirs at the same time, and alike, rank 0 from the whole.
        """
        self._base = base
        self._model = base.model
        self._limits = limits
        self._share = share
        if share is not None and limits.lora_mode is not LoRAMode.UNMERGED:
            raise ModelError(f"lora_mode is {limits.lora_mode}, and a model that is shared cannot be merged")
        self._kernels = base.device.type == "cuda" if kernels is None else kernels
        self._attention = PackedAttention()
        self._merging = Merging(limits.lora_mode)
        self.timings = Timings(0.0, 0.0, 0.0)
        embeddings: Any = base.model.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]
        """Token ids from this on are unknown to the model."""
        self._probe = _Probe(self.vocab_size, min(12, base.max_model_len))
        try:
            expected = self._expect()
            if share is not None:
                share.take(self._model)
                self._model.to(base.device)  # type: ignore[arg-type]
            self._build(expected, cache_shape, memory_share, costs, tuner)
        except (ModelError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as exc:  # whatever a model's own code makes of the example
            name = type(base.model).__name__
            raise ModelError(f"{name} cannot be served: a short example ended with {exc!r}") from exc

    @torch.inference_mode()
    def _expect(self) -> "_Expected":
        """What only the whole model tells; a rank that has not got it leaves it to rank 0."""
        share, rope = self._share, self._limits.rope
        if rope.factors:
            check_scalable(self._base.model.config.get_text_config(), type(self._model).__name__)
        self.base_rows: dict[str, torch.Tensor] = {}
        """Of the weights that have a row for each token, by module; see `fingerprints`."""
        if share is not None and share.rank.number:
            return _Expected(None, dict.fromkeys(rope.factors))
        device = self._base.device if share is None else torch.device("cpu")
        expected = self._probe.expected(self._model, device)
        self.num_logits: int = expected.shape[-1]
        """Token ids from this on are never generated."""
        self.base_rows = self._fingerprints()
        return _Expected(expected, self._expect_scaled(rope, device))

    @torch.inference_mode()
    def _build(
        self,
        expected: "_Expected",
        cache_shape: CacheShape | None,
        memory_share: float | None,
        costs: Costs | None,
        tuner: Tuner | None,
    ) -> None:
        model, device = self._model, self._base.device
        model.set_attn_implementation(self._attention.name)
        found = self._discover(self._probe)
        self.targets: dict[str, Target] = self._checked(found)
        """Modules that adapters may name."""
        projections, head = self._project(found)
        self._projections = projections
        changes = ModuleChanges(model, projections, head, self.targets, found.axes)
        give_back_freed()
        self.cache_shape = cache_shape or self._choose_cache_shape(self._limits.max_num_seqs, memory_share)
        blocks, size = self.cache_shape
        self._attention.allocate(blocks + self._kernels, size, device)
        self._executor = self._make_executor(projections, changes, costs, tuner)
        if self._limits.rope.factors:
            self._executor.rope_factors = {}  # before the first step: what graphs are given depends on it
        self._verify(self._probe, expected.plain)
        for factor, own in expected.scaled.items():
            self._executor.rope_factors = {None: factor}
            self._verify(self._probe, own)
            self._executor.rope_factors = {}

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
        if slot == self._executor.merged_slot:
            self._executor.merged_slot = None
        self._executor.put(slot, weights)
        if weights.key == self._merging.merged:
            self._executor.merged_slot = slot

    @property
    def lora_extra_vocab_size(self) -> int:
        """Tokens that an adapter may bring at most."""
        return self._limits.lora_extra_vocab_size

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
        return slot == self._executor.merged_slot

    def _merge(self, slot: int | None, weights: LoRAWeights) -> None:
        executor, started = self._executor, time.perf_counter()
        executor.merged_slot = None
        executor.merges += 1
        try:
            for names, projection in self._projections.items():
                projection.merge([weights.pairs.get(name) for name in names])
        except (RuntimeError, MemoryError):
            for projection in self._projections.values():
                projection.merge([])
            logger.warning("merging failed", exc_info=True)
            self._merging.failed(weights.key)
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
        return self._executor.changes.width(sequence.slot) or self.num_logits

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

    def _expect_scaled(self, rope: RopeScaling, device: torch.device) -> dict[float, torch.Tensor | None]:
        """The example's logits by each factor that positions may be scaled with."""
        found: dict[float, torch.Tensor | None] = {}
        for factor in rope.factors:
            with scaled(self._model, factor):
                found[factor] = self._probe.expected(self._model, device)
        return found

    def _discover(self, probe: "_Probe") -> Discovery:
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

    def _checked(self, found: Discovery) -> dict[str, Target]:
        """The targets as the whole model has them, without a head whose output is not yet the logits."""
        share, head = self._share, found.head
        targets = dict(found.targets if share is None else share.whole(found.targets))
        knows = share is None or not share.rank.number
        if head is not None and knows and targets[head].out_features != self.num_logits:
            cut = f"it writes {targets[head].out_features} logits, the model {self.num_logits}"
            targets[head] = targets[head]._replace(refused=cut, fixed=cut)
        return targets

    def _fingerprints(self) -> dict[str, torch.Tensor]:
        """Only while the weights are there, whole: a packed one cannot be looked at again."""
        if not self._limits.max_loras:
            return {}
        names = [name for name, target in foresee(self._model).items() if target.has_tokens]
        weights = {name: self._model.get_parameter(f"{name}.weight") for name in names}
        known = {weight.data_ptr(): weight for weight in weights.values()}  # what is tied is looked at once
        found = {pointer: fingerprints(weight) for pointer, weight in known.items()}
        return {name: found[weight.data_ptr()] for name, weight in weights.items()}

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
    ) -> Executor:
        parts = self._model, self._attention, list(projections.values())
        blocks, size = self.cache_shape
        device = self._base.device
        if not self._kernels:
            lora = LoRALayers(projections, self._limits.max_loras, costs or Costs())
            return HostExecutor(*parts, lora, device, changes=changes, block_size=size)
        # Not before they are wanted: a machine without a GPU need not have Triton.
        from worker.engine.graphs import CudaCapture  # noqa: PLC0415
        from worker.engine.kernel_executor import KernelExecutor  # noqa: PLC0415
        from worker.engine.lora_kernels import KernelLoRALayers  # noqa: PLC0415

        return KernelExecutor(
            *parts,
            KernelLoRALayers(projections, device, self._limits, self._base.dtype, tuner),
            device,
            changes=changes,
            num_blocks=blocks,
            block_size=size,
            max_blocks=-(-self._base.max_model_len // size),
            max_num_seqs=self._limits.max_num_seqs,
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

    def _choose_cache_shape(self, max_num_seqs: int, memory_share: float | None) -> CacheShape:
        """One block a sequence where all of them fit at full length, else small blocks in what there is."""
        length, device = self._base.max_model_len, self._base.device
        share = _MEMORY_SHARE[device.type] if memory_share is None else memory_share
        if self._share is not None:
            group = self._share.group
            # The ranks of a host share its memory; all that each lets go of has been let go of by all.
            group.least(0)
            budget = int(free_memory(device) * share)
            budget = group.least(budget // (group.rank.degree if device.type == "cpu" else 1))
        else:
            budget = int(free_memory(device) * share)
        tokens = budget // self._attention.bytes_per_token
        if tokens >= max_num_seqs * length and device.type == "cpu":
            return CacheShape(max_num_seqs, length)
        for_one = -(-length // _PAGED_BLOCK_SIZE)
        blocks = min(tokens // _PAGED_BLOCK_SIZE, max_num_seqs * for_one)
        if blocks < for_one:
            needed = length * self._attention.bytes_per_token
            raise ModelError(
                f"one sequence of max_model_len {length} needs {needed >> 20} MiB of cache, and memory_share "
                f"{share:g} of what is free on {device} is {budget >> 20} MiB: lower max_model_len or raise "
                "memory_share"
            )
        return CacheShape(blocks, _PAGED_BLOCK_SIZE)

    def _verify(self, probe: "_Probe", expected: torch.Tensor | None) -> None:
        """Put each row through in chunks, then token by token; all logits must be the model's own.

        Without them this is a rank that takes its part, and leaves it to rank 0 to judge.
        """
        size = self.cache_shape.block_size
        blocks = list(range(-(-probe.length // size)))
        worst = 0.0
        for row in range(len(probe.prompts)):
            got = []
            for offset, tokens in probe.steps(row):
                logits = self._executor.run([PackedRow(blocks, offset, tokens, len(tokens))])
                got.append(logits.clone())  # the next run may overwrite them
            if expected is not None:
                own = expected[row]
                worst = max(worst, float((torch.cat(got).float().to(own.device) - own).norm() / own.norm()))
            for block in blocks:
                self._attention.scrub(block, 0, min(size, probe.length))
        limit = _TOLERANCE[self._base.dtype]
        if not worst <= limit:
            raise ModelError(
                f"{type(self._model).__name__} cannot be served: packed logits differ from its own by "
                f"{worst:.2g} of their size, the limit is {limit:.2g} for {self._base.dtype}"
            )


class _Expected(NamedTuple):
    """The example's logits from the plain model; None on a rank that does not judge its own."""

    plain: torch.Tensor | None
    scaled: dict[float, torch.Tensor | None]
    """By each factor that positions may be scaled with."""


class _Probe:
    """Two short rows of tokens whose logits are known from the plain model."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.length = length
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(vocab_size, (2, length), generator=generator).tolist()

    def expected(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """[2, length, vocabulary] float32."""
        logits: torch.Tensor = model(
            input_ids=torch.tensor(self.prompts, device=device), use_cache=False
        ).logits
        return logits.float()

    def steps(self, row: int) -> Iterator[tuple[int, list[int]]]:
        """Offset and tokens of each pass: a prefill, a chunk, then one by one."""
        first, second = self.length // 3, 2 * self.length // 3
        for start, stop in itertools.pairwise(sorted({0, first, *range(second, self.length + 1)})):
            yield start, self.prompts[row][start:stop]


def _packed(row: ScheduledRow, places: dict[int, int]) -> PackedRow:
    sequence = row.sequence
    tokens = sequence.tokens[row.start : row.start + row.num_tokens]
    source = None
    if len(tokens) < row.num_tokens:  # the newest is not known here yet
        assert row.num_tokens == 1
        tokens, source = [0], places[id(sequence)]
    return PackedRow(sequence.blocks, row.start, tokens, row.keep, sequence.slot, source)
