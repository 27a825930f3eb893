"""The part with torch in it: a base model with an engine on it, built from settings."""

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import transformers

from worker.delivery.flow import FlowControl
from worker.engine.adapters.adapter import Target
from worker.engine.adapters.loader import AdapterLoader
from worker.engine.adapters.tokenizers import AdapterTokenizers
from worker.engine.base_model import BaseModel, degree_of, resolve_device
from worker.engine.engine import Engine
from worker.engine.kernels.tilings import Tuner
from worker.engine.lora_layers import measure_costs
from worker.engine.lora_store import LoRAStore
from worker.engine.merging import LoRAMode
from worker.engine.model_runner import ModelRunner
from worker.engine.parallel.start import start
from worker.engine.proof import expect
from worker.engine.setup import Setup, limits_of, load_model
from worker.settings import Settings

logger = logging.getLogger(__name__)

_CACHES_AHEAD = 4
"""How often the tokens at work may fill the KV cache; few rows generate as much as they may."""


class Core(NamedTuple):
    """The part with torch in it."""

    base: BaseModel
    engine: Engine
    store: LoRAStore
    tokenizers: AdapterTokenizers
    targets: Mapping[str, Target]
    """What adapters may name."""
    cache_tokens: int
    """That the KV cache has room for."""
    close: Callable[[], None] = lambda: None
    """Ends what runs beside this process; when nothing is computed any more."""


def build_core(settings: Settings, weights: str) -> Core:
    """Load the base model from folder (or hub id) `weights` and put an engine on it. Blocking; minutes."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # logs are lines
    device = resolve_device(settings.device)
    on_gpu = device.type == "cuda"
    setup = _setup(settings, weights, degree_of(settings.tensor_parallel_degree, device))
    tuner = _tuner(settings, device) if setup.adapters and on_gpu else None
    measure = measure_costs if setup.adapters and not on_gpu else None
    if setup.degree > 1:
        base, runner = start(setup, tuner=tuner, measure=measure)
    else:
        base = load_model(setup, device)
        limits = limits_of(setup, base)
        costs = None if measure is None else measure(limits.lora_dtype)
        expected = expect(base, adapters=setup.adapters)
        share = setup.memory_share
        runner = ModelRunner(base, limits, memory_share=share, costs=costs, tuner=tuner, expected=expected)
    tokenizers = AdapterTokenizers(base.tokenizer)
    store = LoRAStore(
        AdapterLoader(
            runner.targets,
            max_lora_rank=settings.max_lora_rank,
            dtype=runner.limits.lora_dtype,
            pin=on_gpu,
            rope=base.rope,
            lora_extra_vocab_size=settings.lora_extra_vocab_size,
            least_tokens=base.tokenizer.num_tokens,
            base_dtype=base.dtype,
            base_rows=runner.base_rows,
            tokenizers=tokenizers.read,
            is_shared=runner.is_shared,
        ),
        settings.cpu_loras,
        settings.max_cpu_lora_bytes,
    )
    engine = Engine(
        runner,
        base,
        store.weights,
        prefix_reuse=settings.prefix_reuse,
        max_passed_over=settings.max_passed_over,
        look_ahead=on_gpu,
    )
    logger.info(
        "model loaded",
        extra={
            "device": str(device),
            "dtype": str(base.dtype),
            "max_model_len": base.max_model_len,
            "cache_bytes": runner.cache_bytes,
        },
    )
    shape = runner.cache_shape
    tokens = shape.num_blocks * shape.block_size
    return Core(base, engine, store, tokenizers, runner.targets, tokens, runner.close)


def _setup(settings: Settings, weights: str, degree: int) -> Setup:
    return Setup(
        weights=weights,
        degree=degree,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        trust_remote_code=settings.trust_remote_code,
        fully_sharded=settings.fully_sharded_loras,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        adapters=settings.lora_enabled,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        lora_dtype=settings.lora_dtype,
        lora_mode=LoRAMode(settings.lora_mode),
        lora_extra_vocab_size=settings.lora_extra_vocab_size,
        memory_share=settings.memory_share,
        rope_factors=settings.rope_factors,
    )


def _tuner(settings: Settings, device: torch.device) -> Tuner:
    from worker.engine.kernels.tuning import CudaTimer, TimingTuner, device_file  # noqa: PLC0415 (needs Triton)

    file = device_file(settings.cache_path, device)
    return TimingTuner(CudaTimer(), settings.kernel_tuning_seconds, file)


def flow_of(settings: Settings, core: Core) -> FlowControl:
    """How much of the rows an engine may have at work."""
    return FlowControl(
        max_rows=settings.in_flight_rows,
        max_tokens=settings.max_in_flight_tokens or core.cache_tokens * _CACHES_AHEAD,
        max_bytes=settings.max_in_flight_bytes,
    )
