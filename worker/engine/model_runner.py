"""A batch -> tensors -> logits -> tokens."""

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from worker.engine.adapter import LoRAWeights, Target
from worker.engine.attention import AttentionPlan, PackedAttention
from worker.engine.base_model import BaseModel
from worker.engine.lora_layers import LoRALayers, LoRAPlan, find_targets
from worker.engine.lora_ops import Run
from worker.engine.sampler import Sample, sample
from worker.engine.scheduler import Batch, ScheduledRow
from worker.errors import ModelError

logger = logging.getLogger(__name__)

_PAGED_BLOCK_SIZE = 32
_CPU_MEMORY_SHARE = 0.4
_CUDA_MEMORY_SHARE = 0.85
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


class ModelRunner:
    """Owns the base model's forward pass: its attention, its cache, its LoRA banks. One thread only.

    Construction finds the cache's shape, proves on a small example that the packed way computes what
    the model computes by itself, and raises ModelError if it does not.
    """

    def __init__(self, base: BaseModel, *, max_num_seqs: int, cache_shape: CacheShape | None = None) -> None:
        self._base = base
        self._model = base.model
        self._attention = PackedAttention()
        self._lora = LoRALayers(base.model, base.device)
        self.timings = Timings(0.0, 0.0, 0.0)
        self.targets: dict[str, Target] = {}
        """Modules that adapters may name."""
        embeddings: Any = base.model.get_input_embeddings()
        self.vocab_size: int = embeddings.weight.shape[0]
        """Token ids from this on are unknown to the model."""
        probe = self._probe = _Probe(self.vocab_size, min(12, base.max_model_len))
        with torch.inference_mode():
            expected = probe.expected(base.model, base.device)
            base.model.set_attn_implementation(self._attention.name)
            self._discover(probe)
            self.cache_shape = cache_shape or self._choose_cache_shape(max_num_seqs)
            self._attention.allocate(*self.cache_shape, base.device)
            self._verify(probe, expected)

    @property
    def cache_bytes(self) -> int:
        blocks, size = self.cache_shape
        return blocks * size * self._attention.bytes_per_token

    def put_adapter(self, slot: int, weights: LoRAWeights) -> None:
        self._lora.put(slot, weights)

    @torch.inference_mode()
    def is_sound(self) -> bool:
        """Whether a batch that is known to be good can still be computed. Leaves the cache alone."""
        try:
            with self._step(self._uncached_plan(self._probe), None):
                return bool(torch.isfinite(self._forward(*self._probe.packed())).all())
        except Exception:  # what it cannot do is what was asked
            logger.exception("a batch that is known to be good failed")
            return False

    @torch.inference_mode()
    def scrub(self, blocks: list[int], num_tokens: int) -> None:
        """Forget the first `num_tokens` tokens in `blocks`, whose keys and values may not be finite."""
        self._attention.scrub(blocks, num_tokens)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sample]:
        """Put `batch` through the model; a sample for each row that reaches its end, in the batch's order.

        The sequences must hold their blocks and slots. The cache then holds the batch's tokens; nothing
        else is changed, and a run that raised may be run again.
        """
        started = time.perf_counter()
        # Prefill before decode is what attention wants; within each, rows of one slot side by side
        # make few runs for LoRA.
        rows = sorted(batch.rows, key=lambda row: (row.num_tokens == 1, _slot(row), row.sequence.blocks[0]))
        plan = self._attention_plan(rows)
        lora = _lora_plan(rows)
        ends = [end for row, end in zip(rows, _ends(rows), strict=True) if row.samples]
        tokens = [token for row in rows for token in _tokens(row)]
        positions = [position for row in rows for position in _positions(row)]
        prepared = time.perf_counter()
        with self._step(plan, lora):
            logits = self._forward(tokens, positions, ends)
        forwarded = time.perf_counter()
        sampling = [row.sequence for row in rows if row.samples]
        samples = dict(zip(map(id, sampling), sample(logits, sampling) if sampling else (), strict=True))
        done = time.perf_counter()
        self.timings = Timings(prepared - started, forwarded - prepared, done - forwarded)
        return [samples[id(row.sequence)] for row in batch.rows if row.samples]

    @contextmanager
    def _step(self, plan: AttentionPlan, lora: LoRAPlan | None) -> Iterator[None]:
        """Give attention and LoRA their plans, and take them back whatever happens."""
        self._attention.plan, self._lora.plan = plan, lora
        try:
            yield
        finally:
            self._attention.plan = self._lora.plan = None

    def _forward(self, tokens: list[int], positions: list[int], ends: list[int]) -> torch.Tensor:
        device = self._base.device
        output = self._model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(ends, dtype=torch.long, device=device),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _attention_plan(self, rows: list[ScheduledRow]) -> AttentionPlan:
        return AttentionPlan(
            [(row.sequence.blocks, row.sequence.computed, row.num_tokens) for row in rows],
            block_size=self.cache_shape.block_size,
            device=self._base.device,
        )

    def _discover(self, probe: "_Probe") -> None:
        """Run the example once without a cache: which layers attend how, which modules see its tokens."""
        seen: dict[str, int] = {}

        def note(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
                if args and isinstance(args[0], torch.Tensor) and args[0].ndim > 1:
                    seen[name] = args[0].shape[:-1].numel()

            return hook

        handles = [module.register_forward_hook(note(name)) for name, module in self._model.named_modules()]
        plan = self._uncached_plan(probe)
        try:
            with self._step(plan, None):
                self._forward(*probe.packed())
        finally:
            for handle in handles:
                handle.remove()
        layers = self._base.model.config.get_text_config().num_hidden_layers
        if sorted(self._attention.shapes) != list(range(layers)):
            raise ModelError(
                f"{type(self._model).__name__} has {layers} layers, of which {len(self._attention.shapes)} "
                "attend through transformers' attention interface"
            )
        self._check_windows()
        self.targets = find_targets(self._model, seen, plan.num_tokens)

    def _uncached_plan(self, probe: "_Probe") -> AttentionPlan:
        rows = [([row], 0, probe.length) for row in range(len(probe.prompts))]
        return AttentionPlan(rows, block_size=probe.length, device=self._base.device, cached=False)

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

    def _choose_cache_shape(self, max_num_seqs: int) -> CacheShape:
        """One block a sequence where all of them fit at full length, else small blocks in what there is."""
        length, device = self._base.max_model_len, self._base.device
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] * _CUDA_MEMORY_SHARE
        else:
            budget = psutil.virtual_memory().available * _CPU_MEMORY_SHARE
        tokens = int(budget / self._attention.bytes_per_token)
        if tokens >= max_num_seqs * length and device.type == "cpu":
            return CacheShape(max_num_seqs, length)
        for_one = -(-length // _PAGED_BLOCK_SIZE)
        blocks = min(tokens // _PAGED_BLOCK_SIZE, max_num_seqs * for_one)
        if blocks < for_one:
            needed = length * self._attention.bytes_per_token
            raise ModelError(
                f"one sequence of max_model_len {length} needs {needed >> 20} MiB of cache, "
                f"{int(budget) >> 20} MiB are left on {device}: lower max_model_len"
            )
        return CacheShape(blocks, _PAGED_BLOCK_SIZE)

    def _verify(self, probe: "_Probe", expected: torch.Tensor) -> None:
        """Put each row through in chunks, then token by token; all logits must be the model's own."""
        size = self.cache_shape.block_size
        blocks = list(range(-(-probe.length // size)))
        worst = 0.0
        for row, own in enumerate(expected):
            got = []
            for offset, tokens in probe.steps(row):
                held = [(blocks, offset, len(tokens))]
                with self._step(AttentionPlan(held, block_size=size, device=self._base.device), None):
                    positions = list(range(offset, offset + len(tokens)))
                    got.append(self._forward(tokens, positions, list(range(len(tokens)))))
            worst = max(worst, float((torch.cat(got).float() - own).norm() / own.norm()))
            self._attention.scrub(blocks, probe.length)
        limit = _TOLERANCE[self._base.dtype]
        if not worst <= limit:
            raise ModelError(
                f"{type(self._model).__name__} cannot be served: packed logits differ from its own by "
                f"{worst:.2g} of their size, the limit is {limit:.2g} for {self._base.dtype}"
            )


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

    def packed(self) -> tuple[list[int], list[int], list[int]]:
        tokens = [token for row in self.prompts for token in row]
        return tokens, [*range(self.length)] * len(self.prompts), [0]

    def steps(self, row: int) -> Iterator[tuple[int, list[int]]]:
        """Offset and tokens of each pass: a prefill, a chunk, then one by one."""
        first, second = self.length // 3, 2 * self.length // 3
        for start, stop in itertools.pairwise(sorted({0, first, *range(second, self.length + 1)})):
            yield start, self.prompts[row][start:stop]


def _slot(row: ScheduledRow) -> int:
    return -1 if row.sequence.slot is None else row.sequence.slot


def _tokens(row: ScheduledRow) -> list[int]:
    return row.sequence.tokens[row.sequence.computed : row.sequence.computed + row.num_tokens]


def _positions(row: ScheduledRow) -> range:
    return range(row.sequence.computed, row.sequence.computed + row.num_tokens)


def _ends(rows: list[ScheduledRow]) -> Iterator[int]:
    """Index of each row's last token in the packed batch."""
    end = -1
    for row in rows:
        end += row.num_tokens
        yield end


def _lora_plan(rows: list[ScheduledRow]) -> LoRAPlan | None:
    runs: list[Run] = []
    start = 0
    for row in rows:
        slot, stop = row.sequence.slot, start + row.num_tokens
        if slot is not None:
            if runs and runs[-1][0] == slot and runs[-1][2] == start:
                runs[-1] = (slot, runs[-1][1], stop)
            else:
                runs.append((slot, start, stop))
        start = stop
    return LoRAPlan(runs, start) if runs else None
