"""How large the KV cache is, and how it is cut into blocks."""

from typing import NamedTuple

from worker.engine.base_model import BaseModel, free_memory
from worker.engine.parallel.group import Group
from worker.errors import ModelError

_PAGED_BLOCK_SIZE = 32
_MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.85}
"""Of the free memory: a GPU is ours alone, a host is not, and holds adapters as well."""


class CacheShape(NamedTuple):
    num_blocks: int
    block_size: int


def choose_cache_shape(
    base: BaseModel,
    max_num_seqs: int,
    bytes_per_token: int,
    memory_share: float | None = None,
    group: Group | None = None,
) -> CacheShape:
    """One block a sequence where all of them fit at full length, else small blocks in what there is.

    `memory_share` is the part of the free memory to take; None stands for 0.4 on a CPU and 0.85 on a GPU. The
    ranks of a `group` choose alike, at the same time. Raises ModelError if not even one sequence fits.
    """
    length, device = base.max_model_len, base.device
    share = _MEMORY_SHARE[device.type] if memory_share is None else memory_share
    if group is not None:
        group.least(0)  # what each lets go of has been let go of by all
    budget = int(free_memory(device) * share)
    if group is not None:  # the ranks of a host share its memory
        budget = group.least(budget // (group.rank.degree if device.type == "cpu" else 1))
    tokens = budget // bytes_per_token
    if tokens >= max_num_seqs * length and device.type == "cpu":
        return CacheShape(max_num_seqs, length)
    for_one = -(-length // _PAGED_BLOCK_SIZE)
    blocks = min(tokens // _PAGED_BLOCK_SIZE, max_num_seqs * for_one)
    if blocks < for_one:
        raise ModelError(
            f"one sequence of max_model_len {length} needs {length * bytes_per_token >> 20} MiB of cache, "
            f"and memory_share {share:g} of what is free on {device} is {budget >> 20} MiB: lower "
            "max_model_len or raise memory_share"
        )
    return CacheShape(blocks, _PAGED_BLOCK_SIZE)
