"""What an engine is built from, in words, whether one process builds it or several."""

import msgspec
import torch

from worker.engine.base_model import BaseModel, load_base_model
from worker.engine.limits import EngineLimits
from worker.engine.merging import LoRAMode
from worker.engine.products import product_dtype


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a process builds its part of an engine from; most names are those of the settings."""

    weights: str
    """A folder, or a hub id."""
    degree: int = 1
    """Processes that share the model."""
    device: str
    """Of rank 0; rank r of several GPUs has the r-th."""
    dtype: str
    max_model_len: int | None
    trust_remote_code: bool
    fully_sharded: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    adapters: bool
    """Whether there may be any."""
    max_loras: int
    max_lora_rank: int
    lora_dtype: str
    """`auto` is what the device multiplies the model's own type in."""
    lora_mode: LoRAMode = LoRAMode.UNMERGED
    lora_extra_vocab_size: int = 0
    rope_factors: tuple[float, ...] = ()
    memory_share: float | None = None
    cache_shape: tuple[int, int] | None = None
    kernels: bool | None = None
    step_seconds: float = 120.0
    """How long a rank may wait for another that is no further."""
    settle_seconds: float = 10.0
    """How long one that failed in a step waits for the others to do so, too."""
    load_seconds: float = 3600.0
    """How long rank 0 waits for each of the others to load the model."""


def load_model(setup: Setup, device: torch.device) -> BaseModel:
    """The model, whole; if it is to be shared on the host. Raises ModelError."""
    return load_base_model(
        setup.weights,
        device=device,
        dtype=setup.dtype,
        max_model_len=setup.max_model_len,
        trust_remote_code=setup.trust_remote_code,
        degree=setup.degree,
        rope_factors=setup.rope_factors,
    )


def limits_of(setup: Setup, base: BaseModel) -> EngineLimits:
    """What the engine on `base` is made for."""
    of_device = product_dtype(base.dtype, base.device)
    return EngineLimits(
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_loras=setup.max_loras,
        max_lora_rank=setup.max_lora_rank,
        lora_dtype=of_device if setup.lora_dtype == "auto" else getattr(torch, setup.lora_dtype),
        lora_mode=setup.lora_mode,
        # Tokens of an adapter's own would need modules of its own, which ranks do not share.
        lora_extra_vocab_size=setup.lora_extra_vocab_size if setup.degree == 1 else 0,
    )
