"""The ranks that share a model, as tensors go between them."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import distributed

from worker.engine.cuts import Rank
from worker.errors import ModelError


class Group(Protocol):
    """All ranks call the same methods in the same order, with tensors of the same shape and dtype.

    What raises leaves the group of no more use.
    """

    rank: Rank

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous `tensor` by its sum over the ranks, the same on all of them."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the ranks have, [degree, *shape]."""

    def hand_out(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by what rank 0 has."""

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks have; it waits for all of them."""

    def abort(self) -> None:
        """Have whoever waits for a rank that is gone go on, where nothing else does. From any thread."""

    def close(self) -> None:
        """Leave the group."""


class ProcessGroup(Group):
    """The ranks of `torch.distributed`, each a process of this machine: NCCL for GPUs, gloo for CPUs."""

    def __init__(self, rank: Rank, device: torch.device, place: Path, timeout_seconds: float) -> None:
        """Meet the others at the file `place`, which is there for this; wait so long for any of them."""
        self.rank = rank
        self._device = device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        else:
            # By name its own address may be another machine's, or none.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=distributed.FileStore(  # type: ignore[attr-defined]
                str(place), rank.degree
            ),
            rank=rank.number,
            world_size=rank.degree,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if on_gpu else None,
        )

    def sum_(self, tensor: torch.Tensor) -> None:
        """See Group."""
        distributed.all_reduce(tensor)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Group."""
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(self.rank.degree, *tensor.shape)
        distributed.all_gather([*gathered], tensor)
        return gathered

    def hand_out(self, tensor: torch.Tensor) -> None:
        """See Group."""
        distributed.broadcast(tensor, src=0)

    def least(self, number: int) -> int:
        """See Group."""
        tensor = torch.tensor([number], device=self._device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MIN)
        return int(tensor.item())

    def abort(self) -> None:
        """See Group. Gloo finds out by itself, from the connections."""
        world = distributed.group.WORLD
        if self._device.type == "cuda" and world is not None:
            world.abort()

    def close(self) -> None:
        """See Group."""
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _loopback() -> str:
    """The name of the interface that has 127.0.0.1."""
    name: str
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    raise ModelError("tensor parallelism on a CPU needs the address 127.0.0.1, and no interface has it")
