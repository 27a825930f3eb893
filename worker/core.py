"""The part with torch in it: a base model with an engine on it, built from settings."""

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import transformers

from worker.delivery.flow import FlowControl
from worker.engine.adapter import Target
from worker.engine.adapter_loader import AdapterLoader
from worker.engine.adapter_tokenizers import AdapterTokenizers
from worker.engine.base_model import BaseModel, degree_of, load_base_model, resolve_device
from worker.engine.engine import Engine
from worker.engine.kernels.tilings import Tuner
from worker.engine.limits import EngineLimits
from worker.engine.lora_layers import measure_costs
from worker.engine.lora_store import LoRAStore
from worker.engine.merging import LoRAMode
from worker.engine.model_runner import ModelRunner
from worker.engine.products import product_dtype
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
    degree = degree_of(settings.tensor_parallel_degree, device)
    if degree == 1:
        base, runner = _build_alone(settings, weights, device)
    else:
        base, runner = _build_with_others(settings, weights, device, degree)
    tokenizers = AdapterTokenizers(base.tokenizer)
    store = LoRAStore(
        AdapterLoader(
            runner.targets,
            max_lora_rank=settings.max_lora_rank,
            dtype=_lora_dtype(settings, base),
            pin=device.type == "cuda",
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
        base.tokenizer,
        store.weights,
        eos_token_ids=base.eos_token_ids,
        max_model_len=base.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_loras=settings.max_loras,
        prefix_reuse=settings.prefix_reuse,
        max_passed_over=settings.max_passed_over,
        look_ahead=device.type == "cuda",
        rope=base.rope,
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


def _build_alone(settings: Settings, weights: str, device: torch.device) -> tuple[BaseModel, ModelRunner]:
    base = load_base_model(
        weights,
        device=device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        trust_remote_code=settings.trust_remote_code,
        rope_factors=settings.rope_factors,
    )
    dtype = _lora_dtype(settings, base)
    limits = EngineLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        lora_dtype=dtype,
        rope=base.rope,
        lora_mode=LoRAMode(settings.lora_mode),
        lora_extra_vocab_size=settings.lora_extra_vocab_size,
    )
    costs = measure_costs(dtype) if settings.lora_enabled and device.type == "cpu" else None
    tuner = _tuner(settings, device) if settings.lora_enabled and device.type == "cuda" else None
    runner = ModelRunner(base, limits, memory_share=settings.memory_share, costs=costs, tuner=tuner)
    return base, runner


def _build_with_others(
    settings: Settings, weights: str, device: torch.device, degree: int
) -> tuple[BaseModel, ModelRunner]:
    """On several devices, each of which has a process."""
    from worker.engine.parallel.orders import Setup  # noqa: PLC0415 (few need torch.distributed)
    from worker.engine.parallel.start import start  # noqa: PLC0415

    assert LoRAMode(settings.lora_mode) is LoRAMode.UNMERGED, "settings are checked"
    setup = Setup(
        weights=weights,
        degree=degree,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        trust_remote_code=settings.trust_remote_code,
        fully_sharded=settings.fully_sharded_loras,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        lora_dtype=settings.lora_dtype,
        memory_share=settings.memory_share,
        rope_factors=settings.rope_factors,
    )
    on_gpu = device.type == "cuda"
    return start(
        setup,
        tuner=_tuner(settings, device) if settings.lora_enabled and on_gpu else None,
        measure=measure_costs if settings.lora_enabled and not on_gpu else None,
    )


def _lora_dtype(settings: Settings, base: BaseModel) -> torch.dtype:
    if settings.lora_dtype == "auto":
        return product_dtype(base.dtype, base.device)
    dtype: torch.dtype = getattr(torch, settings.lora_dtype)
    return dtype


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
