"""What every rank builds, rank 0 like the others: its share of a model, and an engine's runner on it."""

import torch

from worker.engine.base_model import BaseModel, load_base_model, resolve_device
from worker.engine.kernels.tilings import Tuner
from worker.engine.limits import EngineLimits
from worker.engine.model_runner import CacheShape, ModelRunner
from worker.engine.parallel.group import Group
from worker.engine.parallel.orders import Setup
from worker.engine.parallel.share import Share
from worker.errors import ModelError


def device_of(setup: Setup, rank: int) -> torch.device:
    """Where a rank computes. Raises ModelError if there are too few GPUs."""
    device = resolve_device(setup.device)
    if device.type != "cuda":
        return device
    if device.index:
        raise ModelError(
            f"device is {setup.device} and tensor_parallel_degree {setup.degree}: the GPUs are taken from the "
            "first on; say cuda, and CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if setup.degree > count:
        raise ModelError(f"tensor_parallel_degree is {setup.degree}, and {count} CUDA devices were found")
    return torch.device("cuda", rank)


def load_whole(setup: Setup, rank: int) -> BaseModel:
    """The whole model, on the host, for a rank to take its share of. Raises ModelError."""
    return load_base_model(
        setup.weights,
        device=device_of(setup, rank),
        dtype=setup.dtype,
        max_model_len=setup.max_model_len,
        trust_remote_code=setup.trust_remote_code,
        degree=setup.degree,
    )


def build_runner(setup: Setup, base: BaseModel, group: Group, tuner: Tuner | None) -> tuple[ModelRunner, Share]:
    """The runner of a rank, which all build at once. Raises ModelError."""
    share = Share(group, fully_sharded=setup.fully_sharded)
    limits = EngineLimits(
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_loras=setup.max_loras,
        max_lora_rank=setup.max_lora_rank,
        lora_dtype=getattr(torch, setup.lora_dtype),
    )
    runner = ModelRunner(
        base,
        limits,
        cache_shape=None if setup.cache_shape is None else CacheShape(*setup.cache_shape),
        memory_share=setup.memory_share,
        costs=setup.costs,
        tuner=tuner,
        kernels=setup.kernels,
        share=share,
    )
    return runner, share
