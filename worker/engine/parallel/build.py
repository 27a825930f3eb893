"""What every rank builds, rank 0 like the others: its share of a model, and an engine's runner on it."""

import torch

from worker.engine.base_model import BaseModel, load_outline, resolve_device
from worker.engine.cache_size import CacheShape
from worker.engine.cuts import Rank, plan_cuts
from worker.engine.kernels.tilings import Tuner
from worker.engine.lora_plan import Costs
from worker.engine.model_runner import ModelRunner
from worker.engine.pages import give_back_freed
from worker.engine.parallel.share import Share
from worker.engine.proof import Expected, expect
from worker.engine.setup import Setup, limits_of, load_model
from worker.errors import ModelError


def device_of(name: str, degree: int, rank: int) -> torch.device:
    """Where a rank computes, `name` being the setting. Raises ModelError if there are too few GPUs."""
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index:
        raise ModelError(
            f"device is {name} and tensor_parallel_degree {degree}: the GPUs are taken from the first on; "
            "say cuda, and choose them by CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if degree > count:
        raise ModelError(f"tensor_parallel_degree is {degree}, and {count} CUDA devices were found")
    return torch.device("cuda", rank)


def check_sharing(name: str, degree: int, weights: str | None, *, trust_remote_code: bool) -> None:
    """Raise ModelError if the devices are not there, or the model in folder `weights` cannot be divided."""
    device_of(name, degree, 0)  # which looks for all of them
    if weights is not None:
        plan_cuts(load_outline(weights, trust_remote_code=trust_remote_code), degree)


def load(setup: Setup, rank: Rank) -> tuple[BaseModel, Share, Expected | None]:
    """A rank's share of the model, on its device. Raises ModelError.

    Rank 0 asks the whole first what the shares must compute together; nobody may wait for it meanwhile.
    """
    share = Share(rank, fully_sharded=setup.fully_sharded)
    base = load_model(setup, device_of(setup.device, setup.degree, rank.number))
    expected = None if rank.number else expect(base, adapters=setup.adapters)
    share.take(base.model)
    base.model.to(base.device)  # type: ignore[arg-type]
    give_back_freed()
    return base, share, expected


def build_runner(
    setup: Setup,
    base: BaseModel,
    share: Share,
    *,
    tuner: Tuner | None,
    costs: Costs | None,
    expected: Expected | None = None,
) -> ModelRunner:
    """The runner of a rank that has met the others, which all build at once. Raises ModelError."""
    return ModelRunner(
        base,
        limits_of(setup, base),
        cache_shape=None if setup.cache_shape is None else CacheShape(*setup.cache_shape),
        memory_share=setup.memory_share,
        costs=costs,
        tuner=tuner,
        kernels=setup.kernels,
        share=share,
        expected=expected,
    )
