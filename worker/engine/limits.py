"""What an engine is made for."""

from typing import NamedTuple

import torch

from worker.engine.merging import LoRAMode


class EngineLimits(NamedTuple):
    """Sizes that the parts of an engine are built for; the names are those of the settings."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_loras: int
    max_lora_rank: int
    lora_dtype: torch.dtype
    lora_mode: LoRAMode = LoRAMode.UNMERGED
    lora_extra_vocab_size: int = 256
